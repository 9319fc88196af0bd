"""Functions shared by anchor-based detectors: anchors, matching, decoding.

Shape letters: A anchors per cell, R anchors of all levels, M chosen anchors, N rows, G padded boxes.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array

from querydet_jax.config import AnchorConfig, LossConfig
from querydet_jax.ops.anchors import anchors_at, cell_anchors, grid_anchors
from querydet_jax.ops.boxes import decode
from querydet_jax.ops.matching import match_anchors
from querydet_jax.sparse import Cells


def level_anchors(config: AnchorConfig, level: int) -> np.ndarray:
    """Return the anchors ``[A, 4]`` of a cell of P_level in px, relative to the cell's anchor centre."""
    return cell_anchors(config.scale * 2**level, config.sizes_per_octave, config.ratios)


def pyramid_anchors(config: AnchorConfig, shapes: dict[int, tuple[int, int]]) -> Array:
    """Return the anchors ``[R, 4]`` px of levels of the given (h, w), ordered by level, y, x, anchor."""
    return jnp.concatenate(
        [grid_anchors(level_anchors(config, level), *shape, 2**level).reshape(-1, 4) for level, shape in shapes.items()]
    )


def match(config: LossConfig, anchors: Array, boxes: Array, classes: Array) -> tuple[Array, Array]:
    """Run ``match_anchors`` on one image with the configured thresholds and matcher."""
    return match_anchors(
        anchors,
        boxes,
        classes,
        background_iou=config.iou_background,
        foreground_iou=config.iou_foreground,
        matcher=config.matcher,
    )


def decode_chosen(config: AnchorConfig, level: int, cells: Cells, deltas: Array, row: Array, anchor: Array) -> Array:
    """Decode the boxes ``[..., 4]`` px of the anchors ``anchor [...]`` at the rows ``row [...]``.

    Args:
      cells: where the rows lie.
      deltas: ``[N, A * 4]`` or ``[N * A, 4]`` at the rows.
    """
    anchors = anchors_at(jnp.asarray(level_anchors(config, level)), cells.y[row], cells.x[row], 2**level)
    chosen = jnp.take_along_axis(anchors, anchor[..., None, None], axis=-2)[..., 0, :]
    return decode(chosen, deltas.reshape(-1, config.per_cell, 4)[row, anchor])
