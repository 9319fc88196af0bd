"""Learning rate and optimiser."""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from querydet_jax.config import TrainConfig


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Return the learning rate by step: linear warm-up, then decay in steps or by a cosine to zero.

    lr(t) = base * (f + (1 - f) * t / warmup) for t < warmup, where f is the warm-up factor; with ``steps``, times
    ``decay_factor`` for every entry of ``decay_steps`` that t has reached.
    """

    def schedule(step: ArrayLike) -> Array:
        t = jnp.asarray(step, jnp.float32)
        warmup = float(max(config.warmup_steps, 1))
        ramp = config.warmup_factor + (1.0 - config.warmup_factor) * jnp.minimum(t / warmup, 1.0)
        if config.warmup_steps == 0:
            ramp = jnp.ones((), jnp.float32)
        if config.schedule == "steps":
            reached = sum(
                ((t >= boundary).astype(jnp.float32) for boundary in config.decay_steps), jnp.zeros((), jnp.float32)
            )
            decay = jnp.power(config.decay_factor, reached)
        else:
            span = max(config.steps - config.warmup_steps, 1)
            progress = jnp.clip((t - config.warmup_steps) / span, 0.0, 1.0)
            decay = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        return config.learning_rate * ramp * decay

    return schedule


def steps_of_epochs(epochs: int, images: int, batch_size: int) -> int:
    """Return the number of steps, at least 1, whose batches have ``epochs`` times ``images`` images, rounded."""
    return max(1, round(epochs * images / batch_size))


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Return SGD as in torch (g += wd * p; v = momentum * v + g; p -= lr * v) or AdamW.

    Weight decay applies to every trainable parameter, biases included, after clipping.
    """
    parts = []
    if config.clip_value > 0:
        parts.append(optax.clip(config.clip_value))
    if config.clip_norm > 0:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    rate = learning_rate(config)
    if config.optimizer == "sgd":
        parts.append(optax.add_decayed_weights(config.weight_decay))
        parts.append(optax.sgd(rate, momentum=config.momentum))
    else:
        parts.append(optax.adamw(rate, weight_decay=config.weight_decay))
    return optax.chain(*parts)
