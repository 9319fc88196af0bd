"""Convolutions in int8 for ONNX: uint8 inputs, int8 weights, ranges measured on pictures.

``measured_ranges`` runs the detector's float32 graph on pictures and keeps what enters and leaves each layer.
``quantize`` rewrites a graph under construction: a layer reads and writes uint8 tensors between ``QuantizeLinear`` and
``DequantizeLinear``, which runtimes fuse with it, and what merely moves entries (gathers, masks, padding) moves bytes.
A layer goes by its weights, so one range serves it in every graph and rung: computed densely, on sites or on tiles.

The first layer, which reads pixels, and layers that no other layer reads (scores, boxes, queries) stay in float32, as
do decoding and NMS. Shape letters: B batch, H W image, O output channels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from querydet_jax.inference.export.onnx_graph import Builder, Graph, Node, Value
from querydet_jax.inference.pipeline import split_for_inference
from querydet_jax.models.base import DenseDetector
from querydet_jax.runtime.errors import ConfigError, DataError

_FROM_PIXELS = 4  # channels up to which a layer's input counts as pixels
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
    """What enters a layer, and what leaves it after bias and activation."""

    enters: Range
    leaves: Range


@dataclasses.dataclass
class _Layer:
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


class _Network:
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

    def layers(self) -> list[_Layer]:
        found = (self._layer(node) for graph in _with_inner(self.builder.main) for node in graph.nodes)
        return [layer for layer in found if layer is not None]

    def _layer(self, node: Node) -> _Layer | None:
        kernel = self.constant(node.inputs[1]) if node.op in ("Conv", "MatMul") else None
        if kernel is None or kernel.dtype != np.float32 or kernel.ndim != (4 if node.op == "Conv" else 2):
            return None
        rows = kernel if node.op == "MatMul" else kernel.transpose(2, 3, 1, 0).reshape(-1, len(kernel))
        key = hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest()
        channels = rows.shape[-1]
        factor, bias, absorbed, (output,) = np.ones(channels, np.float32), np.zeros(channels, np.float32), [], node.outputs
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
        return _Layer(node, key, kernel, bias, activation, absorbed, output)

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
        constants = [self.builder.constants[name] for name in node.inputs[_MOVES[node.op]] if name in self.builder.constants]
        return not any(array.any() for array in constants)


def _with_inner(graph: Graph) -> Iterator[Graph]:
    yield graph
    for node in graph.nodes:
        for value in node.attributes.values():
            if isinstance(value, Graph):
                yield from _with_inner(value)


# Ranges --------------------------------------------------------------------------------------------------------------

Translate = Callable[[Builder, Callable[..., Any], Any, list[Value]], list[Value]]
"""``onnx_writer.add_function``."""


def measured_ranges(
    model: DenseDetector, batches: Iterable[Mapping[str, np.ndarray]], translate: Translate
) -> dict[str, LayerRanges]:
    """Return each layer's ranges, by ``_Layer.key``: the means over pictures of their least and largest values.

    Layers that share a tensor share its range.

    Args:
      batches: one picture each: uint8 ``images [1, H, W, 3]``, int32 ``sizes [1, 2]``.

    Raises:
      ConfigError: there is no picture.
      DataError: onnxruntime is missing.
    """
    graph, state = split_for_inference(model)

    def forward(state: Any, images: jax.Array, sizes: jax.Array) -> Any:
        return nnx.merge(graph, state)(images, sizes)

    ranges: list[np.ndarray] = []
    programs: dict[tuple[int, ...], tuple[list[_Layer], _Network, Any]] = {}
    for batch in batches:
        images, sizes = batch["images"], batch["sizes"]
        if images.shape not in programs:
            programs[images.shape] = _measuring_program(forward, state, images.shape, translate)
        *_, session = programs[images.shape]
        ranges.append(np.array(session.run(None, {"images": images, "sizes": sizes}), np.float64).reshape(-1, 2))
    if not ranges:
        raise ConfigError("calibration: there is no picture; name pictures, or a folder of them")
    layers, network, _ = next(iter(programs.values()))
    return _shared(network, layers, np.mean(ranges, axis=0).reshape(-1, 2, 2))


def _measuring_program(
    forward: Callable[..., Any], state: Any, shape: tuple[int, ...], translate: Translate
) -> tuple[list[_Layer], _Network, Any]:
    builder = Builder()
    images = builder.input(shape, np.uint8, "images")
    sizes = builder.input((shape[0], 2), np.int32, "sizes")
    builder.outputs(translate(builder, forward, state, [images, sizes]))
    network = _Network(builder)
    layers = network.layers()
    read = {source: layer for layer in layers for source in network.sources(layer.node.inputs[0])}
    layers = [layer for layer in layers if _is_quantized(network, layer, read)]
    builder.main.outputs, outputs = [], []
    for layer in layers:
        for name in (layer.node.inputs[0], layer.output):
            for op in ("ReduceMin", "ReduceMax"):
                value = Value(f"{op}.{len(outputs)}", (), (), np.dtype(np.float32), False)
                builder.main.nodes.append(Node(op, [name], [value.name], {"keepdims": 0}))
                outputs.append(value)
    builder.outputs(outputs)
    return layers, network, _session(builder.model({}, "querydet_jax").SerializeToString())


def _is_quantized(network: _Network, layer: _Layer, read: Mapping[str, _Layer]) -> bool:
    """Return whether a layer reads no pixels, and another layer depends on it."""
    channels = layer.kernel.shape[1] if layer.node.op == "Conv" else layer.kernel.shape[0]
    if channels <= _FROM_PIXELS and layer.node.attributes.get("group", 1) == 1:
        return False
    seen, following = set(), [layer.output]
    while following:
        name = following.pop()
        if name in read:
            return True
        if name not in seen:
            seen.add(name)
            following += [out for node in network.readers.get(name, []) for out in node.outputs]
    return False


def _shared(network: _Network, layers: list[_Layer], ranges: np.ndarray) -> dict[str, LayerRanges]:
    """Join the ranges of tensors that are the same one.

    Args:
      ranges: ``[layers, 2, 2]``: of input and output, least and largest.
    """
    group: dict[str, str] = {}

    def root(name: str) -> str:
        while name in group:
            name = group[name]
        return name

    def join(a: str, b: str) -> None:
        if root(a) != root(b):
            group[root(a)] = root(b)

    for layer in layers:
        join(f"in {layer.key}", f"in {layer.key}")
        join(f"out {layer.key}", layer.output)  # a layer that is called several times has one range
        for source in network.sources(layer.node.inputs[0]):
            join(f"in {layer.key}", source)
    bounds: dict[str, Range] = {}
    for layer, pair in zip(layers, ranges.tolist(), strict=True):
        for end, (low, high) in zip(("in", "out"), pair, strict=True):
            name = root(f"{end} {layer.key}")
            before = bounds.get(name, Range(0.0, 0.0))
            bounds[name] = Range(min(before.low, low), max(before.high, high))
    return {
        layer.key: LayerRanges(*(bounds[root(f"{end} {layer.key}")] for end in ("in", "out"))) for layer in layers
    }


def _session(model: bytes) -> Any:
    if importlib.util.find_spec("onnxruntime") is None:
        raise DataError("measuring ranges needs the package onnxruntime; pip install -r requirements-onnx.txt")
    runtime: Any = importlib.import_module("onnxruntime")
    return runtime.InferenceSession(model, providers=["CPUExecutionProvider"])


# Rewriting -----------------------------------------------------------------------------------------------------------


def quantize(builder: Builder, ranges: Mapping[str, LayerRanges]) -> int:
    """Rewrite the graphs of ``builder``, in place, so that layers with ranges run in int8; return their number."""
    network = _Network(builder)
    layers = [layer for layer in network.layers() if layer.key in ranges]
    _Rewriting(network, layers, ranges).run()
    return len(layers)


class _Rewriting:
    def __init__(self, network: _Network, layers: list[_Layer], ranges: Mapping[str, LayerRanges]) -> None:
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

    def _quantized(self, layer: _Layer, x: str, values: Range) -> list[Node]:
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
