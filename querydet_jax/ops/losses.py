"""Elementwise losses, without reduction."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from querydet_jax.ops.boxes import areas


def binary_cross_entropy(logits: Array, targets: Array) -> Array:
    """Return the sigmoid cross-entropy in its stable form: ``max(x, 0) - x t + log(1 + exp(-|x|))``."""
    # Use where instead of maximum and abs, whose gradients at a logit of exactly 0 do not add up to
    # 1/2 - t. Padding gives such logits while biases are 0.
    positive = logits > 0
    tail = jnp.log1p(jnp.exp(jnp.where(positive, -logits, logits)))
    return jnp.where(positive, logits, 0.0) - logits * targets + tail


def focal_loss(logits: Array, targets: Array, *, alpha: float, gamma: float) -> Array:
    """Return the sigmoid focal loss a_t (1 - p_t)^g BCE(x, t) per element (RetinaNet, Lin et al. 2017, eq. 5).

    ``1 - p_t`` is computed as the sigmoid of the negated signed logit, not as a difference, so
    gradients are finite at any logit, for fractional ``gamma``, too.
    """
    logits = logits.astype(jnp.float32)
    targets = targets.astype(jnp.float32)
    miss = jax.nn.sigmoid(jnp.where(targets > 0.5, -logits, logits))
    # The floor keeps miss**(gamma - 1) finite for gamma < 1, and is too small to change the loss.
    weight = jnp.maximum(miss, 1e-30) ** gamma
    balance = alpha * targets + (1.0 - alpha) * (1.0 - targets)
    return balance * weight * binary_cross_entropy(logits, targets)


def smooth_l1(difference: Array, *, beta: float) -> Array:
    """Return ``0.5 d^2 / beta`` where ``|d| < beta``, else ``|d| - beta / 2`` (Fast R-CNN, Girshick 2015, eq. 3)."""
    size = jnp.abs(difference)
    return jnp.where(size < beta, 0.5 * size**2 / beta, size - 0.5 * beta)


def giou_loss(boxes: Array, targets: Array) -> Array:
    """Return 1 - GIoU (Rezatofighi et al. 2019), 0..2, per pair of xyxy ``boxes`` and ``targets [..., 4]``.

    GIoU = IoU - (hull - union) / hull, where hull is the area of the smallest box around both. Boxes may be empty,
    targets must not.
    """
    (first, last), (target_first, target_last) = jnp.split(boxes, 2, -1), jnp.split(targets, 2, -1)
    overlap = jnp.maximum(jnp.minimum(last, target_last) - jnp.maximum(first, target_first), 0.0)
    extent = jnp.maximum(last, target_last) - jnp.minimum(first, target_first)
    intersection, hull = overlap[..., 0] * overlap[..., 1], extent[..., 0] * extent[..., 1]
    union = areas(boxes) + areas(targets) - intersection
    return 1.0 - intersection / union + (hull - union) / hull
