"""Convolutions of an ONNX graph in int8: uint8 inputs, int8 weights, bytes between them.

``quantize`` rewrites a graph under construction: a layer reads and writes uint8 tensors between ``QuantizeLinear`` and
``DequantizeLinear``, which runtimes fuse with it, and what merely moves entries (gathers, masks, padding) moves bytes.
A layer goes by its weights, so the ranges that ``onnx_calibration`` has measured once serve it in every graph and rung:
computed densely, on sites or on tiles. Shape letters: O output channels.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from querydet_jax.inference.export.onnx_graph import Builder, Graph, Node

# Operators that move entries, and the inputs whose entries they move.
_MOVES: dict[str, slice] = {
    **dict.fromkeys(("Expand", "Gather", "Identity", "Reshape", "Resize", "Slice", "Tile", "Transpose"), slice(1)),
    "Concat": slice(None),
    "Pad": slice(0, 3, 2),
    "Where": slice(1, 3),
}


class Range(NamedTuple):
    """Least and largest value, in float32, of what uint8 tensors stand for; 0 lies between."""

    low: float
    high: float

    @property
    def scale(self) -> np.ndarray:
        # Rounded down, so that 255 stays within a bound such as ReLU6's, and runtimes drop the clipping before.
        return np.nextafter(np.float32(max(self.high - self.low, 1e-6) / 255), np.float32(0))

    @property
    def zero(self) -> np.ndarray:
        return np.clip(np.rint(-self.low / self.scale), 0, 255).astype(np.uint8)


class LayerRanges(NamedTuple):
    """Of what enters a layer, and of what leaves it after bias and activation."""

    enters: Range
    leaves: Range


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What a file in int8 is made with.

    Attributes:
      ranges: by ``Layer.key``.
      images: number of pictures on which they were measured.
      source: where the pictures came from.
    """

    ranges: Mapping[str, LayerRanges]
    images: int
    source: str


@dataclasses.dataclass
class Layer:
    """A convolution or matrix product with constant weights, and what follows it until ``output``.

    Attributes:
      key: hash of the weights, whatever their order of axes.
      kernel: as the node reads it, with the factors that follow.
      bias: float32 ``[O]``.
      activation: Relu or Clip, if one follows.
      absorbed: the factors and biases.
    """

    node: Node
    key: str
    kernel: np.ndarray
    bias: np.ndarray
    activation: Node | None
    absorbed: list[Node]
    output: str

    @property
    def axis(self) -> int:
        """The kernel's axis of output channels."""
        return 0 if self.node.op == "Conv" else 1


class Network:
    """Where each tensor of a graph comes from, and who reads it. Names are unique across inner graphs."""

    def __init__(self, builder: Builder) -> None:
        builder.drop_unused()
        self.builder = builder
        self.made: dict[str, Node] = {}
        self.readers: dict[str, list[Node]] = {}
        self.home: dict[str, Graph] = {}  # of tensors
        for graph in (builder.fixed, *_with_inner(builder.main)):
            self.home.update({value.name: graph for value in graph.inputs})
            for node in graph.nodes:
                self.made.update(dict.fromkeys(node.outputs, node))
                self.home.update(dict.fromkeys(node.outputs, graph))
                for name in node.inputs:
                    self.readers.setdefault(name, []).append(node)
        self._fixed = {name for node in builder.fixed.nodes for name in node.outputs}

    def constant(self, name: str) -> np.ndarray | None:
        """Return what is known when the file is written; large weights are rearranged when it is loaded."""
        node = self.made.get(name)
        if node is None:
            return self.builder.constants.get(name)
        if name not in self._fixed or node.op not in ("Reshape", "Transpose"):
            return None
        source = self.constant(node.inputs[0])
        if source is None:
            return None
        if node.op == "Transpose":
            return source.transpose(node.attributes["perm"])
        shape = self.constant(node.inputs[1])
        return None if shape is None else source.reshape(shape)

    def layers(self) -> list[Layer]:
        found = (self._layer(node) for graph in _with_inner(self.builder.main) for node in graph.nodes)
        return [layer for layer in found if layer is not None]

    def _layer(self, node: Node) -> Layer | None:
        kernel = self.constant(node.inputs[1]) if node.op in ("Conv", "MatMul") else None
        if kernel is None or kernel.dtype != np.float32 or kernel.ndim != (4 if node.op == "Conv" else 2):
            return None
        rows = kernel if node.op == "MatMul" else kernel.transpose(2, 3, 1, 0).reshape(-1, len(kernel))
        key = hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest()
        channels = rows.shape[-1]
        factor, bias = np.ones(channels, np.float32), np.zeros(channels, np.float32)
        absorbed, output = [], node.outputs[0]
        while (following := self._only_reader(output)) is not None and following.op in ("Add", "Mul"):
            (other,) = [name for name in following.inputs if name != output] or [output]
            array = self.constant(other)
            if array is None or array.size not in (1, channels):
                break
            if following.op == "Mul":
                factor, bias = factor * array.reshape(-1), bias * array.reshape(-1)
            else:
                bias = bias + array.reshape(-1)
            absorbed.append(following)
            (output,) = following.outputs
        activation = following if following is not None and following.op in ("Relu", "Clip") else None
        if activation is not None:
            (output,) = activation.outputs
        kernel = kernel * (factor.reshape(-1, 1, 1, 1) if node.op == "Conv" else factor)
        return Layer(node, key, kernel, bias, activation, absorbed, output)

    def _only_reader(self, name: str) -> Node | None:
        readers = self.readers.get(name, [])
        same = len(readers) == 1 and self.home[readers[0].outputs[0]] is self.home[name]
        return readers[0] if same else None

    def sources(self, name: str) -> Iterator[str]:
        """Yield the tensors whose entries ``name`` holds."""
        node = self.made.get(name)
        if node is None or not self.moves_entries(node):
            yield from () if name in self.builder.constants else (name,)
            return
        for moved in node.inputs[_MOVES[node.op]]:
            yield from self.sources(moved)

    def moves_entries(self, node: Node) -> bool:
        """Return whether the result holds entries of the inputs, and zeros, alone."""
        if node.op not in _MOVES or (node.op == "Resize" and node.attributes.get("mode", "nearest") != "nearest"):
            return False
        constants = [
            self.builder.constants[name] for name in node.inputs[_MOVES[node.op]] if name in self.builder.constants
        ]
        return not any(array.any() for array in constants)


