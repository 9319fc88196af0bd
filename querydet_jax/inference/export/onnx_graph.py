"""A graph of ONNX operators under construction: constants once, common nodes once, unused nodes not at all.

A tensor that repeats along an axis is kept with length 1 there, and expanded only where an operator cannot broadcast.
What depends on constants alone stands in the outermost graph, where the branches of conditionals share it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

Shape = tuple[Any, ...]
"""Lengths; texts in the inputs and outputs of a graph for several shapes."""

OPSET = 18
# Entries up to which constants are computed here; with more, when the model is loaded, to keep the file small.
_SHORT = 65_536
_FEW = 3  # a tensor so many times smaller than another is transposed for its sake
_IR_VERSION = 9  # the oldest that this opset allows, for the sake of older runtimes


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the graph.

    Attributes:
      name: of the tensor in the file.
      shape: of the array that it stands for.
      stored: of the tensor; 1 along the axes on which it repeats.
      fixed: whether it depends on constants alone.
      turned: the value that this one is with its axes in another order, and the order.
    """

    name: str
    shape: Shape
    stored: Shape
    dtype: np.dtype
    fixed: bool
    turned: tuple[Value, tuple[int, ...]] | None = None

    @property
    def uniform(self) -> bool:
        """Whether all entries are one."""
        return math.prod(self.stored) == 1


@dataclasses.dataclass
class Node:
    """An operator. Its attributes are numbers, texts, lists of these, or graphs."""

    op: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any]


@dataclasses.dataclass
class Graph:
    """Nodes in the order of their computation. ``inputs`` and ``outputs`` are tensors with their stored shapes.

    What the body of a loop computes without its own tensors stands before the loop.
    """

    nodes: list[Node] = dataclasses.field(default_factory=list)
    inputs: list[Value] = dataclasses.field(default_factory=list)
    outputs: list[Value] = dataclasses.field(default_factory=list)
    known: dict[Any, list[Value]] = dataclasses.field(default_factory=dict)  # results by operator and inputs
    is_loop: bool = False
    own: set[str] = dataclasses.field(default_factory=set)  # tensors that are new in it


