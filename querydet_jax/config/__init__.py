"""Configuration: the schema, the rules between its fields, loading and saving."""

from querydet_jax.config.card import Card
from querydet_jax.config.cards import card_names, cards_folder, find_card
from querydet_jax.config.loading import config_path, load_card, load_config, override, save_config
from querydet_jax.config.rules import check
from querydet_jax.config.schema import (
    AnchorConfig,
    AugmentConfig,
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
    "AugmentConfig",
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
    "card_names",
    "cards_folder",
    "check",
    "config_path",
    "find_card",
    "load_card",
    "load_config",
    "override",
    "save_config",
]
