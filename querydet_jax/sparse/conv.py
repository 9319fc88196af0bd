"""3x3 convolution on sites: gather nine neighbours, then one matrix product; on CPU in chunks of rows.

The loop over chunks takes only as many turns as the sites need, so a nearly empty buffer costs little.
Shape letters: N capacity, C input channels, O output channels, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from querydet_jax.ops.conv2d import conv2d_sums
from querydet_jax.sparse.sites import Sites


class Conv(NamedTuple):
    """Weights of a convolution: ``kernel [3, 3, C, O]``, or ``[1, 1, C, O]`` where stated, and ``bias [O]``."""

    kernel: Array
    bias: Array


Stack = Sequence[Conv]
"""Consecutive convolutions with ReLU between them and none after the last."""


def conv_rows(
    rows: Array,
    table: Array,
    convs: Sequence[Conv],
    count: Array,
    *,
    relu: bool,
    chunk: int,
    out_dtype: DTypeLike | None = None,
) -> list[Array]:
    """Apply several 3x3 convolutions to the same input rows, gathering once.

    Args:
      rows: ``[R, C]`` features.
      table: int32 ``[N, 9]``, the nine neighbours' rows; R reads as zeros.
      convs: kernels that all read ``rows``.
      count: int32 ``[]``; outputs are computed for the first ``count`` table rows. Later rows are undefined.
      chunk: table rows per turn (see ``in_chunks``); must divide N.

    Returns:
      One ``[N, O]`` array per convolution.
    """
    capacity = table.shape[0]
    if capacity % chunk:
        raise ValueError(f"chunk {chunk} does not divide the capacity {capacity}")
    out_dtype = out_dtype or rows.dtype
    kernels = [conv.kernel.reshape(-1, conv.kernel.shape[-1]).astype(rows.dtype) for conv in convs]

    def compute(first: Array, number: int) -> list[Array]:
        neighbours = lax.dynamic_slice_in_dim(table, first, number)
        gathered = rows_or_zeros(rows, neighbours).reshape(number, -1)
        outputs = []
        for kernel, conv in zip(kernels, convs, strict=True):
            y = jnp.dot(gathered, kernel, preferred_element_type=jnp.float32) + conv.bias[None].astype(jnp.float32)
            outputs.append((jax.nn.relu(y) if relu else y).astype(out_dtype))
        return outputs

    outputs = [jnp.zeros((capacity, conv.kernel.shape[-1]), out_dtype) for conv in convs]
    return in_chunks(count, chunk, outputs, compute)


def rows_or_zeros(rows: Array, index: Array) -> Array:
    """Gather ``rows [R, C]`` at ``index [...]`` to ``[..., C]``; index R gives zeros.

    On a TPU a mask that fills in zeros costs more than gather and product together, because the mask of rows must be
    broadcast over lanes. There, absent rows read an appended row of zeros, unless appending would copy more than the
    gather reads. On CPU the copy costs more than the mask (``docs/accelerators.md``).
    """
    if rows.shape[0] > index.size:
        return filled_with_zeros(rows, index)
    return lax.platform_dependent(rows, index, tpu=beside_a_row_of_zeros, default=filled_with_zeros)


def filled_with_zeros(rows: Array, index: Array) -> Array:
    """Compute ``rows_or_zeros`` with a mask."""
    return rows.at[index].get(mode="fill", fill_value=0)


def beside_a_row_of_zeros(rows: Array, index: Array) -> Array:
    """Compute ``rows_or_zeros`` with an appended row of zeros."""
    return jnp.concatenate([rows, jnp.zeros_like(rows[:1])]).at[index].get(mode="promise_in_bounds")


def in_chunks(
    count: Array, chunk: int, outputs: list[Array], compute: Callable[[Array, int], list[Array]]
) -> list[Array]:
    """Fill buffers ``[N, ...]`` from the front; on CPU ``chunk`` rows per turn, for as many turns as ``count`` needs.

    ``compute(first, number)`` returns ``number`` rows, starting at ``first``, of every buffer. On CPU the cost then
    follows the sites, not the capacity. Other devices compute the whole buffer at once: there a turn costs more than
    the rows that it could save (a GPU's host waits for the device before every turn).
    """
    capacity = len(outputs[0])

    def whole(count: Array) -> list[Array]:
        return compute(jnp.int32(0), capacity)

    @jax.jit  # the ONNX translation knows it by its name
    def filled_in_turns(count: Array) -> list[Array]:
        def turn(i: Array, outputs: list[Array]) -> list[Array]:
            first = i * chunk
            return [
                lax.dynamic_update_slice_in_dim(output, y, first, 0)
                for output, y in zip(outputs, compute(first, chunk), strict=True)
            ]

        return lax.fori_loop(0, (count + chunk - 1) // chunk, turn, outputs)

    if chunk >= capacity:
        return whole(count)
    return lax.platform_dependent(count, cpu=filled_in_turns, default=whole)


def run_stacks(rows: Array, table: Array, sites: Sites, stacks: Sequence[Stack], *, chunk: int) -> list[Array]:
    """Run convolution stacks that share their input on sites; only outputs at the keys are defined.

    At the keys the result equals submanifold sparse convolution, and ``masked_dense_stacks``. A layer followed by m
    layers affects a key only from within distance m, so it is computed for the sites within min(c, m) of a key: a
    prefix of the buffer. At context 2 with five layers, an isolated query's 36 sites cost 3 x 36 + 16 + 4 rows
    instead of 5 x 36.

    Args:
      rows: ``[N, C]`` features at the sites.
      table: ``neighbour_table(sites)``.
      stacks: their lengths may differ.

    Returns:
      One float32 ``[N, O]`` per stack, defined at the keys (the first ``sites.counts[0]`` rows) only.
    """
    context = len(sites.counts) - 1

    def run_layer(x: Array, convs: Sequence[Conv], layer: int, depth: int) -> list[Array]:
        last = layer == depth - 1
        return conv_rows(
            x,
            table,
            convs,
            sites.counts[min(context, depth - 1 - layer)],
            relu=not last,
            chunk=chunk,
            out_dtype=jnp.float32 if last else x.dtype,
        )

    outputs: list[Array] = [rows] * len(stacks)
    for depth in sorted({len(stack) for stack in stacks}):
        members = [i for i, stack in enumerate(stacks) if len(stack) == depth]
        # All first layers read the same rows: gather once.
        first = run_layer(rows, [stacks[i][0] for i in members], 0, depth)
        for i, x in zip(members, first, strict=True):
            for layer in range(1, depth):
                (x,) = run_layer(x, [stacks[i][layer]], layer, depth)
            outputs[i] = x
    return outputs


def crop_stacks(features: Array, sites: Sites, stacks: Sequence[Stack], *, chunk: int) -> list[Array]:
    """Run each stack on a crop around every key, without padding, down to one value.

    A stack of d layers reads (2d + 1) x (2d + 1) cells; cells outside the image are zeros.

    Args:
      features: ``[B, h, w, C]``.
      sites: keys, first in the buffer.
      chunk: crops per turn (see ``in_chunks``); must divide the capacity.

    Returns:
      One float32 ``[N, O]`` per stack, defined at the keys only.
    """
    _, height, width = sites.shape
    flat = features.reshape(-1, features.shape[-1])

    def crops(first: Array, number: int, depth: int) -> Array:
        index = lax.dynamic_slice_in_dim(sites.index, first, number)[:, None, None]
        step = jnp.arange(-depth, depth + 1, dtype=jnp.int32)
        y = index // width % height + step[None, :, None]
        x = index % width + step[None, None, :]
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width) & (index < sites.num_cells)
        cell = index + step[None, :, None] * width + step[None, None, :]
        return flat.at[jnp.where(inside, cell, sites.num_cells)].get(mode="fill", fill_value=0)

    def compute(first: Array, number: int) -> list[Array]:
        outputs = []
        for stack in stacks:
            x = crops(first, number, len(stack))
            for layer, conv in enumerate(stack):
                last = layer == len(stack) - 1
                x = dense_conv(x, conv, relu=not last, out_dtype=jnp.float32 if last else None, padding=0)
            outputs.append(x[:, 0, 0])
        return outputs

    outputs = [jnp.zeros((sites.capacity, stack[-1].kernel.shape[-1]), jnp.float32) for stack in stacks]
    return in_chunks(sites.counts[0], chunk, outputs, compute)


def dense_conv(
    x: Array, conv: Conv, *, relu: bool = False, out_dtype: DTypeLike | None = None, padding: int = 1
) -> Array:
    """Convolve densely, 3x3, ``[B, h, w, C]`` to ``[B, h, w, O]`` (``padding`` 0: ``[B, h - 2, w - 2, O]``).

    Accumulate and add the bias in float32 like ``conv_rows``, so that bfloat16 rounds at the same places
    however a level is run. A GPU rounds once more, before the bias (``conv2d_sums``).
    """
    y = conv2d_sums(x, conv.kernel.astype(x.dtype), [(padding, padding)] * 2)
    y = y + conv.bias.astype(jnp.float32)[None, None, None]
    return (jax.nn.relu(y) if relu else y).astype(out_dtype or x.dtype)


def pointwise(x: Array, conv: Conv) -> Array:
    """Convolve 1x1, ``[..., C]`` to ``[..., O]``: accumulate and add the bias in float32, return the type of ``x``.

    Written as a matrix product, whose weight gradient XLA's CPU backend computes up to seven times faster than
    the convolution's.
    """
    y = jnp.dot(x, conv.kernel[0, 0].astype(x.dtype), preferred_element_type=jnp.float32)
    return (y + conv.bias.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def masked_dense_stacks(features: Array, mask: Array, stacks: Sequence[Stack]) -> list[Array]:
    """Compute the function of ``run_stacks`` on a dense map: every layer's output is zeroed outside ``mask``.

    h_0 = f M; h_{k+1} = relu(conv(h_k) + b) M, no ReLU after the last layer.

    Args:
      features: ``[B, h, w, C]``; mask: bool ``[B, h, w]``.

    Returns:
      One float32 ``[B, h, w, O]`` per stack.
    """
    inside = mask[..., None]
    start = jnp.where(inside, features, 0)
    outputs = []
    for stack in stacks:
        x = start
        for layer, conv in enumerate(stack):
            last = layer == len(stack) - 1
            x = dense_conv(x, conv, relu=not last, out_dtype=jnp.float32 if last else None)
            x = jnp.where(inside, x, 0)
        outputs.append(x)
    return outputs
