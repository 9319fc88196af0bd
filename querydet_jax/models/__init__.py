"""Detectors as flax.nnx modules."""

from __future__ import annotations

import numpy as np

from querydet_jax.config import ModelConfig
from querydet_jax.models.fcos import FCOS
from querydet_jax.models.retinanet import RetinaNet
from querydet_jax.models.skeleton import Candidates, DenseDetector, Losses, Outputs

_DETECTORS: dict[str, type[RetinaNet | FCOS]] = {"retinanet": RetinaNet, "fcos": FCOS}


def build_model(config: ModelConfig, seed: int = 0) -> RetinaNet | FCOS:
    """A freshly initialised detector, in inference mode (``model.train()`` for live batch norm)."""
    model = _DETECTORS[config.detector](config, np.random.default_rng(seed))
    model.eval()
    return model


__all__ = ["FCOS", "Candidates", "DenseDetector", "Losses", "Outputs", "RetinaNet", "build_model"]
