"""Write a detector to one file that runs without this package; ``artifact`` describes its layout.

Weights are arguments of the programs, not constants: all programs share one copy, XLA spends no time on folding them,
and a program of QueryDet on ResNet-50 takes 0.2 MB instead of 164.
Shape letters: B batch, H W image, D detections.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import Array

from querydet_jax.config import Config, InferenceConfig
from querydet_jax.inference.detector import Detector
from querydet_jax.inference.export.artifact import FORMAT, MANIFEST, VERSION, WEIGHTS
from querydet_jax.runtime.errors import ConfigError, DataError
from querydet_jax.runtime.files import written_aside
from querydet_jax.runtime.stores import StoreError, as_path

PLATFORMS = ("cpu", "cuda", "tpu")
Canvas = tuple[int, int]


def write_artifact(
    path: str | Path,
    detector: Detector,
    config: Config,
    *,
    canvases: Sequence[Canvas],
    batch_sizes: Sequence[int] = (),
    platforms: Sequence[str] = PLATFORMS,
    min_scores: np.ndarray | None = None,
) -> dict[str, Any]:
    """Lower a detector for every canvas and batch size, and write it with its weights.

    Args:
      path: the file, written atomically.
      detector: weights and inference settings.
      config: name, classes and resize rule for the manifest.
      canvases: (height, width) of the inputs.
      batch_sizes: images per call; empty is any number, where ``any_batch_size``.
      platforms: any of cpu, cuda, tpu; each program runs on all of them.
      min_scores: for the manifest, the score from which a detection of each class counts, ``[K]``; the programs do not
        use it.

    Returns:
      The manifest.

    Raises:
      ConfigError: canvases or platforms are empty or repeat a value, or a batch size is invalid.
      DataError: flatbuffers is not installed, or the file cannot be written.
    """
    _check(detector.config, config.model.detector, canvases, batch_sizes, platforms)
    names, parameters = named_parameters(detector)
    parts, programs = {WEIGHTS: _npz(dict(zip(names, parameters, strict=True)))}, []
    for height, width in canvases:
        for batch in batch_sizes or (None,):
            part = f"programs/{height}x{width}{'' if batch is None else f'_batch{batch}'}.bin"
            parts[part] = lower(detector, (batch, height, width), platforms)
            programs.append({"part": part, "canvas": [height, width], "batch_size": batch})
    manifest = {
        "format": FORMAT,
        "format_version": VERSION,
        "made_with": {name: metadata.version(name) for name in ("jax", "jaxlib", "flatbuffers")},
        **description(detector, config, canvases, batch_sizes, min_scores),
        "platforms": list(platforms),
        "programs": programs,
        "parts": {
            part: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for part, data in parts.items()
        },
    }
    _write(as_path(path), {MANIFEST: json.dumps(manifest, indent=2, allow_nan=False).encode(), **parts})
    return manifest


def description(
    detector: Detector,
    config: Config,
    canvases: Sequence[Canvas],
    batch_sizes: Sequence[int],
    min_scores: np.ndarray | None,
) -> dict[str, Any]:
    """Return what any exported file says about its detector: classes, inputs and settings."""
    return {
        "name": config.name,
        "classes": config.class_names,
        "canvases": [list(canvas) for canvas in canvases],
        "batch_sizes": list(batch_sizes) or None,
        "preprocessing": {
            "pixels": "uint8 RGB; the programs normalize them",
            "resize": "keep the aspect ratio: short side to test_short px, or less where the long side would exceed "
            "test_max px; bilinear, antialiased",
            "test_short": config.data.test_short,
            "test_max": config.data.test_max,
            "exif": config.data.exif,
            "bit_depth": config.data.bit_depth,
            "max_pixels": config.data.max_pixels,
            "padding": "below and to the right, to the smallest canvas that holds the image; sizes tells what is image",
        },
        "inference": _settings(detector.config),
        **({} if min_scores is None else {"min_scores": [float(score) for score in min_scores]}),
    }


def check_once_each(*, optional: str = "", **choices: Sequence[Any]) -> None:
    """Raise ConfigError unless every choice has a value, each once; ``optional`` names one that may have none."""
    for name, values in choices.items():
        if len(set(values)) != len(values) or (not values and name != optional):
            raise ConfigError(f"{name} {values}: give at least one, each once")


def check_batch_sizes(batch_sizes: Sequence[int]) -> None:
    """Raise ConfigError if a batch would be empty."""
    if any(batch < 1 for batch in batch_sizes):
        raise ConfigError(f"batch_sizes {batch_sizes}: must be at least 1")


@contextlib.contextmanager
def file_to_write(path: Path, example: str) -> Iterator[Path]:
    """Give a path to write a file at, which then takes its place at ``path``.

    Raises:
      DataError: it cannot be written; ``example`` is a file name for the message.
    """
    if path.is_dir():
        raise DataError(f"{path}: is a folder; give a file, such as {path / example}")
    try:
        with written_aside(path) as aside:
            yield Path(aside)
    except StoreError:
        raise
    except OSError as error:
        raise DataError(f"{path}: not writable ({error}); give a file in a writable folder") from None


def any_batch_size(inference: InferenceConfig, model: str) -> bool:
    """Return whether one program of the detector ``model`` can take any number of images.

    Buffers of the cascade's sites, and of Faster R-CNN's pooled boxes, are shared by the batch.
    """
    return inference.query == "dense" and model != "faster_rcnn"


def lower(detector: Detector, shape: tuple[int | None, int, int], platforms: Sequence[str]) -> bytes:
    """Lower the program ``(weights, images, sizes) -> detections`` for images ``[B, H, W, 3]`` and serialize it.

    Args:
      shape: (B, H, W); B may be None for any number of images.
    """
    batch, height, width = shape
    names, parameters = named_parameters(detector)
    function, state = detector.function()
    tree = jax.tree.structure(state)

    def program(weights: dict[str, Array], images: Array, sizes: Array) -> dict[str, Any]:
        result = function(tree.unflatten([weights[name] for name in names]), images, sizes)
        # Return plain containers, because readers do not have this package's classes.
        fields = {name: getattr(result, name) for name in ("boxes", "scores", "classes", "valid")}
        return {**fields, "stats": {str(level): counts._asdict() for level, counts in result.stats.items()}}

    number: Any = jax.export.symbolic_shape("b")[0] if batch is None else batch
    weights = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in zip(names, parameters, strict=True)}
    with _without_folders():
        exported = jax.export.export(jax.jit(program), platforms=platforms)(
            weights,
            jax.ShapeDtypeStruct((number, height, width, 3), jnp.uint8),
            jax.ShapeDtypeStruct((number, 2), jnp.int32),
        )
        return bytes(exported.serialize())


def named_parameters(detector: Detector) -> tuple[list[str], list[Array]]:
    """Return the dotted names (``backbone.res2.0.conv1.kernel``) and the arrays of a detector's state."""
    _, state = detector.function()
    leaves = jax.tree_util.tree_leaves_with_path(state)
    names = [".".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)) for path, _ in leaves]
    return names, [leaf for _, leaf in leaves]


