"""ROIAlign over a pyramid against loops over sampling points."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import roi_oracle

from querydet_jax.ops.roi_align import box_levels, roi_align

IMAGE = (192, 320)
SIZE = 5
FEATURES = {
    level: np.random.default_rng(level).normal(size=(2, IMAGE[0] // 2**level, IMAGE[1] // 2**level, 3))
    for level in (2, 3, 4, 5)
}


def some_boxes() -> np.ndarray:
    """Boxes ``[2, 11, 4]``: the whole image, slivers over several windows, an empty one, one in a corner, others."""
    height, width = IMAGE
    rng = np.random.default_rng(0)
    center = rng.uniform(0, 1, (2, 11, 2)) * [width, height]
    half = np.exp(rng.uniform(np.log(2), np.log(150), (2, 11, 2)))
    boxes = np.clip(np.concatenate([center - half, center + half], axis=-1), 0, [width, height, width, height])
    boxes[0, :4] = [(0, 0, width, height), (0, 90, width, 94), (150, 0, 153, height), (70, 60, 70, 60)]
    boxes[1, 0] = (width - 3, height - 2, width, height)
    return boxes.astype(np.float32)


BOXES = some_boxes()
VALID = np.ones((2, 11), bool)
VALID[1, 4] = VALID[0, 7] = False


@functools.cache
def run():
    return jax.jit(functools.partial(roi_align, size=SIZE))


def test_equals_loops_over_sampling_points():
    features = {level: np.float32(x) for level, x in FEATURES.items()}
    found = np.asarray(run()(features, BOXES, VALID))
    levels = np.asarray(box_levels(jnp.asarray(BOXES), 2, 5))
    assert set(levels[VALID]) == {2, 3, 4}
    for b, p in np.ndindex(VALID.shape):
        level = roi_oracle.box_level(BOXES[b, p], 2, 5)
        assert level == levels[b, p]
        expected = roi_oracle.roi_align(FEATURES[level][b], BOXES[b, p], level, SIZE) if VALID[b, p] else 0.0
        np.testing.assert_allclose(found[b, p], expected + np.zeros((SIZE, SIZE, 3)), atol=3e-5, rtol=0)
    assert not found[0, 3].any()  # an empty box has no sampling point


def test_the_gradient_is_the_transpose():
    """The function is linear in the features: <f(x), g> = <x, f'(g)> for any x and g."""
    rng = np.random.default_rng(1)
    gradient = np.float32(rng.normal(size=(*VALID.shape, SIZE, SIZE, 3)))
    features = {level: np.float32(x) for level, x in FEATURES.items()}

    @jax.jit
    def pull(features, boxes):
        return jax.grad(lambda f, b: jnp.sum(roi_align(f, b, VALID, size=SIZE) * gradient), argnums=(0, 1))(
            features, boxes
        )

    found, of_boxes = pull(features, BOXES)
    assert not np.any(of_boxes)
    value = float(np.sum(np.asarray(run()(features, BOXES, VALID), np.float64) * gradient))
    assert abs(value) > 1
    product = sum(float(np.sum(np.asarray(found[level], np.float64) * x)) for level, x in FEATURES.items())
    assert product == pytest.approx(value, rel=1e-5)


def test_bfloat16_is_summed_in_float32():
    """A constant map gives the constant in bins inside the map, rounded once."""
    features = {level: jnp.full(x.shape, 0.3, jnp.bfloat16) for level, x in FEATURES.items()}
    box = np.float32([[[20, 20, 180, 150]], [[40, 40, 60, 70]]])
    found = jax.jit(functools.partial(roi_align, size=SIZE))(features, box, np.ones((2, 1), bool))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(found), np.float32(jnp.bfloat16(0.3)))


@pytest.mark.parametrize(("side", "level"), [(10, 2), (111, 2), (112, 3), (223, 3), (224, 4), (448, 5), (2000, 5)])
def test_levels_by_scale(side, level):
    assert int(box_levels(jnp.asarray([0.0, 0.0, side, side]), 2, 5)) == level
    assert int(box_levels(jnp.asarray([0.0, 0.0, side / 4, side * 4]), 2, 5)) == level
