"""Second stage of Faster R-CNN: the head on pooled proposals, and the sampling of its training proposals.

Ren et al. 2015; for pyramids, FPN (Lin et al. 2017), section 4.2.
Shape letters: B batch, P proposals per image, M sampled ones, G padded boxes, S bins per side, C channels, K classes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from querydet_jax.config import FasterRCNNConfig
from querydet_jax.models.layers import Initializer, fpn_init, normal_init
from querydet_jax.ops.matching import BACKGROUND, match_proposals, matched_deltas
from querydet_jax.ops.sampling import sample_balanced

DELTA_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
"""Factors of the box-delta targets, which bring their standard deviation near one."""


class Linear(nnx.Module):
    """Fully connected layer over a small map, ``[..., S, S, C]`` to ``[..., O]``, with kernel ``[S, S, C, O]``."""

    def __init__(
        self,
        size: int,
        in_channels: int,
        outputs: int,
        *,
        init: Initializer,
        dtype: jnp.dtype,
        rng: np.random.Generator,
    ):
        self.kernel = nnx.Param(jnp.asarray(init(rng, (size, size, in_channels, outputs))))
        self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32))
        self.dtype = dtype

    def __call__(self, x: Array) -> Array:
        """Multiply in the network's dtype and return float32."""
        kernel = self.kernel[...].astype(self.dtype)
        inputs = math.prod(kernel.shape[:3])
        rows = x.astype(self.dtype).reshape(*x.shape[: x.ndim - 3], inputs)
        y = jnp.dot(rows, kernel.reshape(inputs, -1), preferred_element_type=jnp.float32)
        return y + self.bias[...].reshape((1,) * (y.ndim - 1) + (-1,))


class BoxHead(nnx.Module):
    """Two fully connected layers, then class logits and box deltas for every class."""

    def __init__(
        self, in_channels: int, size: int, channels: int, num_classes: int, dtype: jnp.dtype, rng: np.random.Generator
    ):
        self.num_classes = num_classes
        self.fc1 = Linear(size, in_channels, channels, init=fpn_init, dtype=dtype, rng=rng)
        self.fc2 = Linear(1, channels, channels, init=fpn_init, dtype=dtype, rng=rng)
        self.cls_score = Linear(1, channels, num_classes + 1, init=normal_init(0.01), dtype=dtype, rng=rng)
        self.bbox_pred = Linear(1, channels, num_classes * 4, init=normal_init(0.001), dtype=dtype, rng=rng)

    def __call__(self, pooled: Array) -> tuple[Array, Array]:
        """Map ``[B, P, S, S, C]`` to float32 class logits ``[B, P, K + 1]`` and deltas ``[B, P, K, 4]``.

        The background is the last class.
        """
        x = jax.nn.relu(self.fc1(pooled))[..., None, None, :]
        x = jax.nn.relu(self.fc2(x))[..., None, None, :]
        deltas = self.bbox_pred(x)
        return self.cls_score(x), deltas.reshape(*deltas.shape[:-1], self.num_classes, 4)


class SampledProposals(NamedTuple):
    """The training proposals of one image.

    Attributes:
      boxes: ``[M, 4]``.
      labels: int32 ``[M]``, class 0..K-1, K for background.
      deltas: ``[M, 4]`` to the matched object, 0 for background.
      valid: bool ``[M]``.
    """

    boxes: Array
    labels: Array
    deltas: Array
    valid: Array


def sample_proposals(
    proposals: Array,
    valid: Array,
    boxes: Array,
    classes: Array,
    key: Array,
    *,
    config: FasterRCNNConfig,
    num_classes: int,
) -> SampledProposals:
    """Sample the training proposals of one image, from its proposals and the ground-truth boxes.

    Args:
      proposals: ``[P, 4]``.
      valid: bool ``[P]``, false for padding.
      boxes: ``[G, 4]``, ground truth.
      classes: ``[G]``, -1 for padding.
      key: PRNG key.
    """
    proposals = jnp.concatenate([proposals, boxes])
    valid = jnp.concatenate([valid, (classes >= 0) & jnp.all(jnp.isfinite(boxes), axis=1)])
    labels, matched = match_proposals(proposals, boxes, classes, foreground_iou=config.roi_iou)
    found = sample_balanced(
        key,
        valid & (labels >= 0),
        valid & (labels == BACKGROUND),
        count=config.roi_samples,
        fraction=config.roi_foreground,
    )
    deltas = (
        matched_deltas(proposals[found.index], boxes, matched[found.index])
        * jnp.asarray(DELTA_WEIGHTS, jnp.float32)[None]
    )
    return SampledProposals(
        jnp.where(found.valid[:, None], proposals[found.index], 0.0),
        jnp.where(found.foreground, labels[found.index], num_classes),
        jnp.where(found.foreground[:, None], deltas, 0.0),
        found.valid,
    )
