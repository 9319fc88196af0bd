"""Children, context and compaction against loops, and over ten thousand masks."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from querydet_jax.sparse import children, dilate, grow, neighbour_table, select_sites, whole_map
from querydet_jax.sparse.sites import cell_table

SHAPE = (2, 7, 9)
CELLS = 2 * 7 * 9


def grid(*rows: str) -> np.ndarray:
    return np.array([[c == "#" for c in row] for row in rows])


# Children and dilation ----------------------------------------------------------------------


def test_children_by_hand():
    parents = np.stack([grid("#..", "..#"), grid(".#.", "...")])
    fine = np.stack(
        [
            grid("##....", "##....", "....##", "....##"),
            grid("..##..", "..##..", "......", "......"),
        ]
    )
    np.testing.assert_array_equal(children(parents, (4, 6)), fine)


@pytest.mark.parametrize("shape", [(3, 5), (4, 5), (3, 6)])
def test_children_outside_an_odd_map_are_dropped(shape):
    parents = np.stack([grid("#.#", "#.#"), grid("...", "..#")])
    fine = np.asarray(children(parents, (4, 6)))
    np.testing.assert_array_equal(children(parents, shape), fine[:, : shape[0], : shape[1]])
    # The one parent in the corner: its children do not wrap into the next row or image.
    expected = np.zeros((2, 3, 5), bool)
    expected[1, 2, 4] = True
    np.testing.assert_array_equal(children(np.stack([grid("...", "..."), grid("...", "..#")]), (3, 5)), expected)


@pytest.mark.parametrize("shape", [(5, 6), (4, 7)])
def test_a_map_that_parents_cannot_cover_is_refused(shape):
    with pytest.raises(ValueError, match="more than twice"):
        children(np.zeros((1, 2, 3), bool), shape)


def grown_by_loops(keys: np.ndarray, radius: int) -> np.ndarray:
    """A cell is within ``radius`` if any cell of the square around it, in its image, is a key."""
    out = np.zeros_like(keys)
    batch, height, width = keys.shape
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                square = keys[b, max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1]
                out[b, y, x] = square.any()
    return out


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 6), (2, 5, 1), (3, 6, 7)])
def test_dilate_and_grow_against_loops(shape):
    rng = np.random.default_rng(0)
    for density in (0.0, 0.03, 0.1, 0.4, 1.0):
        keys = rng.random(shape) < density
        np.testing.assert_array_equal(dilate(keys), grown_by_loops(keys, 1))
        for context in (0, 1, 2, 5):
            within = grow(keys, context)
            assert len(within) == context + 1
            for radius, mask in enumerate(within):
                np.testing.assert_array_equal(mask, grown_by_loops(keys, radius))


def test_an_isolated_query_has_36_active_cells_at_context_2():
    parents = np.zeros((1, 6, 6), bool)
    parents[0, 2, 3] = True
    sizes = [int(mask.sum()) for mask in grow(children(parents, (12, 12)), 2)]
    assert sizes == [4, 16, 36]


def test_images_of_a_batch_do_not_touch():
    keys = np.zeros((3, 4, 5), bool)
    keys[1] = True  # full to its borders, on which the other images' memory lies
    for mask in grow(keys, 3):
        np.testing.assert_array_equal(mask, keys)


# Compaction ------------------------------------------------------------------------------------


@functools.cache
def masks() -> np.ndarray:
    """About 10,000 key masks ``[M, 2, 7, 9]``: the awkward ones, then random ones of every density."""
    batch, height, width = SHAPE
    y, x = np.indices((height, width))
    patterns = [np.zeros((height, width), bool), np.ones((height, width), bool)]
    patterns += [(y + x) % 2 == phase for phase in (0, 1)]
    patterns += [(y % 2 == 0) & (x % 2 == 0), (y == 0) | (y == height - 1) | (x == 0) | (x == width - 1)]
    patterns += [np.isin(y, (0, height - 1)) & np.isin(x, (0, width - 1)), y == x, y + x == width - 1]
    patterns += [y == row for row in range(height)] + [x == column for column in range(width)]
    patterns += [y % 2 == 0, x % 2 == 0, y < 3, x < 3]
    patterns += [(y // 2 == row) & (x // 2 == column) for row in range(4) for column in range(5)]  # one query's
    empty, full = patterns[0], patterns[1]
    found = [np.stack(pair) for p in patterns for pair in ((p, p), (p, empty), (empty, p), (p, full), (full, ~p))]
    singles = np.eye(CELLS, dtype=bool).reshape(-1, *SHAPE)
    rng = np.random.default_rng(7)
    count = 10_000 - len(found) - 2 * len(singles)
    density = np.repeat(rng.random((count, 1, 1, 1)) ** 2, batch, axis=1)
    density[::5] *= rng.random((len(density[::5]), batch, 1, 1)) < 0.5  # all in one image of the batch
    scattered = rng.random((count, *SHAPE)) < density
    # Clusters: random parents, as a query head makes them.
    parents = rng.random((count // 4, batch, 4, 5)) < density[: count // 4]
    scattered[: count // 4] = np.repeat(np.repeat(parents, 2, 2), 2, 3)[:, :, :height, :width]
    return np.concatenate([found, singles, ~singles, scattered])


def distance_to_key(keys: np.ndarray, context: int) -> np.ndarray:
    """Chebyshev distance to the nearest key of the same image, ``[M, B, h, w]``; context + 1 beyond."""
    _, _, height, width = keys.shape
    distance = np.full(keys.shape, context + 1)
    pad = np.pad(keys, ((0, 0), (0, 0), (context, context), (context, context)))
    for dy in range(-context, context + 1):
        for dx in range(-context, context + 1):
            shifted = pad[:, :, context + dy : context + dy + height, context + dx : context + dx + width]
            distance = np.where(shifted, np.minimum(distance, max(abs(dy), abs(dx))), distance)
    return distance


@functools.cache
def compact(context: int, capacity: int):
    return jax.jit(jax.vmap(lambda keys: select_sites(grow(keys, context), capacity)))


@pytest.mark.parametrize(("context", "capacity"), [(0, CELLS), (1, CELLS), (2, CELLS + 10), (5, CELLS)])
def test_no_site_is_lost_and_none_comes_twice(context, capacity):
    keys = masks()
    assert len(keys) == 10_000
    distance = distance_to_key(keys, context).reshape(len(keys), CELLS)
    sites = compact(context, capacity)(keys)
    index, counts = np.asarray(sites.index), np.asarray(sites.counts)
    is_key = np.asarray(jax.vmap(lambda one: one.is_key)(sites))
    assert index.dtype == np.int32 and counts.dtype == np.int32 and is_key.dtype == bool

    # Each cell's number of slots: one if active, none if not. The last column counts unused slots.
    slots = np.zeros((len(keys), CELLS + 1), int)
    np.add.at(slots, (np.arange(len(keys))[:, None], index), 1)
    np.testing.assert_array_equal(slots[:, :CELLS], distance <= context)
    np.testing.assert_array_equal(slots[:, CELLS], capacity - counts[:, -1])

    for radius in range(context + 1):
        np.testing.assert_array_equal(counts[:, radius], (distance <= radius).sum(1))
    # Keys first, then ring by ring, unused slots last; within a ring in map order.
    ring = np.take_along_axis(np.pad(distance, ((0, 0), (0, 1)), constant_values=99), index.astype(int), axis=1)
    rank = ring * (CELLS + 1) + index
    steps = np.diff(rank, axis=1)
    assert ((steps > 0) | (index[:, 1:] == CELLS)).all() and (np.diff(ring, axis=1) >= 0).all()
    np.testing.assert_array_equal(is_key, ring == 0)


def test_overflow_keeps_distinct_sites_and_tells_the_truth():
    keys, context, capacity = masks(), 2, 24
    everything = compact(context, CELLS)(keys)
    sites = compact(context, capacity)(keys)
    assert (np.asarray(sites.counts)[:, -1] > capacity).sum() > 1000  # it does overflow
    np.testing.assert_array_equal(sites.counts, everything.counts)
    np.testing.assert_array_equal(sites.index, np.asarray(everything.index)[:, :capacity])


def test_sites_know_where_they_are():
    keys = np.zeros(SHAPE, bool)
    keys[0, 6, 8] = keys[1, 0, 0] = keys[1, 3, 4] = True
    sites = select_sites(grow(keys, 0), 5)
    assert (sites.capacity, sites.num_cells, sites.shape) == (5, CELLS, SHAPE)
    np.testing.assert_array_equal(sites.index[:3], np.flatnonzero(keys))
    cells = sites.cells
    assert (cells.num_cells, cells.shape) == (CELLS, SHAPE)
    np.testing.assert_array_equal(np.stack([cells.batch, cells.y, cells.x], 1)[:3], np.argwhere(keys))
    np.testing.assert_array_equal(cells.batch[3:], [2, 2])  # of no image
    np.testing.assert_array_equal(cells.is_key, [True, True, True, False, False])
    # Unused slots have no cell to write to.
    values = np.array([[3.0, 1.0], [4.0, 1.0], [5.0, 1.0], [6.0, 1.0], [7.0, 1.0]], np.float32)
    shown = np.asarray(cells.key_map(values, -1.0))
    np.testing.assert_array_equal(shown[keys], values[:3])
    assert shown.shape == (*SHAPE, 2) and (shown[~keys] == -1).all()


def test_whole_map_is_every_cell_in_map_order():
    keys = np.random.default_rng(1).random(SHAPE) < 0.3
    cells = whole_map(keys)
    np.testing.assert_array_equal(cells.index, np.arange(CELLS))
    np.testing.assert_array_equal(cells.is_key, keys.reshape(-1))
    np.testing.assert_array_equal(cells.key_map(np.ones(CELLS, bool), False), keys)


# Neighbour tables ------------------------------------------------------------------------------


def tables_by_loops(index: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """(slots, cells) of the nine neighbours of each slot, by dictionary."""
    _, height, width = SHAPE
    slot_of = {int(cell): slot for slot, cell in enumerate(index) if cell < CELLS}
    slots = np.full((capacity, 9), capacity)
    cells = np.full((capacity, 9), CELLS)
    for cell, slot in slot_of.items():
        b, y, x = np.unravel_index(cell, SHAPE)
        for k in range(9):
            ny, nx = y + k // 3 - 1, x + k % 3 - 1
            if 0 <= ny < height and 0 <= nx < width:
                neighbour = int((b * height + ny) * width + nx)
                cells[slot, k] = neighbour
                slots[slot, k] = slot_of.get(neighbour, capacity)
    return slots, cells


@pytest.mark.parametrize(("context", "capacity"), [(0, CELLS), (2, CELLS + 2), (2, 24)])
def test_neighbour_and_cell_table_against_loops(context, capacity):
    keys = np.concatenate([masks()[:200:5], masks()[-40:]])
    sites = compact(context, capacity)(keys)  # at capacity 24 many overflow: then only slots there count
    slots = np.asarray(jax.vmap(neighbour_table)(sites))
    cells = np.asarray(jax.vmap(cell_table)(sites))
    assert slots.shape == cells.shape == (len(keys), capacity, 9)
    for i, index in enumerate(np.asarray(sites.index)):
        expected_slots, expected_cells = tables_by_loops(index, capacity)
        np.testing.assert_array_equal(slots[i], expected_slots)
        np.testing.assert_array_equal(cells[i], expected_cells)
