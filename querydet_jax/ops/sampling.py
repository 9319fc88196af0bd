"""Balanced random sampling with static shapes. Shape letters: N candidates, M sampled."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax


class Sample(NamedTuple):
    """``index`` int32 ``[M]`` into the candidates, foreground first; ``foreground`` and ``valid`` bool ``[M]``."""

    index: Array
    foreground: Array
    valid: Array


def sample_balanced(key: Array, foreground: Array, background: Array, *, count: int, fraction: float) -> Sample:
    """Sample ``count`` candidates at random, at most ``fraction`` of them foreground, the rest background.

    Background replaces missing foreground. If there is too little of both, the last entries are invalid (Faster R-CNN,
    Ren et al. 2015, section 3.1.3).

    Args:
      key: PRNG key.
      foreground, background: bool ``[N]``, disjoint. Candidates in neither are never sampled.
      count: M.
      fraction: largest share of foreground.
    """
    order = jax.random.uniform(key, foreground.shape, jnp.float32)
    most = int(count * fraction)
    first = _top_indices(jnp.where(foreground, order, -1.0), most)
    rest = _top_indices(jnp.where(background, order, -1.0), count)
    num_foreground = jnp.minimum(jnp.sum(foreground, dtype=jnp.int32), most)
    num_background = jnp.minimum(jnp.sum(background, dtype=jnp.int32), count - num_foreground)
    place = jnp.arange(count, dtype=jnp.int32)
    is_foreground = place < num_foreground
    index = jnp.where(is_foreground, jnp.pad(first, (0, count - most)), rest[jnp.maximum(place - num_foreground, 0)])
    return Sample(index, is_foreground, place < num_foreground + num_background)


def _top_indices(order: Array, count: int) -> Array:
    """Return the indices of the ``count`` largest entries, filled up with zeros."""
    found = lax.top_k(order, min(count, len(order)))[1].astype(jnp.int32)
    return jnp.pad(found, (0, count - len(found)))
