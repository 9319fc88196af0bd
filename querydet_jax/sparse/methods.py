"""Three ways to compute a level's heads at the keys: CSQ, and the paper's CQ and CCQ (Table 5).

All have one signature. Shape letters: B batch, h w map, N rows, C channels, O output channels, c context radius.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import Array

from querydet_jax.sparse.cells import Cells, whole_map
from querydet_jax.sparse.conv import Stack, crop_stacks, masked_dense_stacks, run_stacks
from querydet_jax.sparse.ladder import ladder_capacities, run_ladder
from querydet_jax.sparse.level import CascadeLevel, dense_input, input_at_sites
from querydet_jax.sparse.sites import grow, select_sites
from querydet_jax.sparse.tiles import cells_of_tiles, grid_shape, run_stacks_on_tiles, select_tiles, tile_count


class SparseOptions(NamedTuple):
    """The cascade's options; ``InferenceConfig`` explains each."""

    threshold: float | Array  # sigma: a query probability strictly above it fires
    context: int  # c
    capacities: tuple[float, ...]  # fractions of a level's cells
    chunk: int
    method: Literal["csq", "cq", "ccq"] = "csq"
    overflow: Literal["dense", "cap"] = "dense"
    kernel: Literal["gather", "tiles", "fused"] = "gather"  # CSQ only
    tile: int = 8  # side of a tile in cells


Select = Callable[[list[Array], Cells], Any]
"""``select(outputs, cells)`` reduces head outputs, one float32 ``[N, O]`` per stack, to what leaves the level.

It runs inside each rung, since no dense map of outputs is ever made. It reads the outputs at keys only and
must return the same shapes for any N.
"""


class Computed(NamedTuple):
    """What a method returns.

    selected: what ``select`` returned. active: bool ``[B, h, w]``, the computed cells, and count their number.
    capacity: the buffer that ran (0: dense). overflowed: whether the ladder overflowed.
    """

    selected: Any
    active: Array
    count: Array
    capacity: Array
    overflowed: Array


def cascade_sparse_query(
    level: CascadeLevel, keys: Array, stacks: Sequence[Stack], select: Select, options: SparseOptions
) -> Computed:
    """CSQ: heads on the keys and their context, inactive cells zero at every layer (paper section 3.3).

    Where the cells do not fit the largest buffer, the dense rung computes the same function, the masked
    dense convolution. With ``overflow="cap"`` there is no such rung: the caller makes the keys fit.
    """
    rings = grow(keys, options.context + level.margin)
    active = rings[options.context]
    capacities, chunk = buffer_sizes(options, keys.shape)

    def on_sites(capacity: int) -> Any:
        rows, sites, table = input_at_sites(level, select_sites(rings, capacity), options.context, chunk)
        return select(run_stacks(rows, table, sites, stacks, chunk=chunk), sites.cells)

    def on_tiles(capacity: int) -> Any:
        tiles = select_tiles(active, capacity // options.tile**2, options.tile)
        fused = options.kernel == "fused"
        outputs = run_stacks_on_tiles(level, active, tiles, stacks, chunk=chunk, fused=fused)
        return select(outputs, cells_of_tiles(tiles, keys))

    def densely() -> Any:
        return select(_flat(masked_dense_stacks(dense_input(level), active, stacks)), whole_map(keys))

    selected, capacity, overflowed = run_ladder(
        room_needed(keys, level.margin, options),
        capacities,
        on_sites if options.kernel == "gather" else on_tiles,
        densely if options.overflow == "dense" else None,
    )
    return Computed(selected, active, _count(active), capacity, overflowed)


def crop_query(
    level: CascadeLevel, keys: Array, stacks: Sequence[Stack], select: Select, options: SparseOptions
) -> Computed:
    """CQ: a crop around each key, as large as the heads' receptive field (11x11 for five layers).

    Crops are zero outside the image and pass through unpadded convolutions. The level's features are
    computed densely first. Equals the dense heads except within a crop's radius of the border, where the
    dense heads see zeros at every layer and a crop only at the first. The ladder counts keys; its last rung
    holds all cells.
    """
    features = dense_input(level)
    capacities, chunk = ladder_capacities((*options.capacities, 1.0), keys.size, max(8, options.chunk // 8))

    def on_crops(capacity: int) -> Any:
        sites = select_sites([keys], capacity)
        return select(crop_stacks(features, sites, stacks, chunk=chunk), sites.cells)

    selected, capacity, overflowed = run_ladder(_count(keys), capacities, on_crops, None)
    active = grow(keys, max(len(stack) for stack in stacks))[-1]
    return Computed(selected, active, _count(active), capacity, overflowed)


def complete_convolution_query(
    level: CascadeLevel, keys: Array, stacks: Sequence[Stack], select: Select, options: SparseOptions
) -> Computed:
    """CCQ: heads everywhere, read at the keys."""
    everywhere = jnp.ones(keys.shape, bool)
    selected = select(_flat(masked_dense_stacks(dense_input(level), everywhere, stacks)), whole_map(keys))
    return Computed(selected, everywhere, jnp.int32(keys.size), jnp.int32(0), jnp.asarray(False))


Method = Callable[[CascadeLevel, Array, Sequence[Stack], Select, SparseOptions], Computed]
"""``method(level, keys, stacks, select, options)``: the heads at the keys, bool ``[B, h, w]``."""

METHODS: dict[str, Method] = {"csq": cascade_sparse_query, "cq": crop_query, "ccq": complete_convolution_query}


def buffer_sizes(options: SparseOptions, shape: tuple[int, ...]) -> tuple[list[int], int]:
    """Return CSQ's buffer sizes in cells for a map ``(B, h, w)``, and the rows (sites or tiles) per turn."""
    batch, height, width = shape
    if options.kernel == "gather":
        return ladder_capacities(options.capacities, batch * height * width, options.chunk)
    cells = options.tile**2
    batch, rows, columns = grid_shape((batch, height, width), options.tile)
    tiles, chunk = ladder_capacities(options.capacities, batch * rows * columns, max(1, options.chunk // cells))
    return [cells * capacity for capacity in tiles], chunk


def room_needed(keys: Array, margin: int, options: SparseOptions) -> Array:
    """Return how many cells CSQ's buffer must hold for ``keys`` bool ``[B, h, w]``, int32 ``[]``."""
    if options.kernel == "gather":
        return _count(grow(keys, options.context + margin)[-1])
    return options.tile**2 * tile_count(grow(keys, options.context)[-1], options.tile)


def _flat(outputs: list[Array]) -> list[Array]:
    return [x.reshape(-1, x.shape[-1]) for x in outputs]


def _count(mask: Array) -> Array:
    return jnp.sum(mask, dtype=jnp.int32)
