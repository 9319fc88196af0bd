"""What is measured: a trained run with its data, or a network with random weights and queries laid out by hand."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from benchmarks.query_layout import LAYOUT_LEVEL, at_level, density, script_queries
from querydet_jax.config import Config, InferenceConfig, ModelConfig, load_config, override
from querydet_jax.config.loading import config_path
from querydet_jax.config.rules import backbone_flavors
from querydet_jax.data import Dataset, open_split
from querydet_jax.inference.detector import Detector
from querydet_jax.inference.runs import open_model
from querydet_jax.models import DenseDetector, build_model
from querydet_jax.ops.anchors import level_shape


def open_run(run: str) -> tuple[Config, DenseDetector, Dataset]:
    """Return the configuration, trained model and validation data of a run folder."""
    config = load_config(config_path(run))
    model = open_model(config, run)
    return config, model, open_split(config, "val", run)


def random_model(backbone: str, classes: int, channels: int = 256, **changes: Any) -> DenseDetector:
    """Build QueryDet with random weights, in the backbone's usual flavour.

    Args:
      changes: values by dotted field of ``ModelConfig``.
    """
    widths = {f"{part}.channels": channels for part in ("fpn", "head", "query")}
    network = {"backbone.name": backbone, "backbone.flavor": backbone_flavors(backbone)[0]}
    return build_model(override(ModelConfig(), {**network, "num_classes": classes, **widths, **changes}))


def random_image(height: int, width: int, batch: int = 1) -> jax.Array:
    """Return uint8 ``[B, H, W, 3]``."""
    return jax.device_put(np.random.default_rng(0).integers(0, 256, (batch, height, width, 3), dtype=np.uint8))


def laid_out_queries(height: int, width: int, active: float, context: int = 2) -> np.ndarray:
    """Return queries bool ``[h, w]`` on P4 that make about the share ``active`` of P2's cells active."""
    shapes = [level_shape(height, width, level) for level in (3, 2)]
    return density(level_shape(height, width, LAYOUT_LEVEL), shapes, context, active)


def scripted_detector(model: DenseDetector, config: InferenceConfig, queries: np.ndarray, shape: tuple[int, int]):
    """Build a detector that fires at the given queries, carried over to its start level, whatever its weights.

    Args:
      queries: bool ``[h, w]`` on P4.
      shape: height and width of the image.
    """
    if config.query != "dense":
        start = config.start_level
        script_queries(model, at_level(queries, LAYOUT_LEVEL, start, level_shape(*shape, start)))
    return Detector(model, config)
