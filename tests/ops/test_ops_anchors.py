"""Anchors and query points, against values worked out by hand."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from querydet_jax.config import AnchorConfig
from querydet_jax.ops.anchors import anchors_at, cell_anchors, grid_anchors, level_shape

RATIOS = (0.5, 1.0, 2.0)


def test_cell_anchors_by_hand() -> None:
    cells = cell_anchors(16.0, 3, RATIOS)
    assert cells.shape == (9, 4) and cells.dtype == np.float32
    # Size 16: area 256; h/w = 1/2, 1, 2 give widths 22.63, 16, 11.31.
    wide, narrow = 8 * 2**0.5, 8 / 2**0.5
    expected = [[-wide, -narrow, wide, narrow], [-8, -8, 8, 8], [-narrow, -wide, narrow, wide]]
    np.testing.assert_allclose(cells[:3], expected, rtol=1e-6)
    # Size-major: every third anchor is a square, of 16, 16 * 2^(1/3) and 16 * 2^(2/3) px.
    squares = cells[1::3]
    np.testing.assert_allclose(squares[:, 2] - squares[:, 0], [16.0, 20.158737, 25.398417], rtol=1e-6)
    np.testing.assert_array_equal(squares[:, 2] - squares[:, 0], squares[:, 3] - squares[:, 1])
    # All ratios of a size have the same area, and ratios are h / w.
    width, height = (cells[:, 2:] - cells[:, :2]).T
    np.testing.assert_allclose(
        (width * height).reshape(3, 3), np.repeat([[256.0], [406.3747], [645.0796]], 3, 1), rtol=1e-5
    )
    np.testing.assert_allclose((height / width).reshape(3, 3), np.repeat([RATIOS], 3, 0), rtol=1e-6)


def test_cell_anchors_are_centred_and_counted() -> None:
    cells = cell_anchors(40.0, 2, (1.0, 3.0))
    assert cells.shape == (4, 4)
    np.testing.assert_array_equal(cells[:, :2], -cells[:, 2:])
    assert AnchorConfig().per_cell == 9
    assert AnchorConfig(sizes_per_octave=2, ratios=(1.0, 3.0)).per_cell == len(cells)


def test_grid_runs_over_y_then_x_then_anchor_from_the_top_left_corner() -> None:
    cells = cell_anchors(32.0, 3, RATIOS)
    grid = grid_anchors(cells, 2, 3, 8)
    assert grid.shape == (2, 3, 9, 4) and grid.dtype == jnp.float32
    flat = np.asarray(grid).reshape(-1, 4)
    for y in range(2):
        for x in range(3):
            for a in range(9):
                # Offset 0: cell (y, x) is centred on (8 x, 8 y), the corner of the cell.
                expected = cells[a] + np.float32([8 * x, 8 * y, 8 * x, 8 * y])
                np.testing.assert_array_equal(flat[(y * 3 + x) * 9 + a], expected)
    np.testing.assert_array_equal(grid[0, 0, 1], [-16, -16, 16, 16])
    np.testing.assert_array_equal(grid[1, 2, 1], [0, -8, 32, 24])


def test_anchors_of_chosen_cells_are_those_of_the_grid() -> None:
    cells = jnp.asarray(cell_anchors(16.0, 3, RATIOS))
    grid = grid_anchors(cells, 5, 7, 4)
    y, x = jnp.asarray([4, 0, 2, 2]), jnp.asarray([6, 0, 3, 3])
    np.testing.assert_array_equal(anchors_at(cells, y, x, 4), grid[y, x])
    np.testing.assert_array_equal(
        anchors_at(cells, y.reshape(2, 2), x.reshape(2, 2), 4), grid[y, x].reshape(2, 2, 9, 4)
    )


@pytest.mark.parametrize(
    ("image", "shapes"),
    [
        ((64, 96), {2: (16, 24), 3: (8, 12), 4: (4, 6), 5: (2, 3), 6: (1, 2), 7: (1, 1)}),
        ((800, 1344), {2: (200, 336), 3: (100, 168), 4: (50, 84), 5: (25, 42), 6: (13, 21), 7: (7, 11)}),
        ((32, 32), {5: (1, 1), 6: (1, 1), 7: (1, 1)}),
    ],
)
def test_level_shape(image: tuple[int, int], shapes: dict[int, tuple[int, int]]) -> None:
    assert {level: level_shape(*image, level) for level in shapes} == shapes
