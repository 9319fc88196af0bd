"""Ways to compute a level's heads at the keys: CSQ, and the paper's CQ and CCQ (Table 5).

All have one signature. Shape letters: B batch, h w map, N capacity, C channels, c context radius.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import Array

from querydet_jax.sparse.conv import (
    Conv,
    Stack,
    conv_rows,
    crop_stacks,
    dense_conv,
    masked_dense_stacks,
    run_stacks,
)
from querydet_jax.sparse.ladder import ladder_capacities, run_ladder
from querydet_jax.sparse.sites import Sites, cell_table, grow, neighbour_table, select_sites, whole_map


class SparseOptions(NamedTuple):
    threshold: float  # sigma: a query probability strictly above it fires
    context: int  # c
    capacities: tuple[float, ...]  # fractions of a level's cells
    chunk: int
    method: Literal["csq", "cq", "ccq"] = "csq"
    overflow: Literal["dense", "cap"] = "dense"


class CascadeLevel(NamedTuple):
    """A level that is computed only around keys.

    ``features [B, h, w, C]`` is the input of the heads, or, where ``output`` is given, the input of
    that convolution, which is then computed at the active sites only and feeds the heads: the
    pyramid's own fine output map is never made.
    """

    level: int
    features: Array
    output: Conv | None


class Computed(NamedTuple):
    """What a method returns: the result of ``finish``, the cells that were computed (bool
    ``[B, h, w]``), their number, the buffer that ran (0: dense) and whether the ladder overflowed."""

    result: Any
    active: Array
    count: Array
    capacity: Array
    overflowed: Array


Finish = Callable[[list[Array], Sites], Any]
"""``finish(outputs, sites)``: one float32 ``[N, O]`` a stack, meaningful at the keys of ``sites``."""


def cascade_sparse_query(
    level: CascadeLevel, keys: Array, stacks: Sequence[Stack], finish: Finish, options: SparseOptions
) -> Computed:
    """CSQ: heads on the keys and their context, inactive cells zero at every layer (section 3.3).

    Where more cells are active than the largest buffer holds, the dense rung computes the same
    function, the masked dense convolution. With ``overflow="cap"`` there is no such rung: the caller
    has seen to it that the keys fit (``largest_capacity``).
    """
    within = grow(keys, options.context)
    capacities, chunk = ladder_capacities(options.capacities, keys.size, options.chunk)

    def on_sites(capacity: int) -> Callable[..., Any]:
        def run(features: Array, within: list[Array]) -> Any:
            sites = select_sites(within, capacity)
            rows = _rows_at(features, level.output, sites, chunk)
            return finish(run_stacks(rows, neighbour_table(sites), sites, stacks, chunk=chunk), sites)

        return run

    def densely(features: Array, within: list[Array]) -> Any:
        features = features if level.output is None else dense_conv(features, level.output)
        return finish(_flat(masked_dense_stacks(features, within[-1], stacks)), whole_map(within[0]))

    count = _count(within[-1])
    last = densely if options.overflow == "dense" else None
    result, capacity, overflowed = run_ladder(count, capacities, on_sites, last, level.features, within)
    return Computed(result, within[-1], count, capacity, overflowed)


def crop_query(
    level: CascadeLevel, keys: Array, stacks: Sequence[Stack], finish: Finish, options: SparseOptions
) -> Computed:
    """CQ: around each key a crop as large as the heads see (11x11 for five layers), zero outside the
    image, through unpadded convolutions. The level's features are computed densely first.

    Equals the dense heads but within a crop's radius of the border, where the dense heads see zeros
    at every layer and a crop only at the first. The ladder counts keys; its last rung has room for all.
    """
    features = level.features if level.output is None else dense_conv(level.features, level.output)
    capacities, chunk = ladder_capacities((*options.capacities, 1.0), keys.size, max(8, options.chunk // 8))

    def on_crops(capacity: int) -> Callable[..., Any]:
        def run(features: Array, keys: Array) -> Any:
            sites = select_sites([keys], capacity)
            return finish(crop_stacks(features, sites, stacks, chunk=chunk), sites)

        return run

    result, capacity, overflowed = run_ladder(_count(keys), capacities, on_crops, None, features, keys)
    active = grow(keys, max(len(stack) for stack in stacks))[-1]
    return Computed(result, active, _count(active), capacity, overflowed)


def complete_convolution_query(
    level: CascadeLevel, keys: Array, stacks: Sequence[Stack], finish: Finish, options: SparseOptions
) -> Computed:
    """CCQ: heads everywhere, read at the keys."""
    features = level.features if level.output is None else dense_conv(level.features, level.output)
    everywhere = jnp.ones(keys.shape, bool)
    result = finish(_flat(masked_dense_stacks(features, everywhere, stacks)), whole_map(keys))
    return Computed(result, everywhere, jnp.int32(keys.size), jnp.int32(0), jnp.asarray(False))


METHODS = {"csq": cascade_sparse_query, "cq": crop_query, "ccq": complete_convolution_query}


def largest_capacity(options: SparseOptions, num_cells: int) -> int:
    """The most active cells that CSQ's buffers hold."""
    return ladder_capacities(options.capacities, num_cells, options.chunk)[0][-1]


def _rows_at(features: Array, output: Conv | None, sites: Sites, chunk: int) -> Array:
    """Head input ``[N, C]`` at the sites, from the dense map ``[B, h, w, C]``."""
    dense_rows = features.reshape(-1, features.shape[-1])
    if output is None:
        return dense_rows.at[sites.index].get(mode="fill", fill_value=0)
    return conv_rows(dense_rows, cell_table(sites), [output], sites.counts[-1], relu=False, chunk=chunk)[0]


def _flat(outputs: list[Array]) -> list[Array]:
    return [x.reshape(-1, x.shape[-1]) for x in outputs]


def _count(mask: Array) -> Array:
    return jnp.sum(mask.astype(jnp.int32))
