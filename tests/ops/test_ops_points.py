"""Points, distances, centerness and the matching of points to boxes, by hand and against loops."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from querydet_jax.ops.matching import BACKGROUND, assign_points
from querydet_jax.ops.points import boxes_around, centerness, distances, grid_points, points_at

INF = np.float32(np.inf)
ROWS = 5
# Two levels of a 64x64 image, strides 8 and 16; boxes reach at most 24 px on the first, more on the second.
POINTS = np.concatenate([np.asarray(grid_points(64 // s, 64 // s, s)).reshape(-1, 2) for s in (8, 16)])
STRIDES = np.repeat(np.float32([8, 16]), [64, 16])
RANGES = np.repeat(np.float32([[0, 24], [24, INF]]), [64, 16], axis=0)


def test_points_are_cell_middles() -> None:
    points = grid_points(2, 3, 8)
    assert points.dtype == jnp.float32
    np.testing.assert_array_equal(points[..., 0], [[4, 12, 20], [4, 12, 20]])
    np.testing.assert_array_equal(points[..., 1], [[4, 4, 4], [12, 12, 12]])
    np.testing.assert_array_equal(points_at(jnp.asarray([1, 0]), jnp.asarray([2, 0]), 8), [[20, 12], [4, 4]])


def test_distances_and_back() -> None:
    points, box = grid_points(2, 2, 10).reshape(-1, 2), jnp.asarray([[2.0, 4.0, 30.0, 12.0]])
    sides = distances(points, box)
    np.testing.assert_array_equal(sides[0], [3, 1, 25, 7])
    assert float(sides[2, 3]) == -3  # below the box
    np.testing.assert_array_equal(boxes_around(points, sides), jnp.broadcast_to(box, (4, 4)))


@pytest.mark.parametrize(
    ("sides", "value"),
    [
        ((5, 5, 5, 5), 1),
        ((1, 2, 4, 2), 0.5),
        ((1, 1, 4, 4), 0.25),
        ((0, 3, 9, 3), 0),
        ((-1, 3, 9, 3), 0),
        ((0,) * 4, 0),
    ],
)
def test_centerness(sides: tuple[float, ...], value: float) -> None:
    assert float(centerness(jnp.asarray(sides, jnp.float32))) == pytest.approx(value, rel=1e-6)


ASSIGN = jax.jit(assign_points, static_argnames="center_radius")


def assign(boxes: list | np.ndarray, classes: list | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    missing = ROWS - len(boxes)
    boxes = np.pad(np.float32(boxes).reshape(-1, 4), ((0, missing), (0, 0)))
    classes = np.pad(np.int32(classes), (0, missing), constant_values=-1)
    labels, matched = ASSIGN(POINTS, STRIDES, RANGES, boxes, classes, center_radius=1.5)
    assert labels.dtype == matched.dtype == jnp.int32
    return np.asarray(labels), np.asarray(matched)


def assigned_by_the_rules(boxes: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    labels, matched = np.full(len(POINTS), BACKGROUND), np.zeros(len(POINTS), int)
    for r, (x, y) in enumerate(POINTS):
        best = np.inf
        for g, (x0, y0, x1, y1) in enumerate(boxes):
            sides = (x - x0, y - y0, x1 - x, y1 - y)
            near = max(abs(x - (x0 + x1) / 2), abs(y - (y0 + y1) / 2)) < 1.5 * STRIDES[r]
            in_range = RANGES[r, 0] < max(sides) < RANGES[r, 1]
            area = (x1 - x0) * (y1 - y0)
            if classes[g] >= 0 and min(sides) > 0 and near and in_range and area < best:
                best, labels[r], matched[r] = area, classes[g], g
    return labels, matched


@st.composite
def truths(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Boxes with corners on a 4 px lattice, so that points lie on sides and at equal distances."""
    ends = draw(hnp.arrays(np.int32, (ROWS, 2, 2), elements=st.integers(0, 16)))
    boxes = np.sort(ends, axis=1).reshape(ROWS, 4) * np.float32(4)
    return boxes.astype(np.float32), draw(hnp.arrays(np.int32, (ROWS,), elements=st.integers(-1, 2)))


@settings(deadline=None, max_examples=100)
@given(truth=truths())
def test_lattice_boxes(truth: tuple[np.ndarray, np.ndarray]) -> None:
    for found, expected in zip(assign(*truth), assigned_by_the_rules(*truth), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_only_points_near_the_centre_match() -> None:
    labels, _ = assign([[4, 4, 44, 44]], [1])  # centre (24, 24)
    second = labels[64:].reshape(4, 4)
    # Stride 16: points at 8, 24, 40 are less than 24 px away, and the box reaches 24 px and more from all but (24, 24).
    assert (second >= 0).sum() == 8 and second[1, 1] == BACKGROUND and (second[3] == BACKGROUND).all()
    first = labels[:64].reshape(8, 8)
    # Stride 8: 20 and 28 are less than 12 px away, farthest side 24 px: not strictly below.
    assert (first == BACKGROUND).all()
    assert (assign([[5, 5, 43, 43]], [1])[0][:64].reshape(8, 8)[2:4, 2:4] == 1).all()


def test_the_smaller_box_wins_and_the_first_of_equal_ones() -> None:
    small, large = [14, 14, 26, 26], [10, 10, 30, 30]
    for boxes, winner in (([large, small], 1), ([small, large], 0), ([small, small], 0)):
        labels, matched = assign(boxes, [0, 2])
        cell = 2 * 8 + 2  # the point (20, 20)
        assert (labels[cell], matched[cell]) == ([0, 2][winner], winner)


def test_padding_and_no_rows() -> None:
    labels, matched = assign([[10, 10, 30, 30], [12, 12, 28, 28]], [1, -1])
    assert set(labels) == {-1, 1} and not matched.any()
    labels, matched = assign_points(POINTS, STRIDES, RANGES, jnp.zeros((0, 4)), jnp.zeros((0,), jnp.int32))
    assert (labels == BACKGROUND).all() and labels.shape == matched.shape == (80,)
