"""Residual networks (He et al. 2016), as in detectron2 (flavour msra) and torchvision."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from querydet_jax.config import BackboneConfig
from querydet_jax.models.backbones.freezing import norm_kind, stop_if_frozen
from querydet_jax.models.layers import Conv, msra_init
from querydet_jax.ops.pooling import max_pool_3x3

_DEPTHS = {
    "resnet10": (1, 1, 1, 1),
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
}
_BOTTLENECK = {"resnet50", "resnet101"}


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions, the first with the stride."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, config: BackboneConfig, **common):
        self.conv1 = Conv(in_channels, width, 3, stride=stride, **common)
        self.conv2 = Conv(width, width, 3, **common)
        self.shortcut = (
            Conv(in_channels, width, 1, stride=stride, **common) if stride > 1 or in_channels != width else None
        )

    def __call__(self, x: Array) -> Array:
        y = self.conv2(jax.nn.relu(self.conv1(x)))
        return jax.nn.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class Bottleneck(nnx.Module):
    """1x1, 3x3 and 1x1 convolutions, the first 1x1 (msra) or the 3x3 (torchvision) with the stride."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, config: BackboneConfig, **common):
        stride_1x1, stride_3x3 = (stride, 1) if config.flavor == "msra" else (1, stride)
        out_channels = 4 * width
        self.conv1 = Conv(in_channels, width, 1, stride=stride_1x1, **common)
        self.conv2 = Conv(width, width, 3, stride=stride_3x3, **common)
        self.conv3 = Conv(width, out_channels, 1, **common)
        self.shortcut = (
            Conv(in_channels, out_channels, 1, stride=stride, **common)
            if stride > 1 or in_channels != out_channels
            else None
        )

    def __call__(self, x: Array) -> Array:
        y = jax.nn.relu(self.conv1(x))
        y = self.conv3(jax.nn.relu(self.conv2(y)))
        return jax.nn.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class Stem(nnx.Module):
    """Convolution of stride 2 (7x7 in residual networks), norm, ReLU, 3x3 max pool of stride 2."""

    def __init__(self, width: int, size: int, **common):
        self.conv1 = Conv(3, width, size, stride=2, **common)

    def __call__(self, x: Array) -> Array:
        return max_pool_3x3(jax.nn.relu(self.conv1(x)))


class ResNet(nnx.Module):
    """Map normalised pixels ``[B, H, W, 3]`` to ``{2: C2, .., 5: C5}``, C_l ``[B, H/2^l, W/2^l, C]``."""

    def __init__(self, config: BackboneConfig, dtype: jnp.dtype, rng: np.random.Generator):
        self.config = config
        common = dict(init=msra_init, dtype=dtype, rng=rng)
        frozen = self.frozen_parts()

        block = Bottleneck if config.name in _BOTTLENECK else BasicBlock
        self.stem = Stem(config.width, 7, norm=norm_kind(config, "stem", frozen), **common)
        channels = config.width
        self.out_channels = {}
        for stage, depth in zip((2, 3, 4, 5), _DEPTHS[config.name], strict=True):
            width = config.width * 2 ** (stage - 2)
            norm = norm_kind(config, f"res{stage}", frozen)
            blocks = []
            for i in range(depth):
                stride = 2 if i == 0 and stage > 2 else 1
                blocks.append(block(channels, width, stride, config, norm=norm, **common))
                channels = width * block.expansion
            setattr(self, f"res{stage}", nnx.List(blocks))
            self.out_channels[stage] = channels

    def __call__(self, x: Array) -> dict[int, Array]:
        frozen = self.frozen_parts()
        outputs = {}
        for part in ("stem", "res2", "res3", "res4", "res5"):
            if part == "stem":
                x = self.stem(x)
            else:
                for block in getattr(self, part):
                    x = block(x)
            x = stop_if_frozen(x, part, frozen)
            if part != "stem":
                outputs[int(part[-1])] = x
        return outputs

    def frozen_parts(self) -> tuple[str, ...]:
        """Return the names of the parts that ``freeze_at`` freezes: stem first, then res2, ..."""
        return ("stem", "res2", "res3", "res4", "res5")[: self.config.freeze_at]
