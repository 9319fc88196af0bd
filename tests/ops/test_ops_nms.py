"""Selection and suppression: NumPy oracles, the published code's kept boxes, the corner cases."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from querydet_jax.ops.nms import class_wise_nms, top_scores

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "aux.npz")
COUNT = 80
NMS = {limit: jax.jit(partial(class_wise_nms, iou_threshold=0.5, max_detections=limit)) for limit in (7, COUNT)}


def iou_of(box: np.ndarray, other: np.ndarray) -> np.float32:
    width, height = np.maximum(np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2]), np.float32(0))
    intersection = width * height
    if intersection == 0:
        return np.float32(0)
    return intersection / (
        (box[2] - box[0]) * (box[3] - box[1]) + (other[2] - other[0]) * (other[3] - other[1]) - intersection
    )


def greedy(boxes: np.ndarray, scores: np.ndarray, classes: np.ndarray, limit: int, threshold: float = 0.5) -> list[int]:
    """Best first (the first on ties), kept unless a kept box of its class overlaps it above the threshold."""
    kept: list[int] = []
    for i in np.argsort(-scores, kind="stable"):
        if np.isneginf(scores[i]) or len(kept) == limit:
            break
        if all(classes[k] != classes[i] or iou_of(boxes[k], boxes[i]) <= np.float32(threshold) for k in kept):
            kept.append(int(i))
    return kept


@st.composite
def candidates(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Up to 80 boxes on a coarse lattice, with equal scores, equal boxes and IoUs of exactly 1/2."""
    ends = draw(hnp.arrays(np.int32, (COUNT, 2, 2), elements=st.integers(0, 6)))
    scores = draw(hnp.arrays(np.int32, (COUNT,), elements=st.integers(-3, 12))) / np.float32(12)
    classes = draw(hnp.arrays(np.int32, (COUNT,), elements=st.integers(0, 2)))
    boxes = np.sort(ends, axis=1).reshape(COUNT, 4).astype(np.float32)
    return boxes, np.where(scores < 0, -np.inf, scores).astype(np.float32), classes


