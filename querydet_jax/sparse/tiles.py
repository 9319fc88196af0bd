"""Convolution on tiles: the second kernel for a sparse level, for accelerators that favour blocks.

Aligned s x s tiles cover the active cells. Before every layer a tile takes one ring of cells from its
neighbours; after it, inactive cells are zeroed again. The result is the masked dense convolution, as on sites,
at the price of the inactive cells in the tiles. The gather copies (s + 2)^2 cells per tile, 1.6 per cell at
s = 8; on single sites it copies nine per cell.
Shape letters: B batch, h w map, T tiles, s tile side, C channels, O output channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from querydet_jax.sparse.cells import Cells
from querydet_jax.sparse.conv import Conv, Stack, dense_conv, in_chunks, rows_or_zeros
from querydet_jax.sparse.level import CascadeLevel, merged_at


class Tiles(NamedTuple):
    """Tiles with at least one active cell, in map order.

    Attributes:
      index: int32 ``[T]``, tile number ``(b * rows + i) * columns + j``; unused slots hold the number of tiles.
      count: int32 ``[]``, tiles in use.
      side: s.
      shape: ``(B, h, w)`` of the map; tiles at its lower and right edge may stick out.
    """

    index: Array
    count: Array
    side: int
    shape: tuple[int, int, int]

    @property
    def grid(self) -> tuple[int, int, int]:
        """(B, rows, columns) of tiles."""
        return grid_shape(self.shape, self.side)


def grid_shape(shape: tuple[int, int, int], side: int) -> tuple[int, int, int]:
    """Return (B, rows, columns) of the tiles that cover a map ``(B, h, w)``."""
    batch, height, width = shape
    return batch, -(-height // side), -(-width // side)


def tile_count(mask: Array, side: int) -> Array:
    """Count the tiles with a true cell in ``mask [B, h, w]``, int32 ``[]``."""
    return jnp.sum(_occupied(mask, side), dtype=jnp.int32)


def select_tiles(mask: Array, capacity: int, side: int) -> Tiles:
    """Select the tiles that cover ``mask [B, h, w]``; ``count`` counts all of them, also above ``capacity``."""
    batch, height, width = mask.shape
    occupied = _occupied(mask, side).reshape(-1)
    totals = jnp.cumsum(occupied, dtype=jnp.int32)
    slot = jnp.where(occupied, totals - 1, capacity)
    numbers = jnp.arange(occupied.size, dtype=jnp.int32)
    index = jnp.full((capacity,), occupied.size, jnp.int32).at[slot].set(numbers, mode="drop")
    return Tiles(index, totals[-1], side, (batch, height, width))


def tile_cells(tiles: Tiles, ring: int = 0) -> Array:
    """Return the flat cell numbers ``[T, s + 2 ring, s + 2 ring]`` of the tiles and the cells around them.

    Cells outside the image and unused slots are ``B * h * w``.
    """
    batch, height, width = tiles.shape
    _, rows, columns = tiles.grid
    step = jnp.arange(-ring, tiles.side + ring, dtype=jnp.int32)
    y = (tiles.index // columns % rows * tiles.side)[:, None, None] + step[None, :, None]
    x = (tiles.index % columns * tiles.side)[:, None, None] + step[None, None, :]
    image = (tiles.index // (rows * columns))[:, None, None]
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width) & (image < batch)
    return jnp.where(inside, (image * height + y) * width + x, batch * height * width)


def neighbour_tiles(tiles: Tiles) -> Array:
    """Return the slots of the 3x3 tiles around each tile, int32 ``[T, 3, 3]``; T where there is none in the buffer."""
    capacity = tiles.index.shape[0]
    batch, rows, columns = tiles.grid
    number = batch * rows * columns
    slot_of_tile = jnp.full((number,), capacity, jnp.int32)
    slot_of_tile = slot_of_tile.at[tiles.index].set(jnp.arange(capacity, dtype=jnp.int32), mode="drop")
    move = jnp.arange(-1, 2, dtype=jnp.int32)
    i = (tiles.index // columns % rows)[:, None, None] + move[None, :, None]
    j = (tiles.index % columns)[:, None, None] + move[None, None, :]
    inside = (i >= 0) & (i < rows) & (j >= 0) & (j < columns) & (tiles.index < number)[:, None, None]
    neighbour = tiles.index[:, None, None] + move[None, :, None] * columns + move[None, None, :]
    return slot_of_tile.at[jnp.where(inside, neighbour, number)].get(mode="fill", fill_value=capacity)


def halo_table(tiles: Tiles) -> Array:
    """Return where each tile's cells and the ring around them lie in a buffer of the tiles' cells.

    Returns:
      int32 ``[T, s + 2, s + 2]``, rows of ``[T * s * s, C]``; ``T * s * s``, which reads as zero, for a cell of
      no tile in the buffer.
    """
    side, capacity = tiles.side, tiles.index.shape[0]
    step = jnp.arange(-1, side + 1, dtype=jnp.int32)
    move, inner = step // side + 1, step % side  # which neighbouring tile, and where in it
    slot = neighbour_tiles(tiles)[:, move[:, None], move[None, :]]
    row = (slot * side + inner[None, :, None]) * side + inner[None, None, :]
    return jnp.where(slot < capacity, row, capacity * side * side)


def cells_of_tiles(tiles: Tiles, keys: Array) -> Cells:
    """Return every cell of the tiles, tile by tile, for rows that ``run_stacks_on_tiles`` computed.

    Args:
      keys: bool ``[B, h, w]``.
    """
    index = tile_cells(tiles).reshape(-1)
    return Cells(index, keys.reshape(-1).at[index].get(mode="fill", fill_value=False), tiles.shape)


def run_stacks_on_tiles(
    level: CascadeLevel, active: Array, tiles: Tiles, stacks: Sequence[Stack], *, chunk: int, fused: bool = False
) -> list[Array]:
    """Run ``masked_dense_stacks`` on tiles.

    Args:
      active: bool ``[B, h, w]``; inactive cells are zero at every layer.
      chunk: tiles per turn (see ``in_chunks``); must divide T.
      fused: run each stack as one TPU kernel (``querydet_jax.sparse.fused``), where the tiles fit a chip's memory.

    Returns:
      One float32 ``[T * s * s, O]`` per stack, rows as in ``cells_of_tiles``; defined at active cells.
    """
    side, capacity = tiles.side, tiles.index.shape[0]
    cells = tile_cells(tiles)
    inside = active.reshape(-1).at[cells].get(mode="fill", fill_value=False)[..., None]

    def masked(first: Array, x: Array) -> Array:
        return jnp.where(lax.dynamic_slice_in_dim(inside, first, len(x)), x, 0)

    def head_input(first: Array, number: int) -> list[Array]:
        if level.output is None:
            return [masked(first, merged_at(level, lax.dynamic_slice_in_dim(cells, first, number)))]
        halo = tile_cells(tiles._replace(index=lax.dynamic_slice_in_dim(tiles.index, first, number)), ring=1)
        return [masked(first, dense_conv(merged_at(level, halo), level.output, padding=0))]

    def buffer(channels: int, like: Array | None) -> Array:
        return jnp.zeros((capacity, side, side, channels), jnp.float32 if like is None else like.dtype)

    channels = (level.features if level.output is None else level.output.kernel).shape[-1]
    (start,) = in_chunks(tiles.count, chunk, [buffer(channels, level.features)], head_input)
    if fused:
        # Here, because Pallas is a sixth of the package's import time, and only TPUs need it.
        from querydet_jax.sparse.fused import fits, tile_stack

        widest = max(conv.kernel.shape[2] for stack in stacks for conv in stack)
        if fits(capacity, side, widest, start.dtype):
            neighbours = neighbour_tiles(tiles).reshape(-1, 9)
            padded = jnp.concatenate([start, jnp.zeros_like(start[:1])])
            found = [tile_stack(padded, neighbours, inside[..., 0], stack) for stack in stacks]
            return [x.reshape(-1, x.shape[-1]) for x in found]
    table = halo_table(tiles)
    outputs = []
    for stack in stacks:
        x = start
        for layer, conv in enumerate(stack):
            last = layer == len(stack) - 1
            rows = x.reshape(-1, x.shape[-1])

            def one_layer(
                first: Array, number: int, rows: Array = rows, conv: Conv = conv, last: bool = last
            ) -> list[Array]:
                around = lax.dynamic_slice_in_dim(table, first, number)
                patch = rows_or_zeros(rows, around)
                y = dense_conv(patch, conv, relu=not last, out_dtype=jnp.float32 if last else None, padding=0)
                return [masked(first, y)]

            (x,) = in_chunks(tiles.count, chunk, [buffer(conv.kernel.shape[-1], None if last else x)], one_layer)
        outputs.append(x.reshape(-1, x.shape[-1]))
    return outputs


def _occupied(mask: Array, side: int) -> Array:
    batch, height, width = mask.shape
    padded = jnp.pad(mask, ((0, 0), (0, -height % side), (0, -width % side)))
    return padded.reshape(batch, padded.shape[1] // side, side, padded.shape[2] // side, side).any(axis=(2, 4))
