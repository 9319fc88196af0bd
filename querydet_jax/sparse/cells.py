"""Where rows of head outputs lie on a feature map, and which of them are keys.

Sites, tiles and whole maps hold their rows in different orders. Selection needs no more than this of any of them.
Shape letters: B batch, h w map, N rows.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array


@partial(jax.tree_util.register_dataclass, data_fields=["index", "is_key"], meta_fields=["shape"])
@dataclasses.dataclass(frozen=True)
class Cells:
    """The cells of ``N`` rows of head outputs, in any order. Outputs are defined at the keys only.

    Attributes:
      index: int32 ``[N]``, flat cell number ``(b * h + y) * w + x``; ``B * h * w`` for rows without a cell.
      is_key: bool ``[N]``.
      shape: ``(B, h, w)``.
    """

    index: Array
    is_key: Array
    shape: tuple[int, int, int]

    @property
    def num_cells(self) -> int:
        batch, height, width = self.shape
        return batch * height * width

    @property
    def batch(self) -> Array:
        """Image number ``[N]``; B for rows without a cell."""
        return self.index // (self.shape[1] * self.shape[2])

    @property
    def y(self) -> Array:
        return self.index // self.shape[2] % self.shape[1]

    @property
    def x(self) -> Array:
        return self.index % self.shape[2]

    def key_map(self, values: Array, fill: float) -> Array:
        """Scatter ``values [N, ...]`` of the keys to a map ``[B, h, w, ...]``, ``fill`` elsewhere."""
        target = jnp.where(self.is_key, self.index, self.num_cells)
        flat = jnp.full((self.num_cells, *values.shape[1:]), fill, values.dtype)
        return flat.at[target].set(values, mode="drop").reshape(*self.shape, *values.shape[1:])


def whole_map(keys: Array) -> Cells:
    """Return every cell of ``keys`` bool ``[B, h, w]`` in map order, for the rows of a dense computation."""
    batch, height, width = keys.shape
    return Cells(jnp.arange(keys.size, dtype=jnp.int32), keys.reshape(-1), (batch, height, width))


def parent_cells(cells: Array, shape: tuple[int, int, int], above: tuple[int, int]) -> Array:
    """Return the flat numbers of the parents, on a map of (h, w) ``above``, of flat ``cells`` of a map ``(B, h, w)``.

    The parent of cell ``B * h * w`` (none) lies beyond the coarser map's cells, where a gather reads zero.
    """
    _, height, width = shape
    y, x = cells // width % height // 2, cells % width // 2
    return (cells // (height * width) * above[0] + y) * above[1] + x
