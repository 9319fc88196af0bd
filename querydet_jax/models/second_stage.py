"""Faster R-CNN's second stage on pooled proposals (Ren et al. 2015; Lin et al. 2017a, section 4.2)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from querydet_jax.models.layers import Initializer, fpn_init, normal_init


class Linear(nnx.Module):
    """Fully connected over a small map: ``[..., S, S, C]`` to ``[..., O]``; the kernel is ``[S, S, C, O]``."""

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
        self.bias = nnx.Param(jnp.zeros((outputs,)))
        self.dtype = dtype

    def __call__(self, x: Array) -> Array:
        """In float32, of a product in the network's type."""
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
        """``[B, P, S, S, C]`` to float32 class logits ``[B, P, K + 1]``, the background last, and deltas
        ``[B, P, K, 4]``."""
        x = jax.nn.relu(self.fc1(pooled))[..., None, None, :]
        x = jax.nn.relu(self.fc2(x))[..., None, None, :]
        deltas = self.bbox_pred(x)
        return self.cls_score(x), deltas.reshape(*deltas.shape[:-1], self.num_classes, 4)
