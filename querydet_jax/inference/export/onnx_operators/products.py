"""Matrix products and convolutions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from querydet_jax.inference.export.onnx_graph import Builder, Translation, Value
from querydet_jax.runtime.errors import DataError


def _product(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    (contracted, shared) = params["dimension_numbers"]
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
