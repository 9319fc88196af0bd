"""Run a detector that `export.py` has written to one file. Copy this module next to your program:

    from artifact import Artifact

    detect = Artifact("detector.zip")
    found = detect(images)  # uint8 RGB [B, H, W, 3]; H, W one of detect.canvases
    found.boxes, found.scores, found.classes, found.valid

It needs jax, numpy and flatbuffers (for jax.export), but not querydet_jax.
Shape letters: B batch, H W image, D detections, K classes.

The file is an uncompressed zip archive:

=====================  ================================================================================
``manifest.json``      description and input format (``Artifact.manifest``), SHA-256 of each other part
``weights.npz``        the parameters by name, which are arguments of every program
``programs/*.bin``     one program per canvas and batch size, as serialized by ``jax.export``
=====================  ================================================================================
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import math
import re
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.core
import jax.export
import numpy as np
from jax import Array

FORMAT = "querydet_jax artifact"
VERSION = 1  # of the layout above; raise it for changes that older readers would misread
MANIFEST, WEIGHTS = "manifest.json", "weights.npz"

AGAIN = "copy it again from its source, or export it again"

# zipfile's errors for truncated or damaged archives; they vary with the place of the damage.
_BROKEN = (
    zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, OSError, KeyError, ValueError, TypeError, OverflowError,
    MemoryError,
)  # fmt: skip

# What a program may ask of the machine beside arithmetic: `shape_assertion` is what jax writes for a batch of any size.
# Custom calls reach Python callbacks, and the others the host.
_REACHES_OUT = re.compile(r"custom_call(?! @shape_assertion\()|stablehlo\.(send|recv|infeed|outfeed)\b")


class ArtifactError(ValueError):
    """The artifact cannot be read or run here, or was not exported for this input."""


class ArtifactDetections(NamedTuple):
    """Detections of a batch, best first.

    Attributes:
      boxes: float32 ``[B, D, 4]`` xyxy px of the input, not clipped.
      scores: float32 ``[B, D]``, 0 where not valid.
      classes: int32 ``[B, D]``, indices into ``Artifact.classes``, -1 where not valid.
      valid: bool ``[B, D]``.
      stats: {sparse level (3 for P3): counts over the batch of queries, keys and active cells, the buffer that ran
        (capacity; 0 is dense) and whether it was too small (overflowed)}; empty for dense inference.
    """

    boxes: Array
    scores: Array
    classes: Array
    valid: Array
    stats: dict[int, dict[str, Array]]


class Artifact:
    """A detector that maps images to detections, compiled at the first call with each input shape.

    Args:
      path: a file written by `export.py`. It is read completely and checked against the manifest's checksums, which
        show damage, not who wrote it: take artifacts only from where you would take a program.
      channels: order of the pixels' channels: rgb, or bgr as OpenCV reads them.

    Attributes:
      manifest: content of ``manifest.json``.
      classes: class names, ``[K]``.
      min_scores: the score from which a detection of each class counts, ``[K]``; None if none were exported. Calls
        return all detections.
      canvases: supported (height, width) of the inputs.
      batch_sizes: supported batch sizes; None is any.

    Raises:
      ArtifactError: the file is not an artifact, is damaged, is of another version of the format or of jax, or
        was exported for other platforms than jax uses here; ``channels`` is neither.
    """

    def __init__(self, path: str | Path, *, channels: Literal["rgb", "bgr"] = "rgb"):
        self.path = Path(path)
        if channels not in ("rgb", "bgr"):
            raise ArtifactError(f"channels {channels!r}: choose rgb or bgr")
        self._bgr = channels == "bgr"
        if importlib.util.find_spec("flatbuffers") is None:
            raise ArtifactError(f"{self.path}: reading it needs flatbuffers; pip install flatbuffers")
        self.manifest, parts = _read(self.path)
        self._check_platform()
        self.classes = tuple(self.manifest["classes"])
        scores = self.manifest.get("min_scores")
        self.min_scores = None if scores is None else np.array(scores, np.float32)
        self.canvases = tuple((height, width) for height, width in self.manifest["canvases"])
        sizes = self.manifest["batch_sizes"]
        self.batch_sizes = None if sizes is None else tuple(sizes)
        weights = parts.pop(WEIGHTS)
        if len(weights) != self._size(WEIGHTS):
            raise ArtifactError(f"{self.path}: {WEIGHTS} is damaged ({len(weights)} bytes); {AGAIN}")
        self._weights = jax.device_put(_arrays(self.path, weights))
        number = _number_of_classes(self._weights)
        if number not in (None, len(self.classes)):
            raise ArtifactError(
                f"{self.path}: {MANIFEST}, classes: {len(self.classes)} names, but the weights have {number}; {AGAIN}"
            )
        self._parts = parts
        self._programs: dict[str, Callable[..., Any]] = {}

    def __call__(self, images: Array | np.ndarray, sizes: Array | np.ndarray | None = None) -> ArtifactDetections:
        """Detect objects in uint8 ``images [B, H, W, 3]``, RGB unless the artifact's ``channels`` says otherwise.

        Args:
          images: each image in the upper left corner of a canvas (H, W) of the artifact, scaled as
            ``manifest["preprocessing"]`` specifies. The rest of the canvas is ignored.
          sizes: integers ``[B, 2]``, (height, width) of each image on the canvas; None is the whole canvas. Values in a
            device's memory are not read.

        Raises:
          ArtifactError: images are not uint8, the artifact was not exported for their shape, a size is not on its
            canvas, or the program cannot be read by this jax, is damaged, or does what no exported detector does.
        """
        images = self._array(images, "images")
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise ArtifactError(
                f"{self.path}: images must be uint8 [B, H, W, 3], not {images.dtype} {list(images.shape)}; "
                f"give {'BGR' if self._bgr else 'RGB'} pixels 0..255, not normalized"
            )
        program = self._program(images.shape)
        sizes = self._sizes(sizes, images.shape)
        # Copies, because jax may read an array after the call, when a camera already fills it anew.
        images, sizes = (x if isinstance(x, jax.Array) else jax.device_put(np.array(x)) for x in (images, sizes))
        out = program(self._weights, images[..., ::-1] if self._bgr else images, sizes)
        return ArtifactDetections(**{**out, "stats": {int(level): counts for level, counts in out["stats"].items()}})

    def _sizes(self, sizes: Array | np.ndarray | None, shape: tuple[int, ...]) -> Array | np.ndarray:
        batch, height, width, _ = shape
        if sizes is None:
            return np.tile(np.asarray((height, width), np.int32), (batch, 1))
        sizes = self._array(sizes, "sizes")
        remedy = "give (height, width) per image, in whole pixels"
        if sizes.dtype.kind not in "iu" or sizes.shape != (batch, 2):
            raise ArtifactError(
                f"{self.path}: sizes are {sizes.dtype} {list(sizes.shape)} for {batch} images; {remedy}"
            )
        traced = isinstance(sizes, jax.core.Tracer)
        if isinstance(sizes, np.ndarray) or not traced and all(d.platform == "cpu" for d in sizes.devices()):
            values = np.asarray(sizes)
            wrong = np.any((values < 1) | (values > (height, width)), axis=1)
            if wrong.any():
                row = int(wrong.argmax())
                raise ArtifactError(
                    f"{self.path}: sizes[{row}] is {values[row].tolist()}, on a canvas of {height}x{width}; {remedy}"
                )
        return sizes.astype(np.int32)

    def _array(self, values: Any, name: str) -> Array | np.ndarray:
        try:
            return values if isinstance(values, jax.Array) else np.asarray(values)
        except (TypeError, ValueError, RuntimeError):
            raise ArtifactError(
                f"{self.path}: {name} are not an array; give pictures of one shape, a size each"
            ) from None

    def _check_platform(self) -> None:
        here, platforms = jax.export.default_export_platform(), self.manifest["platforms"]
        if here not in platforms:
            raise ArtifactError(
                f"{self.path}: exported for {', '.join(platforms)}, but jax runs on {here} here; "
                f"export again with --platforms {here}, or set JAX_PLATFORMS={platforms[0]} where available"
            )

    def _program(self, shape: tuple[int, ...]) -> Callable[..., Any]:
        batch, *canvas = shape[:3]
        for entry in self.manifest["programs"]:
            if entry["canvas"] == canvas and batch >= 1 and entry["batch_size"] in (None, batch):
                return self._compiled(entry)
        canvases = ", ".join(f"{height}x{width}" for height, width in self.canvases)
        sizes = (
            "any number of images" if self.batch_sizes is None else f"{', '.join(map(str, self.batch_sizes))} images"
        )
        raise ArtifactError(
            f"{self.path}: {batch} images of {canvas[0]}x{canvas[1]} (height x width), but exported for {sizes} of "
            f"{canvases}; pad to one of these, or export again with other --data.test-canvases or --batch-sizes"
        )

    def _size(self, part: str) -> int:
        return self.manifest["parts"][part]["bytes"]

    def _compiled(self, entry: dict[str, Any]) -> Callable[..., Any]:
        part = entry["part"]
        if part not in self._programs:
            exported = _deserialize(self.path, part, self._parts[part], self.manifest["made_with"]["jax"])
            found = _REACHES_OUT.search(exported.mlir_module())
            if found or exported.ordered_effects or exported.unordered_effects:
                asked = found[0] if found else "effects"
                raise ArtifactError(
                    f"{self.path}: {part} asks for {asked}, which no exported detector does, and was not run; "
                    "take the artifact from another source"
                )
            if not _fits(exported, self._weights, entry) or len(self._parts[part]) != self._size(part):
                raise ArtifactError(
                    f"{self.path}: {part} is not the program that its {MANIFEST} describes, for {entry['canvas']} and "
                    f"these weights; {AGAIN}"
                )
            self._programs[part] = jax.jit(exported.call)
        return self._programs[part]


def _deserialize(path: Path, part: str, data: bytes, made_with: str) -> jax.export.Exported:
    oldest = jax.export.minimum_supported_calling_convention_version
    newest = jax.export.maximum_supported_calling_convention_version
    # The checksum has matched, so a failure means another jax. It may raise in any of its layers, and for unknown
    # operations only when the module is parsed.
    exported, known = None, True
    try:
        exported = jax.export.deserialize(bytearray(data))
        known = oldest <= exported.calling_convention_version <= newest
        readable = known and bool(exported.mlir_module())
    except Exception:
        readable = False
    if exported is not None and readable:
        return exported
    if known and made_with == jax.__version__:
        raise ArtifactError(f"{path}: {part} is damaged (jax {made_with} wrote it and cannot read it); {AGAIN}")
    raise ArtifactError(
        f"{path}: {part} was written by jax {made_with}, which jax {jax.__version__} here cannot read; "
        f"pip install jax=={made_with}, or export again with this version"
    )


def _fits(exported: jax.export.Exported, weights: dict[str, Array], entry: dict[str, Any]) -> bool:
    """Return whether a program takes these weights and images of this entry, and returns detections."""
    try:
        (named, images, sizes), keywords = jax.tree.unflatten(exported.in_tree, exported.in_avals)
        out = jax.tree.unflatten(exported.out_tree, exported.out_avals)
        wanted = {name: (array.shape, array.dtype) for name, array in weights.items()}
        batch = images.shape[0] if isinstance(images.shape[0], int) else None
        return (
            not keywords
            and wanted == {name: (aval.shape, aval.dtype) for name, aval in named.items()}
            and (batch, list(images.shape[1:]), images.dtype) == (entry["batch_size"], [*entry["canvas"], 3], np.uint8)
            and (sizes.shape[1:], sizes.dtype) == ((2,), np.int32)
            and set(out) == {*ArtifactDetections._fields}
            and all(level.isdecimal() for level in out["stats"])
            and jax.export.default_export_platform() in exported.platforms
        )
    except Exception:  # trees of any other form
        return False


def _read(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Read the manifest and the other parts, and verify their checksums."""
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file; give an artifact written by export.py")
    try:
        with zipfile.ZipFile(path) as archive:
            _entries(archive, path.stat().st_size)
            manifest = json.loads(archive.read(MANIFEST))
            if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
                raise ArtifactError(f"{path}: its {MANIFEST} is not an artifact's; give a file written by export.py")
            if manifest.get("format_version") != VERSION or manifest["format_version"] is True:
                raise ArtifactError(
                    f"{path}: format version {manifest.get('format_version')!r}, but this reader supports {VERSION}; "
                    "export it again, or use the artifact.py of the querydet_jax that wrote it"
                )
            _check_manifest(path, manifest)
            parts = {name: archive.read(name) for name in manifest["parts"]}
    except ArtifactError:
        raise
    except _BROKEN as error:
        raise _damaged(path, error) from None
    for name, data in parts.items():
        if hashlib.sha256(data).hexdigest() != manifest["parts"][name]["sha256"]:
            raise ArtifactError(f"{path}: {name} is damaged (its SHA-256 differs); {AGAIN}")
    return manifest, parts


