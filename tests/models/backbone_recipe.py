"""Weights of a backbone as a function of their PyTorch names and shapes, and an image, in NumPy only."""

from __future__ import annotations

import importlib.util
import zlib
from pathlib import Path

import numpy as np


def make(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return float32 weights in torch layout, scaled so that ReLU6 cuts some activations."""
    z = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if len(shape) > 1:
        return (z * np.sqrt(2.0 / np.prod(shape[1:]))).astype(np.float32)
    leaf = name.rsplit(".", 1)[1]
    values = {"weight": 1.0 + 0.1 * z, "bias": 0.05 * z, "running_mean": 0.1 * z, "running_var": np.exp(0.2 * z)}
    return values[leaf].astype(np.float32)


def image() -> np.ndarray:
    """Return ``recipe.image('a', 96, 128)`` of the golden tests, as uint8 RGB ``[96, 128, 3]``."""
    found = importlib.util.spec_from_file_location("recipe", Path(__file__).parents[1] / "golden" / "recipe.py")
    recipe = importlib.util.module_from_spec(found)
    found.loader.exec_module(recipe)
    return np.ascontiguousarray(recipe.image("a", 96, 128)[::-1].transpose(1, 2, 0))
