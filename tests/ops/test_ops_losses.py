"""Loss terms: float64 formulas, optax's focal loss, values by hand, gradients at the extremes."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from querydet_jax.ops.losses import binary_cross_entropy, focal_loss, giou_loss, smooth_l1

LOGITS = np.concatenate([np.linspace(-12, 12, 97), [-100, -30, 0, 30, 100]]).astype(np.float32)


def focal_in_float64(logits: np.ndarray, target: float, alpha: float, gamma: float) -> np.ndarray:
    """Compute RetinaNet (Lin et al. 2017) eq. 5 with log p_t = -log(1 + exp(-z)) for the signed logit z."""
    z = np.asarray(logits, np.float64) * (1 if target else -1)
    log_p = -np.logaddexp(0, -z)
    miss = np.exp(-np.logaddexp(0, z))
    return (alpha if target else 1 - alpha) * miss**gamma * -log_p


@pytest.mark.parametrize("target", [0.0, 1.0])
@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.25, 1.2), (0.25, 1.3), (0.6, 0.5), (0.5, 0.0)])
def test_focal_loss_equals_its_formula(target: float, alpha: float, gamma: float) -> None:
    found = jax.jit(lambda x: focal_loss(x, jnp.full_like(x, target), alpha=alpha, gamma=gamma))(LOGITS)
    assert found.dtype == jnp.float32 and found.shape == LOGITS.shape
    np.testing.assert_allclose(found, focal_in_float64(LOGITS, target, alpha, gamma), rtol=2e-5, atol=1e-12)


@pytest.mark.parametrize("gamma", [1.2, 2.0])
def test_focal_loss_equals_optax(gamma: float) -> None:
    logits = np.random.default_rng(0).normal(0, 4, (50, 20)).astype(np.float32)
    targets = (np.random.default_rng(1).uniform(size=(50, 20)) < 0.2).astype(np.float32)
    expected = jax.jit(partial(optax.losses.sigmoid_focal_loss, alpha=0.25, gamma=gamma))(logits, targets)
    found = jax.jit(partial(focal_loss, alpha=0.25, gamma=gamma))(logits, targets)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)


def test_focal_loss_without_focus_is_half_the_cross_entropy() -> None:
    for target in (0.0, 1.0):
        targets = jnp.full(LOGITS.shape, target)
        focal = focal_loss(jnp.asarray(LOGITS), targets, alpha=0.5, gamma=0.0)
        np.testing.assert_allclose(focal, 0.5 * binary_cross_entropy(jnp.asarray(LOGITS), targets), rtol=1e-6)


def test_focal_loss_by_hand() -> None:
    # p = 1/2: .25 * (1/2)^2 * ln 2 for an object, .75 * (1/2)^2 * ln 2 for background.
    found = focal_loss(jnp.zeros(2), jnp.asarray([1.0, 0.0]), alpha=0.25, gamma=2.0)
    np.testing.assert_allclose(found, np.log(2) * np.array([0.0625, 0.1875]), rtol=1e-6)


def test_focal_loss_takes_half_precision_and_boolean_targets() -> None:
    logits = jnp.asarray([-3.0, 2.0], jnp.bfloat16)
    found = focal_loss(logits, jnp.asarray([True, False]), alpha=0.25, gamma=2.0)
    assert found.dtype == jnp.float32
    expected = [focal_in_float64(np.array(-3), 1, 0.25, 2.0), focal_in_float64(np.array(2), 0, 0.25, 2.0)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.2, 1.3, 2.0])
@pytest.mark.parametrize("target", [0.0, 1.0])
def test_focal_gradient_is_finite_and_right_everywhere(gamma: float, target: float) -> None:
    gradient = jax.jit(jax.vmap(jax.grad(lambda x: focal_loss(x, jnp.float32(target), alpha=0.25, gamma=gamma))))
    found = np.asarray(gradient(jnp.asarray(LOGITS)))
    assert np.isfinite(found).all()
    # d/dz of -a m^g log p with m = 1 - p is a m^g (g p log p - m), times the sign in the definition of z.
    sign = 1 if target else -1
    z = LOGITS.astype(np.float64) * sign
    log_p, miss = -np.logaddexp(0, -z), np.exp(-np.logaddexp(0, z))
    expected = sign * (0.25 if target else 0.75) * miss**gamma * (gamma * np.exp(log_p) * log_p - miss)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-9)
    # A confident error has the full slope of the cross-entropy.
    wrong = LOGITS == (-100 if target else 100)
    assert abs(found[wrong][0]) == pytest.approx(0.25 if target else 0.75, rel=1e-5)


def test_smooth_l1_by_hand() -> None:
    difference = jnp.asarray([0.0, 0.05, -0.05, 0.1, -0.1, 0.2, -2.0])
    # beta 0.1: 0.5 d^2 / 0.1 inside, |d| - 0.05 outside.
    np.testing.assert_allclose(
        smooth_l1(difference, beta=0.1), [0.0, 0.0125, 0.0125, 0.05, 0.05, 0.15, 1.95], rtol=1e-6, atol=1e-9
    )
    np.testing.assert_allclose(smooth_l1(jnp.asarray([0.5, -3.0]), beta=1.0), [0.125, 2.5])


def test_smooth_l1_gradient_joins_smoothly() -> None:
    slope = jax.vmap(jax.grad(lambda d: smooth_l1(d, beta=0.1)))
    np.testing.assert_allclose(
        slope(jnp.asarray([0.0, 0.05, -0.05, 0.0999, 0.1001, -5.0])), [0, 0.5, -0.5, 0.999, 1, -1], rtol=1e-5
    )


def giou_in_float64(a: np.ndarray, b: np.ndarray) -> float:
    """Rezatofighi et al. 2019, algorithm 1."""
    a, b = np.float64(a), np.float64(b)
    width, height = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return 1 - (width * height / union - (hull - union) / hull)


def test_giou_loss_equals_its_formula() -> None:
    rng = np.random.default_rng(0)
    first = rng.uniform(0, 80, (2, 300, 2))
    boxes, targets = np.concatenate([first, first + rng.uniform(1, 60, (2, 300, 2))], axis=-1).astype(np.float32)
    found = jax.jit(giou_loss)(boxes, targets)
    expected = [giou_in_float64(a, b) for a, b in zip(boxes, targets, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert min(expected) < 0.7 and max(expected) > 1.3  # overlapping and far apart


@pytest.mark.parametrize(
    ("box", "value"),
    [
        ((0, 0, 10, 10), 0.0),
        ((0, 0, 10, 5), 0.5),
        ((10, 0, 20, 10), 1.0),  # side by side: the hull is the union
        ((20, 0, 30, 10), 1 + 1 / 3),
        ((5, 5, 5, 5), 1.0),  # empty, inside
        ((20, 10, 20, 10), 1.5),  # empty, outside
    ],
)
def test_giou_loss_by_hand_has_finite_gradients(box: tuple[float, ...], value: float) -> None:
    target = jnp.asarray([0.0, 0.0, 10.0, 10.0])
    loss, gradient = jax.value_and_grad(giou_loss)(jnp.asarray(box, jnp.float32), target)
    assert float(loss) == pytest.approx(value, abs=1e-6)
    assert np.isfinite(gradient).all()
