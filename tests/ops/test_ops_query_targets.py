"""Targets of the query head (paper section 3.2): a NumPy oracle, and its rules one by one."""

from __future__ import annotations

from typing import Any, Literal

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from querydet_jax.ops.matching import query_targets

SIDE, STRIDE = 8, 8
POINTS = (np.stack(np.meshgrid(np.arange(SIDE), np.arange(SIDE)), -1).astype(np.float32) + np.float32(0.5)) * STRIDE
ROWS = 6


def _targets(
    boxes: jax.Array,
    classes: jax.Array,
    scale_range: tuple[float, float],
    factor: float,
    radius: Literal["object", "level"],
) -> jax.Array:
    return query_targets(SIDE, SIDE, STRIDE, boxes, classes, scale_range=scale_range, radius=radius, factor=factor)


COMPILED = jax.jit(_targets, static_argnames="radius")


def run(
    boxes: np.ndarray,
    classes: np.ndarray | list[int],
    radius: Literal["object", "level"] = "object",
    scale_range: tuple[float, float] = (6.0, 32.0),
    factor: float = 1.0,
) -> np.ndarray:
    """Return the targets bool ``[8, 8]``. Boxes are padded to a fixed number, so that one program serves all tests."""
    missing = ROWS - len(boxes)
    boxes = np.pad(np.float32(boxes).reshape(-1, 4), ((0, missing), (0, 0)))
    classes = np.pad(np.int32(classes), (0, missing), constant_values=-1)
    found = COMPILED(boxes, classes, scale_range, factor, radius=radius)
    assert found.dtype == jnp.bool_ and found.shape == (SIDE, SIDE)
    return np.asarray(found)


def targets_by_the_rules(boxes: np.ndarray, classes: np.ndarray, radius: str) -> np.ndarray:
    """Find the nearest small object by float32 distance, the first on ties, and apply its radius."""
    size = boxes[:, 2:] - boxes[:, :2]
    scales = np.sqrt(size[:, 0] * size[:, 1])
    centers = np.float32(0.5) * (boxes[:, :2] + boxes[:, 2:])
    small = [g for g in range(len(boxes)) if classes[g] >= 0 and 6 <= scales[g] < 32]
    targets = np.zeros((SIDE, SIDE), bool)
    for y in range(SIDE):
        for x in range(SIDE):
            if small:
                offset = POINTS[y, x] - centers[small]
                squares = offset * offset
                distance = np.sqrt(squares[:, 0] + squares[:, 1])
                nearest = int(np.argmin(distance))
                reach = scales[small[nearest]] if radius == "object" else np.float32(32)
                targets[y, x] = distance[nearest] < reach
    return targets


@st.composite
def truths(draw: st.DrawFn, count: int = ROWS) -> tuple[np.ndarray, np.ndarray]:
    """Boxes with corners on a 2 px lattice, so that cells lie equally far from several of them."""
    ends = draw(hnp.arrays(np.int32, (count, 2, 2), elements=st.integers(0, 32)))
    boxes = np.sort(ends, axis=1).reshape(count, 4) * np.float32(2)
    return boxes.astype(np.float32), draw(hnp.arrays(np.int32, (count,), elements=st.integers(-1, 2)))


@pytest.mark.parametrize("radius", ["object", "level"])
@settings(deadline=None, max_examples=50)
@given(truth=truths())
def test_lattice_boxes(radius: str, truth: tuple[np.ndarray, np.ndarray]) -> None:
    np.testing.assert_array_equal(run(*truth, radius), targets_by_the_rules(*truth, radius))


@pytest.mark.parametrize("radius", ["object", "level"])
def test_mirrored_objects_tie_although_their_distances_are_rounded(radius: str) -> None:
    # Pairs of different scales at offsets (a, b) and (b, a) from a cell's middle: a fused multiply-add
    # would make one of them nearer.
    rng = np.random.default_rng(0)
    positive = 0
    for _ in range(60):
        middle = rng.integers(0, SIDE, 2) * STRIDE + 4
        a, b = rng.uniform(4, 16, 2)
        centers = middle + np.array([[a, b], [b, a]])
        half = rng.permutation([3.5, 12.0])[:, None]
        boxes = np.concatenate([centers - half, centers + half], 1).astype(np.float32)
        classes = np.array([0, 0], np.int32)
        expected = targets_by_the_rules(boxes, classes, radius)
        positive += expected.sum()
        np.testing.assert_array_equal(run(boxes, classes, radius), expected)
    assert positive > 100