def _damaged(path: Path, error: BaseException) -> ArtifactError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ArtifactError(f"{path}: damaged, cut short or not an artifact ({reason[:200]}); {AGAIN}")


def _entries(archive: zipfile.ZipFile, size: int) -> dict[str, int]:
    """Return the sizes of an archive's entries by name, in bytes.

    Raises:
      ValueError: entries are compressed, of one name, or together larger than ``size``, that of the archive.
    """
    entries = {info.filename: info.file_size for info in archive.infolist()}
    if len(entries) != len(archive.infolist()):
        raise ValueError("two entries of one name")
    if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
        raise ValueError("compressed entries")
    if sum(entries.values()) > size:
        raise ValueError("entries larger than the file")
    return entries


def _arrays(path: Path, data: bytes) -> dict[str, np.ndarray]:
    """Read ``weights.npz`` as views of ``data``'s entries; what a header claims is checked before any use."""
    arrays = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for name in _entries(archive, len(data)):
                raw = archive.read(name)
                file = io.BytesIO(raw)
                if np.lib.format.read_magic(file) != (1, 0):
                    raise ValueError(f"{name} is of another version of the npy format")
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
                if (
                    dtype.kind not in "fiub"
                    or not dtype.isnative
                    or math.prod(shape) * dtype.itemsize != len(raw) - file.tell()
                ):
                    raise ValueError(f"{name} does not hold what its header says")
                flat = np.frombuffer(raw, dtype, offset=file.tell())
                arrays[name.removesuffix(".npy")] = flat.reshape(shape, order="F" if fortran else "C")
    except _BROKEN as error:
        raise _damaged(path, error) from None
    return arrays


