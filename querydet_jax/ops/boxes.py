"""Box arithmetic. Boxes are float32 (x0, y0, x1, y1) in pixels of the network input, without +1.

Shape letters: N, G numbers of boxes.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import Array

MAX_LOG_SCALE = math.log(1000.0 / 16.0)
"""Upper clamp of a decoded dw, dh: one step cannot grow a box more than 62.5 times."""


def rounded_product(a: Array, b: Array) -> Array:
    """``a * b`` rounded by itself.

    XLA contracts ``a * b - c`` into one fused multiply-add, in some fusions and not in others. Equal
    IoUs would then differ in the last bit, and the matchers compare IoUs for equality: a GT would
    lose the anchors that tie for it. The minimum, which no finite value feels, stands in between.
    """
    return jnp.minimum(a * b, jnp.finfo(jnp.float32).max)


def areas(boxes: Array) -> Array:
    """Areas ``[...]`` of boxes ``[..., 4]``, in px^2."""
    return rounded_product(boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1])


def pairwise_iou(a: Array, b: Array) -> Array:
    """Intersection over union of boxes that broadcast: ``[..., 4]`` and ``[..., 4]`` give ``[...]``.

    Disjoint pairs, and pairs with an empty box, give 0. For a matrix pass ``a[:, None], b[None]``.
    """
    left_top = jnp.maximum(a[..., :2], b[..., :2])
    right_bottom = jnp.minimum(a[..., 2:], b[..., 2:])
    width_height = jnp.maximum(right_bottom - left_top, 0.0)
    intersection = rounded_product(width_height[..., 0], width_height[..., 1])
    union = areas(a) + areas(b) - intersection
    return jnp.where(intersection > 0, intersection / jnp.where(intersection > 0, union, 1.0), 0.0)


def clip(boxes: Array, size: Array) -> Array:
    """Boxes ``[..., 4]`` cut off at the edges of an image of ``size [2]``, (height, width) px."""
    height, width = size[0].astype(jnp.float32), size[1].astype(jnp.float32)
    most = jnp.stack([width, height, width, height])
    return jnp.clip(boxes, 0.0, most.reshape((1,) * (boxes.ndim - 1) + (4,)))


def encode(anchors: Array, boxes: Array) -> Array:
    """Regression targets (dx, dy, dw, dh) ``[..., 4]`` of ``boxes`` seen from ``anchors``, unit weights.

    dx = (gx - ax) / aw, dw = log(gw / aw) on centres and sizes (Girshick et al. 2014, appendix C).
    """
    anchor_size = anchors[..., 2:] - anchors[..., :2]
    anchor_center = anchors[..., :2] + 0.5 * anchor_size
    size = boxes[..., 2:] - boxes[..., :2]
    center = boxes[..., :2] + 0.5 * size
    return jnp.concatenate([(center - anchor_center) / anchor_size, jnp.log(size / anchor_size)], axis=-1)


def decode(anchors: Array, deltas: Array) -> Array:
    """Boxes ``[..., 4]`` from ``anchors`` and ``deltas``; dw, dh are clamped to ``MAX_LOG_SCALE``."""
    anchor_size = anchors[..., 2:] - anchors[..., :2]
    anchor_center = anchors[..., :2] + 0.5 * anchor_size
    center = deltas[..., :2] * anchor_size + anchor_center
    size = jnp.exp(jnp.minimum(deltas[..., 2:], MAX_LOG_SCALE)) * anchor_size
    return jnp.concatenate([center - 0.5 * size, center + 0.5 * size], axis=-1)
