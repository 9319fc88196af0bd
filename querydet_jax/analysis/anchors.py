"""IoU of each box with its best anchor. Letters: N boxes, A anchors per cell."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from querydet_jax.config import AnchorConfig
from querydet_jax.models.anchored import level_anchors
from querydet_jax.ops.anchors import anchors_at
from querydet_jax.ops.boxes import pairwise_iou

_ROWS = 2**15  # boxes per call


def best_anchor_iou(boxes: np.ndarray, inputs: np.ndarray, anchors: AnchorConfig, levels: Sequence[int]) -> np.ndarray:
    """Return the largest IoU of each box with any anchor of a level, up to float32 rounding.

    Only the cell nearest to the box's centre is evaluated per level. Among anchors of one shape, it has the largest
    overlap: the overlap is a product of one factor per axis, which never grows with the distance along that axis, and
    for given areas IoU grows with the overlap.

    Args:
      boxes: float32 [N,4] xyxy px of the network input, inside it.
      inputs: int [N,2], (height, width) of the network input, multiples of 32.
      anchors: the anchors per cell.
      levels: the L levels l of P_l.

    Returns:
      float32 [N,L].
    """
    found = np.zeros((len(boxes), len(levels)), np.float32)
    for first in range(0, len(boxes), _ROWS):
        part = slice(first, first + _ROWS)
        missing = ((0, _ROWS - len(boxes[part])), (0, 0))  # fixed shapes: compile once per level
        rows, sizes = np.pad(boxes[part], missing), np.pad(inputs[part].astype(np.int32), missing, constant_values=32)
        for column, level in enumerate(levels):
            best = _at_nearest_cell(rows, sizes, level_anchors(anchors, level), level=level)
            found[part, column] = np.asarray(best)[: len(boxes[part])]
    return found


@partial(jax.jit, static_argnames="level")
def _at_nearest_cell(boxes: Array, inputs: Array, cells: Array, *, level: int) -> Array:
    stride = 2**level
    centers = 0.5 * (boxes[:, :2] + boxes[:, 2:])
    last = -(-inputs[:, ::-1] // stride) - 1  # (x, y); levels round up, see ``level_shape``
    at = jnp.clip(jnp.round(centers / stride).astype(jnp.int32), 0, last)  # anchor centres are multiples of the stride
    return jnp.max(pairwise_iou(anchors_at(cells, at[:, 1], at[:, 0], stride), boxes[:, None]), axis=1)
