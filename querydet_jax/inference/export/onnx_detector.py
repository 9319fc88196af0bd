"""Run a detector that `querydet export --format onnx` has written. Copy this module next to your program:

    from onnx_detector import OnnxDetector

    detect = OnnxDetector("detector.onnx")
    found = detect(images)  # uint8 RGB [B, H, W, 3]; H, W one of detect.canvases
    found.boxes, found.scores, found.classes, found.valid

It needs onnxruntime and numpy, neither jax nor querydet_jax. Other runtimes read the file as well:

==============================  =====================================================================
input ``images``                uint8 ``[B, H, W, 3]``, RGB, not normalized
input ``sizes``                 int32 ``[B, 2]``, (height, width) of each picture on its canvas
outputs ``boxes`` .. ``valid``  the fields of ``OnnxDetections``
outputs ``stats.3.queries`` ..  its counts, by level
metadata ``querydet_jax``       JSON: classes, canvases, resize rule, inference settings (``manifest``)
==============================  =====================================================================

Shape letters: B batch, H W image, D detections, K classes.
"""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

FORMAT = "querydet_jax onnx"
VERSION = 1  # of inputs, outputs and metadata; raise it for changes that older readers would misread
METADATA = "querydet_jax"  # the key

AGAIN = "copy it again from its source, or export it again"


class OnnxError(ValueError):
    """The file cannot be read or run here, or was not exported for this input."""


