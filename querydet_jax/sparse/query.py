"""Cascade Sparse Query (paper section 3.3): heads on fine levels only where queries point.

Shape letters: B batch, h w map, N capacity, C channels, O output channels, c context radius.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from querydet_jax.sparse.conv import Conv, Stack, conv_rows, dense_conv, masked_dense_stacks, run_stacks
from querydet_jax.sparse.ladder import ladder_capacities, run_ladder
from querydet_jax.sparse.sites import Sites, cell_table, children, grow, neighbour_table, select_sites, whole_map


class SparseOptions(NamedTuple):
    threshold: float  # sigma: a query probability strictly above it fires
    context: int  # c
    capacities: tuple[float, ...]  # fractions of a level's cells
    chunk: int


class CascadeLevel(NamedTuple):
    """A level that is computed only around keys.

    ``features [B, h, w, C]`` is the input of the heads, or, where ``output`` is given, the input of
    that convolution, which is then computed at the active sites only and feeds the heads: the
    pyramid's own fine output map is never made.
    """

    level: int
    features: Array
    output: Conv | None


class LevelStats(NamedTuple):
    """Counts over the whole batch, int32 ``[]`` each; ``overflowed`` bool ``[]``.

    ``queries`` fired on the level above; ``keys`` are their children, where heads are read;
    ``active`` includes the context; ``capacity`` is the buffer that ran, 0 if the dense rung did.
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
) -> list[LevelResult]:
    """Walk down the pyramid: queries, their children as keys, context, heads, next queries.

    Args:
      query_logits: ``[B, h, w]`` of the start level, dense.
      levels: finer levels, coarsest first, each at most twice the size of the one before.
      heads: stacks whose outputs go to ``reduce``.
      query: the query head, run at the keys of every level but the last to gate the next.

    Returns:
      One ``LevelResult`` a level. A level without queries has no keys; so have all finer ones.
    """
    results: list[LevelResult] = []
    logits = query_logits.astype(jnp.float32)
    for position, level in enumerate(levels):
        last = position == len(levels) - 1
        fired = jax.nn.sigmoid(logits) > options.threshold
        result = _run_level(fired, level, heads, None if last else query, reduce, options)
        results.append(result)
        if result.query_logits is not None:
            logits = result.query_logits
    return results


def _run_level(
    fired: Array,
    level: CascadeLevel,
    heads: Sequence[Stack],
    query: Stack | None,
    reduce: Reduce,
    options: SparseOptions,
) -> LevelResult:
    stacks = list(heads) if query is None else [*heads, query]
    batch, height, width, _ = level.features.shape
    keys = children(fired, (height, width))
    within = grow(keys, options.context)
    active = within[-1]
    capacities, chunk = ladder_capacities(options.capacities, batch * height * width, options.chunk)

    def on_sites(capacity: int) -> Callable[..., tuple[Any, Array | None]]:
        def run(features: Array, within: list[Array]) -> tuple[Any, Array | None]:
            sites = select_sites(within, capacity)
            rows = _rows_at(features, level.output, sites, chunk)
            outputs = run_stacks(rows, neighbour_table(sites), sites, stacks, chunk=chunk)
            return _finish(level.level, outputs, sites, query is not None, reduce)

        return run

    def densely(features: Array, within: list[Array]) -> tuple[Any, Array | None]:
        if level.output is not None:
            features = dense_conv(features, level.output)
        outputs = masked_dense_stacks(features, within[-1], stacks)
        outputs = [x.reshape(-1, x.shape[-1]) for x in outputs]
        return _finish(level.level, outputs, whole_map(within[0]), query is not None, reduce)

    count = jnp.sum(active.astype(jnp.int32))
    (reduced, logits), capacity, overflowed = run_ladder(count, capacities, on_sites, densely, level.features, within)
    stats = LevelStats(
        queries=jnp.sum(fired.astype(jnp.int32)),
        keys=jnp.sum(keys.astype(jnp.int32)),
        active=count,
        capacity=capacity,
        overflowed=overflowed,
    )
    return LevelResult(reduced, stats, keys, active, logits)


def _rows_at(features: Array, output: Conv | None, sites: Sites, chunk: int) -> Array:
    """Head input ``[N, C]`` at the sites, from the dense map ``[B, h, w, C]``."""
    dense_rows = features.reshape(-1, features.shape[-1])
    if output is None:
        return dense_rows.at[sites.index].get(mode="fill", fill_value=0)
    return conv_rows(dense_rows, cell_table(sites), [output], sites.counts[-1], relu=False, chunk=chunk)[0]


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
