"""Primitives that compute each entry by itself, and what of them is known when the file is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jax import lax

from querydet_jax.inference.export.onnx_graph import Builder, Translation, Value
from querydet_jax.runtime.errors import DataError


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


def _minimum(b: Builder, x: list[Value], out: Any, params: dict[str, Any]) -> list[Value]:
    for value, other in (x, x[::-1]):
        source, order = other.turned or (other, None)
        relu = b.inputs_of(source, "Relu")
        if relu is not None and value.uniform and b.known(value) is not None:
            # One operator, as for ReLU.
            bounds = [b.constant(np.zeros((), value.dtype)), b.reshape(value, ())]
            y = b.add("Clip", [*relu, *bounds], source.shape, source.dtype, source.stored)
            return [y if order is None else b.transpose(y, order)]
    return [b.elementwise("Min", x)]


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
    return [where(b, which, cases[1], cases[0])]


def where(b: Builder, which: Value, yes: Value, no: Value) -> Value:
    if yes.dtype != bool:
        if yes.dtype != np.uint32:
            return b.elementwise("Where", [which, yes, no], yes.dtype)
        # ONNX Runtime's build for browsers has no Where for uint32.
        return b.cast(b.elementwise("Where", [which, *(b.cast(x, np.int64) for x in (yes, no))], np.int64), np.uint32)
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


ELEMENTWISE: dict[str, Translation] = {
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
    "min": _minimum,
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


def computed(b: Builder, name: str, inputs: list[Value], out: list[Any]) -> list[Value] | None:
    """Return the result of an elementwise primitive on short constants; None if it must be translated."""
    arrays = [b.known(value) for value in inputs]
    if name not in _IN_NUMPY or any(array is None for array in arrays):
        return None
    with np.errstate(all="ignore"):  # infinities are meant
        return [b.constant(np.asarray(_IN_NUMPY[name](*arrays), out[0].dtype), out[0].shape)]


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
