"""With jax's 64-bit types switched on (JAX_ENABLE_X64), programs are made of float32 all the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_training
from flax import nnx
from small_detector import BASE, MODEL, assert_same, pictures, randomize

from querydet_jax import Detector, build_model
from querydet_jax.config import AnchorConfig, FasterRCNNConfig, FPNConfig, ModelConfig, override
from querydet_jax.ops.nms import class_wise_nms, soft_nms

FASTER_RCNN = {
    "detector": "faster_rcnn",
    "fpn": FPNConfig(channels=16, top_source="pool"),
    "anchors": AnchorConfig(scale=8.0, sizes_per_octave=1),
    "faster_rcnn": FasterRCNNConfig(proposals=40, roi_size=3, channels=16),
}
SMALL = dataclasses.replace(
    MODEL, min_level=3, max_level=5, backbone=dataclasses.replace(MODEL.backbone, name="resnet10")
)


@pytest.fixture(autouse=True)
def _x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def strong_float64(jaxpr: Any) -> list[str]:
    """Where a program computes in float64; weak types (of Python's numbers) give way to float32.

    Optax takes the powers of AdamW's decays in float64, and rounds them.
    """
    found = []
    for equation in jaxpr.eqns:
        if any(getattr(v.aval, "dtype", 0) == jnp.float64 and not v.aval.weak_type for v in equation.outvars):
            found.append(str(equation.source_info.traceback or equation))
        for inner in jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            found += strong_float64(inner) if hasattr(inner, "eqns") else []
    return [place for place in found if "optax" not in place]


def assert_narrow(tree: Any) -> None:
    assert {str(x.dtype) for x in jax.tree.leaves(tree)} <= {"float32", "int32", "bool"}


@pytest.mark.parametrize(
    ("changes", "inference"),
    [
        ({}, {"query": "cq", "nms": "linear"}),
        ({"detector": "fcos"}, {"kernel": "tiles", "nms": "gaussian", "overflow": "cap"}),
        (FASTER_RCNN, {}),
    ],
)
def test_detectors(changes, inference):
    model = build_model(dataclasses.replace(SMALL, **changes))
    assert_narrow(nnx.state(model))
    function, state = Detector(model, dataclasses.replace(BASE, **inference)).function()
    images, sizes = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.uint8), jax.ShapeDtypeStruct((2, 2), jnp.int32)
    jaxpr, found = jax.make_jaxpr(function, return_shape=True)(state, images, sizes)
    assert_narrow(found)
    assert strong_float64(jaxpr.jaxpr) == []


@pytest.mark.parametrize(
    ("changes", "train"),
    [
        ({}, {"optimizer": "adamw", "ema": 0.9, "accumulate": 2, "schedule": "cosine", "warmup_steps": 2}),
        ({"detector": "fcos"}, {"clip_norm": 1.0, "clip_value": 1.0}),
        (FASTER_RCNN, {"decay_steps": (5,)}),
    ],
)
def test_training_steps(changes, train):
    small = small_training.SMALL
    model: ModelConfig = dataclasses.replace(small.model, **changes)
    config = dataclasses.replace(small, model=model, train=override(small.train, train))
    state, step = small_training.start(config, None)
    assert_narrow(state)
    jaxpr, found = jax.make_jaxpr(step, return_shape=True)(state, small_training.a_batch())
    assert_narrow(found)
    assert strong_float64(jaxpr.jaxpr) == []


@pytest.mark.slow
def test_the_same_detections():
    images = pictures(2, 32, 64)
    detect = Detector(randomize(build_model(SMALL), seed=16), dataclasses.replace(BASE, score_threshold=0.1))
    with jax.enable_x64(False):
        expected = detect(images)
    assert expected.valid.sum() > 5
    found = detect(images)
    assert_same(found, expected)
    assert_narrow(found)


@pytest.mark.parametrize("method", ["hard", "gaussian"])
def test_the_same_suppression(method):
    rng = np.random.default_rng(3)
    corner = rng.uniform(0, 60, (300, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(10, 40, (300, 2))], axis=1).astype(np.float32)
    scores, classes = rng.uniform(0, 1, 300).astype(np.float32), rng.integers(0, 3, 300, dtype=np.int32)

    def suppress() -> tuple[Any, ...]:
        arrays = (jnp.asarray(boxes), jnp.asarray(scores), jnp.asarray(classes))
        if method == "hard":
            return class_wise_nms(*arrays, iou_threshold=0.5, max_detections=40)
        return soft_nms(*arrays, method=method, iou_threshold=0.5, sigma=0.6, prune=1e-3, max_detections=40)

    with jax.enable_x64(False):
        expected = suppress()
    for found, value in zip(suppress(), expected, strict=True):
        assert found.dtype == value.dtype
        np.testing.assert_array_equal(found, value)
