"""Matchers, bit for bit against the published rules written as loops over the boxes."""

from __future__ import annotations

from functools import partial

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from querydet_jax.ops.anchors import cell_anchors, grid_anchors
from querydet_jax.ops.matching import BACKGROUND, IGNORED, match_anchors, per_image

MATCHERS = ("loop", "standard")
# Two levels of a 64 x 64 image, 720 anchors.
ANCHORS = np.concatenate(
    [
        np.asarray(grid_anchors(cell_anchors(size, 3, (0.5, 1.0, 2.0)), cells, cells, 64 // cells)).reshape(-1, 4)
        for size, cells in ((16.0, 8), (32.0, 4))
    ]
)
COMPILED = {matcher: jax.jit(partial(match_anchors, matcher=matcher)) for matcher in MATCHERS}
ROWS = 504  # all cases are padded to this, so that one program serves all


def iou_of(anchors: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Return the IoU ``[R]``, with every operation rounded to float32."""
    size = np.maximum(np.minimum(anchors[:, 2:], box[2:]) - np.maximum(anchors[:, :2], box[:2]), np.float32(0))
    intersection = size[:, 0] * size[:, 1]
    areas = (anchors[:, 2] - anchors[:, 0]) * (anchors[:, 3] - anchors[:, 1])
    union = areas + (box[2] - box[0]) * (box[3] - box[1]) - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=intersection > 0)


def match_by_the_rules(
    anchors: np.ndarray, boxes: np.ndarray, classes: np.ndarray, matcher: str, low: float = 0.4, high: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """Return labels and matched boxes ``[R]``: one pass for each anchor's best box, one for low-quality matches."""
    real = [g for g in range(len(boxes)) if classes[g] >= 0]
    best = np.zeros(len(anchors), np.float32)
    matched = np.zeros(len(anchors), np.int32)
    for g in real:
        iou = iou_of(anchors, boxes[g])
        matched[iou > best] = g  # strictly: the first box keeps a tie
        best = np.maximum(best, iou)
    labels = np.full(len(anchors), IGNORED, np.int32)
    labels[best < np.float32(low)] = BACKGROUND
    foreground = best >= np.float32(high)
    for g in real:
        iou = iou_of(anchors, boxes[g])
        if iou.max() == 0:
            continue
        if matcher == "loop":
            foreground |= (matched == g) & (best == iou.max())
        else:
            foreground |= iou == iou.max()
    if real:
        labels[foreground] = classes[matched[foreground]]
    return labels, matched


def run(
    matcher: str,
    boxes: np.ndarray,
    classes: np.ndarray,
    anchors: np.ndarray = ANCHORS,
    low: float = 0.4,
    high: float = 0.5,
) -> tuple[np.ndarray, np.ndarray]:
    missing = ROWS - len(boxes)
    boxes = np.pad(np.float32(boxes), ((0, missing), (0, 0)))
    classes = np.pad(np.int32(classes), (0, missing), constant_values=-1)
    labels, matched = COMPILED[matcher](anchors, boxes, classes, background_iou=low, foreground_iou=high)
    assert labels.dtype == matched.dtype == jnp.int32
    return np.asarray(labels), np.asarray(matched)


def assert_follows_the_rules(boxes: np.ndarray, classes: np.ndarray, matcher: str) -> None:
    expected = match_by_the_rules(ANCHORS, boxes, classes, matcher)
    for found, wanted in zip(run(matcher, boxes, classes), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


@st.composite
def truths(draw: st.DrawFn, count: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Boxes on a 4 px lattice, many symmetric between anchors, some equal, some empty, with padding anywhere."""
    ends = draw(hnp.arrays(np.int32, (count, 2, 2), elements=st.integers(0, 16)))
    ends = np.sort(ends, axis=1) * np.float32(4)
    classes = draw(hnp.arrays(np.int32, (count,), elements=st.integers(-1, 2)))
    return ends.reshape(count, 4).astype(np.float32), classes


@pytest.mark.parametrize("matcher", MATCHERS)
@settings(deadline=None, max_examples=60)
@given(truth=truths())
def test_ties_duplicates_empty_boxes_and_padding(matcher: str, truth: tuple[np.ndarray, np.ndarray]) -> None:
    assert_follows_the_rules(*truth, matcher)


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    corner = rng.uniform(-5, 60, (count, 2))
    return np.concatenate([corner, corner + np.exp(rng.uniform(0, 3.9, (count, 2)))], 1).astype(np.float32)


@pytest.mark.parametrize("matcher", MATCHERS)
@pytest.mark.parametrize("count", [1, 8, 24, 500, ROWS])
def test_random_boxes(matcher: str, count: int) -> None:
    rng = np.random.default_rng(count)
    boxes = random_boxes(rng, count)
    boxes[count // 2 :: 3] = boxes[: len(boxes[count // 2 :: 3])]  # duplicates, of other classes
    classes = rng.integers(0, 5, count).astype(np.int32)
    assert_follows_the_rules(boxes, classes, matcher)
    assert (run(matcher, boxes, classes)[0] >= 0).any()


@pytest.mark.parametrize("matcher", MATCHERS)
def test_padding_anywhere_changes_nothing(matcher: str) -> None:
    rng = np.random.default_rng(5)
    boxes, classes = random_boxes(rng, 6), rng.integers(0, 3, 6).astype(np.int32)
    plain_labels, plain_matched = run(matcher, boxes, classes)
    # Spread the boxes over several blocks, with blocks of padding in between that hold plausible coordinates.
    places = np.array([3, 4, 7, 8, 15, 222])
    padded, padded_classes = random_boxes(rng, ROWS), np.full(ROWS, -1, np.int32)
    padded[places], padded_classes[places] = boxes, classes
    labels, matched = run(matcher, padded, padded_classes)
    np.testing.assert_array_equal(labels, plain_labels)
    np.testing.assert_array_equal(matched[labels >= 0], places[plain_matched[labels >= 0]])


@pytest.mark.parametrize("matcher", MATCHERS)
@pytest.mark.parametrize("case", ["no rows", "padding only", "empty box"])
def test_nothing_to_match_is_background(matcher: str, case: str) -> None:
    if case == "no rows":
        found = COMPILED[matcher](ANCHORS, np.zeros((0, 4), np.float32), np.zeros(0, np.int32))
    else:
        found = run(matcher, np.full((1, 4), 32.0), np.array([1 if case == "empty box" else -1]))
    np.testing.assert_array_equal(found[0], np.full(len(ANCHORS), BACKGROUND))
    np.testing.assert_array_equal(found[1], np.zeros(len(ANCHORS)))


def by_hand(matcher: str, anchors: list, boxes: list, classes: list) -> tuple[list[int], list[int]]:
    """Return labels and matched boxes of a few anchors; the remaining rows are far away."""
    elsewhere = np.full((len(ANCHORS), 4), [1e4, 1e4, 1e4 + 10, 1e4 + 10], np.float32)
    elsewhere[: len(anchors)] = anchors
    labels, matched = run(matcher, np.asarray(boxes), np.asarray(classes), elsewhere)
    return labels[: len(anchors)].tolist(), matched[: len(anchors)].tolist()


@pytest.mark.parametrize("matcher", MATCHERS)
def test_thresholds_and_their_edges(matcher: str) -> None:
    anchors = [[0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 4], [50, 50, 60, 60], [0, 0, 10, 12]]
    # The second anchor equals the box, so only their IoUs .5, .8, 0 and 5/12 decide the others.
    assert by_hand(matcher, anchors, [[0, 0, 10, 5]], [7]) == ([7, 7, 7, BACKGROUND, IGNORED], [0] * 5)
    # IoU .4 is ignored, not background; 1/3 is background.
    assert by_hand(matcher, anchors, [[0, 0, 10, 4]], [7])[0] == [IGNORED, 7, 7, BACKGROUND, BACKGROUND]


def test_other_thresholds() -> None:
    rng = np.random.default_rng(2)
    boxes, classes = random_boxes(rng, 8), rng.integers(0, 3, 8).astype(np.int32)
    found = run("loop", boxes, classes, low=0.3, high=0.6)
    expected = match_by_the_rules(ANCHORS, boxes, classes, "loop", low=0.3, high=0.6)
    np.testing.assert_array_equal(found[0], expected[0])
    assert (expected[0] != match_by_the_rules(ANCHORS, boxes, classes, "loop")[0]).any()


@pytest.mark.parametrize("matcher", MATCHERS)
def test_a_box_claims_all_its_equally_best_anchors(matcher: str) -> None:
    # Half way between two anchors, with IoU 1/3 to both.
    labels, matched = by_hand(matcher, [[0, 0, 10, 10], [10, 0, 20, 10], [8, 9, 18, 19]], [[5, 0, 15, 10]], [4])
    assert (labels, matched) == ([4, 4, BACKGROUND], [0, 0, 0])


@pytest.mark.parametrize("matcher", MATCHERS)
def test_the_first_of_equal_boxes_wins(matcher: str) -> None:
    box = [5, 0, 15, 10]
    labels, matched = by_hand(matcher, [[0, 0, 10, 10], [10, 0, 20, 10]], [box, box, box], [-1, 2, 3])
    assert (labels, matched) == ([2, 2], [1, 1])


def test_matchers_differ_where_a_box_loses_its_best_anchor() -> None:
    anchors = [[0, 0, 10, 10], [3, 0, 13, 10]]
    boxes = [[4, 0, 14, 10], [0, 0, 2, 10]]
    # The first anchor overlaps the first box more (60/140 against 20/100), and is the second box's best.
    assert by_hand("loop", anchors, boxes, [0, 1]) == ([IGNORED, 0], [0, 0])
    # detectron2 makes it foreground, with the first box as its target.
    assert by_hand("standard", anchors, boxes, [0, 1]) == ([0, 0], [0, 0])


@pytest.mark.parametrize("matcher", MATCHERS)
def test_memory_stays_far_below_the_matrix_of_overlaps(matcher: str) -> None:
    boxes, anchors = 300, 200_000
    arguments = [((anchors, 4), jnp.float32), ((boxes, 4), jnp.float32), ((boxes,), jnp.int32)]
    program = COMPILED[matcher].lower(*(jax.ShapeDtypeStruct(*a) for a in arguments)).compile()
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 0.15 * boxes * anchors * 4


def test_per_image_runs_each_image_by_itself_and_stops_gradients() -> None:
    rng = np.random.default_rng(9)
    boxes = np.stack([random_boxes(rng, 5), random_boxes(rng, 5)])
    classes = np.array([[0, 1, 2, -1, -1], [1, 1, 0, 2, 2]], np.int32)

    def assign(boxes: jax.Array, classes: jax.Array) -> tuple[jax.Array, jax.Array]:
        return match_anchors(jnp.asarray(ANCHORS), boxes, classes)

    labels, matched = per_image(assign, jnp.asarray(boxes), jnp.asarray(classes))
    for i in range(2):
        expected = match_by_the_rules(ANCHORS, boxes[i], classes[i], "loop")
        np.testing.assert_array_equal(labels[i], expected[0])
        np.testing.assert_array_equal(matched[i], expected[1])
    gradient = jax.grad(lambda x: jnp.sum(per_image(lambda row: row**2, x)))(jnp.ones((2, 3)))
    np.testing.assert_array_equal(gradient, np.zeros((2, 3)))
