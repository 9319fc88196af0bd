"""Learning rate against the published tables; updates against torch's form written by hand."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from querydet_jax.config import TrainConfig
from querydet_jax.training.schedule import learning_rate, make_optimizer

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "aux.npz")


@pytest.mark.parametrize(
    ("table", "config"),
    [
        ("lr_coco_qd", TrainConfig(learning_rate=0.01, steps=90_000, decay_steps=(60_000, 80_000))),
        ("lr_vis_qd", TrainConfig(learning_rate=0.01, steps=50_000, decay_steps=(30_000, 40_000))),
    ],
)
def test_published_learning_rates(table: str, config: TrainConfig) -> None:
    steps, expected = GOLDEN[table].T
    schedule = learning_rate(config)
    traced = jax.jit(jax.vmap(schedule))(jnp.asarray(steps, jnp.int32))
    np.testing.assert_allclose(traced, expected, rtol=1e-6)
    np.testing.assert_allclose([schedule(int(step)) for step in steps], expected, rtol=1e-6)


def rates(config: TrainConfig, *steps: int) -> np.ndarray:
    return np.asarray(jax.jit(jax.vmap(learning_rate(config)))(jnp.asarray(steps)))


def test_cosine() -> None:
    config = TrainConfig(schedule="cosine", learning_rate=0.2, steps=1100, warmup_steps=100, warmup_factor=0.1)
    # Warm-up; then half way 1/2, a quarter of the way (1 + cos(pi/4)) / 2, at the end and after it 0.
    found = rates(config, 0, 50, 100, 600, 350, 1100, 5000)
    np.testing.assert_allclose(found, [0.02, 0.11, 0.2, 0.1, 0.1 * (1 + 0.5**0.5), 0, 0], rtol=1e-4, atol=1e-8)
    assert (np.diff(rates(config, *range(100, 1101, 50))) < 0).all()


def test_no_warmup() -> None:
    config = TrainConfig(warmup_steps=0, learning_rate=0.5, decay_steps=(3,), decay_factor=0.5)
    np.testing.assert_allclose(rates(config, 0, 2, 3, 100), [0.5, 0.5, 0.25, 0.25])
    config = TrainConfig(warmup_steps=0, learning_rate=0.5, schedule="cosine", steps=10)
    np.testing.assert_allclose(rates(config, 0, 5, 10), [0.5, 0.25, 0], atol=1e-7)


def test_no_decay_steps() -> None:
    np.testing.assert_allclose(rates(TrainConfig(decay_steps=()), 1000, 10**6), [0.01, 0.01], rtol=1e-6)


PARAMS = {"kernel": jnp.asarray([[1.0, -2.0], [0.5, 100.0]]), "bias": jnp.asarray([3.0, -1.0])}
GRADIENTS = [
    {"kernel": jnp.asarray([[0.5, -50.0], [0.0, 2.0]]), "bias": jnp.asarray([40.0, 0.1])},
    {"kernel": jnp.asarray([[-0.5, 3.0], [90.0, 2.0]]), "bias": jnp.asarray([-1.0, 0.1])},
    {"kernel": jnp.asarray([[1.5, 7.0], [0.1, -36.0]]), "bias": jnp.asarray([0.0, 0.1])},
]


def run(config: TrainConfig) -> dict[str, np.ndarray]:
    """Parameters after three updates."""
    optimizer = make_optimizer(config)

    @jax.jit
    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, optimizer.init(PARAMS)
    for gradients in GRADIENTS:
        params, state = step(params, state, gradients)
    return {name: np.asarray(x) for name, x in params.items()}


def torch_sgd(
    config: TrainConfig, clip: float = np.inf, norm: float = np.inf, clip_after_decay: bool = False
) -> dict[str, np.ndarray]:
    """g = clip(g); g += wd * p; v = momentum * v + g; p -= lr * v, in float64."""
    params = {name: np.asarray(x, np.float64) for name, x in PARAMS.items()}
    velocity = {name: np.zeros_like(x) for name, x in params.items()}
    for t, gradients in enumerate(GRADIENTS):
        rate = config.learning_rate * (config.warmup_factor + (1 - config.warmup_factor) * t / config.warmup_steps)
        raw = {name: np.asarray(g, np.float64) for name, g in gradients.items()}
        scale = min(1.0, norm / np.sqrt(sum((g**2).sum() for g in raw.values())))
        for name, g in raw.items():
            decay = config.weight_decay * params[name]
            g = np.clip(g + decay, -clip, clip) if clip_after_decay else np.clip(g * scale, -clip, clip) + decay
            velocity[name] = config.momentum * velocity[name] + g
            params[name] = params[name] - rate * velocity[name]
    return params


SGD = dict(learning_rate=0.1, weight_decay=0.05, momentum=0.9, warmup_steps=10, warmup_factor=0.5)


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-5, atol=1e-6)


def test_sgd_is_torchs_and_decays_biases_too() -> None:
    config = TrainConfig(**SGD)
    expected = torch_sgd(config)
    assert_equal(run(config), expected)
    undecayed = torch_sgd(TrainConfig(**SGD | {"weight_decay": 0.0}))
    assert abs(expected["bias"] - undecayed["bias"]).min() > 1e-3  # the decay is large enough to see


def test_clipping_by_value_acts_on_elements_and_before_the_weight_decay() -> None:
    config = TrainConfig(**SGD, clip_value=35.0)
    expected = torch_sgd(config, clip=35.0)
    assert_equal(run(config), expected)
    for other in (torch_sgd(config), torch_sgd(config, clip=35.0, clip_after_decay=True)):
        assert max(abs(other[name] - expected[name]).max() for name in other) > 1e-2


def test_clipping_by_norm_scales_the_whole_gradient() -> None:
    config = TrainConfig(**SGD, clip_norm=10.0)
    assert_equal(run(config), torch_sgd(config, norm=10.0))


def test_adamw_decays_apart_from_its_moments() -> None:
    config = TrainConfig(**SGD, optimizer="adamw")
    params = {name: np.asarray(x, np.float64) for name, x in PARAMS.items()}
    first = {name: np.zeros_like(x) for name, x in params.items()}
    second = {name: np.zeros_like(x) for name, x in params.items()}
    for t, gradients in enumerate(GRADIENTS):
        rate = 0.1 * (0.5 + 0.5 * t / 10)
        for name, p in params.items():
            g = np.asarray(gradients[name], np.float64)
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g**2
            moved = first[name] / (1 - 0.9 ** (t + 1)) / (np.sqrt(second[name] / (1 - 0.999 ** (t + 1))) + 1e-8)
            params[name] = p - rate * (moved + 0.05 * p)
    assert_equal(run(config), params)
