"""Which cells of a feature map are active, in a buffer of fixed capacity.

One site set serves the whole batch: the image is part of a cell's index, so images share the
capacity. Shape letters: B batch, h w map, N capacity, c context radius.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from querydet_jax.sparse.cells import Cells


@partial(jax.tree_util.register_dataclass, data_fields=["index", "counts"], meta_fields=["shape"])
@dataclasses.dataclass(frozen=True)
class Sites:
    """Active cells, the keys first, then the cells at distance 1 from a key, at distance 2, ...

    Attributes:
      index: int32 ``[N]``, flat cell number ``(b * h + y) * w + x``; unused slots hold ``B * h * w``.
      counts: int32 ``[c + 1]``; ``counts[r]`` sites lie within (Chebyshev) distance r of a key, and
        they are the first ``counts[r]`` slots. ``counts[0]`` is the number of keys.
      shape: ``(B, h, w)``.
    """

    index: Array
    counts: Array
    shape: tuple[int, int, int]

    @property
    def capacity(self) -> int:
        return self.index.shape[0]

    @property
    def num_cells(self) -> int:
        batch, height, width = self.shape
        return batch * height * width

    @property
    def is_key(self) -> Array:
        """Bool ``[N]``."""
        return jnp.arange(self.capacity, dtype=jnp.int32) < self.counts[0]

    @property
    def cells(self) -> Cells:
        """Where the rows lie, for selection from head outputs."""
        return Cells(self.index, self.is_key, self.shape)


def children(parents: Array, shape: tuple[int, int]) -> Array:
    """Return the keys: the 2x2 children, on the finer level, of the true cells of ``parents [B, h, w]``.

    QueryDet eq. 1: a query (x, y) on P_l has the keys (2x + i, 2y + j), i and j in {0, 1}, on P_{l-1}.

    Args:
      shape: (h, w) of the finer level, at most twice the parents'. Below that (P6 of an odd P5 is
        rounded up) the children outside the map are dropped.

    Raises:
      ValueError: the finer level is larger, and the parents do not cover it.
    """
    if shape[0] > 2 * parents.shape[1] or shape[1] > 2 * parents.shape[2]:
        raise ValueError(f"a {shape[0]}x{shape[1]} map is more than twice its parents' {parents.shape[1:]}")
    fine = jnp.repeat(jnp.repeat(parents, 2, axis=1), 2, axis=2)
    return fine[:, : shape[0], : shape[1]]


def dilate(mask: Array) -> Array:
    """Grow ``mask [B, h, w]`` by one cell in all eight directions, clipped to the map."""
    rows = jnp.pad(mask, ((0, 0), (1, 1), (0, 0)))
    mask = rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]
    columns = jnp.pad(mask, ((0, 0), (0, 0), (1, 1)))
    return columns[:, :, :-2] | columns[:, :, 1:-1] | columns[:, :, 2:]


def grow(keys: Array, context: int) -> list[Array]:
    """Return masks ``[B, h, w]`` of the cells within 0, 1, .. ``context`` cells of a key.

    The last one is the active set: the union of the (2c+1) x (2c+1) squares around all keys (paper section 3.3).
    """
    within = [keys]
    for _ in range(context):
        within.append(dilate(within[-1]))
    return within


def select_sites(within: list[Array], capacity: int) -> Sites:
    """Compact nested masks, as ``grow`` returns them, into a buffer.

    Every active cell gets exactly one slot. If more than ``capacity`` cells are active, the buffer drops the
    last ones, and ``counts`` still counts them all: the caller chooses a larger buffer.
    """
    batch, height, width = within[-1].shape
    num_cells = within[-1].size
    rings = [within[0]] + [outer & ~inner for inner, outer in zip(within, within[1:], strict=False)]
    flat = jnp.concatenate([ring.reshape(-1) for ring in rings])
    totals = jnp.cumsum(flat, dtype=jnp.int32)
    slot = jnp.where(flat, totals - 1, capacity)
    cell = jnp.tile(jnp.arange(num_cells, dtype=jnp.int32), len(rings))
    index = jnp.full((capacity,), num_cells, jnp.int32).at[slot].set(cell, mode="drop")
    counts = totals[num_cells - 1 :: num_cells]
    return Sites(index, counts, (batch, height, width))


def neighbour_table(sites: Sites) -> Array:
    """Return the slots of each site's 3x3 neighbours, int32 ``[N, 9]``, row-major; N for an inactive neighbour.

    One table serves every convolution on these sites: slot N is out of range of ``[N, C]`` rows and
    reads as zero, as an inactive cell must.
    """
    slot_of_cell = jnp.full((sites.num_cells,), sites.capacity, jnp.int32)
    slot_of_cell = slot_of_cell.at[sites.index].set(jnp.arange(sites.capacity, dtype=jnp.int32), mode="drop")
    return slot_of_cell.at[cell_table(sites)].get(mode="fill", fill_value=sites.capacity)


def within(sites: Sites, table: Array, context: int) -> tuple[Sites, Array]:
    """Narrow sites to those within ``context`` cells of a key; return them and their neighbour table.

    The outer rings keep their slots in the buffer, but the table no longer points at them.
    """
    counts = sites.counts[: context + 1]
    narrowed = Sites(sites.index, counts, sites.shape)
    return narrowed, jnp.where(table < counts[-1], table, sites.capacity)


def cell_table(sites: Sites) -> Array:
    """Return the flat cell numbers of each site's 3x3 neighbours, int32 ``[N, 9]``.

    Cells outside the map, and all neighbours of an unused slot, are ``B * h * w``, which reads as zero
    from the flattened dense map.
    """
    _, height, width = sites.shape
    step = jnp.arange(-1, 2, dtype=jnp.int32)
    cells = sites.cells
    y = cells.y[:, None, None] + step[None, :, None]
    x = cells.x[:, None, None] + step[None, None, :]
    cell = sites.index[:, None, None] + step[None, :, None] * width + step[None, None, :]
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    inside &= (sites.index < sites.num_cells)[:, None, None]
    return jnp.where(inside, cell, sites.num_cells).reshape(-1, 9)
