"""Cascade Sparse Query (paper section 3.3): heads on fine levels only where queries point.

Shape letters: B batch, h w map, N capacity, C channels, O output channels, c context radius.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from querydet_jax.sparse.conv import Stack
from querydet_jax.sparse.level import CascadeLevel
from querydet_jax.sparse.methods import METHODS, Method, SparseOptions, buffer_sizes, room_needed
from querydet_jax.sparse.sites import Sites, children


class LevelStats(NamedTuple):
    """Counts over the whole batch, int32 ``[]`` each; ``overflowed`` bool ``[]``.

    ``queries`` fired on the level above; ``keys`` are their children, where heads are read;
    ``active`` includes the context; ``capacity`` is the buffer that ran, 0 if the dense rung did;
    ``overflowed`` tells that more was asked for than the largest buffer holds: the dense rung then
    computed it, or, under ``overflow="cap"``, the lowest-scoring queries were left out (``queries``
    still counts them).
    """

    queries: Array
    keys: Array
    active: Array
    capacity: Array
    overflowed: Array


class LevelResult(NamedTuple):
    reduced: Any  # what ``reduce`` returned
    stats: LevelStats
    keys: Array  # bool [B, h, w]
    active: Array  # bool [B, h, w]
    query_logits: Array | None  # [B, h, w], -inf where not computed; None on the last level


Reduce = Callable[[int, list[Array], Sites], Any]
"""``reduce(level, outputs, sites)``: ``outputs`` are ``[N, O]`` at the sites, meaningful at the keys
only (``sites.is_key``). Must return the same shapes for any N."""


def cascade(
    query_logits: Array,
    levels: Sequence[CascadeLevel],
    heads: Sequence[Stack],
    query: Stack,
    reduce: Reduce,
    options: SparseOptions,
    method: Method | None = None,
) -> list[LevelResult]:
    """Walk down the pyramid: queries, their children as keys, context, heads, next queries.

    Args:
      query_logits: ``[B, h, w]`` of the start level, dense.
      levels: finer levels, coarsest first, each at most twice the size of the one before.
      heads: stacks whose outputs go to ``reduce``.
      query: the query head, run at the keys of every level but the last to gate the next.
      method: another one than ``options.method`` names.

    Returns:
      One ``LevelResult`` a level. A level without queries has no keys; so have all finer ones.
    """
    results: list[LevelResult] = []
    logits = query_logits.astype(jnp.float32)
    for position, level in enumerate(levels):
        last = position == len(levels) - 1
        fired = jax.nn.sigmoid(logits) > options.threshold
        result = _run_level(logits, fired, level, heads, None if last else query, reduce, options, method)
        results.append(result)
        if result.query_logits is not None:
            logits = result.query_logits
    return results


def _run_level(
    logits: Array,
    fired: Array,
    level: CascadeLevel,
    heads: Sequence[Stack],
    query: Stack | None,
    reduce: Reduce,
    options: SparseOptions,
    method: Method | None,
) -> LevelResult:
    batch, height, width, _ = level.features.shape
    kept, over = fired, jnp.asarray(False)
    if options.method == "csq" and options.overflow == "cap":
        capacities, _ = buffer_sizes(options, (batch, height, width))
        kept, over = cap_queries(
            logits,
            fired,
            lambda mask: room_needed(children(mask, (height, width)), level.margin, options),
            capacities[-1],
        )
    keys = children(kept, (height, width))

    def finish(outputs: list[Array], sites: Sites) -> tuple[Any, Array | None]:
        return _finish(level.level, outputs, sites, query is not None, reduce)

    stacks = list(heads) if query is None else [*heads, query]
    computed = (method or METHODS[options.method])(level, keys, stacks, finish, options)
    reduced, next_logits = computed.result
    stats = LevelStats(
        queries=jnp.sum(fired.astype(jnp.int32)),
        keys=jnp.sum(keys.astype(jnp.int32)),
        active=computed.count,
        capacity=computed.capacity,
        overflowed=computed.overflowed | over,
    )
    return LevelResult(reduced, stats, keys, computed.active, next_logits)


def cap_queries(logits: Array, fired: Array, needed: Callable[[Array], Array], capacity: int) -> tuple[Array, Array]:
    """The best-scoring queries that fit into ``capacity`` cells.

    Queries are taken in order of their logits, equal ones together, as many as fit: found by
    bisection over how many, since the squares around keys overlap.

    Args:
      logits, fired: ``[B, h, w]`` of the coarser level.
      needed: room int32 ``[]`` that the keys and context of some queries need; never less for more queries.

    Returns:
      which queries to keep, bool ``[B, h, w]``; whether any was left out, bool ``[]``.
    """

    def best(_: Array) -> Array:
        ordered = jnp.sort(jnp.where(fired, logits, -jnp.inf).reshape(-1), descending=True)

        def first(count: Array) -> Array:
            return fired & (logits >= ordered[jnp.maximum(count, 1) - 1]) & (count > 0)

        def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bounds  # `low` queries fit, `high` are too many
            middle = (low + high) // 2
            fits = needed(first(middle)) <= capacity
            return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

        start = (jnp.int32(0), jnp.sum(fired.astype(jnp.int32)))
        low, _ = lax.fori_loop(0, logits.size.bit_length(), halve, start)
        return first(low)

    over = needed(fired) > capacity
    return lax.cond(over, best, lambda _: fired, jnp.int32(0)), over


def _finish(
    level: int, outputs: list[Array], sites: Sites, with_query: bool, reduce: Reduce
) -> tuple[Any, Array | None]:
    """Reduce the head outputs and put the query logits back on the map."""
    if not with_query:
        return reduce(level, outputs, sites), None
    *outputs, query = outputs
    target = jnp.where(sites.is_key, sites.index, sites.num_cells)
    logits = jnp.full((sites.num_cells,), -jnp.inf).at[target].set(query[:, 0], mode="drop")
    return reduce(level, outputs, sites), logits.reshape(sites.shape)
