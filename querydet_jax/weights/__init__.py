"""Load and export weights: the published QueryDet, detectron2, torchvision, timm, MSRA (Caffe2), safetensors."""

from __future__ import annotations

from querydet_jax.weights.readers import read_tensors
from querydet_jax.weights.transfer import LoadReport, export_weights, load_weights, state_dict

__all__ = ["LoadReport", "export_weights", "load_weights", "read_tensors", "state_dict"]
