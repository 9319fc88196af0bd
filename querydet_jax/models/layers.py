"""Convolutions with optional norms. Dense and sparse computation share the kernels.

Kernels are HWIO. Padding is always explicit, because "SAME" pads strided convolutions differently from torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from querydet_jax.ops.conv2d import Padding, conv2d
from querydet_jax.ops.depthwise import depthwise_conv
from querydet_jax.sparse import Conv as ConvWeights
from querydet_jax.sparse import pointwise

Initializer = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
"""``init(rng, kernel_shape)``, drawn with NumPy in 0.5 s for a ResNet-50. With jax, compiling a random number
generator for each of its shapes would take 12 s."""


class Frozen(nnx.Variable):
    """A variable that is not trained (frozen norms, pixel mean)."""


class FrozenNorm(nnx.Module):
    """Batch norm with fixed statistics and affine transform: (x - mean) * scale / sqrt(var + epsilon) + bias."""

    def __init__(self, channels: int, epsilon: float = 1e-5):
        self.epsilon = epsilon
        self.scale = Frozen(jnp.ones((channels,), jnp.float32))
        self.bias = Frozen(jnp.zeros((channels,), jnp.float32))
        self.mean = Frozen(jnp.zeros((channels,), jnp.float32))
        self.var = Frozen(jnp.full((channels,), 1.0 - epsilon, jnp.float32))

    def __call__(self, x: Array) -> Array:
        scale = self.scale[...] * lax.rsqrt(self.var[...] + self.epsilon)
        shift = self.bias[...] - self.mean[...] * scale
        return x * scale.astype(x.dtype)[None, None, None] + shift.astype(x.dtype)[None, None, None]


def make_norm(kind: str, channels: int, dtype: jnp.dtype, epsilon: float = 1e-5) -> nnx.Module:
    """Return a norm over ``channels``: frozen, batch (synchronised over devices if it has an axis name) or group."""
    if kind == "frozen":
        return FrozenNorm(channels, epsilon)
    rngs = nnx.Rngs(0)  # required but unused: scale starts at one and bias at zero
    if kind == "batch":
        return nnx.BatchNorm(channels, momentum=0.9, epsilon=epsilon, dtype=dtype, use_running_average=True, rngs=rngs)
    if kind == "group":
        return nnx.GroupNorm(channels, num_groups=32, epsilon=epsilon, dtype=dtype, rngs=rngs)
    raise ValueError(f"norm {kind!r} is not one of frozen, batch, group")


class Conv(nnx.Module):
    """2-D convolution ``[B, H, W, C]`` to ``[B, H', W', O]``.

    Zero padding is "symmetric" (torch) or "same" (TensorFlow: strided convolutions have more padding at the bottom and
    right). A depthwise convolution has a kernel ``[k, k, 1, C]`` and O = C.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int,
        *,
        stride: int = 1,
        init: Initializer,
        bias: Initializer | None = None,
        norm: str | None = None,
        epsilon: float = 1e-5,
        depthwise: bool = False,
        padding: Literal["symmetric", "same"] = "symmetric",
        dtype: jnp.dtype = jnp.float32,
        rng: np.random.Generator,
    ):
        shape = (size, size, 1 if depthwise else in_channels, out_channels)
        self.kernel = nnx.Param(jnp.asarray(init(rng, shape)))
        self.bias = nnx.Param(jnp.asarray(bias(rng, shape))) if bias is not None else None
        self.norm = make_norm(norm, out_channels, dtype, epsilon) if norm is not None else None
        self.stride = stride
        self.size = size
        self.depthwise = depthwise
        self.padding = padding
        self.dtype = dtype

    def __call__(self, x: Array) -> Array:
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        if self.size == 1:
            x = x[:, :: self.stride, :: self.stride]
            if self.bias is not None and self.norm is None:
                return pointwise(x, self.weights())  # the same product as on sites
            # A matrix product as in `pointwise`. Accumulating in float32 is twice as fast on XLA's CPU backend.
            x = jnp.dot(x, kernel[0, 0], preferred_element_type=jnp.float32).astype(self.dtype)
        elif self.depthwise:
            x = depthwise_conv(x, kernel, self.stride, self._padding(x))
        else:
            x = conv2d(x, kernel, self.stride, self._padding(x))
        if self.bias is not None:
            x = x + self.bias[...].astype(self.dtype)[None, None, None]
        return x if self.norm is None else self.norm(x)

    def _padding(self, x: Array) -> Padding:
        if self.padding == "symmetric":
            return [(self.size // 2, self.size // 2)] * 2
        found = []
        for side in x.shape[1:3]:
            total = max((-(-side // self.stride) - 1) * self.stride + self.size - side, 0)
            found.append((total // 2, total - total // 2))
        return found

    def weights(self) -> ConvWeights:
        """Return kernel and bias for the convolution on sites.

        Raises:
          ValueError: the convolution has no bias, has a norm or is depthwise.
        """
        if self.bias is None or self.norm is not None or self.depthwise:
            raise ValueError("only a convolution with a bias and without a norm can run on sites")
        return ConvWeights(self.kernel[...], self.bias[...])


def run_tower(tower: nnx.List, x: Array) -> Array:
    """Apply the convolutions in turn, with a ReLU after each."""
    for conv in tower:
        x = jax.nn.relu(conv(x))
    return x


def zeros_bias(rng: np.random.Generator, kernel_shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros((kernel_shape[-1],), np.float32)


def constant_bias(value: float) -> Initializer:
    return lambda rng, kernel_shape: np.full((kernel_shape[-1],), value, np.float32)


def torch_bias(rng: np.random.Generator, kernel_shape: tuple[int, ...]) -> np.ndarray:
    """Draw PyTorch's default bias of a convolution: U(-b, b), b = 1 / sqrt(fan_in)."""
    bound = 1.0 / math.sqrt(math.prod(kernel_shape[:3]))
    return rng.uniform(-bound, bound, (kernel_shape[-1],)).astype(np.float32)


def normal_init(std: float) -> Initializer:
    return lambda rng, shape: np.float32(std) * rng.standard_normal(shape, np.float32)


def msra_init(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Draw Kaiming normal weights, fan_out, gain sqrt(2) (He et al. 2015), for backbones."""
    return normal_init(math.sqrt(2.0 / (shape[0] * shape[1] * shape[3])))(rng, shape)


def fpn_init(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Draw Kaiming uniform weights with a = 1, fan_in: U(-b, b), b = sqrt(3 / fan_in)."""
    bound = math.sqrt(3.0 / math.prod(shape[:3]))
    return rng.uniform(-bound, bound, shape).astype(np.float32)


def xavier_normal_init(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Draw normal weights, std = sqrt(2 / (fan_in + fan_out)) (Glorot and Bengio 2010), for the query head."""
    return normal_init(math.sqrt(2.0 / (shape[0] * shape[1] * (shape[2] + shape[3]))))(rng, shape)