class Builder:
    """Builds one ONNX model. Operators are added to the innermost open graph."""

    def __init__(self) -> None:
        self.constants: dict[str, np.ndarray] = {}
        self.main = Graph()
        self.fixed = Graph()  # what depends on constants alone, before everything else
        self._open = [self.fixed, self.main]
        self._by_content: dict[Any, str] = {}
        self._made: dict[str, tuple[str, list[Value | None]]] = {}
        self._number = 0

    def input(self, shape: Shape, dtype: DTypeLike, name: str | None = None) -> Value:
        """Add an input to the innermost open graph."""
        value = Value(name or self.new_name(), shape, shape, np.dtype(dtype), False)
        self._open[-1].inputs.append(value)
        self._open[-1].own.add(value.name)
        return value

    def outputs(self, values: Sequence[Value], names: Sequence[str] | None = None) -> None:
        """Make copies of ``values`` the outputs of the innermost open graph.

        Copies, because a branch can return neither its inputs nor tensors of the graph around it.
        """
        graph = self._open[-1]
        for i, value in enumerate(map(self.full, values)):
            out = dataclasses.replace(value, name=names[i] if names else self.new_name(), fixed=False, turned=None)
            graph.nodes.append(Node("Identity", [value.name], [out.name], {}))
            graph.outputs.append(out)

    @contextlib.contextmanager
    def inner_graph(self, *, is_loop: bool = False) -> Iterator[Graph]:
        """Open a graph for a branch or the body of a loop."""
        graph = Graph(is_loop=is_loop)
        self._open.append(graph)
        try:
            yield graph
        finally:
            self._open.pop()

    def constant(self, array: np.ndarray | np.generic, shape: Shape | None = None) -> Value:
        """Return a constant; ``array`` may have length 1 along axes on which it repeats to ``shape``."""
        array = np.asarray(array)
        shape = array.shape if shape is None else shape
        if array.size > 1 and (array == array.flat[0]).all():
            array = np.full((1,) * array.ndim, array.flat[0], array.dtype)
        return self._constant(array, shape)

    def exact_constant(self, array: np.ndarray) -> Value:
        """Return a constant that is stored with all its entries."""
        return self._constant(array, array.shape)

    def _constant(self, array: np.ndarray, shape: Shape) -> Value:
        data = np.ascontiguousarray(array).reshape(array.shape)
        key = (data.dtype.str, data.shape, hashlib.sha256(data.tobytes()).digest())
        if key not in self._by_content:
            self._by_content[key] = self.new_name()
            self.constants[self._by_content[key]] = data
        return Value(self._by_content[key], shape, data.shape, data.dtype, True)

    def ints(self, *values: int) -> Value:
        """Return constants int64 ``[n]``, as operators take shapes, axes and bounds."""
        return self._constant(np.array(values, np.int64), (len(values),))

    def known(self, value: Value) -> np.ndarray | None:
        """Return the stored entries of a short constant; None if they are many, or not known here."""
        array = self.constants.get(value.name)
        return array if array is not None and array.size <= _SHORT else None

    def add(
        self,
        op: str,
        inputs: Sequence[Value | None],
        shape: Shape,
        dtype: DTypeLike,
        stored: Shape | None = None,
        **attributes: Any,
    ) -> Value:
        """Add an operator with one output."""
        (value,) = self.add_several(op, inputs, [(shape, dtype)], [stored or shape], **attributes)
        return value

    def add_several(
        self,
        op: str,
        inputs: Sequence[Value | None],
        results: Sequence[tuple[Shape, DTypeLike]],
        stored: Sequence[Shape] | None = None,
        **attributes: Any,
    ) -> list[Value]:
        """Add an operator, unless an open graph has the same one already."""
        names = [value.name if value else "" for value in inputs]
        fixed = bool(inputs) and all(value is None or value.fixed for value in inputs)
        has_graph = any(isinstance(x, Graph) for x in attributes.values())
        fixed &= not has_graph
        key = (op, tuple(names), repr(sorted(attributes.items())), tuple(shape for shape, _ in results))
        for graph in self._open:
            if key in graph.known and not has_graph:
                return graph.known[key]
        values = [
            Value(self.new_name(), shape, inner, np.dtype(dtype), fixed)
            for (shape, dtype), inner in zip(results, stored or [shape for shape, _ in results], strict=True)
        ]
        graph = self.fixed if fixed else self._open[-1] if has_graph else self._place(names)
        graph.nodes.append(Node(op, names, [value.name for value in values], attributes))
        graph.own.update(value.name for value in values)
        graph.known[key] = values
        for value in values:
            self._made[value.name] = (op, list(inputs))
        return values

    def _place(self, names: Sequence[str]) -> Graph:
        """Return the graph to compute in from tensors: the innermost open one, or before the loop that it is."""
        at = len(self._open) - 1
        while self._open[at].is_loop and self._open[at].own.isdisjoint(names):
            at -= 1
        return self._open[at]

    def is_from_outside(self, value: Value) -> bool:
        """Return whether the innermost open graph is a loop, and ``value`` the same in all turns."""
        return self._open[-1].is_loop and self._place([value.name]) is not self._open[-1]

    def inputs_of(self, value: Value, op: str) -> list[Value | None] | None:
        """Return what an operator ``op`` made ``value`` from; None if another one did."""
        made, inputs = self._made.get(value.name, ("", []))
        return inputs if made == op else None

    def view(self, value: Value, shape: Shape, stored: Shape) -> Value:
        """Return the same entries in another shape; ``stored`` has as many as the tensor."""
        array = self.known(value)
        if array is not None:
            return self.constant(array.reshape(stored), shape)
        if stored == value.stored:
            return dataclasses.replace(value, shape=shape, turned=None)
        return self.add("Reshape", [value, self.ints(*stored)], shape, value.dtype, stored)

    def full(self, value: Value) -> Value:
        """Return the tensor with its repeated axes written out."""
        if value.stored == value.shape:
            return value
        return self.add("Expand", [value, self.ints(*value.shape)], value.shape, value.dtype)

    def reshape(self, value: Value, shape: Shape) -> Value:
        if shape == value.shape:
            return value
        if value.uniform:
            return self.view(value, shape, (1,) * len(shape))
        return self.view(self.full(value), shape, shape)

    def transpose(self, value: Value, order: Sequence[int]) -> Value:
        if value.turned is not None:
            source, before = value.turned
            return self.transpose(source, [before[i] for i in order])
        if list(order) == list(range(len(order))):
            return value
        shape, stored = (tuple(sides[i] for i in order) for sides in (value.shape, value.stored))
        if [i for i in order if value.stored[i] != 1] == [i for i, side in enumerate(value.stored) if side != 1]:
            return self.view(value, shape, stored)
        array = self.known(value)
        if array is not None:
            return self.constant(array.transpose(order), shape)
        turned = self.add("Transpose", [value], shape, value.dtype, stored, perm=list(order))
        return dataclasses.replace(turned, turned=(value, tuple(order)))

    def in_layout(self, value: Value, order: Sequence[int]) -> Value:
        """Return ``value``, of which what follows is rather computed with its axes in ``order``."""
        return dataclasses.replace(value, turned=(self.transpose(value, order), tuple(np.argsort(order).tolist())))

    def cast(self, value: Value, dtype: DTypeLike) -> Value:
        if value.dtype == np.dtype(dtype):
            return value
        if value.turned is not None:
            source, order = value.turned
            return self.transpose(self.cast(source, dtype), order)
        array = self.known(value)
        if array is not None:
            return self.constant(array.astype(dtype), value.shape)
        return self.add("Cast", [value], value.shape, dtype, value.stored, to=np.dtype(dtype))

    def elementwise(self, op: str, inputs: Sequence[Value], dtype: DTypeLike | None = None, **attributes: Any) -> Value:
        """Add an operator that broadcasts; ``dtype`` is the result's, where it is not the inputs'.

        Where inputs are transposed tensors, it works on what they were before: a transpose then wanders down to where
        the order of axes matters, and meets another one there or is never used.
        """
        untransposed = self._untransposed(inputs)
        if untransposed is not None:
            sources, order = untransposed
            return self.transpose(self.elementwise(op, sources, dtype, **attributes), order)
        stored = np.broadcast_shapes(*(value.stored for value in inputs))
        shape = np.broadcast_shapes(*(value.shape for value in inputs))
        return self.add(op, inputs, shape, dtype or inputs[0].dtype, stored, **attributes)

    def _untransposed(self, inputs: Sequence[Value]) -> tuple[list[Value], tuple[int, ...]] | None:
        """Return the inputs before the transpose that large ones share, and its order; None if there is no such one."""
        orders = {value.turned[1] for value in inputs if value.turned is not None}
        if len(orders) != 1:
            return None
        (order,) = orders
        most = max(math.prod(value.stored) for value in inputs if value.turned is not None)
        sources = []
        for value in inputs:
            if value.turned is not None:
                sources.append(value.turned[0])
            elif not value.shape:
                sources.append(value)
            elif len(value.shape) == len(order) and (value.fixed or _FEW * math.prod(value.stored) <= most):
                sources.append(self.transpose(value, np.argsort(order).tolist()))
            else:
                return None
        return sources, order

    def new_name(self) -> str:
        """Return a name that no tensor has."""
        self._number += 1
        return f"t{self._number}"

    def drop_unused(self) -> None:
        """Keep only the nodes that the outputs depend on."""
        fixed = {name for node in self.fixed.nodes for name in node.outputs}
        kept, _ = _used(self.fixed.nodes + self.main.nodes, {value.name for value in self.main.outputs})
        self.fixed.nodes = [node for node in kept if fixed.issuperset(node.outputs)]
        self.main.nodes = [node for node in kept if not fixed.issuperset(node.outputs)]

    def model(self, metadata: dict[str, str], producer: str) -> Any:
        """Return the model, an ``onnx.ModelProto``. Needs the package onnx."""
        nodes, needed = _used(self.fixed.nodes + self.main.nodes, {value.name for value in self.main.outputs})
        import onnx  # pyright: ignore[reportMissingImports]  # an extra

        graph = onnx.helper.make_graph(
            [_node(node) for node in nodes],
            "detector",
            [_info(value) for value in self.main.inputs],
            [_info(value) for value in self.main.outputs],
            [onnx.numpy_helper.from_array(x, name) for name, x in self.constants.items() if name in needed],
        )
        opset = onnx.helper.make_opsetid("", OPSET)
        model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=_IR_VERSION, producer_name=producer)
        onnx.helper.set_model_props(model, metadata)
        return model


