"""Matrix products and convolutions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from querydet_jax.inference.export.onnx_graph import Builder, Translation, Value
from querydet_jax.runtime.errors import DataError

_TO_NCHW, _TO_NHWC = (0, 3, 1, 2), (0, 2, 3, 1)


def _product(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    (contracted, shared) = params["dimension_numbers"]
    if contracted == ((3,), (0,)) and not shared[0] and x[0].turned is not None and len(x[1].shape) == 2:
        return [_pointwise(b, x[0], x[1], out[0])]
    sides = []
    for i, (value, sums, batch) in enumerate(zip(map(b.full, x), contracted, shared, strict=True)):
        free = [axis for axis in range(len(value.shape)) if axis not in (*sums, *batch)]
        order = [*batch, *free, *sums] if i == 0 else [*batch, *sums, *free]
        sides.append((b.transpose(value, order), len(batch), [value.shape[axis] for axis in free], len(sums)))
    (left, count, rows, sums), (right, _, columns, _) = sides
    batch, summed = left.shape[:count], math.prod(left.shape[len(left.shape) - sums :])
    right = b.reshape(right, (*batch, summed, math.prod(columns)))
    if batch or sums != 1:
        left = b.reshape(left, (*batch, math.prod(rows), summed))
        shape = (*batch, math.prod(rows), math.prod(columns))
    else:
        shape = (*rows, math.prod(columns))
    product = b.add("MatMul", [left, right], shape, out[0].dtype)
    return [b.reshape(product, out[0].shape)]


def _pointwise(b: Builder, image: Value, kernel: Value, out: Any) -> Value:
    """Convolve 1x1, since ``image [B, h, w, C]`` is stored as convolutions leave it, [B, C, h, w]."""
    image, strides = b.transpose(b.full(image), _TO_NCHW), [1, 1]
    source, *bounds = b.inputs_of(image, "Slice") or [None]
    if source is not None:
        arrays = [None if x is None else b.known(x) for x in bounds]
        starts, ends, axes, steps = ([] if array is None else array.tolist() for array in arrays)
        if axes == [2, 3] and starts == [0, 0] and ends == list(source.shape[2:]):
            image, strides = source, steps  # the convolution takes every other cell by itself
    kernel = b.transpose(b.full(kernel), [1, 0])
    kernel = b.reshape(kernel, (*kernel.shape, 1, 1))
    shape = tuple(out.shape[axis] for axis in _TO_NCHW)
    y = b.add("Conv", [image, kernel], shape, out.dtype, strides=strides, pads=[0] * 4, kernel_shape=[1, 1])
    return b.transpose(y, _TO_NHWC)


def _convolution(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    dimensions = params["dimension_numbers"]
    if params["batch_group_count"] != 1 or any(step != 1 for step in params["lhs_dilation"]):
        raise DataError("ONNX: a transposed convolution has no translation")
    image = b.transpose(b.full(x[0]), dimensions.lhs_spec)
    kernel = b.transpose(b.full(x[1]), dimensions.rhs_spec)
    padding = params["padding"]
    y = b.add(
        "Conv",
        [image, kernel],
        tuple(out[0].shape[axis] for axis in dimensions.out_spec),
        out[0].dtype,
        strides=list(params["window_strides"]),
        pads=[before for before, _ in padding] + [after for _, after in padding],
        dilations=list(params["rhs_dilation"]),
        group=params["feature_group_count"],
        kernel_shape=list(kernel.shape[2:]),
    )
    return [b.transpose(y, np.argsort(dimensions.out_spec).tolist())]


PRODUCTS: dict[str, Translation] = {
    "conv_general_dilated": _convolution,
    "dot_general": _product,
}
