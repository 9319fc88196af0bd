"""Write a detector as one ONNX file that runs without jax; ``onnx_detector`` describes its inputs and outputs.

The detector is traced as it runs elsewhere, and ``onnx_operators`` writes each primitive of the trace in ONNX. The
rungs of the ladder become nested conditionals, so a runtime computes only the rung that fits.
Shape letters: B batch, H W image, D detections.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from querydet_jax.config import Config
from querydet_jax.inference.detector import Detector
from querydet_jax.inference.export.onnx_detector import FORMAT, METADATA, VERSION
from querydet_jax.inference.export.onnx_graph import Builder, Shape, Value
from querydet_jax.inference.export.onnx_int8 import Calibration, quantize
from querydet_jax.inference.export.onnx_operators import translate_closed
from querydet_jax.inference.export.writer import (
    Canvas,
    check_batch_sizes,
    check_kernel,
    check_once_each,
    description,
    file_to_write,
)
from querydet_jax.runtime.errors import DataError
from querydet_jax.runtime.stores import as_path

_FIELDS = ("boxes", "scores", "classes", "valid")


def write_onnx(
    path: str | Path,
    detector: Detector,
    config: Config,
    *,
    canvases: Sequence[Canvas],
    batch_sizes: Sequence[int],
    min_scores: np.ndarray | None = None,
    int8: Calibration | None = None,
) -> dict[str, Any]:
    """Translate a detector for every canvas and batch size, and write it with its weights, which are stored once.

    Args:
      path: the file, written atomically.
      detector: weights and inference settings.
      config: name, classes and resize rule for the metadata.
      canvases: (height, width) of the inputs.
      batch_sizes: images per call.
      min_scores: for the metadata, the score from which a detection of each class counts, ``[K]``; the graph does not
        use it.
      int8: what ``onnx_calibration.calibrate`` returns, for layers in int8; None: all in float32.

    Returns:
      The manifest.

    Raises:
      ConfigError: canvases or batch sizes are empty, repeat a value, a batch size is invalid, or the kernel is for
        TPUs.
      DataError: onnx is not installed, the detector uses a primitive that has no translation, or the file cannot be
        written.
    """
    check_onnx()
    check_once_each(canvases=canvases, batch_sizes=batch_sizes)
    check_batch_sizes(batch_sizes)
    check_kernel(detector.config, ["ONNX"], "")
    manifest = {
        "format": FORMAT,
        "format_version": VERSION,
        "made_with": {name: metadata.version(name) for name in ("jax", "onnx")},
        **description(detector, config, canvases, batch_sizes, min_scores),
        "precision": "float32" if int8 is None else "int8",
        **({} if int8 is None else {"calibration": {"images": int8.images, "source": int8.source}}),
    }
    builder = Builder()
    _add_programs(builder, detector, [(batch, *canvas) for canvas in canvases for batch in batch_sizes])
    if int8 is not None:
        quantize(builder, int8.ranges)
    model = builder.model({METADATA: json.dumps(manifest, allow_nan=False)}, "querydet_jax")
    with file_to_write(as_path(path), "detector.onnx") as aside:
        aside.write_bytes(model.SerializeToString(deterministic=True))
    return manifest


def check_onnx() -> None:
    """Raise DataError if the package onnx is missing."""
    if importlib.util.find_spec("onnx") is None:
        raise DataError("writing ONNX needs the package onnx; pip install -r requirements-onnx.txt")


def _add_programs(builder: Builder, detector: Detector, shapes: Sequence[tuple[int, int, int]]) -> None:
    """Add inputs, one program per shape (B, H, W) and outputs."""
    if len(shapes) == 1:
        ((batch, height, width),) = shapes
        images = builder.input((batch, height, width, 3), np.uint8, "images")
        results = add_program(builder, detector, images, builder.input((batch, 2), np.int32, "sizes"))
    else:
        # Their sizes have names: the graph looks at the shape of its input, and runs the program for it.
        images = builder.input(("batch", "height", "width", 3), np.uint8, "images")
        sizes = builder.input(("batch", 2), np.int32, "sizes")
        shape = builder.add("Shape", [images], (4,), np.int64)
        results = _chosen_program(builder, detector, images, sizes, shape, shapes)
    builder.outputs(list(results.values()), list(results))


def _chosen_program(
    builder: Builder,
    detector: Detector,
    images: Value,
    sizes: Value,
    shape: Value,
    shapes: Sequence[tuple[int, int, int]],
) -> dict[str, Value]:
    """Run the first program if the images have the first shape, else one of the others."""
    batch, height, width = shapes[0]
    same = builder.elementwise("Equal", [shape, builder.ints(batch, height, width, 3)], bool)
    least = builder.add("ReduceMin", [builder.cast(same, np.int32), builder.ints(0)], (), np.int32, keepdims=0)
    with builder.inner_graph() as then:
        results = _program_of_shape(builder, detector, images, sizes, shapes[0])
        builder.outputs(list(results.values()))
    with builder.inner_graph() as otherwise:
        others = (
            _program_of_shape(builder, detector, images, sizes, shapes[1])
            if len(shapes) == 2
            else _chosen_program(builder, detector, images, sizes, shape, shapes[1:])
        )
        builder.outputs(list(others.values()))
    kinds = [(_any_batch(name, value.shape), value.dtype) for name, value in results.items()]
    condition = builder.cast(least, bool)
    chosen = builder.add_several("If", [condition], kinds, then_branch=then, else_branch=otherwise)
    return dict(zip(results, chosen, strict=True))


def _any_batch(name: str, shape: Shape) -> Shape:
    return ("batch", *shape[1:]) if name in _FIELDS else shape


def _program_of_shape(
    builder: Builder, detector: Detector, images: Value, sizes: Value, shape: tuple[int, int, int]
) -> dict[str, Value]:
    wanted, pairs = (*shape, 3), (shape[0], 2)
    images = builder.add("Reshape", [images, builder.ints(*wanted)], wanted, np.uint8)
    return add_program(
        builder, detector, images, builder.add("Reshape", [sizes, builder.ints(*pairs)], pairs, np.int32)
    )


def add_program(
    builder: Builder, detector: Detector, images: Value, sizes: Value, threshold: Value | None = None
) -> dict[str, Value]:
    """Add what the detector computes from images ``[B, H, W, 3]``; return its outputs by name.

    Args:
      threshold: the query threshold, float32 ``[]``, in place of the configuration's. The outputs then also are the
        maps ``[B, h, w]`` of ``QueryTrace``: ``maps.4.probability``, ``maps.3.keys``, ``maps.3.active``, and so on.
    """
    function: Callable[..., Any]
    function, state = detector.function() if threshold is None else detector.traced_function()
    names: list[str] = []

    def flat(*arguments: Any) -> list[Array]:
        returned = function(*arguments)
        found, maps = (returned, None) if threshold is None else returned
        results = {name: getattr(found, name) for name in _FIELDS}
        for level, counts in sorted(found.stats.items()):
            results.update({f"stats.{level}.{name}": count for name, count in counts._asdict().items()})
        for name, levels in ({} if maps is None else maps._asdict()).items():
            results.update({f"maps.{level}.{name}": levels[level] for level in sorted(levels)})
        names[:] = results
        return list(results.values())

    inputs = [images, sizes] if threshold is None else [images, sizes, threshold]
    results = add_function(builder, flat, state, inputs)
    return dict(zip(names, results, strict=True))


def add_function(builder: Builder, function: Callable[..., Any], state: Any, inputs: Sequence[Value]) -> list[Value]:
    """Add ``function(state, images [B, H, W, 3], ...)``; return the arrays of its result, flattened."""
    parameters, tree = jax.tree.flatten(state)

    def flat(parameters: list[Array], *inputs: Array) -> list[Array]:
        return jax.tree.leaves(function(tree.unflatten(parameters), *inputs))

    images, *others = inputs
    # Convolutions of ONNX read [B, C, H, W].
    inputs = [builder.in_layout(images, (0, 3, 1, 2)), *others]
    traced = jax.make_jaxpr(flat)(parameters, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs))
    weights = [builder.constant(np.asarray(x)) for x in parameters]
    return translate_closed(builder, traced, [*weights, *inputs])
