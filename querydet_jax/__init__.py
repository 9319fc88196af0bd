"""QueryDet (Yang, Huang, Wang, CVPR 2022) in JAX and Flax.

Small objects on high-resolution feature maps, computed only where a query head points, with static
shapes throughout: one compiled program for CPU, GPU or TPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from querydet_jax.config import Config, InferenceConfig, ModelConfig, load_config
    from querydet_jax.inference.detector import Detector
    from querydet_jax.inference.pipeline import Detections
    from querydet_jax.inference.prediction import Prediction
    from querydet_jax.inference.predictor import Predictor, load
    from querydet_jax.models import Losses, Outputs, build_model
    from querydet_jax.weights import LoadReport, export_weights, load_weights

__version__ = "0.1.0"

__all__ = [
    "Config",
    "Detections",
    "Detector",
    "InferenceConfig",
    "LoadReport",
    "Losses",
    "ModelConfig",
    "Outputs",
    "Prediction",
    "Predictor",
    "build_model",
    "export_weights",
    "load",
    "load_config",
    "load_weights",
]


def __getattr__(name: str) -> Any:
    """Import public names on first use: `querydet --help` needs neither jax nor flax."""
    if name in {"Config", "InferenceConfig", "ModelConfig", "load_config"}:
        from querydet_jax import config as module
    elif name == "Detector":
        from querydet_jax.inference import detector as module
    elif name == "Detections":
        from querydet_jax.inference import pipeline as module
    elif name == "Prediction":
        from querydet_jax.inference import prediction as module
    elif name in {"Predictor", "load"}:
        from querydet_jax.inference import predictor as module
    elif name in {"Losses", "Outputs", "build_model"}:
        from querydet_jax import models as module
    elif name in {"LoadReport", "export_weights", "load_weights"}:
        from querydet_jax import weights as module
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
