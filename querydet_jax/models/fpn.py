"""Feature pyramid network (FPN, Lin et al. 2017) with P6 and P7 as in RetinaNet, FCOS or Faster R-CNN."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from querydet_jax.config import FPNConfig
from querydet_jax.models.layers import Conv, fpn_init, zeros_bias
from querydet_jax.sparse import CascadeLevel


class FPN(nnx.Module):
    """Map C_l to P_min..P_max with ``channels`` channels each; no norms, no activations.

    merged_5 = lateral_5(C5); merged_l = lateral_l(C_l) + upsample(merged_{l+1}); P_l = output_l(merged_l).
    P6 = conv stride 2 of C5 (or P5), P7 = conv stride 2 of relu(P6); or P6 = P5 at every other cell.

    The steps are separate methods, because sparse inference computes the outputs of fine levels only at a few cells.
    """

    def __init__(
        self,
        config: FPNConfig,
        in_channels: dict[int, int],
        min_level: int,
        max_level: int,
        dtype: jnp.dtype,
        rng: np.random.Generator,
    ):
        self.config = config
        self.min_level, self.max_level = min_level, max_level
        common: dict[str, Any] = dict(init=fpn_init, bias=zeros_bias, dtype=dtype, rng=rng)
        channels = config.channels
        for level in range(min_level, 6):
            setattr(self, f"lateral{level}", Conv(in_channels[level], channels, 1, **common))
            setattr(self, f"output{level}", Conv(channels, channels, 3, **common))
        if max_level >= 6 and config.top_source != "pool":
            top_channels = in_channels[5] if config.top_source == "c5" else channels
            self.p6 = Conv(top_channels, channels, 3, stride=2, **common)
        if max_level >= 7:
            self.p7 = Conv(channels, channels, 3, stride=2, **common)

    def merge(self, features: dict[int, Array], down_to: int) -> dict[int, Array]:
        """Run the top-down path; return ``{l: merged_l [B, h, w, C]}`` for l = down_to..5."""
        merged = {5: self.lateral(5)(features[5])}
        for level in range(4, down_to - 1, -1):
            above = jnp.repeat(jnp.repeat(merged[level + 1], 2, axis=1), 2, axis=2)
            merged[level] = self.lateral(level)(features[level]) + above
        return merged

    def sparse_level(self, level: int, features: dict[int, Array], merged: dict[int, Array]) -> CascadeLevel:
        """Return the inputs and convolutions of P_l, for computation at a few cells.

        If ``merged`` does not hold the level (the finest, which no other level reads), they include its lateral
        convolution; otherwise only the output convolution.
        """
        output = self.output(level).weights()
        if level in merged:
            return CascadeLevel(level, merged[level], output)
        return CascadeLevel(level, features[level], output, self.lateral(level).weights(), merged[level + 1])

    def outputs(self, features: dict[int, Array], merged: dict[int, Array], min_level: int) -> dict[int, Array]:
        """Return ``{l: P_l}`` for l = min_level..max_level, finest first."""
        out = {level: self.output(level)(merged[level]) for level in range(min_level, 6)}
        if self.max_level >= 6:
            if self.config.top_source == "c5":
                source = features[5]
            else:
                source = out[5] if 5 in out else self.output(5)(merged[5])
            p6 = source[:, ::2, ::2] if self.config.top_source == "pool" else self.p6(source)
            if min_level <= 6:
                out[6] = p6
            if self.max_level >= 7:
                out[7] = self.p7(jax.nn.relu(p6))
        return out

    def __call__(self, features: dict[int, Array]) -> dict[int, Array]:
        return self.outputs(features, self.merge(features, self.min_level), self.min_level)

    def lateral(self, level: int) -> Conv:
        return getattr(self, f"lateral{level}")

    def output(self, level: int) -> Conv:
        return getattr(self, f"output{level}")
