"""Measure on pictures what enters and leaves each layer of a detector, for a file in int8.

The model's float32 graph runs in ONNX Runtime with all heads on all of their levels, whatever inference computes.
Left in float32: the first layer, which reads pixels, and layers that no other layer depends on (scores, boxes,
queries), as well as what the heads' outputs become. Shape letters: B batch, H W image, L layers.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from querydet_jax.config import DataConfig
from querydet_jax.data import Dataset, eval_batches
from querydet_jax.inference.export.onnx_graph import Builder, Node, Value
from querydet_jax.inference.export.onnx_int8 import Calibration, Layer, LayerRanges, Network, Range
from querydet_jax.inference.export.onnx_writer import add_function, check_onnx
from querydet_jax.inference.pipeline import split_for_inference
from querydet_jax.models.base import DenseDetector
from querydet_jax.runtime.errors import ConfigError, DataError

_FROM_PIXELS = 4  # channels up to which a layer's input counts as pixels


def calibrate(model: DenseDetector, dataset: Dataset, data: DataConfig, *, images: int, source: str) -> Calibration:
    """Measure the ranges of a model's layers: the means over pictures of the least and the largest value.

    Layers that share a tensor share its range.

    Args:
      model: the detector, in float32.
      dataset: the pictures; of more than ``images``, some that are spread evenly.
      data: resize rule and canvases.
      images: number of pictures.
      source: where they come from, for the file's metadata.

    Raises:
      ConfigError: there is no picture, or the model computes in another type.
      DataError: onnx or onnxruntime is missing; a picture cannot be read, or fits no canvas.
    """
    check_onnx()
    if importlib.util.find_spec("onnxruntime") is None:
        raise DataError("calibration needs the package onnxruntime; pip install -r requirements-onnx.txt")
    if model.dtype != np.float32:
        raise ConfigError(f"model.dtype {model.dtype}: int8 is made from float32; add --model.dtype float32")
    if not len(dataset):
        raise ConfigError(f"{source}: holds no picture to calibrate with; name others")
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(images, len(dataset))).astype(int)).tolist()
    programs: dict[tuple[int, ...], _Program] = {}
    measured: list[np.ndarray] = []
    for batch in eval_batches(dataset, data, batch_size=1, indices=chosen):
        shape = batch["images"].shape
        if shape not in programs:
            programs[shape] = _measuring_program(model, shape)
        measured.append(programs[shape].run(batch["images"], batch["sizes"]))
    program = next(iter(programs.values()))
    return Calibration(_joined(program, np.mean(measured, axis=0)), len(measured), source)


class _Program(NamedTuple):
    network: Network
    layers: list[Layer]
    session: Any

    def run(self, images: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Return ``[L, 2, 2]``: of input and output, least and largest value."""
        values = self.session.run(None, {"images": images, "sizes": sizes.astype(np.int32)})
        return np.array(values, np.float64).reshape(-1, 2, 2)


def _measuring_program(model: DenseDetector, shape: tuple[int, ...]) -> _Program:
    graph, state = split_for_inference(model)

    def forward(state: Any, images: jax.Array, sizes: jax.Array) -> Any:
        return nnx.merge(graph, state)(images, sizes)

    builder = Builder()
    inputs = [builder.input(shape, np.uint8, "images"), builder.input((shape[0], 2), np.int32, "sizes")]
    builder.outputs(add_function(builder, forward, state, inputs))
    network = Network(builder)
    layers = network.layers()
    read = {source for layer in layers for source in network.sources(layer.node.inputs[0])}
    layers = [layer for layer in layers if not _reads_pixels(layer) and _leads_to(network, layer.output, read)]
    builder.main.outputs, extremes = [], []
    for name in (name for layer in layers for name in (layer.node.inputs[0], layer.output)):
        for op in ("ReduceMin", "ReduceMax"):
            extremes.append(Value(builder.new_name(), (), (), np.dtype(np.float32), False))
            builder.main.nodes.append(Node(op, [name], [extremes[-1].name], {"keepdims": 0}))
    builder.outputs(extremes)
    runtime: Any = importlib.import_module("onnxruntime")
    stored = builder.model({}, "querydet_jax").SerializeToString()
    return _Program(network, layers, runtime.InferenceSession(stored, providers=["CPUExecutionProvider"]))


def _reads_pixels(layer: Layer) -> bool:
    return layer.kernel.shape[1 - layer.axis] <= _FROM_PIXELS and layer.node.attributes.get("group", 1) == 1


def _leads_to(network: Network, name: str, targets: set[str]) -> bool:
    """Return whether a tensor is among the targets, or one of these depends on it."""
    seen, following = set(), [name]
    while following:
        name = following.pop()
        if name in targets:
            return True
        if name not in seen:
            seen.add(name)
            following += [out for node in network.readers.get(name, []) for out in node.outputs]
    return False


def _joined(program: _Program, ranges: np.ndarray) -> Mapping[str, LayerRanges]:
    """Return the ranges ``[L, 2, 2]`` by ``Layer.key``; what is one tensor, or follows one another, shares one."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while name in parent:
            name = parent[name]
        return name

    def join(a: str, b: str) -> None:
        if root(a) != root(b):
            parent[root(a)] = root(b)

    for layer in program.layers:
        join(f"leaves {layer.key}", layer.output)  # a layer that is called for several levels has one range
        for source in program.network.sources(layer.node.inputs[0]):
            join(f"enters {layer.key}", source)
    bounds: dict[str, Range] = {}
    for layer, pair in zip(program.layers, ranges.tolist(), strict=True):
        for field, (low, high) in zip(LayerRanges._fields, pair, strict=True):
            name = root(f"{field} {layer.key}")
            before = bounds.get(name, Range(0.0, 0.0))
            bounds[name] = Range(min(before.low, low), max(before.high, high))
    return {
        layer.key: LayerRanges(*(bounds[root(f"{field} {layer.key}")] for field in LayerRanges._fields))
        for layer in program.layers
    }
