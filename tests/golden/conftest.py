"""The published code's weights, images and boxes, rebuilt from their names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import recipe
from published_images import rgb

import querydet_jax as qd

HERE = Path(__file__).parent

# Recorded with 10 classes and the VisDrone settings of the losses.
OVERRIDES = {
    "model.num_classes": 10,
    "model.loss.level_weights": (1.0, 1.4, 1.8, 2.2, 2.6, 2.6),
    "model.loss.query_gammas": (1.3, 1.3),
    "inference.max_detections": 500,
}
CONFIG = Path(__file__).parents[2] / "configs" / "coco_querydet_r50.py"


@pytest.fixture(scope="session")
def config() -> qd.Config:
    return qd.load_config(CONFIG, OVERRIDES)


@pytest.fixture(scope="session")
def weights() -> dict[str, np.ndarray]:
    shapes = json.loads((HERE / "querydet10_param_shapes.json").read_text())
    return {name: recipe.make(name, shape) for name, shape in shapes.items()}


@pytest.fixture(scope="session")
def model(config: qd.Config, weights: dict[str, np.ndarray]) -> Any:
    model = qd.build_model(config.model)
    report = qd.load_weights(model, weights)
    assert not report.missing and not report.unexpected
    return model


@pytest.fixture(scope="session")
def image_a() -> np.ndarray:
    return rgb("a", 120, 180)


@pytest.fixture(scope="session")
def image_b() -> np.ndarray:
    return rgb("b", 200, 300)


@pytest.fixture(scope="session")
def batch() -> tuple[np.ndarray, ...]:
    """Images a and c on one canvas, with their boxes."""
    images, sizes = np.zeros((2, 128, 192, 3), np.uint8), []
    for i, (tag, height, width) in enumerate((("a", 120, 180), ("c", 128, 160))):
        images[i, :height, :width] = rgb(tag, height, width)
        sizes.append((height, width))
    boxes, classes = np.zeros((2, 16, 4), np.float32), np.full((2, 16), -1, np.int32)
    boxes[0, :12], classes[0, :12] = recipe.boxes("a12", 12, 120, 180, 10)
    boxes[1, :5], classes[1, :5] = recipe.boxes("c5", 5, 128, 160, 10, smin=4.0, smax=60.0)
    return images, boxes, classes, np.asarray(sizes, np.int32)


@pytest.fixture(scope="session")
def recorded():
    """Recorded arrays by file name."""
    cache: dict[str, Any] = {}

    def read(name: str) -> Any:
        if name not in cache:
            with np.load(HERE / f"{name}.npz") as file:
                cache[name] = dict(file)
        return cache[name]

    return read
