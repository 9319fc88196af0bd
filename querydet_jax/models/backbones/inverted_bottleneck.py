"""Networks of inverted bottlenecks (Sandler et al. 2018), the base of MobileNetV2 and EfficientNet-Lite."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from querydet_jax.config import BackboneConfig
from querydet_jax.models.backbones.freezing import norm_kind, stop_if_frozen
from querydet_jax.models.layers import Conv, msra_init


class Stage(NamedTuple):
    """``blocks`` inverted bottlenecks of the same shape; the first applies the stride."""

    size: int
    """Kernel size of the depthwise convolution."""
    stride: int
    expansion: int
    """Ratio of a block's inner channels to its input channels."""
    channels: int
    """Output channels of a block."""
    blocks: int


class InvertedBottleneck(nnx.Module):
    """1x1 expansion, depthwise convolution, 1x1 projection without activation, and a shortcut if shapes agree."""

    def __init__(self, in_channels: int, stage: Stage, stride: int, **common: Any):
        width = in_channels * stage.expansion
        self.expand = Conv(in_channels, width, 1, **common) if stage.expansion > 1 else None
        self.depthwise = Conv(width, width, stage.size, stride=stride, depthwise=True, **common)
        self.project = Conv(width, stage.channels, 1, **common)
        self.residual = stride == 1 and in_channels == stage.channels

    def __call__(self, x: Array) -> Array:
        y = x if self.expand is None else jax.nn.relu6(self.expand(x))
        y = self.project(jax.nn.relu6(self.depthwise(y)))
        return x + y if self.residual else y


class InvertedBottleneckNet(nnx.Module):
    """Map normalised pixels ``[B, H, W, 3]`` to ``{2: C2, .., 5: C5}``, C_l ``[B, H/2^l, W/2^l, C]``.

    C_l is the output of the last block at stride 2^l, without a final activation.
    """

    STAGES: ClassVar[dict[int, tuple[Stage, ...]]]
    """{level l, from 1: stages with output stride 2^l}."""
    EPSILON: ClassVar[float]
    PADDING: ClassVar[Literal["symmetric", "same"]]

    def __init__(self, config: BackboneConfig, dtype: jnp.dtype, rng: np.random.Generator):
        self.config = config
        frozen = self.frozen_parts()

        def common(part: str) -> dict[str, Any]:
            norm = norm_kind(config, part, frozen)
            return dict(init=msra_init, norm=norm, epsilon=self.EPSILON, padding=self.PADDING, dtype=dtype, rng=rng)

        channels = 32
        self.stem = Conv(3, channels, 3, stride=2, **common("stem"))
        self.out_channels = {}
        for level, stages in self.STAGES.items():
            made = []
            for stage in stages:
                for i in range(stage.blocks):
                    stride = stage.stride if i == 0 else 1
                    made.append(InvertedBottleneck(channels, stage, stride, **common(f"level{level}")))
                    channels = stage.channels
            setattr(self, f"level{level}", nnx.List(made))
            if level > 1:
                self.out_channels[level] = channels

    def __call__(self, x: Array) -> dict[int, Array]:
        frozen, outputs = self.frozen_parts(), {}
        x = stop_if_frozen(jax.nn.relu6(self.stem(x)), "stem", frozen)
        for level in self.STAGES:
            for block in getattr(self, f"level{level}"):
                x = block(x)
            x = outputs[level] = stop_if_frozen(x, f"level{level}", frozen)
        return {level: outputs[level] for level in self.out_channels}

    def frozen_parts(self) -> tuple[str, ...]:
        """Return the names of the parts that ``freeze_at`` freezes: 1 the stem, 2 all up to stride 4, ..."""
        at = self.config.freeze_at
        levels = tuple(f"level{level}" for level in self.STAGES if level <= at) if at > 1 else ()
        return ("stem", *levels) if at else ()

    @classmethod
    def places(cls) -> list[list[tuple[int, int]]]:
        """Return, per stage in order of computation, the (level, index within the level) of each block."""
        found = []
        for level, stages in cls.STAGES.items():
            first = 0
            for stage in stages:
                found.append([(level, first + i) for i in range(stage.blocks)])
                first += stage.blocks
        return found
