"""Detectors as flax.nnx modules."""

from __future__ import annotations

import numpy as np

from querydet_jax.config import ModelConfig
from querydet_jax.models.base import DenseDetector
from querydet_jax.models.candidates import Candidates
from querydet_jax.models.faster_rcnn import FasterRCNN
from querydet_jax.models.fcos import FCOS
from querydet_jax.models.loss_terms import Losses, Outputs
from querydet_jax.models.retinanet import RetinaNet

Detectors = RetinaNet | FCOS | FasterRCNN

_DETECTORS: dict[str, type[Detectors]] = {"retinanet": RetinaNet, "fcos": FCOS, "faster_rcnn": FasterRCNN}


def build_model(config: ModelConfig, seed: int = 0) -> Detectors:
    """A freshly initialised detector, in inference mode (``model.train()`` for live batch norm)."""
    model = _DETECTORS[config.detector](config, np.random.default_rng(seed))
    model.eval()
    return model


__all__ = ["FCOS", "Candidates", "DenseDetector", "FasterRCNN", "Losses", "Outputs", "RetinaNet", "build_model"]
