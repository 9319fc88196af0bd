"""Backbones: images to C2..C5 at strides 4, 8, 16, 32."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from querydet_jax.config import BackboneConfig
from querydet_jax.models.backbones.resnet import ResNet

_BACKBONES = {name: ResNet for name in ("resnet10", "resnet18", "resnet34", "resnet50", "resnet101")}


def build_backbone(config: BackboneConfig, dtype: jnp.dtype, rng: np.random.Generator) -> ResNet:
    return _BACKBONES[config.name](config, dtype, rng)


__all__ = ["ResNet", "build_backbone"]
