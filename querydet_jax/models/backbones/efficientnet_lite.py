"""EfficientNet-Lite0 (Tan and Le 2019; the Lite variant: no squeeze and excitation, ReLU6)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from querydet_jax.config import BackboneConfig
from querydet_jax.models.layers import Conv, msra_init

EPSILON = 1e-3  # of its batch norms

# Blocks by the pyramid level whose stride they work at: (kernel size, stride, expansion, output channels).
_BLOCKS: dict[int, tuple[tuple[int, int, int, int], ...]] = {
    1: ((3, 1, 1, 16),),
    2: ((3, 2, 6, 24), (3, 1, 6, 24)),
    3: ((5, 2, 6, 40), (5, 1, 6, 40)),
    4: ((3, 2, 6, 80), *((3, 1, 6, 80),) * 2, *((5, 1, 6, 112),) * 3),
    5: ((5, 2, 6, 192), *((5, 1, 6, 192),) * 3, (3, 1, 6, 320)),
}

NUM_BLOCKS = sum(map(len, _BLOCKS.values()))


class InvertedBottleneck(nnx.Module):
    """1x1 expansion, depthwise convolution, 1x1 projection without activation; adds its input where it can."""

    def __init__(self, in_channels: int, block: tuple[int, int, int, int], **common: Any):
        size, stride, expansion, out_channels = block
        width = in_channels * expansion
        self.expand = Conv(in_channels, width, 1, **common) if expansion > 1 else None
        self.depthwise = Conv(width, width, size, stride=stride, depthwise=True, padding="same", **common)
        self.project = Conv(width, out_channels, 1, **common)
        self.residual = stride == 1 and in_channels == out_channels

    def __call__(self, x: Array) -> Array:
        y = x if self.expand is None else jax.nn.relu6(self.expand(x))
        y = self.project(jax.nn.relu6(self.depthwise(y)))
        return x + y if self.residual else y


class EfficientNetLite(nnx.Module):
    """Normalised pixels ``[B, H, W, 3]`` to ``{2: C2, .., 5: C5}`` of 24, 40, 112 and 320 channels.

    Strided convolutions pad as TensorFlow does ("SAME": the odd cell at the bottom and right), and
    pixels are RGB, (x - 127) / 128: so the ImageNet weights were trained.
    """

    def __init__(self, config: BackboneConfig, dtype: jnp.dtype, rng: np.random.Generator):
        self.config = config
        frozen = self.frozen_parts()

        def common(part: str) -> dict[str, Any]:
            # Live statistics would go on changing what a frozen part computes.
            norm = "frozen" if config.norm == "batch" and part in frozen else config.norm
            return dict(init=msra_init, norm=norm, epsilon=EPSILON, dtype=dtype, rng=rng)

        channels = 32
        self.stem = Conv(3, channels, 3, stride=2, padding="same", **common("stem"))
        self.out_channels = {}
        for level, blocks in _BLOCKS.items():
            made = []
            for block in blocks:
                made.append(InvertedBottleneck(channels, block, **common(f"level{level}")))
                channels = block[-1]
            setattr(self, f"level{level}", nnx.List(made))
            if level > 1:
                self.out_channels[level] = channels

    def __call__(self, x: Array) -> dict[int, Array]:
        frozen, outputs = self.frozen_parts(), {}
        x = jax.nn.relu6(self.stem(x))
        if "stem" in frozen:
            # Whoever differentiates with respect to every parameter still finds these at zero.
            x = lax.stop_gradient(x)
        for level in _BLOCKS:
            for block in getattr(self, f"level{level}"):
                x = block(x)
            if f"level{level}" in frozen:
                x = lax.stop_gradient(x)
            outputs[level] = x
        return {level: outputs[level] for level in self.out_channels}

    def frozen_parts(self) -> tuple[str, ...]:
        """Names of the children that ``freeze_at`` keeps from training: 1 the stem, 2 all up to stride 4, ..."""
        at = self.config.freeze_at
        levels = tuple(f"level{level}" for level in _BLOCKS if level <= at) if at > 1 else ()
        return ("stem", *levels) if at else ()


def block_of(number: int) -> tuple[int, int]:
    """Pyramid level and position there of the network's block ``number < NUM_BLOCKS``, counted from its input."""
    return [(level, i) for level, blocks in _BLOCKS.items() for i in range(len(blocks))][number]
