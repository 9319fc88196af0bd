"""The compiled function from images to detections: checks of what enters, one set of programs per input shape.

What the programs compute is in ``pipeline``. Shape letters: B batch, H W image, D detections.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import Array

from querydet_jax.config import InferenceConfig
from querydet_jax.config.rules import check_fused
from querydet_jax.inference import compiling, pipeline
from querydet_jax.inference.pipeline import Detections, QueryTrace
from querydet_jax.models.base import DenseDetector
from querydet_jax.models.candidates import Candidates
from querydet_jax.runtime.errors import ConfigError, DataError

PyTree = Any


class Detector:
    """Image to detections, compiled once per input shape.

    ``config.query`` chooses how the fine levels are computed: ``dense`` runs the heads on every
    level everywhere (the query head not at all); ``csq`` runs them densely from
    ``config.start_level`` up and, below it, only around queries (paper section 3.3); ``cq`` and
    ``ccq`` are the paper's other two ways to read the same keys (Table 5).

    Args:
      model: a detector of ``querydet_jax.models``. Its weights are read at construction and by ``update``.
      config: inference options.
      channels: order of the pixels' channels: rgb, or bgr as OpenCV reads them.
      max_shapes: number of input shapes whose programs are kept, the last ones used. A further shape frees the one
        not used for longest, which is compiled again when it returns.

    Raises:
      ConfigError: the model lacks what ``config`` asks for, or ``channels`` or ``max_shapes`` is none of these.
    """

    # Eight shapes: two canvases in both orientations, for single pictures and for batches.
    def __init__(
        self,
        model: DenseDetector,
        config: InferenceConfig,
        *,
        channels: Literal["rgb", "bgr"] = "rgb",
        max_shapes: int = 8,
    ):
        if channels not in ("rgb", "bgr"):
            raise ConfigError(f"channels {channels!r}: choose rgb or bgr")
        if not isinstance(max_shapes, int) or max_shapes < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(f"max_shapes {max_shapes}: must be a whole number, at least 1")
        if config.query != "dense":
            if model.query_head is None:
                raise ConfigError(
                    f"inference.query {config.query}: this model has no query head; use inference.query dense"
                )
            if model.config.head.norm != "none":
                raise ConfigError(
                    f"inference.query {config.query}: this model's heads have {model.config.head.norm} norm, which "
                    "needs the whole map; use inference.query dense"
                )
            if not model.config.min_level < config.start_level <= model.config.max_level:
                raise ConfigError(
                    f"inference.start_level {config.start_level}: the model has "
                    f"P{model.config.min_level}..P{model.config.max_level}; choose one above P{model.config.min_level}"
                )
            check_fused(model.config, config)
        self.config = config
        self._bgr, self._max_shapes = channels == "bgr", max_shapes
        self._formats: PyTree = None  # of the weights in memory, where the compiler has chosen them
        self._programs: dict[tuple[int, ...], _Programs] = {}  # by shape of the images, the last used one last
        self._lock = threading.Lock()
        self.update(model)

    def update(self, model: DenseDetector) -> None:
        """Take the weights of ``model``, which must have the same configuration; nothing is recompiled."""
        self._graph, self._state = pipeline.split_for_inference(model)
        self._weights = compiling.cast_kernels(self._state, model.dtype)
        if self._formats is not None:
            self._weights = jax.device_put(self._weights, self._formats)

    def __call__(self, images: Array | np.ndarray, sizes: Array | np.ndarray | None = None) -> Detections:
        """Detect objects in pictures.

        Args:
          images: uint8 ``[B, H, W, 3]``, RGB unless the detector's ``channels`` says otherwise.
          sizes: integers ``[B, 2]``, the valid (height, width) of each image, where images are padded to a canvas;
            None: all of it.

        Raises:
          DataError: ``images`` or ``sizes`` have another type or shape, there is no image, or a size is not on its
            canvas. Values of ``sizes`` in a device's memory are not read.
        """
        images, sizes = self._inputs(images, sizes)
        return self._of_shape(images.shape).detect(self._weights, images, sizes)

    def trace(self, images: Array | np.ndarray, sizes: Array | np.ndarray | None = None) -> QueryTrace:
        """Query probabilities, keys and active cells by level, for pictures and statistics."""
        (trace,) = self.traces(images, sizes, (self.config.threshold,))
        return trace

    def traces(
        self, images: Array | np.ndarray, sizes: Array | np.ndarray | None, thresholds: Sequence[float]
    ) -> Iterator[QueryTrace]:
        """Yield one ``trace`` per query threshold.

        The cascade itself runs for each threshold, since a level's query probabilities exist only at its keys and
        depend on the active cells around them. The pyramid is computed once, and the threshold is an argument of
        the compiled program, so all thresholds share one.
        """
        if self.config.query == "dense":
            raise ConfigError("inference.query dense computes no queries; use inference.query csq")
        images, sizes = self._inputs(images, sizes)
        programs = self._of_shape(images.shape)
        pyramid = programs.dense_part(self._weights, images, sizes)
        return (programs.trace(self._weights, pyramid, jnp.float32(threshold)) for threshold in thresholds)

    def candidates(self, images: Array | np.ndarray, sizes: Array | np.ndarray | None = None) -> Candidates:
        """Return the best boxes of every level, before the score threshold and NMS. Arguments as in a call."""
        images, sizes = self._inputs(images, sizes)
        return self._of_shape(images.shape).candidates(self._weights, images, sizes)

    def function(self) -> tuple[Callable[[PyTree, Array, Array], Detections], PyTree]:
        """Return what a call runs, on RGB: a pure function of (state, images, sizes), and its state."""
        return partial(pipeline.detect, self._graph, self.config), self._state

    def traced_function(
        self,
    ) -> tuple[Callable[[PyTree, Array, Array, Array], tuple[Detections, QueryTrace]], PyTree]:
        """Return a pure function of (state, images, sizes, threshold) on RGB, and its state.

        It gives what a call returns and what ``trace`` does, for the query threshold float32 ``[]`` instead of the
        configuration's. The maps of dense inference are empty.
        """
        return partial(pipeline.detect_and_trace, self._graph, self.config), self._state

    def lower(self, shape: tuple[int, int, int]) -> jax.stages.Lowered:
        """Lower the program for images ``[B, H, W, 3]``, for cost analysis or ahead-of-time compilation."""
        return self._new_programs().detect.lower(self._weights, *_shapes((*shape, 3)))

    def compilations(self) -> int:
        """Return how many compiled programs are kept: one per input shape, the last ``max_shapes`` of them."""
        with self._lock:
            functions: list[Any] = [programs.detect for programs in self._programs.values()]
            return sum(1 if isinstance(f, jax.stages.Compiled) else f._cache_size() for f in functions)

    def _of_shape(self, shape: tuple[int, ...]) -> _Programs:
        with self._lock:
            programs = self._programs.pop(shape, None) or self._programs_of(shape)
            self._programs[shape] = programs
            while len(self._programs) > self._max_shapes:
                del self._programs[next(iter(self._programs))]
        return programs

    def _programs_of(self, shape: tuple[int, ...]) -> _Programs:
        programs = self._new_programs()
        if self.config.gpu == "plain" or self._formats is not None or not compiling.on_gpu():
            return programs
        # The first program chooses the layouts of the weights. Others take them as they lie.
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self._weights)
        detect = jax.jit(programs.detect.__wrapped__, in_shardings=(compiling.any_layout(), None, None))
        options = compiling.compiler_options(self.config.gpu)
        compiled = detect.lower(abstract, *_shapes(shape)).compile(compiler_options=options)
        self._formats = compiled.input_formats[0][0]
        self._weights = jax.device_put(self._weights, self._formats)
        return programs._replace(detect=compiled)

    def _new_programs(self) -> _Programs:
        # jax frees a program with the function that it was compiled for, so every shape has functions of its own.
        options = compiling.compiler_options(self.config.gpu) if compiling.on_gpu() else None

        def of_images(function: Callable[..., Any]) -> jax.stages.Wrapped:
            function = partial(function, self._graph, self.config)
            return jax.jit(_reverse_channels(function) if self._bgr else function, compiler_options=options)

        return _Programs(
            detect=of_images(pipeline.detect),
            candidates=of_images(pipeline.only_candidates),
            dense_part=of_images(pipeline.dense_part),
            trace=jax.jit(partial(pipeline.trace_cascade, self._graph, self.config), compiler_options=options),
        )

    def _inputs(self, images: Array | np.ndarray, sizes: Array | np.ndarray | None) -> tuple[Array, Array]:
        if self.config.kernel == "fused" and self.config.query != "dense" and jax.default_backend() != "tpu":
            raise ConfigError(
                f"inference.kernel fused: is for TPUs, and jax runs on {jax.default_backend()} here; "
                "use inference.kernel gather"
            )
        if not isinstance(images, (jax.Array, np.ndarray)):
            images = _array(images, "images")
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not images.size:
            order = "BGR" if self._bgr else "RGB"
            raise DataError(
                f"images must be uint8 [B, H, W, 3], not {images.dtype} {list(images.shape)}; give at least one "
                f"picture, {order} pixels 0..255, not normalized"
            )
        return _on_device(images), _on_device(_checked_sizes(sizes, images.shape))


class _Programs(NamedTuple):
    """Compiled functions for images of one shape."""

    detect: Any  # jax.stages.Wrapped, or Compiled where its compilation has chosen the layouts of the weights
    candidates: jax.stages.Wrapped
    dense_part: jax.stages.Wrapped
    trace: jax.stages.Wrapped


def _reverse_channels(function: Callable[[PyTree, Array, Array], Any]) -> Callable[[PyTree, Array, Array], Any]:
    return lambda state, images, sizes: function(state, images[..., ::-1], sizes)


def _shapes(images: tuple[int, ...]) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    return jax.ShapeDtypeStruct(images, jnp.uint8), jax.ShapeDtypeStruct((images[0], 2), jnp.int32)


def _checked_sizes(sizes: Array | np.ndarray | None, shape: tuple[int, ...]) -> Array | np.ndarray:
    batch, height, width, _ = shape
    if sizes is None:
        return np.broadcast_to(np.asarray((height, width), np.int32), (batch, 2))
    if not isinstance(sizes, (jax.Array, np.ndarray)):
        sizes = _array(sizes, "sizes")
    remedy = "give (height, width) per image, in whole pixels"
    if sizes.dtype.kind not in "iu" or sizes.shape != (batch, 2):
        raise DataError(f"sizes must be integers [{batch}, 2], not {sizes.dtype} {list(sizes.shape)}; {remedy}")
    if _in_host_memory(sizes):
        values = np.asarray(sizes)
        wrong = np.any((values < 1) | (values > (height, width)), axis=1)
        if wrong.any():
            row = int(wrong.argmax())
            raise DataError(f"sizes[{row}] is {values[row].tolist()}, on a canvas of {height}x{width}; {remedy}")
    return sizes.astype(np.int32)


def _in_host_memory(x: Array | np.ndarray) -> bool:
    if isinstance(x, np.ndarray):
        return True
    return not isinstance(x, jax.core.Tracer) and all(device.platform == "cpu" for device in x.devices())


def _on_device(x: Array | np.ndarray) -> Array:
    # A copy, because jax may read the array after the call, when a camera already fills it anew. And not jnp.asarray,
    # which would compile a program per shape, and keep it.
    return x if isinstance(x, jax.Array) else jax.device_put(np.array(x, order="C"))


def _array(values: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{name}: not an array ({reason}); pictures of one batch have one shape") from None
