"""Each primitive of a traced detector in ONNX operators.

Every shape stays static. A primitive without a translation here is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core
import numpy as np
from jax import lax

from querydet_jax.inference.export.onnx_graph import Builder, Shape, Value
from querydet_jax.runtime.errors import DataError

Jaxpr = jax.extend.core.Jaxpr
Translation = Callable[[Builder, list[Value], Any, dict[str, Any]], list[Value]]
"""``translate(builder, inputs, out, params)``: the outputs; ``out`` are the outputs' abstract values."""

_UNROLLED = 16  # turns up to which a loop with a fixed number of turns is written out


def translate_closed(b: Builder, closed: jax.extend.core.ClosedJaxpr, inputs: Sequence[Value]) -> list[Value]:
    """Add what ``closed`` computes from ``inputs`` to the open graph; return its outputs.

    Raises:
      DataError: a primitive has no translation.
    """
    constants = [b.constant(np.asarray(value)) for value in closed.consts]
    jaxpr = closed.jaxpr
    return _translate(b, jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars]), [*constants, *inputs])


def _translate(builder: Builder, jaxpr: Jaxpr, inputs: Sequence[Value]) -> list[Value]:
    values: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Value:
        if isinstance(atom, jax.extend.core.Literal):
            aval: Any = atom.aval
            return builder.constant(np.asarray(atom.val, aval.dtype))
        return values[atom]

    for equation in jaxpr.eqns:
        name, avals = equation.primitive.name, [v.aval for v in equation.outvars]
        given = [read(atom) for atom in equation.invars]
        out = _computed(builder, name, given, avals)
        if out is None:
            if name not in _TRANSLATIONS:
                raise DataError(f"ONNX: jax's primitive {name} has no translation; export without --format onnx")
            out = _TRANSLATIONS[name](builder, given, avals, equation.params)
        values.update(zip(equation.outvars, out, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _computed(b: Builder, name: str, inputs: list[Value], out: list[Any]) -> list[Value] | None:
    """Return the result of an elementwise primitive on short constants; None if it must be translated."""
    arrays = [b.known(value) for value in inputs]
    if name not in _IN_NUMPY or any(array is None for array in arrays):
        return None
    with np.errstate(all="ignore"):  # infinities are meant
        return [b.constant(np.asarray(_IN_NUMPY[name](*arrays), out[0].dtype), out[0].shape)]


# Elementwise


def _plain(op: str, **attributes: Any) -> Translation:
    return lambda b, x, out, params: [b.elementwise(op, x, out[0].dtype, **attributes)]


def _logical(op: str, of_integers: str) -> Translation:
    return lambda b, x, out, params: [b.elementwise(op if x[0].dtype == bool else of_integers, x)]


def _maximum(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    for value, other in (x, x[::-1]):
        array = b.known(value)
        # As an operator of its own, which runtimes fuse with the convolution before it.
        if array is not None and value.uniform and array.item() == 0 and value.dtype == np.float32:
            return [b.elementwise("Relu", [other])]
    return [b.elementwise("Max", x)]


def _clamp(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    low, value, high = x
    return [b.elementwise("Min", [b.elementwise("Max", [value, low]), high])]


def _not_equal(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    return [b.elementwise("Not", [b.elementwise("Equal", x, bool)])]


def _power(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    exponent = params.get("y", 2)
    if exponent == 2:
        return [b.elementwise("Mul", [x[0], x[0]])]
    return [b.elementwise("Pow", [x[0], b.constant(np.asarray(exponent, x[0].dtype))])]


def _exp2(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    return [b.elementwise("Pow", [b.constant(np.asarray(2, x[0].dtype)), x[0]])]


def _rsqrt(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    return [b.elementwise("Reciprocal", [b.elementwise("Sqrt", x)])]


def _round(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    if params["rounding_method"] != lax.RoundingMethod.TO_NEAREST_EVEN:
        raise DataError("ONNX: rounds halves to even only")
    return [b.elementwise("Round", x)]


def _select(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    which, *cases = x
    if which.dtype != bool or len(cases) != 2:
        raise DataError("ONNX: selection among more than two arrays has no translation")
    return [_where(b, which, cases[1], cases[0])]


def _where(b: Builder, which: Value, yes: Value, no: Value) -> Value:
    if yes.dtype != bool:
        return b.elementwise("Where", [which, yes, no], yes.dtype)
    # ONNX Runtime has no Where for truth values.
    both = [b.elementwise("And", [which, yes]), b.elementwise("And", [b.elementwise("Not", [which]), no])]
    return b.elementwise("Or", both)


def _convert(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    return [b.cast(x[0], out[0].dtype)]


def _is_finite(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    largest = b.constant(np.asarray(np.finfo(x[0].dtype).max))
    return [b.elementwise("LessOrEqual", [b.elementwise("Abs", x), largest], bool)]


def _same(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    return x


# Shapes


def _broadcast(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    stored = [1] * len(out[0].shape)
    for axis, side in zip(params["broadcast_dimensions"], x[0].stored, strict=True):
        stored[axis] = side
    return [b.view(x[0], out[0].shape, tuple(stored))]


def _reshape(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    if params.get("dimensions") is not None:
        raise DataError("ONNX: a reshape in another order of axes has no translation")
    return [b.reshape(x[0], out[0].shape)]


def _squeeze(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    stored = [side for axis, side in enumerate(x[0].stored) if axis not in params["dimensions"]]
    return [b.view(x[0], out[0].shape, tuple(stored))]


def _transpose(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    return [b.transpose(x[0], params["permutation"])]


def _iota(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    shape, axis = out[0].shape, params["dimension"]
    stored = tuple(side if i == axis else 1 for i, side in enumerate(shape))
    return [_range(b, shape[axis], out[0].dtype, shape, stored)]


def _range(b: Builder, count: int, dtype: Any, shape: Shape, stored: Shape) -> Value:
    """0, 1, 2, .. along the one axis of ``stored`` that is not 1."""
    if count <= 1024:
        return b.constant(np.arange(count, dtype=dtype).reshape(stored), shape)
    bounds = [b.constant(np.asarray(x, np.int32)) for x in (0, count, 1)]
    return b.view(b.cast(b.add("Range", bounds, (count,), np.int32), dtype), shape, stored)


def _slice(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    steps = params["strides"] or (1,) * len(params["start_indices"])
    return [_cut(b, x[0], params["start_indices"], params["limit_indices"], steps)]


def _cut(b: Builder, x: Value, starts: Sequence[int], ends: Sequence[int], steps: Sequence[int]) -> Value:
    shape = tuple(len(range(*bounds)) for bounds in zip(starts, ends, steps, strict=True))
    stored = tuple(1 if have == 1 else side for have, side in zip(x.stored, shape, strict=True))
    axes = [i for i, (have, side) in enumerate(zip(x.stored, stored, strict=True)) if have != side]
    if not axes:
        return b.view(x, shape, stored)
    array = b.known(x)
    if array is not None:
        sides = enumerate(zip(starts, ends, steps, strict=True))
        cuts = [slice(*bounds) if i in axes else slice(None) for i, bounds in sides]
        return b.constant(array[tuple(cuts)], shape)
    bounds = [b.ints(*(values[i] for i in axes)) for values in (starts, ends, range(len(shape)), steps)]
    return b.add("Slice", [x, *bounds], shape, x.dtype, stored)


def _reverse(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    axes = [axis for axis in params["dimensions"] if x[0].stored[axis] != 1]
    if not axes:
        return x
    ones = b.ints(*(-1 for _ in axes))
    last = b.ints(*(-(2**31) for _ in axes))
    return [b.add("Slice", [x[0], ones, last, b.ints(*axes), ones], x[0].shape, x[0].dtype, x[0].stored)]


def _pad(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    value, fill = x
    config = params["padding_config"]
    if any(between for _, _, between in config):
        raise DataError("ONNX: padding between entries has no translation")
    starts = [max(0, -before) for before, _, _ in config]
    ends = [side - max(0, -after) for side, (_, after, _) in zip(value.shape, config, strict=True)]
    value = b.full(_cut(b, value, starts, ends, [1] * len(starts)))
    pads = [max(0, before) for before, _, _ in config] + [max(0, after) for _, after, _ in config]
    return [b.add("Pad", [value, b.ints(*pads), fill], out[0].shape, value.dtype)] if any(pads) else [value]


def _concatenate(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    return [b.add("Concat", [b.full(value) for value in x], out[0].shape, out[0].dtype, axis=params["dimension"])]


def _stack(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    axis = params["axis"]
    thin = [b.reshape(value, (*value.shape[:axis], 1, *value.shape[axis:])) for value in x]
    return _concatenate(b, thin, out, {"dimension": axis})


def _split(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    axis, end, parts = params["axis"], 0, []
    for size in params["sizes"]:
        bounds = ([0] * len(x[0].shape), list(x[0].shape))
        bounds[0][axis], bounds[1][axis] = end, end + size
        parts.append(_cut(b, x[0], *bounds, [1] * len(x[0].shape)))
        end += size
    return parts


def _tile(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    return [b.add("Tile", [b.full(x[0]), b.ints(*params["reps"])], out[0].shape, out[0].dtype)]


# Reductions and order


def _reduce(op: str) -> Translation:
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


# Products


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


# Reading and writing by index. The axes that are read by index are gathered into one, so that one number per row tells
# its place; axes of a batch get the row's own number.


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
            start = _cut(b, b.full(index), [0] * len(lead) + [k], [*lead, k + 1], [1] * len(index.shape))
            start = b.reshape(start, (*lead, *(1 for _ in inner)))
            zero, last = (b.constant(np.asarray(x, np.int32)) for x in (0, shape[axis] - sizes[axis]))
            bounded = b.elementwise("Min", [b.elementwise("Max", [start, zero]), last])
            inside = b.elementwise("Equal", [bounded, start], bool)
            fits = inside if fits is None else b.elementwise("And", [fits, inside])
            if axis in inner and sizes[axis] > 1:
                ones = [1] * len(sides)
                ones[len(lead) + inner.index(axis)] = sizes[axis]
                offset = _range(b, sizes[axis], np.int32, tuple(ones), tuple(ones))
                bounded = b.elementwise("Add", [bounded, offset])
        else:
            (source,) = (other for mine, other in batching if mine == axis)
            ones = [1] * len(sides)
            ones[source] = shape[axis]
            bounded = _range(b, shape[axis], np.int32, tuple(ones), tuple(ones))
        if step != 1:
            bounded = b.elementwise("Mul", [bounded, b.constant(np.asarray(step, np.int32))])
        known = b.known(place)
        place = bounded if known is not None and place.uniform else b.elementwise("Add", [place, bounded])
    assert fits is not None, "a gather or scatter has an index"
    return b.full(b.view(place, sides, place.stored)), fits, indexed


def _gather(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    operand, index = x
    d, sizes, mode = params["dimension_numbers"], params["slice_sizes"], params["mode"]
    batching = list(zip(d.operand_batching_dims, d.start_indices_batching_dims, strict=True))
    windows = [a for a in range(len(sizes)) if a not in (*d.collapsed_slice_dims, *d.operand_batching_dims)]
    place, fits, indexed = _places(b, index, operand.shape, d.start_index_map, batching, sizes, windows)
    rest = [axis for axis in range(len(sizes)) if axis not in indexed]
    ends = [side if axis in indexed else sizes[axis] for axis, side in enumerate(operand.shape)]
    operand = b.full(_cut(b, operand, [0] * len(ends), ends, [1] * len(ends)))
    cells = math.prod(operand.shape[axis] for axis in indexed)
    table = b.reshape(b.transpose(operand, [*indexed, *rest]), (cells, *(sizes[axis] for axis in rest)))
    lead = len(index.shape) - 1
    y = b.add("Gather", [table, place], (*place.shape, *table.shape[1:]), operand.dtype, axis=0)
    # Its axes: the index's, the windows of indexed axes, the rest.
    have = [*(axis for axis in windows if axis in indexed), *rest]
    leads = iter(range(lead))
    order = []
    for axis in range(len(out[0].shape)):
        order.append(lead + have.index(windows[d.offset_dims.index(axis)]) if axis in d.offset_dims else next(leads))
    y = b.transpose(y, order)
    if mode == lax.GatherScatterMode.FILL_OR_DROP:
        sides = [1 if axis in d.offset_dims else side for axis, side in enumerate(out[0].shape)]
        fill = b.constant(np.asarray(_fill(params["fill_value"], y.dtype), y.dtype))
        where = b.reshape(b.full(b.view(fits, (*index.shape[:-1], *fits.shape[lead:]), fits.stored)), tuple(sides))
        y = _where(b, where, y, fill)
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
        place = _where(b, fits, place, b.constant(np.asarray(cells, np.int32)))
        if table.uniform:
            table = b.view(table, (cells + 1, *sides), table.stored)
        else:
            beyond = b.constant(np.zeros((1,) * len(table.shape), table.dtype), (1, *sides))
            table = b.add("Concat", [b.full(table), b.full(beyond)], (cells + 1, *sides), table.dtype, axis=0)
    place = b.cast(b.reshape(place, (number, 1)), np.int64)
    inputs = [b.full(table), place, b.full(b.reshape(rows, (number, *sides)))]
    table = b.add("ScatterND", inputs, table.shape, table.dtype)
    if fits is not None:
        table = _cut(b, table, [0] * len(table.shape), [cells, *sides], [1] * len(table.shape))
    moved = b.reshape(table, tuple(shape[axis] for axis in (*indexed, *rest)))
    return b.transpose(moved, np.argsort([*indexed, *rest]).tolist())


def _starts(b: Builder, starts: Sequence[Value], shape: Shape, sizes: Shape) -> dict[int, Value]:
    """Return the cells ``[size]`` that a window takes along each axis that it does not take whole."""
    cells = {}
    for axis, (start, side, size) in enumerate(zip(starts, shape, sizes, strict=True)):
        if size != side:
            zero, last = (b.constant(np.asarray(x, np.int32)) for x in (0, side - size))
            first = b.elementwise("Min", [b.elementwise("Max", [b.cast(start, np.int32), zero]), last])
            cells[axis] = b.elementwise("Add", [b.reshape(first, (1,)), _range(b, size, np.int32, (size,), (size,))])
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


# Control


def _inlined(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    closed = params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]
    return translate_closed(b, closed, x)


def _platform(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    # The branch for any platform: whole buffers instead of loops, grouped convolution instead of shifted products.
    (chosen,) = (i for i, platforms in enumerate(params["platforms"]) if platforms is None)
    return [b.constant(np.asarray(chosen, np.int32))]


def _conditional(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    which, *operands = x
    branches, known = params["branches"], b.known(which)
    if known is not None:
        return translate_closed(b, branches[min(max(int(known.item()), 0), len(branches) - 1)], operands)
    return _nested(b, which, branches, operands, out)


def _nested(b: Builder, which: Value, branches: Sequence[Any], operands: list[Value], out: Any) -> list[Value]:
    """A choice among several branches is the first or a choice among the others."""
    if len(branches) == 1:
        return translate_closed(b, branches[0], operands)
    first = b.elementwise("LessOrEqual", [b.cast(which, np.int32), b.constant(np.asarray(0, np.int32))], bool)
    with b.inner_graph() as then:
        b.outputs(translate_closed(b, branches[0], operands))
    with b.inner_graph() as otherwise:
        less = b.elementwise("Sub", [b.cast(which, np.int32), b.constant(np.asarray(1, np.int32))])
        b.outputs(_nested(b, less, branches[1:], operands, out))
    results = [(aval.shape, aval.dtype) for aval in out]
    return b.add_several("If", [first], results, then_branch=then, else_branch=otherwise)


def _while(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    of_test, of_body = params["cond_nconsts"], params["body_nconsts"]
    test, body, state = x[:of_test], x[of_test : of_test + of_body], x[of_test + of_body :]

    def wanted(state: list[Value]) -> Value:
        (value,) = translate_closed(b, params["cond_jaxpr"], [*test, *state])
        return value

    def turn(state: list[Value], _: Value) -> tuple[list[Value], list[Value], Value | None]:
        # Under vmap the loop goes on while any row wants it. A row that is done keeps its state.
        of_row, old = (state[0], state[1:]) if batched else (None, state)
        new = translate_closed(b, params["body_jaxpr"], [*body, *old])
        if of_row is not None:
            new = [_rows_where(b, of_row, x, y) for x, y in zip(new, old, strict=True)]
        next_wanted = wanted(new)
        return [next_wanted, *new] if batched else new, [], _any(b, next_wanted)

    start = wanted(state)
    batched = math.prod(start.shape) > 1
    if not batched:
        return _loop(b, None, _any(b, start), state, turn, out)
    return _loop(b, None, _any(b, start), [start, *state], turn, [start, *out])[1:]


def _any(b: Builder, x: Value) -> Value:
    if math.prod(x.shape) == 1:
        return b.reshape(x, ())
    (value,) = _reduce("ReduceMax")(b, [x], [jax.ShapeDtypeStruct((), bool)], {"axes": range(len(x.shape))})
    return value


def _rows_where(b: Builder, rows: Value, x: Value, y: Value) -> Value:
    more = (1,) * (len(x.shape) - len(rows.shape))
    rows = b.view(rows, (*rows.shape, *more), (*rows.stored, *more))
    return _where(b, rows, x, y)


def _scan(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    constants, carried = params["num_consts"], params["num_carry"]
    length, body = params["length"], params["jaxpr"]
    fixed, state, rows = x[:constants], x[constants : constants + carried], x[constants + carried :]

    def row(value: Value, at: Value) -> Value:
        return b.add("Gather", [b.full(value), at], value.shape[1:], value.dtype, axis=0)

    def turn(state: list[Value], i: Value) -> tuple[list[Value], list[Value], Value | None]:
        if params["reverse"]:
            i = b.elementwise("Sub", [b.constant(np.asarray(length - 1, np.int64)), i])
        done = translate_closed(b, body, [*fixed, *state, *(row(value, i) for value in rows)])
        return done[:carried], done[carried:], None

    if length > _UNROLLED:
        if params["reverse"] and len(out) > carried:
            raise DataError("ONNX: a reversed scan with outputs has no translation")
        return _loop(b, length, None, state, turn, out)
    turns: list[list[Value]] = []
    for i in range(length):
        state, made, _ = turn(state, b.constant(np.asarray(i, np.int64)))
        turns.append(made)
    stacked = []
    for j, aval in enumerate(out[carried:]):
        column = [made[j] for made in (turns[::-1] if params["reverse"] else turns)]
        stacked += _stack(b, column, [aval], {"axis": 0})
    return [*state, *stacked]


Turn = Callable[[list[Value], Value], tuple[list[Value], list[Value], Value | None]]


def _loop(
    b: Builder, length: int | None, start: Value | None, state: list[Value], turn: Turn, out: Sequence[Any]
) -> list[Value]:
    """Add a loop of ``length`` turns, or while ``turn(state, i)`` says so; its outputs are the state and the rows."""
    carried = [b.full(value) for value in state]
    with b.inner_graph() as body:
        i, before = b.input((), np.int64), b.input((), bool)
        inner = [b.input(value.shape, value.dtype) for value in carried]
        state, rows, goes_on = turn(inner, i)
        b.outputs([before if goes_on is None else goes_on, *state, *rows])
    count = None if length is None else b.constant(np.asarray(length, np.int64))
    results = [(aval.shape, aval.dtype) for aval in out]
    return b.add_several("Loop", [count, start, *carried], results, body=body)


_ELEMENTWISE: dict[str, Translation] = {
    "abs": _plain("Abs"),
    "add": _plain("Add"),
    "add_any": _plain("Add"),
    "and": _logical("And", "BitwiseAnd"),
    "ceil": _plain("Ceil"),
    "clamp": _clamp,
    "convert_element_type": _convert,
    "copy": _same,
    "div": _plain("Div"),
    "eq": _plain("Equal"),
    "exp": _plain("Exp"),
    "exp2": _exp2,
    "floor": _plain("Floor"),
    "ge": _plain("GreaterOrEqual"),
    "gt": _plain("Greater"),
    "integer_pow": _power,
    "is_finite": _is_finite,
    "le": _plain("LessOrEqual"),
    "le_to": _plain("LessOrEqual"),
    "log": _plain("Log"),
    "logistic": _plain("Sigmoid"),
    "lt": _plain("Less"),
    "lt_to": _plain("Less"),
    "max": _maximum,
    "min": _plain("Min"),
    "mul": _plain("Mul"),
    "ne": _not_equal,
    "neg": _plain("Neg"),
    "not": _logical("Not", "BitwiseNot"),
    "or": _logical("Or", "BitwiseOr"),
    "rem": _plain("Mod", fmod=1),  # the sign of the dividend
    "round": _round,
    "rsqrt": _rsqrt,
    "select_n": _select,
    "sign": _plain("Sign"),
    "sqrt": _plain("Sqrt"),
    "square": _power,
    "stop_gradient": _same,
    "sub": _plain("Sub"),
    "tanh": _plain("Tanh"),
}
_CONTROL: dict[str, Translation] = {
    "closed_call": _inlined,
    "cond": _conditional,
    "custom_jvp_call": _inlined,
    "custom_vjp_call": _inlined,
    "jit": _inlined,
    "pjit": _inlined,
    "platform_index": _platform,
    "scan": _scan,
    "while": _while,
}
_TRANSLATIONS: dict[str, Translation] = {
    **_ELEMENTWISE,
    **_CONTROL,
    "argmax": _arg("ArgMax"),
    "argmin": _arg("ArgMin"),
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "cumsum": _cumulative_sum,
    "dot_general": _product,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update,
    "gather": _gather,
    "iota": _iota,
    "pad": _pad,
    "reduce_and": _reduce("ReduceMin"),
    "reduce_max": _reduce("ReduceMax"),
    "reduce_min": _reduce("ReduceMin"),
    "reduce_or": _reduce("ReduceMax"),
    "reduce_sum": _reduce("ReduceSum"),
    "reduce_window_max": _window_maximum,
    "reshape": _reshape,
    "rev": _reverse,
    "scatter": _scatter,
    "slice": _slice,
    "sort": _sort,
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "top_k": _largest,
    "transpose": _transpose,
}


def _quotient(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Divide as jax does: integers toward zero."""
    return x / y if x.dtype.kind == "f" else (x - np.fmod(x, y)) // y


# Where constants meet, the result is computed at once.
_IN_NUMPY: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "and": np.bitwise_and,
    "div": _quotient,
    "eq": np.equal,
    "exp": np.exp,
    "ge": np.greater_equal,
    "gt": np.greater,
    "le": np.less_equal,
    "lt": np.less,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "ne": np.not_equal,
    "neg": np.negative,
    "not": np.invert,
    "or": np.bitwise_or,
    "rem": np.fmod,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "select_n": lambda which, first, second: np.where(which, second, first),
    "sign": np.sign,
    "sqrt": np.sqrt,
    "sub": np.subtract,
}
