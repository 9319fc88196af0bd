"""Reading and writing by index.

The axes that are read by index are gathered into one, so that one number per row tells its place; axes of a batch get
the row's own number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax

from querydet_jax.inference.export.onnx_graph import Builder, Shape, Translation, Value
from querydet_jax.inference.export.onnx_operators.elementwise import where
from querydet_jax.inference.export.onnx_operators.shapes import counted, cut

_TURNS = 16  # how often a loop is taken to read a table


def _places(
    b: Builder,
    index: Value,
    shape: Shape,
    axes: Sequence[int],
    batching: Sequence[tuple[int, int]],
    sizes: Sequence[int],
    windows: Sequence[int],
) -> tuple[Value, Value, list[int]]:
    """Return each entry's place among the cells of the indexed axes, whether its window lies in bounds, and these axes.

    Args:
      index: int ``[..., K]``, a start per axis of ``axes``.
      shape: of the array that is read or written.
      axes: its axes that ``index`` tells, K.
      batching: its axes that belong to axes of ``index``, as pairs.
      sizes: of the window, by axis of the array.
      windows: axes with an axis of their own in the result, int32 ``[..., W1, W2, ..]``, in this order.
    """
    lead = index.shape[:-1]
    inner = [axis for axis in windows if axis in axes]
    sides = (*lead, *(sizes[axis] for axis in inner))
    indexed = sorted([*axes, *(axis for axis, _ in batching)])
    index = b.cast(index, np.int32)
    place, fits = b.constant(np.zeros((1,) * len(sides), np.int32), sides), None
    for axis in indexed:
        step = math.prod(shape[other] for other in indexed if other > axis)
        if axis in axes:
            k = list(axes).index(axis)
            start = cut(b, b.full(index), [0] * len(lead) + [k], [*lead, k + 1], [1] * len(index.shape))
            start = b.reshape(start, (*lead, *(1 for _ in inner)))
            zero, last = (b.constant(np.asarray(x, np.int32)) for x in (0, shape[axis] - sizes[axis]))
            bounded = b.elementwise("Min", [b.elementwise("Max", [start, zero]), last])
            inside = b.elementwise("Equal", [bounded, start], bool)
            fits = inside if fits is None else b.elementwise("And", [fits, inside])
            if axis in inner and sizes[axis] > 1:
                ones = [1] * len(sides)
                ones[len(lead) + inner.index(axis)] = sizes[axis]
                offset = counted(b, sizes[axis], np.int32, tuple(ones), tuple(ones))
                bounded = b.elementwise("Add", [bounded, offset])
        else:
            (source,) = (other for mine, other in batching if mine == axis)
            ones = [1] * len(sides)
            ones[source] = shape[axis]
            bounded = counted(b, shape[axis], np.int32, tuple(ones), tuple(ones))
        if step != 1:
            bounded = b.elementwise("Mul", [bounded, b.constant(np.asarray(step, np.int32))])
        known = b.known(place)
        place = bounded if known is not None and place.uniform else b.elementwise("Add", [place, bounded])
    assert fits is not None, "a gather or scatter has an index"
    return b.full(b.view(place, sides, place.stored)), fits, indexed


def _gather(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    operand, index = x
    d, sizes = params["dimension_numbers"], params["slice_sizes"]
    batching = list(zip(d.operand_batching_dims, d.start_indices_batching_dims, strict=True))
    windows = [a for a in range(len(sizes)) if a not in (*d.collapsed_slice_dims, *d.operand_batching_dims)]
    place, fits, indexed = _places(b, index, operand.shape, d.start_index_map, batching, sizes, windows)
    rest = [axis for axis in range(len(sizes)) if axis not in indexed]
    ends = [side if axis in indexed else sizes[axis] for axis, side in enumerate(operand.shape)]
    operand = b.full(cut(b, operand, [0] * len(ends), ends, [1] * len(ends)))
    cells = math.prod(operand.shape[axis] for axis in indexed)
    table = b.reshape(b.transpose(operand, [*indexed, *rest]), (cells, *(sizes[axis] for axis in rest)))
    lead = len(index.shape) - 1
    fill = None
    if params["mode"] == lax.GatherScatterMode.FILL_OR_DROP:
        fill = b.constant(np.asarray(_fill(params["fill_value"], operand.dtype), operand.dtype))
        reads = math.prod(place.shape)
        if cells < reads or (cells < _TURNS * reads and b.is_from_outside(table)):
            # A further row of what is read out of bounds costs less than a choice for every row that is read.
            beyond = b.full(b.view(fill, (1, *table.shape[1:]), (1,) * len(table.shape)))
            table = b.add("Concat", [table, beyond], (cells + 1, *table.shape[1:]), operand.dtype, axis=0)
            place = b.full(where(b, fits, place, b.constant(np.asarray(cells, np.int32))))
            fill = None
    y = b.add("Gather", [table, place], (*place.shape, *table.shape[1:]), operand.dtype, axis=0)
    # Its axes: the index's, the windows of indexed axes, the rest.
    have = [*(axis for axis in windows if axis in indexed), *rest]
    leads = iter(range(lead))
    order = []
    for axis in range(len(out[0].shape)):
        order.append(lead + have.index(windows[d.offset_dims.index(axis)]) if axis in d.offset_dims else next(leads))
    y = b.transpose(y, order)
    if fill is not None:
        sides = [1 if axis in d.offset_dims else side for axis, side in enumerate(out[0].shape)]
        inside = b.reshape(b.full(b.view(fits, (*index.shape[:-1], *fits.shape[lead:]), fits.stored)), tuple(sides))
        y = where(b, inside, y, fill)
    return [y]


def _fill(value: Any, dtype: np.dtype) -> Any:
    """Return what jax reads where an index is out of bounds."""
    if value is not None:
        return value
    if dtype.kind in "iu":
        return np.iinfo(dtype).min if dtype.kind == "i" else np.iinfo(dtype).max
    return True if dtype.kind == "b" else np.nan


def _scatter(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    operand, index, updates = x
    d, shape = params["dimension_numbers"], operand.shape
    batching = list(zip(d.operand_batching_dims, d.scatter_indices_batching_dims, strict=True))
    windows = [a for a in range(len(shape)) if a not in (*d.inserted_window_dims, *d.operand_batching_dims)]
    sizes = [1] * len(shape)
    for axis, position in zip(windows, d.update_window_dims, strict=True):
        sizes[axis] = updates.shape[position]
    place, fits, indexed = _places(b, index, shape, d.scatter_dims_to_operand_dims, batching, sizes, windows)
    rest = [axis for axis in range(len(shape)) if axis not in indexed]
    outer = [axis for axis in range(len(updates.shape)) if axis not in d.update_window_dims]
    position = dict(zip(windows, d.update_window_dims, strict=True))
    order = [*outer, *(position[axis] for axis in windows if axis in indexed), *(position[axis] for axis in rest)]
    rows = b.transpose(updates, order)
    if params["mode"] != lax.GatherScatterMode.FILL_OR_DROP:
        fits = None
    return [_written(b, operand, indexed, place, fits, rows)]


def _written(
    b: Builder, operand: Value, indexed: Sequence[int], place: Value, fits: Value | None, rows: Value
) -> Value:
    """Return ``operand`` with ``rows [*place.shape, ...]`` written at ``place``, where they ``fit``."""
    shape = operand.shape
    rest = [axis for axis in range(len(shape)) if axis not in indexed]
    cells, sides = math.prod(shape[axis] for axis in indexed), tuple(shape[axis] for axis in rest)
    number = math.prod(place.shape)
    table = b.reshape(b.transpose(operand, [*indexed, *rest]), (cells, *sides))
    if fits is not None:
        # What does not fit is written to a row more, which is then cut off.
        place = where(b, fits, place, b.constant(np.asarray(cells, np.int32)))
        if table.uniform:
            table = b.view(table, (cells + 1, *sides), table.stored)
        else:
            beyond = b.constant(np.zeros((1,) * len(table.shape), table.dtype), (1, *sides))
            table = b.add("Concat", [b.full(table), b.full(beyond)], (cells + 1, *sides), table.dtype, axis=0)
    place = b.cast(b.reshape(place, (number, 1)), np.int64)
    inputs = [b.full(table), place, b.full(b.reshape(rows, (number, *sides)))]
    table = b.add("ScatterND", inputs, table.shape, table.dtype)
    if fits is not None:
        table = cut(b, table, [0] * len(table.shape), [cells, *sides], [1] * len(table.shape))
    moved = b.reshape(table, tuple(shape[axis] for axis in (*indexed, *rest)))
    return b.transpose(moved, np.argsort([*indexed, *rest]).tolist())


def _starts(b: Builder, starts: Sequence[Value], shape: Shape, sizes: Shape) -> dict[int, Value]:
    """Return the cells ``[size]`` that a window takes along each axis that it does not take whole."""
    cells = {}
    for axis, (start, side, size) in enumerate(zip(starts, shape, sizes, strict=True)):
        if size != side:
            zero, last = (b.constant(np.asarray(x, np.int32)) for x in (0, side - size))
            first = b.elementwise("Min", [b.elementwise("Max", [b.cast(start, np.int32), zero]), last])
            cells[axis] = b.elementwise("Add", [b.reshape(first, (1,)), counted(b, size, np.int32, (size,), (size,))])
    return cells


def _dynamic_slice(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    # By index rather than as a slice, whose shape a runtime does not know before it runs.
    value = b.full(x[0])
    for axis, cells in _starts(b, x[1:], value.shape, params["slice_sizes"]).items():
        shape = (*value.shape[:axis], cells.shape[0], *value.shape[axis + 1 :])
        value = b.add("Gather", [value, cells], shape, value.dtype, axis=axis)
    return [value]


def _dynamic_update(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    operand, update, *starts = x
    axes = _starts(b, starts, operand.shape, update.shape)
    if not axes:
        return [update]
    indexed, place = sorted(axes), None
    for i, axis in enumerate(indexed):
        step = math.prod(operand.shape[other] for other in indexed if other > axis)
        sides = tuple(update.shape[axis] if j == i else 1 for j in range(len(indexed)))
        cells = b.reshape(axes[axis], sides)
        if step != 1:
            cells = b.elementwise("Mul", [cells, b.constant(np.asarray(step, np.int32))])
        place = cells if place is None else b.elementwise("Add", [place, cells])
    assert place is not None
    rest = [axis for axis in range(len(operand.shape)) if axis not in indexed]
    return [_written(b, operand, indexed, b.full(place), None, b.transpose(update, [*indexed, *rest]))]


INDEXING: dict[str, Translation] = {
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update,
    "gather": _gather,
    "scatter": _scatter,
}
