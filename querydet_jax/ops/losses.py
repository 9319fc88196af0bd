"""Loss terms, elementwise and unreduced."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from querydet_jax.ops.boxes import areas


def binary_cross_entropy(logits: Array, targets: Array) -> Array:
    """Return the stable sigmoid cross-entropy ``max(x, 0) - x t + log(1 + exp(-|x|))``."""
    # Selections, not maximum and abs: their gradients at a logit of exactly 0 do not add up to 1/2 - t,
    # and padding makes such logits, wherever biases are still 0.
    positive = logits > 0
    tail = jnp.log1p(jnp.exp(jnp.where(positive, -logits, logits)))
    return jnp.where(positive, logits, 0.0) - logits * targets + tail


def focal_loss(logits: Array, targets: Array, *, alpha: float, gamma: float) -> Array:
    """Sigmoid focal loss a_t (1 - p_t)^g BCE(x, t) (RetinaNet, Lin et al. 2017, eq. 5), one value an element.

    ``1 - p_t`` is taken as ``sigmoid`` of the negated signed logit, never as a difference, so a
    fractional ``gamma`` keeps finite gradients at any logit.
    """
    logits = logits.astype(jnp.float32)
    targets = targets.astype(jnp.float32)
    miss = jax.nn.sigmoid(jnp.where(targets > 0.5, -logits, logits))
    # The floor keeps miss**(gamma - 1) finite for gamma < 1; it is far below what float32 resolves.
    weight = jnp.maximum(miss, 1e-30) ** gamma
    balance = alpha * targets + (1.0 - alpha) * (1.0 - targets)
    return balance * weight * binary_cross_entropy(logits, targets)


def smooth_l1(difference: Array, *, beta: float) -> Array:
    """Return ``0.5 d^2 / beta`` where ``|d| < beta``, else ``|d| - beta / 2`` (Girshick 2015)."""
    size = jnp.abs(difference)
    return jnp.where(size < beta, 0.5 * size**2 / beta, size - 0.5 * beta)


def giou_loss(boxes: Array, targets: Array) -> Array:
    """1 - GIoU (Rezatofighi et al. 2019) of xyxy ``boxes`` and ``targets [..., 4]``, one value a pair, 0..2.

    GIoU = IoU - (hull - union) / hull, areas, with the smallest box around both as hull. Boxes may be empty,
    targets must not be.
    """
    (first, last), (target_first, target_last) = jnp.split(boxes, 2, -1), jnp.split(targets, 2, -1)
    overlap = jnp.maximum(jnp.minimum(last, target_last) - jnp.maximum(first, target_first), 0.0)
    extent = jnp.maximum(last, target_last) - jnp.minimum(first, target_first)
    intersection, hull = overlap[..., 0] * overlap[..., 1], extent[..., 0] * extent[..., 1]
    union = areas(boxes) + areas(targets) - intersection
    return 1.0 - intersection / union + (hull - union) / hull
