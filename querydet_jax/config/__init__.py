"""Configuration: the schema, the rules between its fields, loading and saving."""

from querydet_jax.config.card import Card
from querydet_jax.config.loading import load_card, load_config, override, save_config
from querydet_jax.config.rules import check
from querydet_jax.config.schema import (
    AnchorConfig,
    BackboneConfig,
    Config,
    DataConfig,
    FasterRCNNConfig,
    FCOSConfig,
    FPNConfig,
    HeadConfig,
    InferenceConfig,
    LossConfig,
    ModelConfig,
    QueryConfig,
    TrainConfig,
)

__all__ = [
    "AnchorConfig",
    "BackboneConfig",
    "Card",
    "Config",
    "DataConfig",
    "FCOSConfig",
    "FPNConfig",
    "FasterRCNNConfig",
    "HeadConfig",
    "InferenceConfig",
    "LossConfig",
    "ModelConfig",
    "QueryConfig",
    "TrainConfig",
    "check",
    "load_card",
    "load_config",
    "override",
    "save_config",
]
