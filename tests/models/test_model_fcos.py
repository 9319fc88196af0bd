"""Training of FCOS: losses are the sum of their parts, and finite for any truth."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from truths import IMAGES, TRUTHS, assert_finite, losses_and_gradients

from querydet_jax.models import FCOS
from querydet_jax.models.loss_terms import query_scale_range


@pytest.fixture(scope="module")
def compute(small_fcos: FCOS) -> Any:
    return losses_and_gradients(small_fcos)


@pytest.mark.parametrize("name", list(TRUTHS))
def test_losses_and_gradients_are_finite(compute: Any, name: str) -> None:
    losses, gradients = compute(*TRUTHS[name])
    assert_finite(losses, gradients)
    count = float(losses.num_foreground)
    assert (count > 0) == (float(losses.box) > 0) == (float(losses.centerness) > 0)
    assert (count > 0) == (name not in ("no boxes", "nothing to learn"))
    for layer in ("bbox_pred", "ctrness"):
        assert np.any(gradients["head"][layer]["kernel"][...]) == (count > 0)
    assert count > 50 or name != "500 objects"


def test_total_is_the_sum_of_weighted_levels(compute: Any) -> None:
    losses, _ = compute(*TRUTHS["500 objects"])
    weights = np.array([1.0, 1.5, 2.0, 4.0])
    average = 0.9 * 300 + 0.1 * float(losses.num_foreground)
    assert float(losses.normalizer) == pytest.approx(average, rel=1e-6)
    for name in ("cls", "box", "centerness"):
        sums = np.asarray(losses.per_level[name])
        assert sums.shape == (4,)
        assert float(getattr(losses, name)) == pytest.approx((weights * sums).sum() / average, rel=1e-5)
    assert float(losses.query) == pytest.approx(
        (np.array([10, 5]) * np.asarray(losses.per_level["query"])).sum(), rel=1e-5
    )
    assert list(losses.terms()) == ["cls", "box", "query", "centerness"]
    assert float(losses.total) == pytest.approx(float(sum(losses.terms().values())), rel=1e-6)


def test_the_average_counts_no_foreground_as_one(compute: Any) -> None:
    losses, _ = compute(*TRUTHS["no boxes"], normalizer=20.0)
    assert float(losses.num_foreground) == 0 and float(losses.normalizer) == pytest.approx(18.1)


def test_no_rows_equal_rows_of_padding(small_fcos: FCOS, compute: Any) -> None:
    graph, state = nnx.split(small_fcos)
    none = jax.jit(
        lambda state: nnx.merge(graph, state).losses(
            IMAGES, np.zeros((2, 0, 4), np.float32), np.zeros((2, 0), np.int32), 300.0
        )
    )(state)
    padded, _ = compute(*TRUTHS["no boxes"])
    for a, b in zip(jax.tree.leaves(none), jax.tree.leaves(padded), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_each_level_matches_its_range(small_fcos: FCOS) -> None:
    """Centred squares of growing size move up the pyramid; the coarsest level takes all larger ones."""
    shapes = [(64, 64), (32, 32), (16, 16), (8, 8)]
    ends = np.cumsum([h * w for h, w in shapes])
    for side, level in ((20, 3), (100, 3), (160, 4), (300, 5), (512, 6), (6000, 6)):
        box = np.float32([[[256 - side / 2] * 2 + [256 + side / 2] * 2]])
        targets = small_fcos.targets(shapes, jnp.asarray(box), jnp.zeros((1, 1), jnp.int32))
        found = np.flatnonzero(np.asarray(targets.labels[0]) == 0)
        assert level in 3 + np.searchsorted(ends, found, side="right"), side
        np.testing.assert_array_equal(np.asarray(targets.boxes[0])[found], np.broadcast_to(box[0], (len(found), 4)))


def test_sides_start_at_zero_not_at_random(small_fcos: FCOS) -> None:
    assert small_fcos.config.head.box_bias == "torch"  # RetinaNet's default
    assert not np.any(small_fcos.head.bbox_pred.bias[...])
    assert np.any(small_fcos.head.bbox_pred.kernel[...]) and np.any(small_fcos.head.ctrness.kernel[...])


def test_outputs_and_query_scales(small_fcos: FCOS) -> None:
    out = jax.jit(lambda images: small_fcos(images))(IMAGES)
    for level, (height, width) in {3: (8, 12), 4: (4, 6), 5: (2, 3), 6: (1, 2)}.items():
        assert out.cls[level].shape == (2, height, width, 1, 3) and out.box[level].shape == (2, height, width, 1, 4)
        assert out.centerness[level].shape == (2, height, width)
    assert [query_scale_range(small_fcos.config, level) for level in (3, 4)] == [(0.0, 32.0), (0.0, 64.0)]