def _with_inner(graph: Graph) -> Iterator[Graph]:
    yield graph
    for node in graph.nodes:
        for value in node.attributes.values():
            if isinstance(value, Graph):
                yield from _with_inner(value)


def quantize(builder: Builder, ranges: Mapping[str, LayerRanges]) -> int:
    """Rewrite the graphs of ``builder``, in place, so that layers with ranges run in int8; return their number."""
    network = Network(builder)
    layers = [layer for layer in network.layers() if layer.key in ranges]
    _Rewriting(network, layers, ranges).run()
    return len(layers)


class _Rewriting:
    def __init__(self, network: Network, layers: list[Layer], ranges: Mapping[str, LayerRanges]) -> None:
        self._network, self._builder, self._ranges = network, network.builder, ranges
        self._layers = {id(layer.node): layer for layer in layers}
        self._absorbed = {id(node) for layer in layers for node in layer.absorbed}
        self._twins: dict[tuple[str, Range], str] = {}
        self._stands_for: dict[str, tuple[str, Range]] = {}  # uint8 tensor that a float32 one is read from
        self._after: dict[str, list[Node]] = {}  # nodes behind the one that makes a tensor
        self._first: dict[int, list[Node]] = {}  # nodes at the beginning of a graph
        self._plain: set[int] = set()  # nodes that read what they name

    def run(self) -> None:
        for layer in self._layers.values():
            self._twin(layer.node.inputs[0], self._ranges[layer.key].enters)
        for layer in self._layers.values():
            if layer.output not in self._stands_for:
                self._twin(layer.output, self._ranges[layer.key].leaves)
        self._follow_moves(self._builder.main)
        self._emit(self._builder.main)

    def _follow_moves(self, graph: Graph) -> None:
        """Move bytes also where float32 is read in the end, so that inner graphs find bytes.

        ONNX Runtime pushes ``DequantizeLinear`` behind such operators by itself, and stumbles where an inner graph
        reads their results.
        """
        for node in graph.nodes:
            moved = node.inputs[_MOVES[node.op]] if self._network.moves_entries(node) else []
            ranges = {self._stands_for[name][1] for name in moved if name in self._stands_for}
            known = all(name in self._stands_for or name in self._builder.constants for name in moved)
            if known and len(ranges) == 1 and node.outputs[0] not in self._stands_for:
                self._twin(node.outputs[0], ranges.pop())
            for inner in node.attributes.values():
                if isinstance(inner, Graph):
                    self._follow_moves(inner)

    def _twin(self, name: str, values: Range) -> str:
        """Return the uint8 tensor with the entries of ``name``."""
        if (name, values) in self._twins:
            return self._twins[name, values]
        node, array = self._network.made.get(name), self._builder.constants.get(name)
        if array is not None:
            entries = np.clip(np.rint(array / values.scale) + float(values.zero), 0, 255).astype(np.uint8)
            twin = self._builder.exact_constant(entries).name
        elif name in self._stands_for:
            twin = self._requantized(name, values)
        elif node is not None and self._network.moves_entries(node):
            twin = self._moved(node, values)
        elif node is not None and node.op == "Loop" and node.outputs.index(name) >= len(node.inputs) - 2:
            twin = self._from_loop(node, name, values)
        else:
            twin = self._builder.new_name()
            self._add_behind(name, Node("QuantizeLinear", [name, *self._parameters(values)], [twin], {}))
        self._twins[name, values] = twin
        if array is None and self._network.home[name] is not self._builder.fixed:
            self._stands_for.setdefault(name, (twin, values))
        return twin

    def _moved(self, node: Node, values: Range) -> str:
        inputs = list(node.inputs)
        for i in range(len(inputs))[_MOVES[node.op]]:
            inputs[i] = self._twin(inputs[i], values)
        (name,) = node.outputs
        twin = self._builder.new_name()
        if self._network.home[name] is self._builder.fixed:
            self._builder.fixed.nodes.append(Node(node.op, inputs, [twin], node.attributes))
        else:
            self._add_behind(name, Node(node.op, inputs, [twin], node.attributes))
        return twin

    def _from_loop(self, loop: Node, name: str, values: Range) -> str:
        """Let a loop join bytes."""
        body, k = loop.attributes["body"], loop.outputs.index(name)
        out = body.outputs[1 + k]
        copy = self._network.made[out.name]
        copy.inputs = [self._twin(copy.inputs[0], values)]
        self._plain.add(id(copy))
        body.outputs[1 + k] = dataclasses.replace(out, dtype=np.dtype(np.uint8))
        twin = loop.outputs[k] = self._builder.new_name()
        # Names of tensors are looked up by the nodes that make them.
        self._network.made[twin] = loop
        self._network.home[twin] = self._network.home[name]
        return twin

    def _requantized(self, name: str, values: Range) -> str:
        source, range_of_source = self._stands_for[name]
        between, twin = self._builder.new_name(), self._builder.new_name()
        self._add_behind(source, Node("DequantizeLinear", [source, *self._parameters(range_of_source)], [between], {}))
        self._add_behind(source, Node("QuantizeLinear", [between, *self._parameters(values)], [twin], {}))
        return twin

    def _add_behind(self, name: str, node: Node) -> None:
        """Place ``node`` behind the one that makes the tensor ``name``, in the same graph."""
        self._plain.add(id(node))
        home = self._network.home[name]
        self._network.home[node.outputs[0]] = home
        if name in self._network.made:
            self._network.made[node.outputs[0]] = node
            self._after.setdefault(name, []).append(node)
        else:
            self._first.setdefault(id(home), []).append(node)

    def _parameters(self, values: Range) -> list[str]:
        return [self._builder.exact_constant(np.asarray(x)).name for x in (values.scale, values.zero)]

    def _emit(self, graph: Graph) -> None:
        nodes: list[Node] = []
        floats: dict[str, str] = {}  # by uint8 tensor, in this graph, because runtimes fuse within one

        def as_float(name: str, values: Range) -> str:
            if name not in floats:
                floats[name] = self._builder.new_name()
                nodes.append(Node("DequantizeLinear", [name, *self._parameters(values)], [floats[name]], {}))
            return floats[name]

        def add(node: Node) -> None:
            nodes.append(node)
            for name in node.outputs:
                for following in self._after.get(name, []):
                    add(following)

        for node in self._first.get(id(graph), []):
            add(node)
        for node in graph.nodes:
            if id(node) in self._absorbed:
                continue
            for inner in node.attributes.values():
                if isinstance(inner, Graph):
                    self._emit(inner)
            layer = self._layers.get(id(node))
            if layer is not None:
                values = self._ranges[layer.key].enters
                x = as_float(self._twins[node.inputs[0], values], values)
                for new in self._quantized(layer, x, values):
                    add(new)
                continue
            if id(node) not in self._plain:
                node.inputs = [
                    as_float(*self._stands_for[name]) if name in self._stands_for else name for name in node.inputs
                ]
            add(node)
        graph.nodes[:] = nodes

    def _quantized(self, layer: Layer, x: str, values: Range) -> list[Node]:
        """Return the layer's nodes up to its activation, which follows as it is."""
        b, new = self._builder, self._builder.new_name
        axes = tuple(i for i in range(layer.kernel.ndim) if i != layer.axis)
        scales = np.maximum(np.abs(layer.kernel).max(axis=axes), 1e-12) / np.float32(127)
        shape = [-1 if i == layer.axis else 1 for i in range(layer.kernel.ndim)]
        kernel = b.exact_constant(np.rint(layer.kernel / scales.reshape(shape)).astype(np.int8))
        zeros = b.exact_constant(np.zeros(len(scales), np.int8))
        weights = new()
        nodes = [
            Node(
                "DequantizeLinear",
                [kernel.name, b.exact_constant(scales).name, zeros.name],
                [weights],
                {"axis": layer.axis},
            )
        ]
        # Integers beside the products, so that dense and sparse layers add the same bias.
        of_bias = (scales * values.scale).astype(np.float32)
        limit = 2**31 - 1
        bias = np.clip(np.rint(layer.bias.astype(np.float64) / of_bias), -limit, limit).astype(np.int32)
        out = layer.output if layer.activation is None else layer.activation.inputs[0]
        if layer.node.op == "Conv":
            stored, read = b.exact_constant(bias), new()
            none = b.exact_constant(np.zeros(len(scales), np.int32))
            inputs = [stored.name, b.exact_constant(of_bias).name, none.name]
            nodes.append(Node("DequantizeLinear", inputs, [read], {"axis": 0}))
            nodes.append(Node("Conv", [x, weights, read], [out], layer.node.attributes))
        else:
            product = new()
            nodes.append(Node("MatMul", [x, weights], [product], {}))
            nodes.append(Node("Add", [product, b.exact_constant((bias * of_bias).astype(np.float32)).name], [out], {}))
        return nodes
