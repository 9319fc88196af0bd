"""Walk through a trace: each primitive's translation, and those of control flow, which hold traces themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core
import numpy as np

from querydet_jax.inference.export.onnx_graph import Builder, Translation, Value
from querydet_jax.inference.export.onnx_operators.elementwise import ELEMENTWISE, computed, where
from querydet_jax.inference.export.onnx_operators.indexing import INDEXING
from querydet_jax.inference.export.onnx_operators.products import PRODUCTS
from querydet_jax.inference.export.onnx_operators.reductions import REDUCTIONS, reduce
from querydet_jax.inference.export.onnx_operators.shapes import SHAPES, stack
from querydet_jax.runtime.errors import DataError

Jaxpr = jax.extend.core.Jaxpr

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
        out = computed(builder, name, given, avals)
        if out is None:
            if name not in _TRANSLATIONS:
                raise DataError(f"ONNX: jax's primitive {name} has no translation; export without --format onnx")
            out = _TRANSLATIONS[name](builder, given, avals, equation.params)
        values.update(zip(equation.outvars, out, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


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
    for platforms, branch in zip(params.get("branches_platforms") or (), branches, strict=False):
        if platforms is not None and "cpu" in platforms and _is_named(branch, "filled_in_turns"):
            return _filled_in_turns(b, branch, operands, out)
    if known is not None:
        return translate_closed(b, branches[min(max(int(known.item()), 0), len(branches) - 1)], operands)
    return _nested(b, which, branches, operands, out)


def _is_named(closed: Any, name: str) -> bool:
    jaxpr = closed.jaxpr
    return [x.params.get("name") for x in jaxpr.eqns] == [name] and list(jaxpr.outvars) == jaxpr.eqns[0].outvars


def _filled_in_turns(b: Builder, closed: Any, x: list[Value], out: Any) -> list[Value]:
    """``sparse.conv.in_chunks``: a loop of as many turns as needed, each of which writes the next rows of buffers.

    The loop of ONNX joins the turns' rows by itself; the rest of the buffers, whose rows nobody reads, is zeros.
    """
    call = closed.jaxpr.eqns[0]
    x = _translate(b, closed.jaxpr.replace(eqns=[], outvars=call.invars), x)
    closed = call.params["jaxpr"]
    *before, loop = closed.jaxpr.eqns
    assert not closed.consts and loop.primitive.name == "while" and list(closed.jaxpr.outvars) == loop.outvars[2:], loop
    inputs = _translate(b, closed.jaxpr.replace(eqns=before, outvars=loop.invars), x)
    of_test, of_body = loop.params["cond_nconsts"], loop.params["body_nconsts"]
    fixed, (_, count, *buffers) = inputs[of_test : of_test + of_body], inputs[of_test + of_body :]
    body = loop.params["body_jaxpr"]
    writes = {
        equation.outvars[0]: equation for equation in body.jaxpr.eqns if equation.outvars[0] in body.jaxpr.outvars
    }
    written = [writes[name] for name in body.jaxpr.outvars[2:]]
    assert all(equation.primitive.name == "dynamic_update_slice" for equation in written), written
    rest = [equation for equation in body.jaxpr.eqns if equation not in written]
    rows = body.jaxpr.replace(eqns=rest, outvars=[equation.invars[1] for equation in written])

    def turn(_: list[Value], i: Value) -> tuple[list[Value], list[Value], Value | None]:
        return [], _translate(b, rows, [*constants, *fixed, b.cast(i, np.int32), count, *buffers]), None

    constants = [b.constant(np.asarray(value)) for value in body.consts]
    # One turn at least: OpenVINO cannot join none.
    turns = b.cast(b.elementwise("Max", [count, b.constant(np.asarray(1, np.int32))]), np.int64)
    parts = _loop(b, turns, None, [], turn, [equation.invars[1].aval for equation in written])
    return [_filled_up(b, part, turns, aval) for part, aval in zip(parts, out, strict=True)]


def _filled_up(b: Builder, part: Value, turns: Value, out: Any) -> Value:
    """Join the turns ``[turns, rows, ...]`` to a buffer ``[N, ...]`` that they fill from the front."""
    number, *sides = out.shape
    rows = b.add("Reshape", [part, b.ints(-1, *sides)], out.shape, out.dtype)
    done = b.elementwise("Mul", [turns, b.constant(np.asarray(part.shape[0], np.int64))])
    missing = b.reshape(b.elementwise("Sub", [b.constant(np.asarray(number, np.int64)), done]), (1,))
    none, rank = [b.ints(*[0] * len(out.shape)), b.ints(*[0] * len(sides))], 2 * len(out.shape)
    pads = b.add("Concat", [none[0], missing, *none[1:]], (rank,), np.int64, axis=0)
    return b.add("Pad", [rows, pads, b.constant(np.zeros((), out.dtype))], out.shape, out.dtype)


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
    (value,) = reduce("ReduceMax")(b, [x], [jax.ShapeDtypeStruct((), bool)], {"axes": range(len(x.shape))})
    return value


def _rows_where(b: Builder, rows: Value, x: Value, y: Value) -> Value:
    more = (1,) * (len(x.shape) - len(rows.shape))
    rows = b.view(rows, (*rows.shape, *more), (*rows.stored, *more))
    return where(b, rows, x, y)


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
        stacked += stack(b, column, [aval], {"axis": 0})
    return [*state, *stacked]


Turn = Callable[[list[Value], Value], tuple[list[Value], list[Value], Value | None]]


def _loop(
    b: Builder, length: int | Value | None, start: Value | None, state: list[Value], turn: Turn, out: Sequence[Any]
) -> list[Value]:
    """Add a loop of ``length`` turns, or while ``turn(state, i)`` says so; its outputs are the state and the rows."""
    carried = [b.full(value) for value in state]
    with b.inner_graph(is_loop=True) as body:
        i, before = b.input((), np.int64), b.input((), bool)
        inner = [b.input(value.shape, value.dtype) for value in carried]
        state, rows, goes_on = turn(inner, i)
        b.outputs([before if goes_on is None else goes_on, *state, *rows])
    count = b.constant(np.asarray(length, np.int64)) if isinstance(length, int) else length
    results = [(aval.shape, aval.dtype) for aval in out]
    return b.add_several("Loop", [count, start, *carried], results, body=body)


_TRANSLATIONS: dict[str, Translation] = {
    **ELEMENTWISE,
    **SHAPES,
    **REDUCTIONS,
    **PRODUCTS,
    **INDEXING,
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
