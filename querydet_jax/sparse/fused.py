"""Convolution stacks on tiles as one TPU kernel, written in Pallas.

XLA runs a layer on tiles as a gather of rings, a convolution and a mask, each a pass over the buffer. Here a whole
stack is one kernel: its activations stay in the chip's memory (VMEM) in two buffers that take turns, a tile finds its
eight neighbours by their slots, and nine products, bias, ReLU and mask follow without leaving it.
Shape letters: T tiles, s tile side, C channels, O output channels, L layers, G tiles per turn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from querydet_jax.sparse.conv import Conv, Stack

_GROUP = 4  # tiles per turn: 256 rows at s = 8, so that loading weights into a matrix unit does not dominate
_VMEM = 96 * 2**20  # bytes of VMEM that a kernel may take; v5e and v6e have 128 MiB
_BUFFERS = 48 * 2**20  # of these, for the two buffers


def fits(tiles: int, side: int, channels: int, dtype: DTypeLike) -> bool:
    """Return whether a buffer of so many tiles ``[s, s, C]`` fits a chip's memory twice."""
    return 2 * (tiles + 1) * side**2 * channels * jnp.dtype(dtype).itemsize <= _BUFFERS


def tile_layer(
    x: Array, neighbours: Array, mask: Array, conv: Conv, *, relu: bool = False, out_dtype: DTypeLike | None = None
) -> Array:
    """Convolve tiles 3x3, ``[T + 1, s, s, C]`` to ``[T, s, s, O]``. Arguments as in ``tile_stack``."""
    return _call(x, neighbours, mask, [], conv, relu, out_dtype or x.dtype)


def tile_stack(x: Array, neighbours: Array, mask: Array, stack: Stack) -> Array:
    """Run a convolution stack on tiles: the function of ``masked_dense_stacks``.

    Args:
      x: ``[T + 1, s, s, C]``, zero at inactive cells and in the last tile, s a multiple of 8. On a TPU, channels must
        be multiples of 128, but for the outputs of the last layer.
      neighbours: int32 ``[T, 9]``, the slots in ``x`` of the tiles around a tile and of itself, row-major; T for an
        absent one.
      mask: bool ``[T, s, s]``, active cells; all others are zero after every layer.

    Returns:
      float32 ``[T, s, s, O]``.
    """
    stack = list(stack)
    while len(stack) > 1 and stack[0].kernel.shape[2] != stack[0].kernel.shape[3]:
        # Another number of channels does not fit the buffers of the rest.
        x = tile_layer(x, neighbours, mask, stack.pop(0), relu=True)
        x = jnp.concatenate([x, jnp.zeros_like(x[:1])])
    return _call(x, neighbours, mask, stack[:-1], stack[-1], relu=False, out_dtype=jnp.float32)


def _call(
    x: Array, neighbours: Array, mask: Array, hidden: Sequence[Conv], last: Conv, relu: bool, out_dtype: DTypeLike
) -> Array:
    """Run ``hidden`` layers, C to C with ReLU, and a ``last`` one as one kernel, over a grid of (L, T / G) turns."""
    number, side, channels = len(mask), x.shape[1], x.shape[3]
    group = math.gcd(number, _GROUP)
    depth, outputs = len(hidden) + 1, last.kernel.shape[3]

    def kernel_of(conv: Conv) -> Array:
        return conv.kernel.astype(x.dtype).reshape(9, channels, -1)

    def bias_of(conv: Conv) -> Array:
        return conv.bias.astype(jnp.float32)[None]

    tiles = partial(pl.BlockSpec, (group, side, side, 1), lambda layer, turn, _: (turn, 0, 0, 0))
    operands: list[Array] = [x, mask[..., None].astype(jnp.float32)]
    specs: list[Any] = [pl.BlockSpec(memory_space=pl.ANY), tiles()]
    if hidden:
        operands += [jnp.stack([kernel_of(conv) for conv in hidden]), jnp.stack([bias_of(conv) for conv in hidden])]

        def of_layer(layer: Array, turn: Array, _: Any) -> tuple[Any, ...]:
            return jnp.minimum(layer, depth - 2), 0, 0

        specs += [
            pl.BlockSpec((None, 9, channels, channels), lambda *a: (*of_layer(*a), 0)),
            pl.BlockSpec((None, 1, channels), of_layer),
        ]
    operands += [kernel_of(last), bias_of(last)]
    specs += [
        pl.BlockSpec((9, channels, outputs), lambda *_: (0, 0, 0)),
        pl.BlockSpec((1, outputs), lambda *_: (0, 0)),
    ]
    return pl.pallas_call(
        partial(_turn, depth=depth, group=group, side=side, relu=relu),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(depth, number // group),
            in_specs=specs,
            # Only the last layer writes results: until then the block stays, and is not copied out.
            out_specs=pl.BlockSpec(
                (group, side, side, outputs),
                lambda layer, turn, _: (jnp.where(layer == depth - 1, turn, 0), 0, 0, 0),
            ),
            scratch_shapes=[
                pltpu.VMEM((2, *x.shape), x.dtype),
                pltpu.VMEM((group, side + 2, side + 2, channels), x.dtype),
                pltpu.SemaphoreType.DMA,
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((number, side, side, outputs), out_dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=_VMEM),
        name="fused_tiles",
    )(neighbours.reshape(-1), *operands)


def _turn(neighbours: Any, x: Any, mask: Any, *refs: Any, depth: int, group: int, side: int, relu: bool) -> None:
    """Compute one layer on G tiles."""
    *hidden, kernel, bias, out, buffers, around, arrived = refs
    layer, turn = pl.program_id(0), pl.program_id(1)
    channels = x.shape[-1]

    @pl.when((layer == 0) & (turn == 0))
    def _() -> None:
        copy = pltpu.make_async_copy(x, buffers.at[0], arrived)
        copy.start()
        buffers[1, x.shape[0] - 1] = jnp.zeros((side, side, channels), x.dtype)  # the absent tile
        copy.wait()

    # Where a neighbour's rows (columns) lie around a tile, and which of its own these are, by its move of -1, 0 or 1.
    ring = [
        (slice(0, 1), slice(side - 1, side)),
        (slice(1, side + 1), slice(0, side)),
        (slice(side + 1, side + 2), slice(0, 1)),
    ]
    for i in range(group):
        for d in range(9):
            slot = neighbours[(turn * group + i) * 9 + d]
            (rows, its_rows), (columns, its_columns) = ring[d // 3], ring[d % 3]
            around[i, rows, columns] = buffers[layer % 2, slot, its_rows, its_columns]

    def convolved(kernel: Any, bias: Any, relu: bool) -> Array:
        total = jnp.zeros((group * side**2, kernel.shape[-1]), jnp.float32)
        for d in range(9):
            tap = around[:, d // 3 : d // 3 + side, d % 3 : d % 3 + side].reshape(-1, channels)
            total = total + jnp.dot(tap, kernel[d], preferred_element_type=jnp.float32)
        total = total + bias[...]
        y = (jnp.maximum(total, 0) if relu else total).reshape(group, side, side, -1)
        return jnp.where(mask[...] != 0, y, 0)

    if hidden:

        @pl.when(layer < depth - 1)
        def _() -> None:
            y = convolved(*hidden, relu=True)
            buffers[(layer + 1) % 2, pl.ds(turn * group, group)] = y.astype(x.dtype)

    @pl.when(layer == depth - 1)
    def _() -> None:
        out[...] = convolved(kernel, bias, relu).astype(out.dtype)
