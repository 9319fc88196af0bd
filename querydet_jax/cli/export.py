"""`querydet export`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from querydet_jax.cli.arguments import parse, results_folder
from querydet_jax.config import Config, override
from querydet_jax.config.zoo import is_packaged
from querydet_jax.data import open_split
from querydet_jax.data.plan import both_orientations
from querydet_jax.data.readers.images import Reading
from querydet_jax.data.readers.pictures import open_pictures
from querydet_jax.inference.detector import Detector
from querydet_jax.inference.export.onnx_calibration import calibrate
from querydet_jax.inference.export.onnx_int8 import Calibration
from querydet_jax.inference.export.onnx_writer import write_onnx
from querydet_jax.inference.export.web import write_page
from querydet_jax.inference.export.writer import PLATFORMS, Canvas, any_batch_size, write_artifact
from querydet_jax.inference.min_scores import BEST, min_scores
from querydet_jax.inference.runs import open_model
from querydet_jax.models.base import DenseDetector
from querydet_jax.runtime import machine
from querydet_jax.runtime.errors import ConfigError
from querydet_jax.runtime.stores import as_path, size_of
from querydet_jax.viz.text import score_text
from querydet_jax.weights.packaged import read_card

TRAIN = "train"  # names the pictures of the data set that trains
_NAMES = {"artifact": "detector.zip", "onnx": "detector.onnx", "web": "web"}


@dataclass(frozen=True)
class ExportArguments:
    out: str = ""
    """The file or folder to write (default: detector.zip, detector.onnx or web in the run folder, or in runs/NAME)."""
    format: Literal["artifact", "onnx", "web"] = "artifact"
    """artifact: programs for jax. onnx: one graph for ONNX Runtime, which needs no jax (requirements-onnx.txt). web: a
    folder with a page that detects in the browser; any web server serves it (same requirements)."""
    weights: str = ""
    """Weight file (.pth .pkl .npz .safetensors) or run folder, if the source is a card."""
    platforms: tuple[Literal["cpu", "cuda", "tpu"], ...] = PLATFORMS
    """Platforms that an artifact is compiled for; none needs to be present."""
    batch_sizes: tuple[int, ...] = ()
    """Images per call, one program each (default: inference.batch_size, because buffers are pooled over the batch; in
    an artifact, for dense inference of RetinaNet and FCOS, any number, in one program)."""
    both_orientations: bool = True
    """Also accept every canvas of data.test-canvases turned on its side, as predict does."""
    min_score: str = ""
    """The score from which detections count, for whoever runs the file; the programs give all. A number; best, each
    class's with the largest F1 in the run's last evaluation; or best,CLASS=0.4,CLASS=0.2 (default: none; for web, where
    the page starts: best for packaged weights, otherwise 0.3)."""
    precision: Literal["float32", "int8"] = "float32"
    """Of an ONNX file's convolutions. int8 computes faster on CPUs, and needs pictures for calibration."""
    calibration: tuple[str, ...] = ()
    """With int8: pictures, or folders of them, like those that the detector will see; or train, the data set's training
    pictures (--data.root)."""
    calibration_images: int = 200
    """With int8: look at so many of these pictures, spread evenly."""
    examples: tuple[str, ...] = ()
    """For web: pictures, or folders of them, that the page offers; an ATTRIBUTION.md beside them comes along (default:
    none; in a checkout, those of packaged weights in examples/NAME)."""
    runtime: str = ""
    """For web: the npm package onnxruntime-web as a file (.tgz) or unpacked folder (default: fetched once and kept)."""


