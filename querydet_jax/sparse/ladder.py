"""Capacity ladder: run the smallest of several compiled sizes that fits, the dense computation last."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import jax.numpy as jnp
from jax import Array, lax

Result = TypeVar("Result")


def ladder_capacities(fractions: Sequence[float], num_cells: int, chunk: int) -> tuple[list[int], int]:
    """Return the buffer sizes for a map, ascending, and the chunk that divides them all.

    Args:
      fractions: ascending fractions of the cells.
      num_cells: B * h * w.
      chunk: wanted rows per turn; small maps use fewer.
    """
    chunk = min(chunk, max(8, num_cells // 8))
    sizes = {min(math.ceil(f * num_cells / chunk), math.ceil(num_cells / chunk)) * chunk for f in fractions}
    return sorted(sizes), chunk


def run_ladder(
    count: Array,
    capacities: Sequence[int],
    sparse: Callable[[int], Result],
    dense: Callable[[], Result] | None,
) -> tuple[Result, Array, Array]:
    """Run ``sparse(capacity)`` for the smallest capacity that holds ``count`` sites.

    Above the largest, ``dense()`` computes the same function without a buffer, so the result never depends on
    the capacities. Without ``dense``, the count must not exceed the largest. All rungs return the same
    shapes. Never call this under ``vmap``: a batched ``lax.switch`` runs every branch.

    Returns:
      the result; the capacity that ran, int32 ``[]`` (0: dense); whether it overflowed, bool ``[]``.
    """
    limits = jnp.asarray(capacities, jnp.int32)
    over = jnp.sum(count > limits, dtype=jnp.int32)
    rungs = [partial(sparse, capacity) for capacity in capacities] + ([] if dense is None else [dense])
    rung = jnp.minimum(over, len(rungs) - 1)
    result = lax.switch(rung, rungs)
    used = jnp.concatenate([limits, jnp.zeros((1,), jnp.int32)])[rung]
    return result, used, over == len(capacities)
