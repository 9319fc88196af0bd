"""Backbones, which map images to C2..C5 at strides 4, 8, 16, 32."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from querydet_jax.config import BackboneConfig
from querydet_jax.models.backbones.efficientnet_lite import EfficientNetLite
from querydet_jax.models.backbones.mobilenet_v2 import MobileNetV2
from querydet_jax.models.backbones.resnet import ResNet
from querydet_jax.models.backbones.shufflenet_v2 import ShuffleNetV2

Backbone = ResNet | EfficientNetLite | MobileNetV2 | ShuffleNetV2

_BACKBONES: dict[str, type[Backbone]] = {
    **{name: ResNet for name in ("resnet10", "resnet18", "resnet34", "resnet50", "resnet101")},
    "efficientnet_lite0": EfficientNetLite,
    "mobilenet_v2": MobileNetV2,
    "shufflenet_v2": ShuffleNetV2,
}


def build_backbone(config: BackboneConfig, dtype: jnp.dtype, rng: np.random.Generator) -> Backbone:
    return _BACKBONES[config.name](config, dtype, rng)


__all__ = ["Backbone", "EfficientNetLite", "MobileNetV2", "ResNet", "ShuffleNetV2", "build_backbone"]