def _number_of_classes(weights: dict[str, Array]) -> int | None:
    """Return K by the last layers' outputs: A * K and A * 4 of a dense head, K + 1 of Faster R-CNN's second stage."""
    outputs = {name: x.shape[-1] for name, x in weights.items() if x.ndim}
    if "box_head.cls_score.bias" in outputs:
        return outputs["box_head.cls_score.bias"] - 1
    if "head.cls_score.bias" in outputs and "head.bbox_pred.bias" in outputs:
        return outputs["head.cls_score.bias"] // max(outputs["head.bbox_pred.bias"] // 4, 1)
    return None


def _check_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Raise ArtifactError if a field of the manifest is missing or is not what `export.py` writes."""
    for field, (wanted, is_right) in _FIELDS.items():
        value: Any = manifest
        for key in field.split("."):
            value = value.get(key, _MISSING) if isinstance(value, dict) else _MISSING
        if value is _MISSING and field in _OPTIONAL:
            continue
        if value is _MISSING or not is_right(value):
            seen = "missing" if value is _MISSING else f"{json.dumps(value)[:80]}, not {wanted}"
            raise ArtifactError(f"{path}: {MANIFEST}, {field}: {seen}; {AGAIN}")
    if WEIGHTS not in manifest["parts"]:
        raise ArtifactError(f"{path}: {MANIFEST}, parts: lists no {WEIGHTS}; {AGAIN}")
    for i, program in enumerate(manifest["programs"]):
        if program["part"] not in manifest["parts"] or program["part"] == WEIGHTS:
            raise ArtifactError(f"{path}: {MANIFEST}, programs[{i}].part: is not among the parts; {AGAIN}")
    scores, classes = manifest.get("min_scores"), manifest["classes"]
    if scores is not None and len(scores) != len(classes):
        raise ArtifactError(f"{path}: {MANIFEST}, min_scores: {len(scores)} scores for {len(classes)} classes; {AGAIN}")
    listed = sorted((*program["canvas"], program["batch_size"] or 0) for program in manifest["programs"])
    if listed != sorted((*c, batch) for c in manifest["canvases"] for batch in manifest["batch_sizes"] or [0]):
        raise ArtifactError(f"{path}: {MANIFEST}, programs: not one per canvas and batch size; {AGAIN}")


_MISSING = object()


def _is_count(x: Any) -> bool:
    return type(x) is int and x >= 1


def _is_text(x: Any) -> bool:
    return isinstance(x, str)


def _is_line(x: Any) -> bool:
    return isinstance(x, str) and x.isprintable()


def _is_number(x: Any) -> bool:
    return type(x) in (int, float) and math.isfinite(x)


def _list_of(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, list) and bool(x) and all(map(is_right, x))


def _is_canvas(x: Any) -> bool:
    return isinstance(x, list) and len(x) == 2 and all(map(_is_count, x))


def _is_program(x: Any) -> bool:
    return (
        isinstance(x, dict)
        and _is_text(x.get("part"))
        and _is_canvas(x.get("canvas"))
        and (x.get("batch_size", 0) is None or _is_count(x.get("batch_size")))
    )


def _is_parts(x: Any) -> bool:
    return isinstance(x, dict) and all(
        name.isprintable()
        and isinstance(part, dict)
        and type(part.get("bytes")) is int
        and isinstance(part.get("sha256"), str)
        for name, part in x.items()
    )


_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "made_with.jax": ("a version", _is_line),
    "name": ("text", _is_text),
    "classes": ("a list of names", _list_of(_is_text)),
    "platforms": ("a list of platforms", _list_of(lambda x: x in ("cpu", "cuda", "rocm", "tpu"))),
    "canvases": ("a list of [height, width] in px", _list_of(_is_canvas)),
    "batch_sizes": ("null or a list of counts", lambda x: x is None or _list_of(_is_count)(x)),
    "preprocessing.test_short": ("a length in px", _is_count),
    "preprocessing.test_max": ("a length in px", _is_count),
    "inference.query": ("dense, csq, cq or ccq", lambda x: x in ("dense", "csq", "cq", "ccq")),
    "inference.threshold": ("a number", _is_number),
    "programs": ("a list of programs with part, canvas and batch_size", _list_of(_is_program)),
    "parts": ("the parts, with bytes and sha256", _is_parts),
}
# Of these, artifacts of older versions may lack some, and nothing here depends on them.
_OPTIONAL: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **{f"made_with.{name}": ("a version", _is_line) for name in ("jaxlib", "flatbuffers")},
    **{f"preprocessing.{name}": ("text", _is_line) for name in ("pixels", "resize", "padding", "bit_depth")},
    "preprocessing.max_pixels": ("a count, or 0", lambda x: type(x) is int and x >= 0),
    "preprocessing.exif": ("auto, apply or ignore", lambda x: x in ("auto", "apply", "ignore")),
    **{f"inference.{name}": ("text", _is_line) for name in ("overflow", "kernel", "nms")},
    **{
        f"inference.{name}": ("a number", _is_number)
        for name in ("start_level", "context", "chunk", "tile", "score_threshold", "topk", "nms_iou", "soft_sigma",
                     "soft_prune", "max_detections")
    },
    "inference.capacities": ("a list of numbers", _list_of(_is_number)),
    "min_scores": ("a list of scores from 0 to 1", _list_of(lambda x: _is_number(x) and 0 <= x <= 1)),
}  # fmt: skip
_FIELDS.update(_OPTIONAL)
