"""Primitives that reduce or order along axes."""

from __future__ import annotations

from typing import Any

import numpy as np

from querydet_jax.inference.export.onnx_graph import Builder, Shape, Translation, Value
from querydet_jax.runtime.errors import DataError


def reduce(op: str) -> Translation:
    def apply(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
        value = b.full(x[0])
        if value.dtype == bool:  # any and all
            value = b.cast(value, np.int32)
        reduced = b.add(op, [value, b.ints(*params["axes"])], out[0].shape, value.dtype, keepdims=0)
        return [b.cast(reduced, out[0].dtype)]

    return apply


def _arg(op: str) -> Translation:
    def apply(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
        (axis,) = params["axes"]
        return [b.cast(b.add(op, [b.full(x[0])], out[0].shape, np.int64, axis=axis, keepdims=0), out[0].dtype)]

    return apply


def _cumulative_sum(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    axis = b.constant(np.asarray(params["axis"], np.int64))
    reverse = int(params["reverse"])
    return [b.add("CumSum", [b.full(x[0]), axis], out[0].shape, out[0].dtype, reverse=reverse)]


def _window_maximum(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    windows, strides, padding = params["window_dimensions"], params["window_strides"], params["padding"]
    outer = [axis for axis, side in enumerate(windows) if side == 1 and strides[axis] == 1 and padding[axis] == (0, 0)]
    inner = [axis for axis in range(len(windows)) if axis not in outer]
    if len(outer) != 2 or any(step != 1 for step in (*params["base_dilation"], *params["window_dilation"])):
        raise DataError("ONNX: this maximum over windows has no translation")
    order = [*outer, *inner]
    y = b.add(
        "MaxPool",
        [b.transpose(b.full(x[0]), order)],
        tuple(out[0].shape[axis] for axis in order),
        out[0].dtype,
        kernel_shape=[windows[axis] for axis in inner],
        strides=[strides[axis] for axis in inner],
        pads=[padding[axis][0] for axis in inner] + [padding[axis][1] for axis in inner],
    )
    return [b.transpose(y, np.argsort(order).tolist())]


def _largest(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    shape, axis = out[0].shape, params.get("axis", len(x[0].shape) - 1)
    values, index = _ordered(b, x[0], params["k"], shape, axis, largest=1)
    return [values, b.cast(index, out[1].dtype)]


def _sort(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    if params["num_keys"] != 1:
        raise DataError("ONNX: a sort by several keys has no translation")
    axis, shape = params["dimension"], x[0].shape
    values, index = _ordered(b, x[0], shape[axis], shape, axis, largest=0)
    rest = [b.add("GatherElements", [b.full(value), index], shape, value.dtype, axis=axis) for value in x[1:]]
    return [values, *rest]


def _ordered(b: Builder, x: Value, k: int, shape: Shape, axis: int, largest: int) -> list[Value]:
    """The first ``k`` in order; of equal ones the first first, which ONNX promises as jax does."""
    results = [(shape, x.dtype), (shape, np.int64)]
    return b.add_several("TopK", [b.full(x), b.ints(k)], results, axis=axis, largest=largest, sorted=1)


REDUCTIONS: dict[str, Translation] = {
    "argmax": _arg("ArgMax"),
    "argmin": _arg("ArgMin"),
    "cumsum": _cumulative_sum,
    "reduce_and": reduce("ReduceMin"),
    "reduce_max": reduce("ReduceMax"),
    "reduce_min": reduce("ReduceMin"),
    "reduce_or": reduce("ReduceMax"),
    "reduce_sum": reduce("ReduceSum"),
    "reduce_window_max": _window_maximum,
    "sort": _sort,
    "top_k": _largest,
}