Translation = Callable[[Builder, list[Value], Any, dict[str, Any]], list[Value]]
"""``translate(builder, inputs, out, params)`` adds what a primitive of jax computes, and returns its outputs, of which
``out`` are the abstract values."""


def _used(nodes: Sequence[Node], needed: set[str]) -> tuple[list[Node], set[str]]:
    """Return the nodes that ``needed`` tensors depend on, and all tensors that these nodes read."""
    needed, kept = set(needed), []
    for node in reversed(nodes):
        if needed.isdisjoint(node.outputs):
            continue
        attributes = dict(node.attributes)
        for name, graph in attributes.items():
            if isinstance(graph, Graph):
                inner, read = _used(graph.nodes, {value.name for value in graph.outputs})
                attributes[name] = Graph(inner, graph.inputs, graph.outputs)
                needed |= read
        needed.update(node.inputs)
        kept.append(Node(node.op, node.inputs, node.outputs, attributes))
    return kept[::-1], needed


def _node(node: Node) -> Any:
    import onnx  # pyright: ignore[reportMissingImports]

    attributes = {}
    for name, value in node.attributes.items():
        if isinstance(value, Graph):
            infos = [[_info(x) for x in values] for values in (value.inputs, value.outputs)]
            value = onnx.helper.make_graph([_node(inner) for inner in value.nodes], name, *infos)
        elif isinstance(value, np.dtype):
            value = onnx.helper.np_dtype_to_tensor_dtype(value)
        attributes[name] = value
    return onnx.helper.make_node(node.op, node.inputs, node.outputs, **attributes)


def _info(value: Value) -> Any:
    import onnx  # pyright: ignore[reportMissingImports]

    kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
    return onnx.helper.make_tensor_value_info(value.name, kind, value.stored)
