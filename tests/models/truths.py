"""Extreme ground truth for two images of 64 x 96, and a detector's losses and gradients for any truth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from querydet_jax.models import DenseDetector, Losses

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3), dtype=np.uint8)
ROWS = 500
LEARNT = (20.0, 10.0, 50.0, 44.0)
NOWHERE = (300.0, 300.0, 302.0, 302.0)  # contains no point of any level and overlaps no anchor


def _many() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    first = rng.uniform(0, 60, (2, ROWS, 2))
    boxes = np.concatenate([first, first + rng.uniform(4, 40, (2, ROWS, 2))], axis=-1)
    return boxes, rng.integers(0, 3, (2, ROWS))


TRUTHS: dict[str, tuple[Any, Any]] = {
    "no boxes": (np.zeros((2, 1, 4)), [[-1], [-1]]),
    "nothing to learn": ([[NOWHERE], [NOWHERE]], [[0], [2]]),
    "one object": ([[LEARNT], [NOWHERE]], [[1], [-1]]),
    "an empty box": ([[(30, 30, 30, 30)], [LEARNT]], [[1], [0]]),
    "a box beyond the image": ([[(-3000, -3000, 3100, 3100)], [LEARNT]], [[1], [0]]),
    "a box that is no number": ([[(np.nan,) * 4], [LEARNT]], [[1], [0]]),
    "500 objects": _many(),
}


def losses_and_gradients(model: DenseDetector) -> Callable[..., tuple[Any, Any]]:
    """Return ``compute(boxes [B, g, 4], classes [B, g], normalizer=300.0)``, compiled once, with rows padded to 500."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def run(boxes: jax.Array, classes: jax.Array, normalizer: float) -> tuple[Losses, Any]:
        def total(params: Any) -> tuple[jax.Array, Losses]:
            losses = nnx.merge(graph, params, rest).losses(IMAGES, boxes, classes, normalizer)
            return losses.total, losses

        (_, losses), gradients = jax.value_and_grad(total, has_aux=True)(params)
        return losses, gradients

    def compute(boxes: Any, classes: Any, normalizer: float = 300.0) -> tuple[Any, Any]:
        missing = ROWS - np.shape(classes)[1]
        boxes = np.pad(np.float32(boxes), ((0, 0), (0, missing), (0, 0)))
        return run(boxes, np.pad(np.int32(classes), ((0, 0), (0, missing)), constant_values=-1), normalizer)

    return compute


def assert_finite(losses: Losses, gradients: Any) -> None:
    leaves = jax.tree.leaves((losses, gradients))
    assert all(np.isfinite(x).all() for x in leaves)
    assert all(x.dtype == np.float32 for x in leaves)
    assert float(losses.cls) > 0 and float(losses.query) > 0
