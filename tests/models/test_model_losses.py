"""Training losses: QueryDet section 3.4 written out in NumPy, empty images, the normaliser."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from truths import TRUTHS, assert_finite, losses_and_gradients

from querydet_jax.config import LossConfig, ModelConfig
from querydet_jax.models import DenseDetector, Losses
from querydet_jax.models.loss_terms import level_weights, query_scale_range

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3)).astype(np.uint8)
BOXES = np.zeros((2, 5, 4), np.float32)
BOXES[0, :3] = [[10, 10, 34, 30], [60, 5, 68, 15], [20, 30, 80, 64]]
BOXES[1, [1, 4]] = [[40, 40, 50, 52], [0, 0, 90, 60]]
CLASSES = np.array([[0, 2, 1, -1, -1], [-1, 1, -1, -1, 0]], np.int32)
SHAPES = [(8, 12), (4, 6), (2, 3), (1, 2)]  # of P3..P6
NOTHING = np.full_like(CLASSES, -1)


@pytest.fixture(scope="module")
def compute(small_model: DenseDetector) -> Any:
    """``compute(boxes, classes, normalizer)`` returns the losses and the gradients of the total."""
    graph, params, rest = nnx.split(small_model, small_model.trainable(), ...)

    def total(params: Any, boxes: jax.Array, classes: jax.Array, normalizer: jax.Array) -> tuple[jax.Array, Losses]:
        losses = nnx.merge(graph, params, rest).losses(IMAGES, boxes, classes, normalizer)
        return losses.total, losses

    run = jax.jit(jax.value_and_grad(total, has_aux=True))

    def compute(boxes: np.ndarray, classes: np.ndarray, normalizer: float = 100.0) -> tuple[Losses, Any]:
        (_, losses), gradients = run(params, boxes, classes, jnp.float32(normalizer))
        return losses, gradients

    return compute


@pytest.fixture(scope="module")
def outputs(small_model: DenseDetector) -> Any:
    """Dense outputs, ``(labels, targets)`` and query targets by level."""
    graph, state = nnx.split(small_model)

    def run(state: Any, images: jax.Array, boxes: jax.Array, classes: jax.Array) -> Any:
        model = nnx.merge(graph, state)
        out = model(images)
        queries = {level: model.query_target(level, x.shape[1:], boxes, classes) for level, x in out.query.items()}
        return out, model.targets(SHAPES, boxes, classes), queries

    return jax.tree.map(np.asarray, jax.jit(run)(state, IMAGES, BOXES, CLASSES))


def focal(logits: np.ndarray, targets: np.ndarray, gamma: float) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    z = np.where(targets, logits, -logits)
    return np.where(targets, 0.25, 0.75) * np.exp(-np.logaddexp(0, z)) ** gamma * np.logaddexp(0, -z)


def test_losses_are_the_formula(compute: Any, outputs: Any) -> None:
    losses, _ = compute(BOXES, CLASSES)
    out, (labels, targets), queries = outputs
    assert [x.shape[1:3] for x in out.features.values()] == SHAPES
    foreground = int((labels >= 0).sum())
    assert foreground >= 5 and (labels == -2).any()
    normalizer = 0.9 * 100 + 0.1 * foreground
    cls_loss = box_loss = query_loss = 0.0
    start = 0
    for i, (level, weight) in enumerate(zip((3, 4, 5, 6), (1.0, 1.5, 2.0, 4.0), strict=True)):
        cls = out.cls[level].reshape(2, -1, 3)
        box = np.float64(out.box[level]).reshape(2, -1, 4)
        label, target = labels[:, start : start + cls.shape[1]], targets[:, start : start + cls.shape[1]]
        start += cls.shape[1]
        one_hot = label[..., None] == np.arange(3)
        cls_sum = focal(cls, one_hot, 2.0)[label != -2].sum()
        distance = np.abs(box - target)[label >= 0]
        box_sum = np.where(distance < 0.1, 5 * distance**2, distance - 0.05).sum()
        assert float(losses.per_level["cls"][i]) == pytest.approx(cls_sum, rel=1e-4)
        assert float(losses.per_level["box"][i]) == pytest.approx(box_sum, rel=1e-4, abs=1e-6)
        cls_loss += weight * cls_sum / normalizer
        box_loss += weight * box_sum / normalizer
    assert start == labels.shape[1]
    for level, weight, gamma in ((3, 10.0, 1.2), (4, 5.0, 1.5)):
        assert 0 < queries[level].sum() < queries[level].size
        query_loss += weight * focal(out.query[level], queries[level], gamma).mean()
    assert float(losses.num_foreground) == foreground
    assert float(losses.normalizer) == pytest.approx(normalizer)
    assert float(losses.cls) == pytest.approx(cls_loss, rel=1e-4)
    assert float(losses.box) == pytest.approx(box_loss, rel=1e-4)
    assert float(losses.query) == pytest.approx(query_loss, rel=1e-4)
    assert float(losses.total) == pytest.approx(cls_loss + box_loss + query_loss, rel=1e-4)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(losses))


def test_targets_decode_to_their_boxes(outputs: Any) -> None:
    _, (labels, targets), _ = outputs
    assert labels.shape == (2, (96 + 24 + 6 + 2) * 9) and targets.shape == (*labels.shape, 4)
    assert np.isfinite(targets).all() and not targets[labels < 0].any()
    # Finest level first, then y, x, anchor; bases 32, 64, ... at strides 8, 16, ...
    rows = []
    for level, (height, width) in zip((3, 4, 5, 6), SHAPES, strict=True):
        for y in range(height):
            for x in range(width):
                for octave in range(3):
                    for ratio in (0.5, 1.0, 2.0):
                        size = 4 * 2**level * 2 ** (octave / 3)
                        rows.append((x * 2**level, y * 2**level, size / ratio**0.5, size * ratio**0.5))
    x, y, width, height = np.array(rows).T
    for image in range(2):
        for row in np.flatnonzero(labels[image] >= 0):
            dx, dy, dw, dh = targets[image, row]
            center = np.array([x[row] + dx * width[row], y[row] + dy * height[row]])
            half = np.array([width[row] * np.exp(dw), height[row] * np.exp(dh)]) / 2
            box = np.concatenate([center - half, center + half])
            candidates = np.flatnonzero(CLASSES[image] == labels[image, row])
            assert any(np.allclose(box, BOXES[image, g], atol=1e-2) for g in candidates)


def test_no_objects_give_finite_losses_and_gradients(compute: Any) -> None:
    losses, gradients = compute(BOXES, NOTHING)
    assert float(losses.num_foreground) == 0 and float(losses.box) == 0
    assert float(losses.cls) > 0 and float(losses.query) > 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((losses, gradients)))
    # Without objects the box branch gets no gradient.
    assert not np.any(gradients["head"]["bbox_pred"]["kernel"][...])
    some, gradients = compute(BOXES, CLASSES)
    assert float(some.num_foreground) > 0
    assert np.any(gradients["head"]["bbox_pred"]["kernel"][...])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((some, gradients)))


@pytest.fixture(scope="module")
def of_any_truth(small_model: DenseDetector) -> Any:
    return losses_and_gradients(small_model)


@pytest.mark.parametrize("name", list(TRUTHS))
def test_losses_and_gradients_are_finite(of_any_truth: Any, name: str) -> None:
    losses, gradients = of_any_truth(*TRUTHS[name])
    assert_finite(losses, gradients)
    assert (
        (float(losses.num_foreground) > 0) == (float(losses.box) > 0) == (name not in ("no boxes", "nothing to learn"))
    )


def test_no_rows_equal_rows_of_padding(small_model: DenseDetector, compute: Any) -> None:
    graph, state = nnx.split(small_model)
    run = jax.jit(lambda state, boxes, classes: nnx.merge(graph, state).losses(IMAGES, boxes, classes, 100.0))
    none = run(state, BOXES[:, :0], CLASSES[:, :0])
    padded, _ = compute(BOXES, NOTHING)
    for a, b in zip(jax.tree.leaves(none), jax.tree.leaves(padded), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_coordinates_of_padding_do_not_matter(compute: Any) -> None:
    elsewhere = BOXES.copy()
    elsewhere[CLASSES < 0] = [5, 5, 60, 40]
    a, _ = compute(BOXES, CLASSES)
    b, _ = compute(elsewhere, CLASSES)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_normalizer_is_a_moving_average_bounded_below(compute: Any) -> None:
    first, _ = compute(BOXES, CLASSES, 100.0)
    count = float(first.num_foreground)
    second, _ = compute(BOXES, CLASSES, float(first.normalizer))
    assert float(second.normalizer) == pytest.approx(0.9 * (0.9 * 100 + 0.1 * count) + 0.1 * count, rel=1e-6)
    # The updated average divides the sums of the same step, but not the query loss.
    ratio = float(first.normalizer) / float(second.normalizer)
    assert float(second.cls) == pytest.approx(float(first.cls) * ratio, rel=1e-5)
    assert float(second.box) == pytest.approx(float(first.box) * ratio, rel=1e-5)
    assert float(second.query) == float(first.query)
    # An average below 1 is stored as it is, but the divisor is at least 1.
    empty, _ = compute(BOXES, NOTHING, 0.5)
    assert float(empty.normalizer) == pytest.approx(0.45)
    weighted = float(jnp.sum(empty.per_level["cls"] * jnp.asarray([1.0, 1.5, 2.0, 4.0])))
    assert float(empty.cls) == pytest.approx(weighted, rel=1e-5)


def test_level_weights() -> None:
    config = ModelConfig()
    assert level_weights(config) == (1.0, 1.4, 2.1, 2.5, 2.9, 3.2)

    def weights(**loss: Any) -> tuple[float, ...]:
        return level_weights(dataclasses.replace(config, loss=LossConfig(**loss)))

    assert weights(level_weighting="uniform") == (1.0,) * 6
    assert weights(level_weighting="linear") == pytest.approx((1.0, 1.4, 1.8, 2.2, 2.6, 3.0))
    assert weights(level_weighting="linear", linear_max=6.0) == pytest.approx((1, 2, 3, 4, 5, 6))
    assert weights(level_weights=(1.0, 1.4, 1.8, 2.2, 2.6, 2.6)) == (1.0, 1.4, 1.8, 2.2, 2.6, 2.6)


def test_query_levels_have_their_published_scales(small_model: DenseDetector) -> None:
    assert query_scale_range(small_model.config, 3) == (0.0, 32.0)
    assert query_scale_range(small_model.config, 4) == (0.0, 64.0)