def export(words: Sequence[str], program: str) -> None:
    """Compile a detector ahead of time into one file, or into a page."""
    arguments, config, source = parse(
        ExportArguments,
        "Write a detector, weights included, as one file that runs with jax or ONNX Runtime alone, or as a page for "
        "the browser: uint8 pictures to detections. "
        "Canvases, resize rule and inference settings are fixed in it.",
        words,
        program,
    )
    _check(arguments)
    machine.prepare()
    model = open_model(config, source, arguments.weights or None)
    canvases = config.data.test_canvases
    if arguments.both_orientations:
        canvases = both_orientations(canvases)
    to = arguments.format
    batch_sizes = (1,) if to == "web" else arguments.batch_sizes
    if not batch_sizes and (to == "onnx" or not any_batch_size(config.inference, config.model.detector)):
        batch_sizes = (config.inference.batch_size,)
    int8 = _calibration(arguments, model, config, canvases, str(source)) if arguments.precision == "int8" else None
    weights = as_path(arguments.weights or source)
    card = read_card(weights) if is_packaged(weights) else None
    best = weights if card is None else card.min_scores
    chosen = arguments.min_score or (BEST if to == "web" and card and card.min_scores else "")
    scores = None
    if chosen or to == "web":  # a page needs some to start with
        scores = min_scores(chosen, config.class_names, best, query=config.inference.query)
    out = as_path(arguments.out) if arguments.out else results_folder(source, config) / _NAMES[to]
    begun = time.perf_counter()
    count = len(canvases) * max(len(batch_sizes), 1)
    use = f"querydet predict {out} --images PICTURE_OR_FOLDER"
    common: dict[str, Any] = dict(canvases=canvases, min_scores=scores)
    if to == "web":
        examples = arguments.examples or _examples(source)
        write_page(out, model, config, card=card, examples=examples, runtime=arguments.runtime, **common)
        count *= 1 if config.inference.query == "dense" else 2
        use = f"python -m http.server --directory {out} 8000, and open http://localhost:8000"
    elif to == "onnx":
        write_onnx(out, Detector(model, config.inference), config, batch_sizes=batch_sizes, int8=int8, **common)
    else:
        detector = Detector(model, config.inference)
        write_artifact(out, detector, config, batch_sizes=batch_sizes, platforms=arguments.platforms, **common)
    size = size_of(out)
    shapes = ", ".join(f"{height}x{width}" for height, width in canvases)
    numbers = ", ".join(map(str, batch_sizes)) if batch_sizes else "any"
    counts = "" if scores is None else f", scores from {score_text(scores)}"
    measured = "" if int8 is None else f", int8 by {int8.images} pictures of {int8.source}"
    runtime = {"onnx": "ONNX Runtime", "web": "browsers"}.get(to, ", ".join(arguments.platforms))
    print(
        f"{out}: {size / 1e6:.1f} MB, {count} program{'s' * (count > 1)} in "
        f"{time.perf_counter() - begun:.1f} s; {config.inference.query}, canvases {shapes}, batch size {numbers}, for "
        f"{runtime}{counts}{measured}\nuse it with: {use}"
    )


def _check(arguments: ExportArguments) -> None:
    """Refuse options that the format has no use for."""
    to = arguments.format
    if to != "artifact" and arguments.platforms != PLATFORMS:
        kind = "an ONNX file" if to == "onnx" else "a page"
        raise ConfigError(f"--platforms: {kind} is for no platform in particular; leave it out")
    if to == "artifact" and arguments.out.endswith(".onnx"):
        raise ConfigError(f"--out {arguments.out}: an artifact is a zip archive; add --format onnx for an ONNX file")
    if to == "web" and arguments.batch_sizes:
        raise ConfigError("--batch-sizes: a page looks at one picture at a time; leave it out")
    if arguments.precision == "int8":
        if to != "onnx":
            raise ConfigError(f"--precision int8: is for ONNX files, not for {to}; add --format onnx, or leave it out")
        if not arguments.calibration:
            raise ConfigError("--precision int8: needs --calibration: pictures, or a folder of them, or train")
        if arguments.calibration_images < 1:
            raise ConfigError(f"--calibration-images {arguments.calibration_images}: give 1 or more")
    elif arguments.calibration:
        raise ConfigError("--calibration: is for int8; add --precision int8, or leave it out")
    for name in ("examples", "runtime"):
        if to != "web" and getattr(arguments, name):
            raise ConfigError(f"--{name}: is for pages; add --format web, or leave it out")


def _calibration(
    arguments: ExportArguments, model: DenseDetector, config: Config, canvases: Sequence[Canvas], source: str
) -> Calibration:
    names = arguments.calibration
    if names == (TRAIN,):
        dataset = open_split(config, TRAIN, source)
    else:
        dataset = open_pictures(names, config.class_names, Reading.of(config.data))
    data = override(config.data, {"test_canvases": tuple(canvases)})
    images = arguments.calibration_images
    return calibrate(model, dataset, data, images=images, source=", ".join(names))


def _examples(source: Path) -> tuple[Path, ...]:
    """Return the folder of pictures that a checkout has for packaged weights."""
    folder = Path(__file__).parents[2] / "examples" / source.name
    return (folder,) if is_packaged(source) and folder.is_dir() else ()
