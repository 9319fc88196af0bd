"""Detection and query heads. Without norms, they run densely or on sites with the same weights."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from querydet_jax.config import HeadConfig, QueryConfig
from querydet_jax.models.layers import (
    Conv,
    constant_bias,
    normal_init,
    run_tower,
    torch_bias,
    xavier_normal_init,
    zeros_bias,
)
from querydet_jax.sparse import Stack


class DetectionHead(nnx.Module):
    """Class and box towers shared over levels (RetinaNet, Lin et al. 2017, section 4).

    Anchor a and class k have channel ``a * K + k`` of the class logits; coordinate c has channel ``a * 4 + c`` of the
    box deltas. Shape letters: B batch, h w map, C channels, A anchors per cell, K classes.
    """

    def __init__(
        self,
        config: HeadConfig,
        in_channels: int,
        num_anchors: int,
        num_classes: int,
        dtype: jnp.dtype,
        rng: np.random.Generator,
    ):
        common: dict[str, Any] = dict(init=normal_init(0.01), dtype=dtype, rng=rng)

        def tower() -> nnx.List:
            sizes = [in_channels] + [config.channels] * config.num_convs
            norm = None if config.norm == "none" else config.norm
            return nnx.List(
                [Conv(i, o, 3, bias=zeros_bias, norm=norm, **common) for i, o in zip(sizes, sizes[1:], strict=False)]
            )

        last = config.channels if config.num_convs else in_channels
        # Every anchor starts as foreground with probability `prior`, so that the loss of the background
        # does not dominate the first steps (RetinaNet, section 4.1).
        prior = -math.log((1.0 - config.prior) / config.prior)
        self.cls_tower, self.box_tower = tower(), tower()
        self.cls_score = Conv(last, num_anchors * num_classes, 3, bias=constant_bias(prior), **common)
        box_bias = torch_bias if config.box_bias == "torch" else zeros_bias
        self.bbox_pred = Conv(last, num_anchors * 4, 3, bias=box_bias, **common)

    def __call__(self, x: Array) -> tuple[Array, Array]:
        """Map ``[B, h, w, C]`` to float32 class logits ``[B, h, w, A * K]`` and deltas ``[B, h, w, A * 4]``."""
        cls = self.cls_score(run_tower(self.cls_tower, x))
        box = self.bbox_pred(run_tower(self.box_tower, x))
        return cls.astype(jnp.float32), box.astype(jnp.float32)

    def stacks(self) -> tuple[Stack, Stack]:
        """Return the class and box branches as convolution stacks, for computation on sites."""
        return (
            [conv.weights() for conv in [*self.cls_tower, self.cls_score]],
            [conv.weights() for conv in [*self.box_tower, self.bbox_pred]],
        )


class QueryHead(nnx.Module):
    """Predict where the next finer level has small objects (QueryDet section 3.2)."""

    def __init__(self, config: QueryConfig, in_channels: int, dtype: jnp.dtype, rng: np.random.Generator):
        common: dict[str, Any] = dict(init=xavier_normal_init, bias=zeros_bias, dtype=dtype, rng=rng)
        sizes = [in_channels] + [config.channels] * config.num_convs
        self.tower = nnx.List([Conv(i, o, 3, **common) for i, o in zip(sizes, sizes[1:], strict=False)])
        self.pred = Conv(sizes[-1], 1, 3, **common)

    def __call__(self, x: Array) -> Array:
        """Map ``[B, h, w, C]`` to float32 query logits ``[B, h, w]``."""
        return self.pred(run_tower(self.tower, x))[..., 0].astype(jnp.float32)

    def stack(self) -> Stack:
        """Return the convolution stack, for computation on sites."""
        return [conv.weights() for conv in [*self.tower, self.pred]]
