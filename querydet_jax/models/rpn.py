"""Head of the region proposal network (Ren et al. 2015) and the query branch on its trunk (QueryDet Table 9)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from querydet_jax.config import HeadConfig
from querydet_jax.models.layers import Conv, normal_init, xavier_normal_init, zeros_bias
from querydet_jax.sparse import Conv as ConvWeights
from querydet_jax.sparse import Stack


class RPNHead(nnx.Module):
    """3x3 convolutions with ReLU, then two 1x1 branches for objectness and box deltas; shared over levels.

    Anchor a has channel ``a`` of the objectness and channel ``a * 4 + c`` of the deltas.
    """

    def __init__(
        self, config: HeadConfig, in_channels: int, num_anchors: int, dtype: jnp.dtype, rng: np.random.Generator
    ):
        common: dict[str, Any] = dict(init=normal_init(0.01), bias=zeros_bias, dtype=dtype, rng=rng)
        sizes = [in_channels] + [config.channels] * config.num_convs
        self.trunk = nnx.List([Conv(i, o, 3, **common) for i, o in zip(sizes, sizes[1:], strict=False)])
        self.objectness = Conv(config.channels, num_anchors, 1, **common)
        self.deltas = Conv(config.channels, num_anchors * 4, 1, **common)

    def before_branches(self, x: Array) -> Array:
        """Map ``[B, h, w, C]`` to the trunk's ``[B, h, w, C']`` before its last ReLU, as ``stacks`` does on sites."""
        *first, last = self.trunk
        for conv in first:
            x = jax.nn.relu(conv(x))
        return last(x)

    def trunk_output(self, x: Array) -> Array:
        return jax.nn.relu(self.before_branches(x))

    def branches(self, trunk: Array) -> tuple[Array, Array]:
        """Map ``[..., C']`` to float32 objectness logits ``[..., A]`` and deltas ``[..., A * 4]``."""
        return _branch(self.objectness, trunk), _branch(self.deltas, trunk)

    def stacks(self) -> tuple[Stack]:
        """Return the trunk as a convolution stack, for computation on sites.

        Like every stack, it ends before a ReLU. The 1x1 branches need no neighbours, so they run where its output is
        read.
        """
        return ([conv.weights() for conv in self.trunk],)


class RPNQueryHead(nnx.Module):
    """Query branch: a third 1x1 convolution on the RPN's trunk."""

    def __init__(self, head: RPNHead, dtype: jnp.dtype, rng: np.random.Generator):
        self.trunk = head.trunk  # the same variables
        channels = head.objectness.kernel[...].shape[2]
        self.pred = Conv(channels, 1, 1, init=xavier_normal_init, bias=zeros_bias, dtype=dtype, rng=rng)

    def __call__(self, x: Array) -> Array:
        """Map ``[B, h, w, C]`` to float32 query logits ``[B, h, w]``."""
        for conv in self.trunk:
            x = jax.nn.relu(conv(x))
        return self.branch(x)

    def branch(self, trunk: Array) -> Array:
        """Map the trunk's output ``[B, h, w, C']`` to float32 query logits ``[B, h, w]``."""
        return _branch(self.pred, trunk)[..., 0]

    def stack(self) -> Stack:
        """Return trunk and branch as a stack for computation on sites; the 1x1 kernel is padded to 3x3 with zeros."""
        kernel, bias = self.pred.weights()
        return [
            *(conv.weights() for conv in self.trunk),
            ConvWeights(jnp.pad(kernel, ((1, 1), (1, 1), (0, 0), (0, 0))), bias),
        ]


def _branch(conv: Conv, trunk: Array) -> Array:
    kernel, bias = conv.weights()
    y = jnp.dot(trunk, kernel[0, 0].astype(trunk.dtype), preferred_element_type=jnp.float32)
    return y + bias.reshape((1,) * (y.ndim - 1) + (-1,))