def check_kernel(inference: InferenceConfig, runtimes: Sequence[str], remedy: str) -> None:
    """Raise ConfigError if the kernel for TPUs would be written for other runtimes."""
    if inference.kernel == "fused" and inference.query != "dense" and tuple(runtimes) != ("tpu",):
        raise ConfigError(
            f"inference.kernel fused: is for TPUs, not for {', '.join(runtimes)}; {remedy}set inference.kernel gather"
        )


def _check(
    inference: InferenceConfig,
    model: str,
    canvases: Sequence[Canvas],
    batch_sizes: Sequence[int],
    platforms: Sequence[str],
) -> None:
    if importlib.util.find_spec("flatbuffers") is None:
        raise DataError("exporting needs flatbuffers; pip install -r requirements-export.txt")
    check_once_each(optional="batch_sizes", canvases=canvases, batch_sizes=batch_sizes, platforms=platforms)
    check_batch_sizes(batch_sizes)
    check_kernel(inference, platforms, "export with --platforms tpu, or ")
    if not batch_sizes and not any_batch_size(inference, model):
        remedy = ", or set inference.query dense" if model != "faster_rcnn" else ""
        raise ConfigError(
            f"{model} with inference.query {inference.query} has buffers whose size depends on the batch size: give "
            f"batch_sizes{remedy}"
        )


def _settings(inference: InferenceConfig) -> dict[str, Any]:
    settings = dataclasses.asdict(inference)
    del settings["batch_size"]  # the manifest lists the artifact's own batch sizes
    return settings


def _npz(arrays: dict[str, Array]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **{name: np.asarray(x) for name, x in arrays.items()})
    return buffer.getvalue()


def _write(path: Path, parts: dict[str, bytes]) -> None:
    with file_to_write(path, "detector.zip") as aside, zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED) as archive:
        for name, data in parts.items():
            entry = zipfile.ZipInfo(name)  # fixed time, so that equal artifacts are equal files
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data)


@contextlib.contextmanager
def _without_folders() -> Iterator[None]:
    """Keep only file names, not this machine's paths, in the source locations of exported programs."""
    setting = "jax_hlo_source_file_canonicalization_regex"
    before = getattr(jax.config, setting)
    jax.config.update(setting, r".*[/\\]")
    try:
        yield
    finally:
        jax.config.update(setting, before)
