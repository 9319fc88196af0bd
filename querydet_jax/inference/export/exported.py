"""Open what `querydet export` wrote, of either format."""

from __future__ import annotations

from pathlib import Path

from querydet_jax.inference.export.artifact import Artifact, ArtifactError
from querydet_jax.inference.export.onnx_detector import OnnxDetector, OnnxError
from querydet_jax.runtime.errors import QueryDetError
from querydet_jax.runtime.stores import local_copy

Exported = Artifact | OnnxDetector
EXPORT_ERRORS = (ArtifactError, OnnxError)

_READERS = {".zip": Artifact, ".onnx": OnnxDetector}


def names_exported(path: Path) -> bool:
    """Return whether a path, by its suffix, names an exported file, be it there or not."""
    return path.suffix in _READERS and not path.is_dir()


def open_exported(path: Path) -> Exported:
    """Open an artifact (.zip) or an ONNX file (.onnx).

    Raises:
      QueryDetError: it is missing, damaged, of another program or version, or does not run here.
    """
    with local_copy(path) as here:
        try:
            detector = _READERS[path.suffix](here)
        except EXPORT_ERRORS as error:
            raise QueryDetError(str(error).replace(str(here), str(path))) from error
    detector.path = path
    return detector
