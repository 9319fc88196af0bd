"""Cascade Sparse Query (paper section 3.3): heads on fine levels only where queries point.

Shape letters: B batch, h w map, N rows, C channels, O output channels, c context radius.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from querydet_jax.sparse.cells import Cells
from querydet_jax.sparse.conv import Stack
from querydet_jax.sparse.level import CascadeLevel
from querydet_jax.sparse.methods import METHODS, SparseOptions, buffer_sizes, room_needed
from querydet_jax.sparse.sites import children


class LevelStats(NamedTuple):
    """Counts over the whole batch, int32 ``[]`` each; ``overflowed`` bool ``[]``.

    ``queries`` fired on the level above; ``keys`` are their children, where the heads are read; ``active``
    includes the context; ``capacity`` is the buffer that ran, 0 for the dense rung. ``overflowed``: more cells
    were asked for than the largest buffer holds. The dense rung then computed them, or, under
    ``overflow="cap"``, the lowest-scoring queries were left out (``queries`` still counts them).
    """

    queries: Array
    keys: Array
    active: Array
    capacity: Array
    overflowed: Array


class LevelResult(NamedTuple):
    """One level of the cascade: what ``select`` returned, counts, and maps ``[B, h, w]``.

    ``query_logits`` are -inf where not computed, None on the last level.
    """

    selected: Any
    stats: LevelStats
    keys: Array
    active: Array
    query_logits: Array | None


LevelSelect = Callable[[int, list[Array], Cells], Any]
"""``select(level, outputs, cells)``: ``methods.Select`` for any level of the pyramid."""


def cascade(
    query_logits: Array,
    levels: Sequence[CascadeLevel],
    heads: Sequence[Stack],
    query: Stack,
    select: LevelSelect,
    options: SparseOptions,
) -> list[LevelResult]:
    """Walk down the pyramid: queries, their children as keys, context, heads, next queries.

    Args:
      query_logits: ``[B, h, w]`` of the start level, dense.
      levels: finer levels, coarsest first, each at most twice the size of the one before.
      heads: stacks whose outputs go to ``select``.
      query: the query head. It runs at the keys of every level but the last and gates the next level.

    Returns:
      One ``LevelResult`` per level. A level without queries has no keys, nor has any finer one.
    """
    results: list[LevelResult] = []
    logits = query_logits.astype(jnp.float32)
    for level in levels:
        gate = query if level is not levels[-1] else None
        result = _run_level(logits, level, heads, gate, select, options)
        results.append(result)
        if result.query_logits is not None:
            logits = result.query_logits
    return results


def _run_level(
    logits: Array,
    level: CascadeLevel,
    heads: Sequence[Stack],
    query: Stack | None,
    select: LevelSelect,
    options: SparseOptions,
) -> LevelResult:
    shape = (level.features.shape[1], level.features.shape[2])
    fired = jax.nn.sigmoid(logits) > options.threshold
    kept, capped = fired, jnp.asarray(False)
    if options.method == "csq" and options.overflow == "cap":
        capacities, _ = buffer_sizes(options, level.features.shape[:3])
        kept, capped = cap_queries(
            logits, fired, lambda mask: room_needed(children(mask, shape), level.margin, options), capacities[-1]
        )
    keys = children(kept, shape)

    def select_and_gate(outputs: list[Array], cells: Cells) -> tuple[Any, Array | None]:
        if query is None:
            return select(level.level, outputs, cells), None
        *outputs, gate = outputs
        return select(level.level, outputs, cells), cells.key_map(gate[:, 0], -jnp.inf)

    stacks = [*heads] if query is None else [*heads, query]
    computed = METHODS[options.method](level, keys, stacks, select_and_gate, options)
    selected, next_logits = computed.selected
    stats = LevelStats(
        queries=jnp.sum(fired, dtype=jnp.int32),
        keys=jnp.sum(keys, dtype=jnp.int32),
        active=computed.count,
        capacity=computed.capacity,
        overflowed=computed.overflowed | capped,
    )
    return LevelResult(selected, stats, keys, computed.active, next_logits)


def cap_queries(logits: Array, fired: Array, needed: Callable[[Array], Array], capacity: int) -> tuple[Array, Array]:
    """Keep the best-scoring queries that fit into ``capacity`` cells.

    Queries are taken in order of their logits, equal ones together, as many as fit. How many fit is found by
    bisection, since the squares around keys overlap.

    Args:
      logits, fired: ``[B, h, w]`` of the coarser level.
      needed: maps queries to the cells int32 ``[]`` that their keys and context need; it never decreases as
        queries are added.

    Returns:
      which queries to keep, bool ``[B, h, w]``; whether any was left out, bool ``[]``.
    """

    def best() -> Array:
        ordered = jnp.sort(jnp.where(fired, logits, -jnp.inf).reshape(-1), descending=True)

        def first(count: Array) -> Array:
            return fired & (logits >= ordered[jnp.maximum(count, 1) - 1]) & (count > 0)

        def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bounds  # `low` queries fit, `high` are too many
            middle = (low + high) // 2
            fits = needed(first(middle)) <= capacity
            return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

        start = (jnp.int32(0), jnp.sum(fired, dtype=jnp.int32))
        low, _ = lax.fori_loop(0, logits.size.bit_length(), halve, start)
        return first(low)

    over = needed(fired) > capacity
    return lax.cond(over, best, lambda: fired), over
