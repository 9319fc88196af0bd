"""Primitives that move entries: reshapes, slices, pads, joins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from querydet_jax.inference.export.onnx_graph import Builder, Shape, Translation, Value
from querydet_jax.runtime.errors import DataError


def _broadcast(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    stored = [1] * len(out[0].shape)
    for axis, side in zip(params["broadcast_dimensions"], x[0].stored, strict=True):
        stored[axis] = side
    return [b.view(x[0], out[0].shape, tuple(stored))]


def _reshape(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    if params.get("dimensions") is not None:
        raise DataError("ONNX: a reshape in another order of axes has no translation")
    return [_repeated(b, x[0], out[0].shape) or b.reshape(x[0], out[0].shape)]


def _repeated(b: Builder, x: Value, shape: Shape) -> Value | None:
    """Return ``jnp.repeat`` of an image that is stored as convolutions leave it, [B, C, h, w]; None of anything else.

    It reaches here as the image with a further axis on which it repeats, which the reshape joins to the one before.
    """
    (base, _) = b.inputs_of(x, "Reshape") or (None, None)
    if base is None or base.turned is None or len(base.shape) != 4 or base.dtype != np.float32:
        return None
    axis = next((i for i, (side, wanted) in enumerate(zip(base.shape, shape, strict=False)) if side != wanted), 0)
    times = shape[axis] // base.shape[axis]
    added, stored = ((*base.shape[: axis + 1], count, *base.shape[axis + 1 :]) for count in (times, 1))
    if not axis or x.shape != added or x.stored != stored or math.prod(shape) != math.prod(added):
        return None
    source, order = base.turned
    scales = b.constant(np.array([times if i == order[axis] else 1 for i in range(4)], np.float32))
    mode: dict[str, Any] = dict(mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor")
    sides = tuple(shape[i] for i in np.argsort(order))
    return b.transpose(b.add("Resize", [source, None, scales], sides, source.dtype, **mode), order)


def _squeeze(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    stored = [side for axis, side in enumerate(x[0].stored) if axis not in params["dimensions"]]
    return [b.view(x[0], out[0].shape, tuple(stored))]


def _transpose(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    return [b.transpose(x[0], params["permutation"])]


def _iota(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    shape, axis = out[0].shape, params["dimension"]
    stored = tuple(side if i == axis else 1 for i, side in enumerate(shape))
    return [counted(b, shape[axis], out[0].dtype, shape, stored)]


def counted(b: Builder, count: int, dtype: Any, shape: Shape, stored: Shape) -> Value:
    """0, 1, 2, .. along the one axis of ``stored`` that is not 1."""
    if count <= 1024:
        return b.constant(np.arange(count, dtype=dtype).reshape(stored), shape)
    bounds = [b.constant(np.asarray(x, np.int32)) for x in (0, count, 1)]
    return b.view(b.cast(b.add("Range", bounds, (count,), np.int32), dtype), shape, stored)


def _slice(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    steps = params["strides"] or (1,) * len(params["start_indices"])
    return [cut(b, x[0], params["start_indices"], params["limit_indices"], steps)]


def cut(b: Builder, x: Value, starts: Sequence[int], ends: Sequence[int], steps: Sequence[int]) -> Value:
    if x.turned is not None:
        source, order = x.turned
        bounds = ([side[i] for i in np.argsort(order)] for side in (starts, ends, steps))
        return b.transpose(cut(b, source, *bounds), order)
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
    if value.turned is not None:
        source, order = value.turned
        sides = [out[0].shape[i] for i in np.argsort(order)]
        inner = {"padding_config": [config[i] for i in np.argsort(order)]}
        (padded,) = _pad(b, [source, fill], [jax.ShapeDtypeStruct(sides, value.dtype)], inner)
        return [b.transpose(padded, order)]
    if any(between for _, _, between in config):
        raise DataError("ONNX: padding between entries has no translation")
    starts = [max(0, -before) for before, _, _ in config]
    ends = [side - max(0, -after) for side, (_, after, _) in zip(value.shape, config, strict=True)]
    value = b.full(cut(b, value, starts, ends, [1] * len(starts)))
    pads = [max(0, before) for before, _, _ in config] + [max(0, after) for _, after, _ in config]
    return [b.add("Pad", [value, b.ints(*pads), fill], out[0].shape, value.dtype)] if any(pads) else [value]


def _concatenate(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    return [b.add("Concat", [b.full(value) for value in x], out[0].shape, out[0].dtype, axis=params["dimension"])]


def stack(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    axis = params["axis"]
    thin = [b.reshape(value, (*value.shape[:axis], 1, *value.shape[axis:])) for value in x]
    return _concatenate(b, thin, out, {"dimension": axis})


def _split(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    axis, end, parts = params["axis"], 0, []
    for size in params["sizes"]:
        bounds = ([0] * len(x[0].shape), list(x[0].shape))
        bounds[0][axis], bounds[1][axis] = end, end + size
        parts.append(cut(b, x[0], *bounds, [1] * len(x[0].shape)))
        end += size
    return parts


def _tile(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    return [b.add("Tile", [b.full(x[0]), b.ints(*params["reps"])], out[0].shape, out[0].dtype)]


SHAPES: dict[str, Translation] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "iota": _iota,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _reverse,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "stack": stack,
    "tile": _tile,
    "transpose": _transpose,
}
