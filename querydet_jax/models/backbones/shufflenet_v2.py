"""ShuffleNetV2 1.0x (Ma et al. 2018), a backbone of QueryDet Table 7."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from querydet_jax.config import BackboneConfig
from querydet_jax.models.backbones.freezing import norm_kind, stop_if_frozen
from querydet_jax.models.backbones.resnet import Stem
from querydet_jax.models.layers import Conv, msra_init

# {level l: (channels, units) with output stride 2^l}; level 2 is the stem.
_STAGES = {3: (116, 4), 4: (232, 8), 5: (464, 4)}
_STEM, _LAST = 24, 1024


def channel_shuffle(x: Array) -> Array:
    """Interleave the halves of ``[B, h, w, C]``: channels 0, C/2, 1, C/2 + 1, ..."""
    halves = x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2)
    return halves.swapaxes(-1, -2).reshape(x.shape)


class Shortcut(nnx.Module):
    """Shortcut of a unit that halves the map: depthwise convolution, 1x1 convolution, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, **common: Any):
        self.depthwise = Conv(in_channels, in_channels, 3, stride=2, depthwise=True, **common)
        self.project = Conv(in_channels, out_channels, 1, **common)

    def __call__(self, x: Array) -> Array:
        return jax.nn.relu(self.project(self.depthwise(x)))


class ShuffleUnit(nnx.Module):
    """Three convolutions on half of the channels; the other half is unchanged; then a channel shuffle.

    A unit that halves the map (``in_channels != out_channels``) feeds all channels to both branches.
    """

    def __init__(self, in_channels: int, out_channels: int, **common: Any):
        width = out_channels // 2
        halves = in_channels != out_channels
        self.shortcut = Shortcut(in_channels, width, **common) if halves else None
        self.expand = Conv(in_channels if halves else width, width, 1, **common)
        self.depthwise = Conv(width, width, 3, stride=2 if halves else 1, depthwise=True, **common)
        self.project = Conv(width, width, 1, **common)

    def __call__(self, x: Array) -> Array:
        if self.shortcut is None:
            kept, x = jnp.split(x, 2, axis=-1)
        else:
            kept = self.shortcut(x)
        x = self.depthwise(jax.nn.relu(self.expand(x)))
        x = jax.nn.relu(self.project(x))
        return channel_shuffle(jnp.concatenate([kept, x], axis=-1))


class ShuffleNetV2(nnx.Module):
    """Map normalised pixels ``[B, H, W, 3]`` to ``{2: C2, .., 5: C5}`` with 24, 116, 232 and 1024 channels.

    This is torchvision's network without the classifier. C2 is the output of the stem's max pool, C5 that of the last
    1x1 convolution, which reads the 464 channels of the last stage.
    """

    def __init__(self, config: BackboneConfig, dtype: jnp.dtype, rng: np.random.Generator):
        self.config = config
        frozen = self.frozen_parts()

        def common(part: str) -> dict[str, Any]:
            return dict(init=msra_init, norm=norm_kind(config, part, frozen), dtype=dtype, rng=rng)

        self.stem = Stem(_STEM, 3, **common("stem"))
        channels = _STEM
        self.out_channels = {2: channels}
        for level, (width, units) in _STAGES.items():
            made = []
            for _ in range(units):
                made.append(ShuffleUnit(channels, width, **common(f"level{level}")))
                channels = width
            setattr(self, f"level{level}", nnx.List(made))
            self.out_channels[level] = channels
        self.last = Conv(channels, _LAST, 1, **common("last"))
        self.out_channels[5] = _LAST

    def __call__(self, x: Array) -> dict[int, Array]:
        frozen = self.frozen_parts()
        x = stop_if_frozen(self.stem(x), "stem", frozen)
        outputs = {2: x}
        for level in _STAGES:
            for unit in getattr(self, f"level{level}"):
                x = unit(x)
            x = outputs[level] = stop_if_frozen(x, f"level{level}", frozen)
        outputs[5] = stop_if_frozen(jax.nn.relu(self.last(x)), "last", frozen)
        return outputs

    def frozen_parts(self) -> tuple[str, ...]:
        """Return the names of the parts that ``freeze_at`` freezes: 1 or 2 the stem, 3 all up to stride 8, ..."""
        at = self.config.freeze_at
        levels = tuple(f"level{level}" for level in _STAGES if level <= at)
        return ("stem", *levels, *(("last",) if at == 5 else ())) if at else ()
