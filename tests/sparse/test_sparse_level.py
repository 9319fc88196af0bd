"""The heads' input at sites and on tiles equals the pyramid's own map there."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cascade_oracle import conv3x3, squares

from querydet_jax.sparse import CascadeLevel, Conv, grow, select_sites
from querydet_jax.sparse.cells import parent_cells
from querydet_jax.sparse.level import dense_input, input_at_sites, merged_at

BATCH, HEIGHT, WIDTH = 2, 7, 9  # odd: the last row and column have parents that stick out
FINE, CHANNELS = 5, 4
CELLS = BATCH * HEIGHT * WIDTH


def make_level(kind: str, dtype=jnp.float32) -> CascadeLevel:
    rng = np.random.default_rng(0)
    output = Conv(rng.normal(0, 0.2, (3, 3, CHANNELS, CHANNELS)).astype(np.float32), rng.normal(size=CHANNELS))
    lateral = Conv(rng.normal(0, 0.4, (1, 1, FINE, CHANNELS)).astype(np.float32), rng.normal(size=CHANNELS))
    output, lateral = (Conv(*(jnp.asarray(x, jnp.float32) for x in conv)) for conv in (output, lateral))
    features = jnp.asarray(rng.normal(size=(BATCH, HEIGHT, WIDTH, CHANNELS)), dtype)
    stage = jnp.asarray(rng.normal(size=(BATCH, HEIGHT, WIDTH, FINE)), dtype)
    above = jnp.asarray(rng.normal(size=(BATCH, 4, 5, CHANNELS)), dtype)
    return {
        "as it comes": CascadeLevel(2, features),
        "output": CascadeLevel(2, features, output),
        "lateral": CascadeLevel(2, stage, output, lateral, above),
    }[kind]


def by_definition(level: CascadeLevel) -> np.ndarray:
    x = np.asarray(level.features, np.float64)
    if level.lateral is not None:
        above = np.asarray(level.above).repeat(2, 1).repeat(2, 2)[:, :HEIGHT, :WIDTH]
        x = x @ np.asarray(level.lateral.kernel[0, 0]) + np.asarray(level.lateral.bias) + above
    return x if level.output is None else conv3x3(x, np.asarray(level.output.kernel), np.asarray(level.output.bias))


KINDS = ("as it comes", "output", "lateral")


@pytest.mark.parametrize("kind", KINDS)
def test_dense_input_is_the_pyramid(kind):
    level = make_level(kind)
    assert level.margin == (1 if kind == "lateral" else 0)
    np.testing.assert_allclose(jax.jit(dense_input)(level), by_definition(level), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("context", "chunk"), [(0, 8), (2, 4), (2, 128)])
def test_input_at_sites(kind, context, chunk):
    level, expected = make_level(kind), by_definition(make_level(kind))
    rng = np.random.default_rng(1)

    @jax.jit
    def run(keys):
        sites = select_sites(grow(keys, context + level.margin), 128)
        return input_at_sites(level, sites, context, chunk)

    for density in (0.0, 0.02, 0.2, 1.0):
        keys = rng.random((BATCH, HEIGHT, WIDTH)) < density
        keys[0, -1, -1] |= density > 0  # a corner, the end of an image
        rows, sites, table = run(keys)
        active = squares(keys, context)
        number = active.sum()
        assert sites.counts.shape == (context + 1,) and int(sites.counts[-1]) == number
        cells = np.asarray(sites.index)[:number]
        np.testing.assert_array_equal(np.sort(cells), np.flatnonzero(active))
        np.testing.assert_allclose(rows[:number], expected.reshape(CELLS, -1)[cells], rtol=0, atol=1e-5)
        # The heads see the active cells alone, not the ring that the output convolution needed.
        table = np.asarray(table)[:number]
        assert ((table < number) | (table == 128)).all()
        slot_of = {int(cell): slot for slot, cell in enumerate(cells)}
        for cell, row in zip(cells, table, strict=True):
            b, y, x = np.unravel_index(cell, (BATCH, HEIGHT, WIDTH))
            for k, slot in enumerate(row):
                ny, nx = y + k // 3 - 1, x + k % 3 - 1
                inside = 0 <= ny < HEIGHT and 0 <= nx < WIDTH
                assert slot == (slot_of.get((b * HEIGHT + ny) * WIDTH + nx, 128) if inside else 128)


def test_merged_map_is_zero_where_there_is_no_cell():
    """Not the lateral's bias: the output convolution pads its input with zeros."""
    level = make_level("lateral")
    assert not np.asarray(merged_at(level, jnp.array([CELLS, CELLS]))).any()
    assert np.asarray(merged_at(level, jnp.array([0]))).any()


def test_parents():
    cells = np.arange(CELLS + 1)
    parents = np.asarray(parent_cells(jnp.asarray(cells), (BATCH, HEIGHT, WIDTH), (4, 5)))
    for cell in cells[:-1]:
        b, y, x = np.unravel_index(cell, (BATCH, HEIGHT, WIDTH))
        assert parents[cell] == (b * 4 + y // 2) * 5 + x // 2
    assert parents[-1] >= BATCH * 4 * 5


def test_bfloat16_rounds_at_the_same_places():
    """A cell is the same number whether its level is computed on sites or densely."""
    level = make_level("lateral", jnp.bfloat16)
    everywhere = jnp.ones((BATCH, HEIGHT, WIDTH), bool)
    rows, sites, _ = input_at_sites(level, select_sites([everywhere] * 2, CELLS), 0, CELLS)
    dense = dense_input(level).reshape(CELLS, -1)
    assert rows.dtype == dense.dtype == jnp.bfloat16
    difference = np.abs(np.asarray(rows, np.float32) - np.asarray(dense, np.float32)[np.asarray(sites.index)])
    assert (difference > 0).mean() < 0.02 and difference.max() < 0.04
