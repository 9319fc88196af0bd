"""Tiles: every active cell in exactly one, and the same numbers as the masked dense convolution."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sparse_cascade import LADDER, THRESHOLD, make_network, run, starts
from test_sparse_conv import CHANNELS, DEPTHS, FIVE, key_masks, make_features, stacks
from test_sparse_level import KINDS, by_definition, make_level
from test_sparse_sites import CELLS, SHAPE, masks

from querydet_jax.sparse import (
    CascadeLevel,
    Conv,
    SparseOptions,
    buffer_sizes,
    masked_dense_stacks,
    run_stacks_on_tiles,
)
from querydet_jax.sparse.level import dense_input
from querydet_jax.sparse.tiles import cells_of_tiles, grid_shape, halo_table, select_tiles, tile_cells, tile_count


def number_of_tiles(shape: tuple[int, int, int], side: int) -> int:
    return int(np.prod(grid_shape(shape, side)))


@functools.cache
def cover(side: int, capacity: int):
    """Compiled over many masks: tiles' index and count, their cells' index and key flags."""

    def one(mask, keys):
        tiles = select_tiles(mask, capacity, side)
        cells = cells_of_tiles(tiles, keys)
        return tiles.index, tiles.count, cells.index, cells.is_key, tile_count(mask, side)

    return jax.jit(jax.vmap(one))


@pytest.mark.parametrize("side", [1, 2, 3, 8])
def test_no_active_cell_is_lost_and_none_comes_twice(side):
    mask = masks()
    keys = mask & (np.random.default_rng(0).random(mask.shape) < 0.5)
    number = number_of_tiles(SHAPE, side)
    index, count, cells, is_key, counted = (np.asarray(x) for x in cover(side, number + 1)(mask, keys))
    assert len(mask) == 10_000 and cells.shape == (len(mask), (number + 1) * side**2)
    slots = np.zeros((len(mask), CELLS + 1), int)
    np.add.at(slots, (np.arange(len(mask))[:, None], cells), 1)
    flat, key = mask.reshape(len(mask), -1), keys.reshape(len(mask), -1)
    assert slots[:, :CELLS].max() == 1 and (slots[:, :CELLS] >= flat).all()
    at_cells = np.take_along_axis(np.pad(key, ((0, 0), (0, 1))), cells, axis=1)
    np.testing.assert_array_equal(is_key, at_cells)
    # No tile without an active cell, and the count is the number of tiles in use.
    np.testing.assert_array_equal(counted, count)
    np.testing.assert_array_equal((index < number).sum(1), count)
    per_tile = np.take_along_axis(np.pad(flat, ((0, 0), (0, 1))), cells, axis=1).reshape(len(mask), -1, side**2)
    np.testing.assert_array_equal(per_tile.any(2), index < number)
    assert (np.diff(index, axis=1)[index[:, 1:] < number] > 0).all()


@functools.partial(jax.jit, static_argnums=(1, 2))
def tables(mask, capacity: int, side: int):
    """Cells of the tiles, the same with a ring around each, and the halo table."""
    tiles = select_tiles(mask, capacity, side)
    return tile_cells(tiles), tile_cells(tiles, ring=1), halo_table(tiles)


@pytest.mark.parametrize("side", [2, 3, 8])
@pytest.mark.parametrize("spare", [0, 3])
def test_halo_table_against_a_dictionary(side, spare):
    chosen = masks()[:200:9]
    numbers = np.asarray(jax.jit(jax.vmap(lambda mask: tile_count(mask, side)))(chosen)).tolist()
    for mask, number in zip(chosen, numbers, strict=True):
        cells, around, table = jax.device_get(tables(mask, number + spare, side))
        buffer = cells.reshape(-1)
        row_of = {int(cell): row for row, cell in enumerate(buffer) if cell < CELLS}
        np.testing.assert_array_equal(around[:, 1:-1, 1:-1].reshape(-1), buffer)
        assert table.shape == around.shape == (number + spare, side + 2, side + 2)
        for cell, row in zip(around.reshape(-1), table.reshape(-1), strict=True):
            if cell < CELLS:
                assert row == row_of.get(int(cell), len(buffer))
            else:  # outside the image, or an unused slot: a row without a cell, or none at all
                assert row == len(buffer) or buffer[row] == CELLS


@functools.cache
def on_tiles(side: int, capacity: int, chunk: int, depths: tuple[int, ...], dtype=jnp.float32):
    @jax.jit
    def run(features, mask):
        level = CascadeLevel(2, features.astype(dtype))
        tiles = select_tiles(mask, capacity, side)
        outputs = run_stacks_on_tiles(level, mask, tiles, stacks(*depths), chunk=chunk)
        return outputs, cells_of_tiles(tiles, mask)

    return run


def put_back(outputs, sites, shape) -> list[np.ndarray]:
    found = []
    for y in outputs:
        flat = np.zeros((sites.num_cells, y.shape[1]), np.float32)
        flat[np.asarray(sites.index)[np.asarray(sites.is_key)]] = np.asarray(y)[np.asarray(sites.is_key)]
        found.append(flat.reshape(*shape, -1))
    return found


@pytest.mark.parametrize(
    ("batch", "side", "chunk", "depths"), [(1, 8, 1, DEPTHS), (2, 2, 4, DEPTHS), (2, 3, 6, FIVE), (3, 4, 2, DEPTHS)]
)
def test_tiles_equal_masked_dense(batch, side, chunk, depths):
    features = make_features(batch)
    number = -(-number_of_tiles(features.shape[:3], side) // chunk) * chunk
    dense = jax.jit(lambda x, mask: masked_dense_stacks(x, mask, stacks(*depths)))
    for name, mask in key_masks(batch).items():
        outputs, sites = on_tiles(side, number, chunk, depths)(features, mask)
        for y, expected in zip(put_back(outputs, sites, mask.shape), dense(features, mask), strict=True):
            np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5, err_msg=name)


def test_inactive_cells_of_a_tile_are_not_read():
    features, mask = make_features(2), key_masks(2)["random 0.2"]
    poisoned = np.where(mask[..., None], features, np.nan).astype(np.float32)
    outputs, sites = on_tiles(4, 8, 2, DEPTHS)(poisoned, mask)
    expected, _ = on_tiles(4, 8, 2, DEPTHS)(features, mask)
    assert np.asarray(sites.is_key).sum() == mask.sum() > 0
    for y, clean in zip(outputs, expected, strict=True):
        np.testing.assert_array_equal(y, clean)


def test_bfloat16_on_tiles():
    features, mask = make_features(2), key_masks(2)["random 0.2"]
    wide, _ = on_tiles(4, 8, 2, DEPTHS)(features, mask)
    narrow, _ = on_tiles(4, 8, 2, DEPTHS, jnp.bfloat16)(features, mask)
    for a, b in zip(wide, narrow, strict=True):
        assert b.dtype == jnp.float32
        assert 0 < np.abs(a - b).max() < 0.03 * np.abs(a).max()


@pytest.mark.parametrize("kind", KINDS)
def test_head_input_on_tiles(kind):
    """One identity layer: what comes out is what the heads read."""
    level = make_level(kind)
    batch, height, width, _ = level.features.shape
    identity = np.zeros((3, 3, CHANNELS, CHANNELS), np.float32)
    identity[1, 1] = np.eye(CHANNELS)
    stack = [Conv(jnp.asarray(identity), jnp.zeros(CHANNELS))]
    mask = np.random.default_rng(0).random((batch, height, width)) < 0.15
    mask[1, -1, -1] = True
    tiles = select_tiles(jnp.asarray(mask), 18, 3)
    (y,) = run_stacks_on_tiles(level, jnp.asarray(mask), tiles, [stack], chunk=6)
    (found,) = put_back([y], cells_of_tiles(tiles, jnp.asarray(mask)), mask.shape)
    np.testing.assert_allclose(found[mask], by_definition(level)[mask], rtol=0, atol=1e-5)
    np.testing.assert_allclose(found[mask], np.asarray(dense_input(level))[mask], rtol=0, atol=1e-5)


@pytest.mark.parametrize("capacities", [(), LADDER])
def test_cascade_on_tiles_equals_the_cascade_on_sites(capacities):
    network = make_network()
    options = SparseOptions(THRESHOLD, 2, capacities, 64, kernel="tiles", tile=4)
    rungs = set()
    for start in starts().values():
        tiled = run(network, start, options)
        plain = run(network, start, SparseOptions(THRESHOLD, 2, LADDER, 8))
        for i, (a, b) in enumerate(zip(tiled, plain, strict=True)):
            np.testing.assert_array_equal(a.keys, b.keys)
            np.testing.assert_array_equal(a.active, b.active)
            assert [int(x) for x in a.stats[:3]] == [int(x) for x in b.stats[:3]]
            for x, y in zip(a.selected, b.selected, strict=True):
                np.testing.assert_allclose(x, y, rtol=0, atol=2e-5)
            sizes, _ = buffer_sizes(options, a.keys.shape)
            needed = 16 * int(tile_count(a.active, 4))
            fitting = [size for size in sizes if size >= needed]
            assert int(a.stats.capacity) == (fitting[0] if fitting else 0)
            rungs.add((i, int(a.stats.capacity)))
    if capacities == LADDER:
        assert len(rungs) >= 6


def test_capped_cascade_on_tiles():
    network, start = make_network(), starts()["random, more"]
    options = SparseOptions(THRESHOLD, 1, (0.5,), 64, overflow="cap", kernel="tiles", tile=4)
    capped = run(network, start, options)
    free = run(network, start, options._replace(overflow="dense"))
    assert any(bool(result.stats.overflowed) for result in capped)
    for result, other in zip(capped, free, strict=True):
        (size,), _ = buffer_sizes(options, result.keys.shape)
        assert 16 * int(tile_count(result.active, 4)) <= size == int(result.stats.capacity)
        if bool(result.stats.overflowed):
            assert 0 < int(result.stats.keys) < int(other.stats.keys)
            break
