"""Weights of EfficientNet-Lite0 as a function of their PyTorch names and shapes; NumPy only."""

from __future__ import annotations

import zlib

import numpy as np


def make(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 in torch layout; activations stay where ReLU6 cuts some of them."""
    z = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if len(shape) > 1:
        return (z * np.sqrt(2.0 / np.prod(shape[1:]))).astype(np.float32)
    leaf = name.rsplit(".", 1)[1]
    values = {"weight": 1.0 + 0.1 * z, "bias": 0.05 * z, "running_mean": 0.1 * z, "running_var": np.exp(0.2 * z)}
    return values[leaf].astype(np.float32)
