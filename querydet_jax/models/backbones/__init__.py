"""Backbones: images to C2..C5 at strides 4, 8, 16, 32."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from querydet_jax.config import BackboneConfig
from querydet_jax.models.backbones.efficientnet_lite import EfficientNetLite
from querydet_jax.models.backbones.resnet import ResNet

Backbone = ResNet | EfficientNetLite

_BACKBONES: dict[str, type[Backbone]] = {
    **{name: ResNet for name in ("resnet10", "resnet18", "resnet34", "resnet50", "resnet101")},
    "efficientnet_lite0": EfficientNetLite,
}


def build_backbone(config: BackboneConfig, dtype: jnp.dtype, rng: np.random.Generator) -> Backbone:
    return _BACKBONES[config.name](config, dtype, rng)


__all__ = ["Backbone", "EfficientNetLite", "ResNet", "build_backbone"]
