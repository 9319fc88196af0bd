"""QueryDet (Yang, Huang, Wang, CVPR 2022) in JAX and Flax.

Small objects on high-resolution feature maps, computed only where a query head points, with static
shapes throughout: one compiled program for CPU, GPU or TPU.
"""

from querydet_jax.config import Config, InferenceConfig, ModelConfig, load_config
from querydet_jax.inference.detector import Detections, Detector
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
    "build_model",
    "export_weights",
    "load_config",
    "load_weights",
]
