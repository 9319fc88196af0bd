"""Anchors of pyramid levels.

Level P_l has stride 2^l. As in the published code, anchors are centred on the top-left corner of their cell (offset
0), while query targets use the cell's middle (``ops.points``). Shape letters: h w map, A anchors per cell.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import Array


def cell_anchors(base_size: float, sizes_per_octave: int, ratios: tuple[float, ...]) -> np.ndarray:
    """Return the anchors ``[A, 4]`` around the origin in px, ordered by size, then by ratio.

    Sizes are ``base_size * 2^(i / sizes_per_octave)``; a ratio is h/w at equal area.
    """
    rows = []
    for octave in range(sizes_per_octave):
        size = base_size * 2.0 ** (octave / sizes_per_octave)
        for ratio in ratios:
            width = math.sqrt(size**2 / ratio)
            height = ratio * width
            rows.append((-width / 2.0, -height / 2.0, width / 2.0, height / 2.0))
    return np.asarray(rows, np.float32)


def anchors_at(cells: Array, y: Array, x: Array, stride: int) -> Array:
    """Return the anchors ``[..., A, 4]`` of the cells at rows ``y`` and columns ``x`` ``[...]``."""
    shift = jnp.stack([x, y, x, y], axis=-1).astype(jnp.float32) * stride
    return shift[..., None, :] + jnp.reshape(jnp.asarray(cells), (1,) * shift[..., 0].ndim + cells.shape)


def grid_anchors(cells: Array | np.ndarray, height: int, width: int, stride: int) -> Array:
    """Return all anchors ``[h, w, A, 4]`` of an ``h x w`` level."""
    y, x = jnp.meshgrid(jnp.arange(height, dtype=jnp.int32), jnp.arange(width, dtype=jnp.int32), indexing="ij")
    return anchors_at(jnp.asarray(cells), y, x, stride)


def level_shape(height: int, width: int, level: int) -> tuple[int, int]:
    """Return the size (h, w) of P_level for an input padded to a multiple of 32.

    P2..P5 halve exactly; the strided convolutions of P6 and P7 round up.
    """
    for _ in range(level):
        height, width = -(-height // 2), -(-width // 2)
    return height, width
