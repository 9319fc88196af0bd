"""A small detector with random weights, pictures for it, and what its definition says it finds.

ResNet-18 of half the width and 16 channels above it; query probabilities and scores spread, so that some
cells fire and most do not, and boxes move.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import TypeVar

import cascade_oracle
import jax.numpy as jnp
import numpy as np
from flax import nnx

from querydet_jax import Detections, Detector, InferenceConfig, ModelConfig, build_model
from querydet_jax.config import BackboneConfig, FPNConfig, HeadConfig, QueryConfig
from querydet_jax.models import FCOS, RetinaNet

MODEL = ModelConfig(
    num_classes=3,
    backbone=BackboneConfig(name="resnet18", flavor="torchvision", width=32),
    fpn=FPNConfig(channels=16),
    head=HeadConfig(channels=16, num_convs=1),
    query=QueryConfig(channels=16, num_convs=2),
)
Network = TypeVar("Network", RetinaNet, FCOS)
REACH = 3  # of the deepest stack: two layers and the prediction
BASE = InferenceConfig(
    threshold=0.65,
    context=1,
    capacities=(0.05, 0.25),
    chunk=16,
    score_threshold=0.15,
    topk=100,
    max_detections=50,
)


def randomize(model: Network, seed: int) -> Network:
    """Other weights, in place."""
    rng = np.random.default_rng(seed)

    def draw(conv, gain: float, bias: float = 0.0) -> None:
        shape = conv.kernel[...].shape
        conv.kernel[...] = jnp.asarray(rng.normal(0, np.sqrt(gain / np.prod(shape[:3])), shape), jnp.float32)
        conv.bias[...] = jnp.asarray(rng.normal(bias, 0.1, shape[3:]), jnp.float32)

    # The random backbone's features are that large.
    for name, scale in {"lateral2": 8, "lateral3": 8, "lateral4": 5, "lateral5": 2, "p6": 2}.items():
        if hasattr(model.fpn, name):
            conv = getattr(model.fpn, name)
            conv.kernel[...] = conv.kernel[...] / scale
    for conv in [*model.head.cls_tower, *model.head.box_tower, *model.query_head.tower]:
        draw(conv, 2.0)
    draw(model.head.cls_score, 0.8, -2.0)
    draw(model.head.bbox_pred, 0.05)
    draw(model.query_head.pred, 6.0, -0.2)
    return model


@functools.cache
def model(min_level: int = 2, max_level: int = 6) -> RetinaNet:
    config = dataclasses.replace(MODEL, min_level=min_level, max_level=max_level)
    return randomize(build_model(config, seed=0), seed=16)


def with_bias(conv_of: Callable[[RetinaNet], nnx.Module], value: float) -> RetinaNet:
    """A copy of the model whose convolution ``conv_of(model)`` has all biases at ``value``."""
    changed = nnx.clone(model())
    conv = conv_of(changed)
    conv.bias[...] = jnp.full_like(conv.bias[...], value)
    return changed


def with_query_bias(value: float) -> RetinaNet:
    """At 100 every cell fires, at -100 none."""
    return with_bias(lambda model: model.query_head.pred, value)


@contextlib.contextmanager
def updated(detector: Detector, changed: RetinaNet) -> Iterator[None]:
    """The detector with other weights for a while; nothing may be compiled for them."""
    before = detector.compilations()
    detector.update(changed)
    yield
    assert detector.compilations() == before
    detector.update(model())


@functools.cache
def detector(**changes) -> Detector:
    return Detector(model(), dataclasses.replace(BASE, **changes))


def pictures(batch: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Gray with coloured blocks on a share of the picture: none on the first, everywhere on the last."""
    rng = np.random.default_rng(seed)
    out = np.full((batch, height, width, 3), 118, np.uint8)
    for i in range(batch):
        blocks = rng.integers(0, 256, (-(-height // 6), -(-width // 6), 3), dtype=np.uint8)
        noise = blocks.repeat(6, 0).repeat(6, 1)[:height, :width]
        rows = height * i // max(batch - 1, 1)
        out[i, :rows] = noise[:rows]
    return out


def assert_same(result: Detections, expected: Detections) -> None:
    """The same boxes, classes and order; values to rounding."""
    np.testing.assert_array_equal(result.valid, expected.valid)
    np.testing.assert_array_equal(result.classes, expected.classes)
    np.testing.assert_allclose(result.scores, expected.scores, rtol=0, atol=1e-5)
    np.testing.assert_allclose(result.boxes, expected.boxes, rtol=1e-5, atol=1e-3)


def counts(result: Detections) -> dict[int, list[int]]:
    return {level: [int(x) for x in stats[:3]] for level, stats in result.stats.items()}


@functools.cache
def _compiled_features():
    return nnx.jit(lambda model, images: model.features(images))


def features(model: nnx.Module, images: np.ndarray) -> dict[int, np.ndarray]:
    return {level: np.asarray(x) for level, x in _compiled_features()(model, images).items()}


def weights(stack) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(np.asarray(conv.kernel), np.asarray(conv.bias)) for conv in stack]


def reference(
    model: RetinaNet | FCOS, images: np.ndarray, config: InferenceConfig, context: int | None = None
) -> tuple[list[cascade_oracle.Candidates], dict[int, list[int]]]:
    """What ``config`` should find in each image, and [queries, keys, active] by sparse level."""
    cls, box = model.head_stacks()
    return cascade_oracle.detect(
        features(model, images),
        (weights(cls), weights(box)),
        weights(model.query_head.stack()) if config.query == "csq" else None,
        start_level=config.start_level,
        threshold=config.threshold,
        context=config.context if context is None else context,
        topk=config.topk,
        score_threshold=config.score_threshold,
        nms_iou=config.nms_iou,
        max_detections=config.max_detections,
        candidates=cascade_oracle.point_candidates if isinstance(model, FCOS) else cascade_oracle.candidates,
    )


def assert_matches(result: Detections, expected: list[cascade_oracle.Candidates]) -> None:
    for b, image in enumerate(expected):
        valid = np.asarray(result.valid[b])
        assert valid.sum() == len(image.scores)
        np.testing.assert_array_equal(np.asarray(result.classes[b])[valid], image.classes)
        np.testing.assert_allclose(np.asarray(result.scores[b])[valid], image.scores, rtol=0, atol=1e-5)
        np.testing.assert_allclose(np.asarray(result.boxes[b])[valid], image.boxes, rtol=1e-5, atol=1e-3)