class OnnxDetections(NamedTuple):
    """Detections of a batch, best first.

    Attributes:
      boxes: float32 ``[B, D, 4]`` xyxy px of the input, not clipped.
      scores: float32 ``[B, D]``, 0 where not valid.
      classes: int32 ``[B, D]``, indices into ``OnnxDetector.classes``, -1 where not valid.
      valid: bool ``[B, D]``.
      stats: {sparse level (3 for P3): counts over the batch of queries, keys and active cells, the buffer that ran
        (capacity; 0 is dense) and whether it was too small (overflowed)}; empty for dense inference.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    valid: np.ndarray
    stats: dict[int, dict[str, np.ndarray]]


class OnnxDetector:
    """A detector that maps images to detections, run by ONNX Runtime on the CPU.

    Args:
      path: a file written by `querydet export --format onnx`.
      channels: order of the pixels' channels: rgb, or bgr as OpenCV reads them.
      threads: threads per operator; None is one per core.

    Attributes:
      manifest: the file's description.
      classes: class names, ``[K]``.
      min_scores: the score from which a detection of each class counts, ``[K]``; None if none were exported. Calls
        return all detections.
      canvases: supported (height, width) of the inputs.
      batch_sizes: supported batch sizes.

    Raises:
      OnnxError: onnxruntime is missing, or cannot read the file; the file is cut short, of another program or of
        another version of the format; ``channels`` is neither.
    """

    def __init__(
        self, path: str | Path, *, channels: Literal["rgb", "bgr"] = "rgb", threads: int | None = None
    ) -> None:
        self.path = Path(path)
        if channels not in ("rgb", "bgr"):
            raise OnnxError(f"channels {channels!r}: choose rgb or bgr")
        self._bgr = channels == "bgr"
        self._session = _session(self.path, threads)
        self.manifest = _manifest(self.path, self._session)
        self.classes = tuple(self.manifest["classes"])
        scores = self.manifest.get("min_scores")
        self.min_scores = None if scores is None else np.array(scores, np.float32)
        self.canvases = tuple((height, width) for height, width in self.manifest["canvases"])
        self.batch_sizes = tuple(self.manifest["batch_sizes"])
        self._outputs = [output.name for output in self._session.get_outputs()]

    def __call__(self, images: np.ndarray, sizes: np.ndarray | None = None) -> OnnxDetections:
        """Detect objects in uint8 ``images [B, H, W, 3]``, RGB unless the detector's ``channels`` says otherwise.

        Args:
          images: each image in the upper left corner of a canvas (H, W), scaled as ``manifest["preprocessing"]``
            specifies. The rest of the canvas is ignored.
          sizes: integers ``[B, 2]``, (height, width) of each image on the canvas; None is the whole canvas.

        Raises:
          OnnxError: images are not uint8, the file was not exported for their shape, or a size is not on its canvas.
        """
        images = self._array(images, "images")
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise OnnxError(
                f"{self.path}: images must be uint8 [B, H, W, 3], not {images.dtype} {list(images.shape)}; "
                f"give {'BGR' if self._bgr else 'RGB'} pixels 0..255, not normalized"
            )
        batch, *canvas = images.shape[:3]
        if batch not in self.batch_sizes or tuple(canvas) not in self.canvases:
            canvases = ", ".join(f"{height}x{width}" for height, width in self.canvases)
            raise OnnxError(
                f"{self.path}: {batch} images of {canvas[0]}x{canvas[1]} (height x width), but exported for "
                f"{', '.join(map(str, self.batch_sizes))} images of {canvases}; pad to one of these, or export again "
                "with other --data.test-canvases or --batch-sizes"
            )
        given = {"images": images[..., ::-1] if self._bgr else images, "sizes": self._sizes(sizes, images.shape)}
        given = {name: np.ascontiguousarray(x) for name, x in given.items()}
        out = dict(zip(self._outputs, self._session.run(self._outputs, given), strict=True))
        stats: dict[int, dict[str, np.ndarray]] = {}
        for name in self._outputs:
            if name.startswith("stats."):
                _, level, count = name.split(".")
                stats.setdefault(int(level), {})[count] = out.pop(name)
        return OnnxDetections(**out, stats=stats)

    def _sizes(self, sizes: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
        batch, height, width, _ = shape
        if sizes is None:
            return np.tile(np.asarray((height, width), np.int32), (batch, 1))
        sizes = self._array(sizes, "sizes")
        remedy = "give (height, width) per image, in whole pixels"
        if sizes.dtype.kind not in "iu" or sizes.shape != (batch, 2):
            raise OnnxError(f"{self.path}: sizes are {sizes.dtype} {list(sizes.shape)} for {batch} images; {remedy}")
        wrong = np.any((sizes < 1) | (sizes > (height, width)), axis=1)
        if wrong.any():
            row = int(wrong.argmax())
            raise OnnxError(
                f"{self.path}: sizes[{row}] is {sizes[row].tolist()}, on a canvas of {height}x{width}; {remedy}"
            )
        return sizes.astype(np.int32)

    def _array(self, values: Any, name: str) -> np.ndarray:
        try:
            return np.asarray(values)
        except (TypeError, ValueError, RuntimeError):
            raise OnnxError(f"{self.path}: {name} are not an array; give pictures of one shape, a size each") from None


def _session(path: Path, threads: int | None) -> Any:
    if not path.is_file():
        raise OnnxError(f"{path}: no such file; give one written by querydet export --format onnx")
    try:
        runtime: Any = importlib.import_module("onnxruntime")
    except ModuleNotFoundError:
        raise OnnxError(f"{path}: running it needs onnxruntime; pip install onnxruntime") from None
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # its exceptions say the same
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's have no base of their own
        reason = " ".join(str(error).split())[:200]
        raise OnnxError(f"{path}: damaged, cut short or not an ONNX file ({reason}); {AGAIN}") from None


def _manifest(path: Path, session: Any) -> dict[str, Any]:
    stored = session.get_modelmeta().custom_metadata_map.get(METADATA)
    try:
        manifest = json.loads(stored or "null")
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise OnnxError(f"{path}: holds no detector of querydet_jax; give one written by querydet export --format onnx")
    version = manifest.get("format_version")
    if type(version) is not int or version != VERSION:
        raise OnnxError(
            f"{path}: format version {version!r}, but this reader supports {VERSION}; export it again, or use the "
            "onnx_detector.py of the querydet_jax that wrote it"
        )
    for field, (wanted, is_right) in _FIELDS.items():
        value: Any = manifest
        for key in field.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if not is_right(value):
            raise OnnxError(f"{path}: metadata, {field}: {json.dumps(value)[:80]}, not {wanted}; {AGAIN}")
    scores = manifest.get("min_scores")
    if scores is not None and not (
        isinstance(scores, list) and len(scores) == len(manifest["classes"]) and all(map(_is_number, scores))
    ):
        raise OnnxError(f"{path}: metadata, min_scores: not a score per class; {AGAIN}")
    names = [x.name for x in (*session.get_inputs(), *session.get_outputs())]
    if names[:6] != ["images", "sizes", *OnnxDetections._fields[:4]]:
        raise OnnxError(f"{path}: its inputs and outputs are not a detector's, but {', '.join(names)[:200]}; {AGAIN}")
    return manifest


def _is_count(x: Any) -> bool:
    return type(x) is int and x >= 1


def _is_number(x: Any) -> bool:
    return type(x) in (int, float) and math.isfinite(x)


def _is_list(x: Any) -> bool:
    return isinstance(x, list) and bool(x)


_FIELDS: dict[str, tuple[str, Any]] = {
    "name": ("text", lambda x: isinstance(x, str)),
    "classes": ("a list of names", lambda x: _is_list(x) and all(isinstance(name, str) for name in x)),
    "canvases": (
        "a list of [height, width] in px",
        lambda x: _is_list(x) and all(_is_list(side) and len(side) == 2 and all(map(_is_count, side)) for side in x),
    ),
    "batch_sizes": ("a list of counts", lambda x: _is_list(x) and all(map(_is_count, x))),
    "preprocessing.test_short": ("a length in px", _is_count),
    "preprocessing.test_max": ("a length in px", _is_count),
    "inference.query": ("dense, csq, cq or ccq", lambda x: x in ("dense", "csq", "cq", "ccq")),
    "inference.threshold": ("a number", _is_number),
}
