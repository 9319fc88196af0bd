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


@partial(jax.tree_util.register_dataclass, data_fields=["index", "is_key", "counts"], meta_fields=["shape"])
@dataclasses.dataclass(frozen=True)
class Sites:
    """Active cells, the keys first, then the cells at distance 1 from a key, at distance 2, ...

    Attributes:
      index: int32 ``[N]``, flat cell number ``(b * h + y) * w + x``; unused slots hold ``B * h * w``.
      is_key: bool ``[N]``.
      counts: int32 ``[c + 1]``; ``counts[r]`` sites lie within (Chebyshev) distance r of a key, and
        they are the first ``counts[r]`` slots. ``counts[0]`` is the number of keys.
      shape: ``(B, h, w)``.
    """

    index: Array
    is_key: Array
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
    def batch(self) -> Array:
        """Image number ``[N]``; B for unused slots."""
        return self.index // (self.shape[1] * self.shape[2])

    @property
    def y(self) -> Array:
        return self.index // self.shape[2] % self.shape[1]

    @property
    def x(self) -> Array:
        return self.index % self.shape[2]

    def to_mask(self, flags: Array) -> Array:
        """Bool map ``[B, h, w]``, true at the sites whose ``flags [N]`` entry is true."""
        target = jnp.where(flags, self.index, self.num_cells)
        return jnp.zeros((self.num_cells,), bool).at[target].set(True, mode="drop").reshape(self.shape)


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
    """``mask [B, h, w]`` grown by one cell in all eight directions, clipped to the map."""
    rows = jnp.pad(mask, ((0, 0), (1, 1), (0, 0)))
    mask = rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]
    columns = jnp.pad(mask, ((0, 0), (0, 0), (1, 1)))
    return columns[:, :, :-2] | columns[:, :, 1:-1] | columns[:, :, 2:]


def grow(keys: Array, context: int) -> list[Array]:
    """Masks ``[B, h, w]`` of the cells within 0, 1, .. ``context`` cells of a key.

    The last one is the active set: the union of the (2c+1) x (2c+1) squares around each key.
    """
    within = [keys]
    for _ in range(context):
        within.append(dilate(within[-1]))
    return within


def select_sites(within: list[Array], capacity: int) -> Sites:
    """Compact nested masks (as ``grow`` makes them) into a buffer.

    Every active cell gets exactly one slot. If more than ``capacity`` cells are active the buffer
    lacks some, while ``counts`` still tells the truth: the caller chooses a larger one.
    """
    batch, height, width = within[-1].shape
    num_cells = within[-1].size
    rings = [within[0]] + [outer & ~inner for inner, outer in zip(within, within[1:], strict=False)]
    flat = jnp.concatenate([ring.reshape(-1) for ring in rings])
    totals = jnp.cumsum(flat.astype(jnp.int32))
    slot = jnp.where(flat, totals - 1, capacity)
    cell = jnp.tile(jnp.arange(num_cells, dtype=jnp.int32), len(rings))
    index = jnp.full((capacity,), num_cells, jnp.int32).at[slot].set(cell, mode="drop")
    counts = totals[num_cells - 1 :: num_cells]
    return Sites(index, jnp.arange(capacity) < counts[0], counts, (batch, height, width))


def whole_map(keys: Array) -> Sites:
    """Every cell of ``keys [B, h, w]`` as a site in map order, for results of a dense computation.

    Here alone the keys are not first.
    """
    batch, height, width = keys.shape
    flat = keys.reshape(-1)
    index = jnp.arange(flat.size, dtype=jnp.int32)
    return Sites(index, flat, jnp.full((1,), flat.size, jnp.int32), (batch, height, width))


def neighbour_table(sites: Sites) -> Array:
    """Slots of the 3x3 neighbours of every site, int32 ``[N, 9]``, row-major; N where there is none.

    One table serves every convolution on these sites: a slot N is out of range of ``[N, C]`` rows
    and reads as zero, as an inactive cell must.
    """
    slot_of_cell = jnp.full((sites.num_cells,), sites.capacity, jnp.int32)
    slot_of_cell = slot_of_cell.at[sites.index].set(jnp.arange(sites.capacity, dtype=jnp.int32), mode="drop")
    return slot_of_cell.at[cell_table(sites)].get(mode="fill", fill_value=sites.capacity)


def within(sites: Sites, table: Array, context: int) -> tuple[Sites, Array]:
    """The sites up to ``context`` cells from a key, in the same buffer, and their neighbour table.

    The rings further out keep their slots, but no entry of the table points at them any more.
    """
    counts = sites.counts[: context + 1]
    narrowed = Sites(sites.index, sites.is_key, counts, sites.shape)
    return narrowed, jnp.where(table < counts[-1], table, sites.capacity)


def parent_cells(cells: Array, shape: tuple[int, int, int], above: tuple[int, int]) -> Array:
    """Flat numbers of the parents, on a map of (h, w) ``above``, of flat ``cells`` of a map ``(B, h, w)``.

    A cell ``B * h * w`` (none) has a parent beyond the coarser map's cells, which reads as zero.
    """
    _, height, width = shape
    y, x = cells // width % height // 2, cells % width // 2
    return (cells // (height * width) * above[0] + y) * above[1] + x


def cell_table(sites: Sites) -> Array:
    """Flat cell numbers of the 3x3 neighbours of every site, int32 ``[N, 9]``.

    Cells outside the map, and all of an unused slot's, are ``B * h * w``, which reads as zero from
    the flattened dense map.
    """
    _, height, width = sites.shape
    step = jnp.arange(-1, 2, dtype=jnp.int32)
    y = sites.y[:, None, None] + step[None, :, None]
    x = sites.x[:, None, None] + step[None, None, :]
    cell = sites.index[:, None, None] + step[None, :, None] * width + step[None, None, :]
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    inside &= (sites.index < sites.num_cells)[:, None, None]
    return jnp.where(inside, cell, sites.num_cells).reshape(-1, 9)
