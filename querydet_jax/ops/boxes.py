"""Box arithmetic. Boxes are float32 (x0, y0, x1, y1) in pixels of the network input; widths are x1 - x0."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import Array

MAX_LOG_SCALE = math.log(1000.0 / 16.0)
"""Upper limit of dw and dh in ``decode``, so that a box is at most 62.5 times as large as its anchor."""


def rounded_product(a: Array, b: Array) -> Array:
    """Return ``a * b``, always rounded to float32 before further use.

    XLA may contract ``a * b - c`` to a fused multiply-add in one fusion and not in another. Equal
    IoUs would then differ in the last bit, and the matchers, which compare IoUs for equality, would
    lose ties. The minimum prevents the contraction and changes no finite value.
    """
    return jnp.minimum(a * b, jnp.finfo(jnp.float32).max)


def areas(boxes: Array) -> Array:
    """Return the areas ``[...]`` of boxes ``[..., 4]``, in px^2."""
    return rounded_product(boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1])


def pairwise_iou(a: Array, b: Array) -> Array:
    """Return the intersection over union ``[...]`` of boxes ``[..., 4]`` and ``[..., 4]``, which broadcast.

    Disjoint pairs and pairs with an empty box give 0. For a matrix, pass ``a[:, None], b[None]``.
    """
    # By coordinate: in ONNX, where nothing is fused, arrays with a last axis of two are slow.
    (a_left, a_top, a_right, a_bottom), (b_left, b_top, b_right, b_bottom) = (
        [x[..., i] for i in range(4)] for x in (a, b)
    )
    width = jnp.maximum(jnp.minimum(a_right, b_right) - jnp.maximum(a_left, b_left), 0.0)
    height = jnp.maximum(jnp.minimum(a_bottom, b_bottom) - jnp.maximum(a_top, b_top), 0.0)
    intersection = rounded_product(width, height)
    union = areas(a) + areas(b) - intersection
    return jnp.where(intersection > 0, intersection / jnp.where(intersection > 0, union, 1.0), 0.0)


def clip(boxes: Array, size: Array) -> Array:
    """Clip boxes ``[..., 4]`` to an image of ``size [2]``, (height, width) in px."""
    height, width = size[0].astype(jnp.float32), size[1].astype(jnp.float32)
    most = jnp.stack([width, height, width, height])
    return jnp.clip(boxes, 0.0, most.reshape((1,) * (boxes.ndim - 1) + (4,)))


def encode(anchors: Array, boxes: Array) -> Array:
    """Return the regression targets (dx, dy, dw, dh) ``[..., 4]`` from ``anchors`` to ``boxes``, with unit weights.

    dx = (gx - ax) / aw, dw = log(gw / aw) on centres and sizes (Girshick et al. 2014, appendix C).
    """
    anchor_size = anchors[..., 2:] - anchors[..., :2]
    anchor_center = anchors[..., :2] + 0.5 * anchor_size
    size = boxes[..., 2:] - boxes[..., :2]
    center = boxes[..., :2] + 0.5 * size
    return jnp.concatenate([(center - anchor_center) / anchor_size, jnp.log(size / anchor_size)], axis=-1)


def decode(anchors: Array, deltas: Array) -> Array:
    """Return the boxes ``[..., 4]`` given by ``anchors`` and ``deltas``; dw, dh are clamped to ``MAX_LOG_SCALE``."""
    anchor_size = anchors[..., 2:] - anchors[..., :2]
    anchor_center = anchors[..., :2] + 0.5 * anchor_size
    center = deltas[..., :2] * anchor_size + anchor_center
    size = jnp.exp(jnp.minimum(deltas[..., 2:], MAX_LOG_SCALE)) * anchor_size
    return jnp.concatenate([center - 0.5 * size, center + 0.5 * size], axis=-1)
