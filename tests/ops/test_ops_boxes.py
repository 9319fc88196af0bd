"""Box arithmetic: cases by hand, the published coder's numbers, rounding that preserves ties."""

from __future__ import annotations

from pathlib import Path

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from querydet_jax.ops.boxes import MAX_LOG_SCALE, areas, decode, encode, pairwise_iou

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "aux.npz")


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0, 0, 10, 10), (0, 0, 10, 10), 1.0),
        ((0, 0, 10, 10), (5, 0, 15, 10), 50 / 150),
        ((0, 0, 10, 10), (5, 5, 15, 15), 25 / 175),
        ((0, 0, 10, 10), (2, 2, 4, 4), 4 / 100),  # inside; no pixel is added to a side
        ((-5, -5, 5, 5), (0, 0, 5, 5), 25 / 100),
        ((0, 0, 10, 10), (10, 0, 20, 10), 0.0),  # a shared edge is no overlap
        ((0, 0, 10, 10), (30, 30, 40, 40), 0.0),
        ((0, 0, 10, 10), (30, 2, 40, 4), 0.0),  # overlap in y alone
        ((5, 5, 5, 5), (5, 5, 5, 5), 0.0),  # two empty boxes: no 0 / 0
        ((0, 0, 10, 10), (3, 3, 3, 8), 0.0),  # an empty box inside another
        ((0, 0, 0, 0), (0, 0, 0, 0), 0.0),
    ],
)
def test_iou_by_hand(a: tuple[float, ...], b: tuple[float, ...], expected: float) -> None:
    a, b = np.float32(a), np.float32(b)
    assert float(pairwise_iou(a, b)) == pytest.approx(expected, abs=1e-7)
    assert float(pairwise_iou(b, a)) == float(pairwise_iou(a, b))


def test_iou_broadcasts_to_a_matrix() -> None:
    a = jnp.asarray([[0, 0, 2, 2], [1, 0, 3, 2], [9, 9, 10, 10]], jnp.float32)
    b = jnp.asarray([[0, 0, 2, 2], [0, 0, 4, 4]], jnp.float32)
    expected = [[1.0, 0.25], [1 / 3, 0.25], [0.0, 0.0]]
    np.testing.assert_allclose(pairwise_iou(a[:, None], b[None]), expected, rtol=1e-6)


def test_areas_by_hand() -> None:
    np.testing.assert_array_equal(areas(jnp.asarray([[1.0, 2, 4, 10], [3, 3, 3, 9]])), [24.0, 0.0])


def iou_in_float32(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The published formula, every operation rounded to float32."""
    size = np.maximum(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), np.float32(0))
    intersection = size[..., 0] * size[..., 1]
    area_a = (a[..., 2] - a[..., 0]) * (a[..., 3] - a[..., 1])
    area_b = (b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1])
    union = area_a + area_b - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=intersection > 0)


@pytest.mark.parametrize("form", ["matrix", "row", "loop"])
def test_compiled_iou_equals_numpy_to_the_last_bit(form: str) -> None:
    # The matchers compare IoUs for equality; a fused multiply-add in one program and not in another
    # would break ties. The programs differ in how XLA fuses the products.
    rng = np.random.default_rng(3)
    corner = rng.uniform(0, 120, (300, 2))
    a = np.concatenate([corner, corner + rng.uniform(0.1, 90, (300, 2))], 1).astype(np.float32)
    b = a[rng.permutation(300)[:40]] + rng.normal(0, 3, (40, 4)).astype(np.float32)
    b = np.concatenate([np.minimum(b[:, :2], b[:, 2:]), np.maximum(b[:, :2], b[:, 2:])], 1)
    expected = iou_in_float32(a[:, None], b[None])
    if form == "matrix":
        found = jax.jit(lambda a, b: pairwise_iou(a[:, None], b[None]))(a, b)
    elif form == "row":
        row = jax.jit(lambda a, box: pairwise_iou(a, box[None]))
        found = np.stack([row(a, box) for box in b], 1)
    else:
        found = jax.jit(lambda a, b: jax.lax.map(lambda box: pairwise_iou(a, box[None]), b))(a, b).T
    assert (expected > 0.3).sum() > 100
    np.testing.assert_array_equal(np.asarray(found), expected)


coordinates = st.floats(-500, 500, width=32)
sides = st.floats(1, 500, width=32)


@st.composite
def boxes_of(draw: st.DrawFn, count: int) -> np.ndarray:
    corner = draw(hnp.arrays(np.float32, (count, 2), elements=coordinates))
    size = draw(hnp.arrays(np.float32, (count, 2), elements=sides))
    return np.concatenate([corner, corner + size], 1)


@settings(deadline=None, max_examples=60)
@given(anchors=boxes_of(4), boxes=boxes_of(4))
def test_decode_inverts_encode(anchors: np.ndarray, boxes: np.ndarray) -> None:
    # Sides are 1 to 500 px; beyond a ratio of 62.5 decoding is clamped on purpose.
    ratio = (boxes[:, 2:] - boxes[:, :2]) / (anchors[:, 2:] - anchors[:, :2])
    again = np.asarray(decode(jnp.asarray(anchors), encode(jnp.asarray(anchors), jnp.asarray(boxes))))
    fits = (ratio < 62.0).all(1)
    np.testing.assert_allclose(again[fits], boxes[fits], atol=2e-2)
    shrunk = again[:, 2:] - again[:, :2] <= boxes[:, 2:] - boxes[:, :2] + 2e-2
    assert shrunk.all()


def test_encode_by_hand() -> None:
    anchor, box = jnp.asarray([0.0, 0, 10, 20]), jnp.asarray([10.0, 10, 30, 20])
    # Centres (5, 10) and (20, 15), sizes (10, 20) and (20, 10).
    np.testing.assert_allclose(encode(anchor, box), [1.5, 0.25, np.log(2), -np.log(2)], rtol=1e-6)
    np.testing.assert_array_equal(encode(anchor, anchor), np.zeros(4))


def test_decode_clamps_growth_and_nothing_else() -> None:
    anchor = jnp.asarray([-0.5, -0.5, 0.5, 0.5])
    assert MAX_LOG_SCALE == pytest.approx(4.135166556742356, abs=1e-15)
    box = np.asarray(decode(anchor, jnp.asarray([100.0, -100, 50, -50])))
    assert box[2] - box[0] == pytest.approx(62.5, rel=1e-5)  # exp(50) px otherwise
    assert 0 <= box[3] - box[1] < 1e-5  # shrinking is not clamped
    assert (box[0] + box[2]) / 2 == pytest.approx(100.0)  # nor is moving
    assert np.isfinite(decode(anchor, jnp.asarray([0.0, 0, 1e30, 1e30]))).all()


def test_coder_equals_the_published_numbers() -> None:
    anchors, truth = jnp.asarray(GOLDEN["coder_anchors"]), jnp.asarray(GOLDEN["coder_gt"])
    deltas = jnp.asarray(GOLDEN["coder_deltas"])
    assert (deltas[:, 2:] > MAX_LOG_SCALE).any()  # the table reaches the clamp
    np.testing.assert_allclose(encode(anchors, truth), GOLDEN["coder_encoded"], rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(decode(anchors, deltas), GOLDEN["coder_decoded"], rtol=1e-5, atol=1e-4)