def square(x: float, y: float, side: float) -> list[float]:
    return [x - side / 2, y - side / 2, x + side / 2, y + side / 2]


def cells_of(boxes: list[list[float]], classes: list[int] | None = None, **options: Any) -> set[tuple[int, int]]:
    """Return the positive (row, column) on an 8 x 8 map of stride 8, with cell middles at 4, 12, 20, ..."""
    found = run(
        np.asarray(boxes),
        classes if classes is not None else [0] * len(boxes),
        **{"scale_range": (0.0, 32.0)} | options,
    )
    return {(int(y), int(x)) for y, x in np.argwhere(found)}


CROSS = {(2, 2), (1, 2), (3, 2), (2, 1), (2, 3)}


def test_the_radius_is_the_objects_own_scale_and_strict() -> None:
    assert cells_of([square(20, 20, 7)]) == {(2, 2)}
    assert cells_of([square(20, 20, 8)]) == {(2, 2)}  # neighbours are exactly 8 px away
    assert cells_of([square(20, 20, 8.5)]) == CROSS
    assert cells_of([[20 - 17, 20 - 1, 20 + 17, 20 + 1]]) == CROSS  # scale sqrt(34 * 2) = 8.2, whatever the shape
    # Middles of the surrounding cells are 8 * sqrt(2) = 11.3 px away.
    assert cells_of([square(20, 20, 12)]) == {(y, x) for y in (1, 2, 3) for x in (1, 2, 3)}


def test_distances_are_from_the_cells_middle() -> None:
    assert cells_of([square(16, 16, 5)]) == set()  # a corner: all middles are 5.7 px away
    assert cells_of([square(16, 16, 6)]) == {(1, 1), (1, 2), (2, 1), (2, 2)}


def test_scale_interval_is_half_open() -> None:
    assert cells_of([square(20, 20, 32)]) == set()
    assert cells_of([square(20, 20, 31.75)]) != set()
    assert cells_of([square(20, 20, 10)], scale_range=(10.0, 20.0)) == CROSS
    assert cells_of([square(20, 20, 9.75)], scale_range=(10.0, 20.0)) == set()


def test_only_the_nearest_small_object_counts() -> None:
    far, tiny = square(28, 20, 24), square(20, 20, 2)
    assert (2, 2) in cells_of([far])
    # At (2, 1) the tiny object is 8 px away, beyond its radius 2; the far one, 16 px away, is within its radius 24.
    assert (2, 1) in cells_of([far]) and (2, 1) not in cells_of([far, tiny])
    # Objects too large for the level and padding do not take precedence like that.
    assert cells_of([far, square(20, 20, 40)]) == cells_of([far])
    assert cells_of([far, tiny], [0, -1]) == cells_of([far])


def test_the_first_of_equally_near_objects_counts() -> None:
    assert (2, 2) in cells_of([square(12, 20, 20), square(28, 20, 3)])
    assert (2, 2) not in cells_of([square(28, 20, 3), square(12, 20, 20)])


def test_level_radius_and_factor() -> None:
    reach = cells_of([square(20, 20, 3)], radius="level", scale_range=(0.0, 12.0))
    assert reach == {(y, x) for y in (1, 2, 3) for x in (1, 2, 3)}
    assert cells_of([square(20, 20, 4.5)], factor=2.0) == CROSS
    assert cells_of([square(20, 20, 8.5)], factor=0.5) == {(2, 2)}
    assert cells_of([square(20, 20, 3)], radius="level", scale_range=(0.0, 18.0), factor=0.5) == CROSS


def test_no_small_object_no_query() -> None:
    assert cells_of([]) == set()
    assert cells_of([[0.0] * 4] * 3, [-1] * 3) == set()
    assert cells_of([square(20, 20, 200)]) == set()
    none = query_targets(4, 5, 8, jnp.zeros((0, 4)), jnp.zeros(0, jnp.int32), scale_range=(0.0, 32.0))
    assert none.shape == (4, 5) and none.dtype == jnp.bool_ and not none.any()


def test_rows_are_y_and_maps_need_not_be_square() -> None:
    boxes, classes = jnp.asarray([square(36, 4, 6)], jnp.float32), jnp.zeros(1, jnp.int32)
    found = np.asarray(query_targets(2, 6, 8, boxes, classes, scale_range=(0.0, 32.0)))
    assert found.shape == (2, 6) and np.argwhere(found).tolist() == [[0, 4]]
