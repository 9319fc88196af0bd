"""2-D convolution, faster on CPU: kernel gradients in float32, everything in bfloat16. On TPU, faster first layers.

Shape letters: B batch, H W input, h w output, C input channels, O output channels, k kernel size, s stride.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

Padding = Sequence[tuple[int, int]]
"""Zeros (before, after) for rows, then for columns."""

_BLOCK = 672  # output cells per step of the kernel gradient, so that their patches stay in the cache
# Smallest number of output cells and input channels for it; below, XLA's gradient is as fast.
_CELLS, _CHANNELS = 1000, 16
_BF16_CELLS = 250  # smallest number of output cells for products of rows in bfloat16
_PICTURE = 4  # most input channels of a first layer, which a TPU convolves by phases


def conv2d(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    """Convolve ``x [B, H, W, C]`` with ``kernel [k, k, C, O]`` to ``[B, h, w, O]``.

    XLA's CPU backend computes the kernel gradient as a convolution with a kernel as large as the map. For large maps,
    this function computes it in blocks of rows, as matrix products of output gradients ``[cells, O]`` and input patches
    ``[cells, k * k * C]``. Measured for the 3x3 layers of the heads at 800x1344 (jaxlib 0.10.2, 2 cores of an AMD EPYC,
    150 to 165 GFLOP/s for a 4096^3 matrix product), GFLOP/s of XLA and of this function: P2, 256 to 256 channels, 22
    and 152; P2, 256 to 720, 19 and 177; P3, 55 and 139. Maps of 64x64 gain less: a step of QueryDet with
    EfficientNet-Lite0 on 8 crops of 256x256 takes 2.35 s with blocks from 1,000 cells on, 2.63 s from 4,097 on.

    In bfloat16, XLA's CPU backend convolves in float32, but its matrix products use the processor's bfloat16
    instructions. There, a 3x3 convolution with stride 1 and its gradients are products of rows: see `_by_rows`.
    """
    return _conv(stride, tuple(tuple(side) for side in padding), x, kernel)


def conv2d_sums(x: Array, kernel: Array, padding: Padding) -> Array:
    """Convolve with stride 1 as ``conv2d``, for inference, and return the sums in float32, whatever the type of ``x``.

    cuDNN has no convolution from bfloat16 to float32: XLA would convert input and kernel to float32 first. So a GPU
    rounds the sums to bfloat16, as ``conv2d`` does.
    """
    plain = partial(_plain, 1, padding, dtype=jnp.float32)
    if x.dtype != jnp.bfloat16:
        return plain(x, kernel)

    def rounded(x: Array, kernel: Array) -> Array:
        return _plain(1, padding, x, kernel).astype(jnp.float32)

    by_rows = partial(_by_rows, padding, dtype=jnp.float32) if _bf16_rows(1, padding, x, kernel) else plain
    return lax.platform_dependent(x, kernel, cpu=by_rows, cuda=rounded, rocm=rounded, default=plain)


def conv2d_by_phases(x: Array, kernel: Array, padding: Padding) -> Array:
    """Convolve with stride 2 as ``conv2d``, by a convolution of stride 1 on the four phases of the input as channels.

    Space to depth: ``[H, W, C]`` becomes ``[H/2, W/2, 4C]``, the k x k kernel ceil(k/2) x ceil(k/2). A picture's three
    channels fill three of the 128 rows of a TPU's matrix unit, and strided rows of a picture must be copied first.
    """
    (_, height, width, _), size = x.shape, kernel.shape[0]
    (top, bottom), (left, right) = padding
    taps = (size + 1) // 2
    # Rows and columns read; an even kernel's worth, the last one by zeros of the kernel.
    rows = 2 * ((height + top + bottom - size) // 2 + taps)
    columns = 2 * ((width + left + right - size) // 2 + taps)
    # Negative padding cuts off what is not read.
    edges = ((0, 0, 0), (top, rows - top - height, 0), (left, columns - left - width, 0), (0, 0, 0))
    x = lax.pad(x, jnp.zeros((), x.dtype), edges)
    even = jnp.pad(kernel, ((0, 2 * taps - size), (0, 2 * taps - size), (0, 0), (0, 0)))
    phases = [(i, j) for i in range(2) for j in range(2)]
    # Slices, because the reshape and transpose of six axes takes the TPU's compiler too long.
    deep = jnp.concatenate([tap(x, i, j, rows // 2, columns // 2, 2) for i, j in phases], axis=3)
    deep_kernel = jnp.concatenate([even[i::2, j::2] for i, j in phases], axis=2)
    return _plain(1, ((0, 0), (0, 0)), deep, deep_kernel)


def tap(x: Array, i: int, j: int, rows: int, columns: int, stride: int) -> Array:
    """Return the input cells that kernel entry (i, j) multiplies: every s-th cell of ``[..., H, W, C]`` from (i, j)."""
    lead = x.ndim - 3
    return lax.slice(
        x,
        (0,) * lead + (i, j, 0),
        x.shape[:lead] + (i + (rows - 1) * stride + 1, j + (columns - 1) * stride + 1, x.shape[-1]),
        (1,) * lead + (stride, stride, 1),
    )


def _plain(stride: int, padding: Padding, x: Array, kernel: Array, dtype: DTypeLike | None = None) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=dtype,
    )


def _of_pictures(stride: int, x: Array) -> bool:
    return stride == 2 and x.shape[3] <= _PICTURE


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _conv(stride: int, padding: Padding, x: Array, kernel: Array) -> Array:
    plain = partial(_plain, stride, padding)
    if _of_pictures(stride, x):
        return lax.platform_dependent(x, kernel, tpu=partial(conv2d_by_phases, padding=padding), default=plain)
    if not _bf16_rows(stride, padding, x, kernel):
        return plain(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=partial(_by_rows, padding), default=plain)


def _forward(stride: int, padding: Padding, x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _conv(stride, padding, x, kernel), (x, kernel)


def _backward(stride: int, padding: Padding, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = saved

    def by_xla_alone(x: Array, kernel: Array, g: Array) -> tuple[Array, Array]:
        return jax.vjp(partial(_plain, stride, padding), x, kernel)[1](g)

    def by_phases(x: Array, kernel: Array, g: Array) -> tuple[Array, Array]:
        return jax.vjp(partial(conv2d_by_phases, padding=padding), x, kernel)[1](g)

    if _of_pictures(stride, x):
        return lax.platform_dependent(x, kernel, g, tpu=by_phases, default=by_xla_alone)
    if _bf16_rows(stride, padding, x, kernel):
        return lax.platform_dependent(x, kernel, g, cpu=partial(_gradients_by_rows, padding), default=by_xla_alone)

    _, to_input = jax.vjp(lambda x: _plain(stride, padding, x, kernel), x)

    def by_xla(x: Array, g: Array) -> Array:
        _, to_kernel = jax.vjp(lambda kernel: _plain(stride, padding, x, kernel), kernel)
        return to_kernel(g)[0]

    def by_blocks(x: Array, g: Array) -> Array:
        return _kernel_gradient(x, g, kernel, stride, padding)

    if g.shape[1] * g.shape[2] < _CELLS or x.shape[3] < _CHANNELS:
        return to_input(g)[0], by_xla(x, g)
    return to_input(g)[0], lax.platform_dependent(x, g, cpu=by_blocks, default=by_xla)


_conv.defvjp(_forward, _backward)


def _kernel_gradient(x: Array, g: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    """Return the kernel gradient ``[k, k, C, O]``, summed in float32 over blocks of rows."""
    size, _, channels, outputs = kernel.shape

    def add(total: Array, seen: Array, weight: Array) -> Array:
        rows, width, _ = weight.shape
        taps = [tap(seen, i, j, rows, width, stride) for i in range(size) for j in range(size)]
        patches = jnp.concatenate([t.reshape(-1, channels) for t in taps], axis=1)
        return total + jnp.dot(weight.reshape(-1, outputs).T, patches, preferred_element_type=jnp.float32)

    start = jnp.zeros((outputs, size * size * channels), jnp.float32)
    total = sum_over_blocks(x, g, size, stride, padding, _BLOCK, start, add)
    return total.T.reshape(kernel.shape).astype(kernel.dtype)


def sum_over_blocks(
    x: Array,
    g: Array,
    size: int,
    stride: int,
    padding: Padding,
    cells: int,
    start: Array,
    add: Callable[[Array, Array, Array], Array],
) -> Array:
    """Accumulate a kernel gradient over blocks of rows of ``x [B, H, W, C]`` and ``g [B, h, w, O]``.

    Args:
      x: the convolution's input.
      g: the gradient of its output.
      size, stride, padding: of the convolution.
      cells: largest number of cells of ``g`` per block, in whole rows; a block has at least one row.
      start: the initial total.
      add: ``add(total, seen, weight)`` adds one block: ``weight [rows, w, O]`` of ``g`` and its padded input rows
        ``seen [(rows - 1) * s + k, W', C]``.
    """
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    batch, height, width, outputs = g.shape
    rows = max(1, min(height, cells // width))
    while height % rows:
        rows -= 1
    steps = height // rows

    def step(t: Array, total: Array) -> Array:
        image, y = t // steps, (t % steps) * rows
        seen = lax.dynamic_slice(x, (image, y * stride, 0, 0), (1, (rows - 1) * stride + size, *x.shape[2:]))
        weight = lax.dynamic_slice(g, (image, y, 0, 0), (1, rows, width, outputs))
        return add(total, seen[0], weight[0])

    return lax.fori_loop(0, batch * steps, step, start)


def _bf16_rows(stride: int, padding: Padding, x: Array, kernel: Array) -> bool:
    """Return whether products of rows are faster on CPU than XLA's convolution."""
    size, _, channels, outputs = kernel.shape
    if x.dtype != jnp.bfloat16 or size == 1 or stride != 1 or channels < _CHANNELS or channels % 2 or outputs % 2:
        return False
    height, width = _output_sides(padding, x, size)
    return height * width >= _BF16_CELLS


def _output_sides(padding: Padding, x: Array, size: int) -> tuple[int, int]:
    height, width = (side + sum(zeros) - size + 1 for side, zeros in zip(x.shape[1:3], padding, strict=True))
    return height, width


def _by_rows(padding: Padding, x: Array, kernel: Array, dtype: DTypeLike = jnp.bfloat16) -> Array:
    """Convolve in bfloat16 with stride 1: per image and kernel row, one product ``[h * w, k * C] [k * C, O]``.

    XLA's CPU backend moves and joins bfloat16 values by way of float32, so they are moved as integers here. Sums are
    float32, rounded once to ``dtype``, bfloat16 or float32.
    """
    size, _, channels, outputs = kernel.shape
    height, width = _output_sides(padding, x, size)
    rows = kernel.reshape(size, size * channels, outputs)

    def of_image(pairs: Array) -> Array:
        columns = _join_columns(padding, pairs, size, width)
        products = [jnp.dot(_row(columns, i, height), rows[i], preferred_element_type=jnp.float32) for i in range(size)]
        return lax.bitcast_convert_type(sum(products[1:], products[0]).astype(dtype), moved)

    moved = jnp.uint16 if dtype == jnp.bfloat16 else jnp.uint32
    found = lax.bitcast_convert_type(lax.map(of_image, _pairs(x)), dtype)
    return found.reshape(x.shape[0], height, width, outputs)


def _gradients_by_rows(padding: Padding, x: Array, kernel: Array, g: Array) -> tuple[Array, Array]:
    """Return the gradients of `_by_rows` for input and kernel."""
    size, _, channels, outputs = kernel.shape
    _, height, width, _ = g.shape
    pairs, weights = _pairs(x), _pairs(g)

    def step(image: Array, total: Array) -> Array:
        columns = _join_columns(padding, lax.dynamic_index_in_dim(pairs, image, keepdims=False), size, width)
        weight = _singles(lax.dynamic_index_in_dim(weights, image, keepdims=False)).reshape(-1, outputs)
        # A product with a transposed left side is computed in float32; one with a transposed right side is not.
        across = lax.dot_general(
            jnp.eye(outputs, dtype=jnp.bfloat16),
            weight,
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        ).astype(jnp.bfloat16)
        products = [jnp.dot(across, _row(columns, i, height), preferred_element_type=jnp.float32) for i in range(size)]
        return total + jnp.stack(products)

    start = jnp.zeros((size, outputs, size * channels), jnp.float32)
    total = lax.fori_loop(0, x.shape[0], step, start)
    turned = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
    around = [(size - 1 - before, size - 1 - after) for before, after in padding]
    return _by_rows(around, g, turned), total.transpose(0, 2, 1).reshape(kernel.shape).astype(kernel.dtype)


def _pairs(x: Array) -> Array:
    """View bfloat16 ``[..., C]`` as uint32 ``[..., C / 2]``."""
    return lax.bitcast_convert_type(x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2), jnp.uint32)


def _singles(pairs: Array) -> Array:
    """View uint32 ``[..., C / 2]`` as bfloat16 ``[..., C]``."""
    return lax.bitcast_convert_type(pairs, jnp.bfloat16).reshape(*pairs.shape[:-1], pairs.shape[-1] * 2)


def _join_columns(padding: Padding, pairs: Array, size: int, width: int) -> Array:
    """Pad an image's cells ``[H, W, C / 2]`` and join those that kernel columns multiply: ``[H', w, k * C / 2]``."""
    pairs = jnp.pad(pairs, (*padding, (0, 0)))
    return jnp.concatenate([pairs[:, j : j + width] for j in range(size)], axis=2)


def _row(columns: Array, i: int, height: int) -> Array:
    """Return the input ``[h * w, k * C]`` of kernel row i."""
    rows = columns[i : i + height]
    return _singles(rows).reshape(height * rows.shape[1], -1)