@pytest.mark.parametrize("limit", [7, COUNT])
@settings(deadline=None, max_examples=50)
@given(given=candidates())
def test_equals_greedy(limit: int, given: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    expected = greedy(*given, limit)
    keep, valid = map(np.asarray, NMS[limit](*given))
    assert keep.shape == valid.shape == (limit,) and keep.dtype == np.int32
    assert valid.tolist() == [True] * len(expected) + [False] * (limit - len(expected))
    assert keep[valid].tolist() == expected
    assert (keep[~valid] == 0).all()


@pytest.mark.parametrize("limit", [200, 20])
def test_keeps_what_the_published_code_keeps(limit: int) -> None:
    arrays = [jnp.asarray(GOLDEN[f"snms_{name}"]) for name in ("boxes", "scores", "classes")]
    keep, valid = class_wise_nms(*arrays, iou_threshold=0.5, max_detections=limit)
    expected = GOLDEN["nms_keep"][:limit]
    assert len(expected) < len(GOLDEN["snms_boxes"])  # something is suppressed
    np.testing.assert_array_equal(np.asarray(keep)[np.asarray(valid)], expected)


def kept(boxes: list, scores: list, classes: list, threshold: float = 0.5, limit: int = 5) -> list[int]:
    keep, valid = class_wise_nms(
        jnp.asarray(boxes, jnp.float32).reshape(-1, 4),
        jnp.asarray(scores, jnp.float32),
        jnp.asarray(classes, jnp.int32),
        iou_threshold=threshold,
        max_detections=limit,
    )
    return np.asarray(keep)[np.asarray(valid)].tolist()


def test_rules_by_hand() -> None:
    half, whole, apart = [0, 0, 10, 5], [0, 0, 10, 10], [50, 50, 60, 60]
    assert kept([whole, half, apart], [0.9, 0.8, 0.7], [0, 0, 0]) == [0, 1, 2]  # IoU 1/2 is not above 1/2
    assert kept([whole, half, apart], [0.9, 0.8, 0.7], [0, 0, 0], threshold=0.49) == [0, 2]
    assert kept([whole, whole, whole], [0.3, 0.9, 0.6], [0, 1, 0]) == [1, 2]  # classes do not meet
    assert kept([whole, whole], [0.5, 0.5], [2, 2]) == [0]  # the first of equals
    assert kept([apart, whole], [0.5, 0.5], [2, 2]) == [0, 1]
    assert kept([whole] * 3, [0.0, 0.0, 0.0], [0, 1, 2]) == [0, 1, 2]  # a score of 0 is a score


def test_a_suppressed_box_suppresses_nothing() -> None:
    chain = [[0, 0, 10, 10], [3, 0, 13, 10], [6, 0, 16, 10]]  # neighbours overlap by 7/13, the ends by 1/4
    assert kept(chain, [0.9, 0.8, 0.7], [0, 0, 0]) == [0, 2]
    assert kept(chain, [0.8, 0.9, 0.7], [0, 0, 0]) == [1]


def test_limits_and_absent_candidates() -> None:
    apart = [[20 * i, 0, 20 * i + 10, 10] for i in range(6)]
    assert kept(apart, [0.1, 0.6, 0.3, 0.5, 0.2, 0.4], [0] * 6, limit=4) == [1, 3, 5, 2]
    assert kept(apart, [0.1] * 6, [0] * 6, limit=6) == [0, 1, 2, 3, 4, 5]
    assert kept(apart, [-np.inf, 0.6, -np.inf, 0.5, -np.inf, -np.inf], [0] * 6) == [1, 3]
    assert kept(apart, [-np.inf] * 6, [0] * 6) == []
    # What an absent candidate holds does not matter.
    assert kept([[-np.inf, np.nan, np.inf, 0], [0, 0, 10, 10]], [-np.inf, 0.4], [0, 0]) == [1]


def top_by_sorting(scores: np.ndarray, row_best: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Values and flat indices by a stable sort of everything that is not excluded."""
    flat = np.where((row_best > -np.inf)[:, None], scores, -np.inf).reshape(-1)
    order = np.argsort(-flat, kind="stable")[: min(k, flat.size)]
    return flat[order], order


@pytest.mark.parametrize("k", [1, 3, 12, 37, 500])
@settings(deadline=None, max_examples=25)
@given(
    scores=hnp.arrays(np.int32, (12, 5), elements=st.integers(-4, 4)),
    excluded=hnp.arrays(np.bool_, (12,)),
)
def test_top_scores_equals_a_full_sort(k: int, scores: np.ndarray, excluded: np.ndarray) -> None:
    values = scores.astype(np.float32)
    row_best = np.where(excluded, -np.inf, values.max(1)).astype(np.float32)
    expected, order = top_by_sorting(values, row_best, k)
    found, row, column = map(np.asarray, TOP[k](values, row_best))
    np.testing.assert_array_equal(found, expected)
    present = found > -np.inf
    assert present.sum() == min(k, 5 * int((~excluded).sum()))
    np.testing.assert_array_equal((row * 5 + column)[present], order[present])


TOP = {k: jax.jit(partial(top_scores, k=k)) for k in (1, 3, 12, 37, 500)}


def test_top_scores_by_hand() -> None:
    scores = jnp.asarray([[5.0, 1.0], [9.0, 9.0], [5.0, 8.0]])
    values, row, column = jax.jit(partial(top_scores, k=4))(scores, scores.max(1))
    assert values.tolist() == [9.0, 9.0, 8.0, 5.0]
    assert row.tolist() == [1, 1, 2, 0] and column.tolist() == [0, 1, 1, 0]
    # The best row is excluded; four entries are left.
    values, row, column = jax.jit(partial(top_scores, k=5))(scores, jnp.asarray([5.0, -jnp.inf, 8.0]))
    assert values.tolist() == [8.0, 5.0, 5.0, 1.0, -np.inf]
    assert row[:4].tolist() == [2, 0, 2, 0] and column[:4].tolist() == [1, 0, 0, 1]
