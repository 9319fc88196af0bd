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
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.export
import numpy as np
from jax import Array

FORMAT = "querydet_jax artifact"
VERSION = 1  # of the layout above; raise it for changes that older readers would misread
MANIFEST, WEIGHTS = "manifest.json", "weights.npz"

# zipfile's errors for truncated or damaged archives; they vary with the place of the damage.
_BROKEN = (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, OSError, KeyError, ValueError, OverflowError)


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
      path: a file written by `export.py`. It is read completely and checked against the manifest's checksums.

    Attributes:
      manifest: content of ``manifest.json``.
      classes: class names, ``[K]``.
      canvases: supported (height, width) of the inputs.
      batch_sizes: supported batch sizes; None is any.

    Raises:
      ArtifactError: the file is not an artifact, is damaged, is of another version of the format or of jax, or
        was exported for other platforms than jax uses here.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if importlib.util.find_spec("flatbuffers") is None:
            raise ArtifactError(f"{self.path}: reading it needs flatbuffers; pip install flatbuffers")
        self.manifest, parts = _read(self.path)
        self._check_platform()
        self.classes = tuple(self.manifest["classes"])
        self.canvases = tuple((height, width) for height, width in self.manifest["canvases"])
        sizes = self.manifest["batch_sizes"]
        self.batch_sizes = None if sizes is None else tuple(sizes)
        with np.load(io.BytesIO(parts.pop(WEIGHTS))) as weights:
            self._weights = jax.device_put({name: weights[name] for name in weights.files})
        self._parts = parts
        self._programs: dict[str, Callable[..., Any]] = {}

    def __call__(self, images: Array | np.ndarray, sizes: Array | np.ndarray | None = None) -> ArtifactDetections:
        """Detect objects in uint8 RGB ``images [B, H, W, 3]``.

        Args:
          images: each image in the upper left corner of a canvas (H, W) of the artifact, scaled as
            ``manifest["preprocessing"]`` specifies. The rest of the canvas is ignored.
          sizes: int32 ``[B, 2]``, (height, width) of each image on the canvas; None is the whole canvas.

        Raises:
          ArtifactError: images are not uint8 RGB, or the artifact was not exported for their shape.
        """
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise ArtifactError(
                f"{self.path}: images must be uint8 [B, H, W, 3], not {images.dtype} {list(images.shape)}; "
                "give RGB pixels 0..255, not normalized"
            )
        program = self._program(images.shape)
        if sizes is None:
            sizes = np.tile(np.asarray(images.shape[1:3], np.int32), (len(images), 1))
        elif sizes.shape != (len(images), 2):
            raise ArtifactError(
                f"{self.path}: sizes are {list(sizes.shape)} for {len(images)} images; give (height, width) per image"
            )
        out = program(self._weights, images, sizes.astype(np.int32))
        return ArtifactDetections(**{**out, "stats": {int(level): counts for level, counts in out["stats"].items()}})

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
                return self._compiled(entry["part"])
        canvases = ", ".join(f"{height}x{width}" for height, width in self.canvases)
        sizes = (
            "any number of images" if self.batch_sizes is None else f"{', '.join(map(str, self.batch_sizes))} images"
        )
        raise ArtifactError(
            f"{self.path}: {batch} images of {canvas[0]}x{canvas[1]} (height x width), but exported for {sizes} of "
            f"{canvases}; pad to one of these, or export again with other --data.test-canvases or --batch-sizes"
        )

    def _compiled(self, part: str) -> Callable[..., Any]:
        if part not in self._programs:
            exported = _deserialize(self.path, part, self._parts[part], self.manifest["made_with"]["jax"])
            self._programs[part] = jax.jit(exported.call)
        return self._programs[part]


def _deserialize(path: Path, part: str, data: bytes, made_with: str) -> jax.export.Exported:
    oldest = jax.export.minimum_supported_calling_convention_version
    newest = jax.export.maximum_supported_calling_convention_version
    # The checksum has matched, so a failure means an older jax. It may raise in any of its layers, and for unknown
    # operations only when the module is parsed.
    try:
        exported = jax.export.deserialize(bytearray(data))
        readable = oldest <= exported.calling_convention_version <= newest and bool(exported.mlir_module())
    except Exception:
        exported, readable = None, False
    if exported is None or not readable:
        raise ArtifactError(
            f"{path}: {part} was written by jax {made_with}, which jax {jax.__version__} here cannot read; "
            f"pip install jax=={made_with}, or export again with this version"
        )
    return exported


def _read(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Read the manifest and the other parts, and verify their checksums."""
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file; give an artifact written by export.py")
    again = "copy it again from its source, or export it again"
    try:
        with zipfile.ZipFile(path) as archive:
            manifest = json.loads(archive.read(MANIFEST))
            if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
                raise ArtifactError(f"{path}: its {MANIFEST} is not an artifact's; give a file written by export.py")
            if manifest.get("format_version") != VERSION:
                raise ArtifactError(
                    f"{path}: format version {manifest.get('format_version')}, but this reader supports {VERSION}; "
                    "export it again, or use the artifact.py of the querydet_jax that wrote it"
                )
            parts = {name: archive.read(name) for name in manifest["parts"]}
    except ArtifactError:
        raise
    except _BROKEN as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtifactError(f"{path}: damaged, cut short or not an artifact ({reason}); {again}") from None
    for name, data in parts.items():
        if hashlib.sha256(data).hexdigest() != manifest["parts"][name]["sha256"]:
            raise ArtifactError(f"{path}: {name} is damaged (its SHA-256 differs); {again}")
    return manifest, parts
