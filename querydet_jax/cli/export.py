"""`querydet export`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from querydet_jax.cli.arguments import parse, results_folder
from querydet_jax.config.zoo import is_packaged
from querydet_jax.data.plan import both_orientations
from querydet_jax.inference.detector import Detector
from querydet_jax.inference.export.onnx_writer import write_onnx
from querydet_jax.inference.export.writer import PLATFORMS, any_batch_size, write_artifact
from querydet_jax.inference.min_scores import min_scores
from querydet_jax.inference.runs import open_model
from querydet_jax.runtime import machine
from querydet_jax.runtime.errors import ConfigError
from querydet_jax.viz.text import score_text
from querydet_jax.weights.packaged import read_card


@dataclass(frozen=True)
class ExportArguments:
    out: str = ""
    """The file to write (default: detector.zip or detector.onnx in the run folder, or in runs/NAME)."""
    format: Literal["artifact", "onnx"] = "artifact"
    """artifact: programs for jax. onnx: one graph for ONNX Runtime, which needs no jax (requirements-onnx.txt)."""
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
    class's with the largest F1 in the run's last evaluation; or best,CLASS=0.4,CLASS=0.2 (default: none)."""


def export(words: Sequence[str], program: str) -> None:
    """Compile a detector ahead of time into one file."""
    arguments, config, source = parse(
        ExportArguments,
        "Write a detector, weights included, as one file that runs with jax or ONNX Runtime alone: uint8 pictures to "
        "detections. "
        "Canvases, resize rule and inference settings are fixed in it.",
        words,
        program,
    )
    machine.prepare()
    model = open_model(config, source, arguments.weights or None)
    canvases = config.data.test_canvases
    if arguments.both_orientations:
        canvases = both_orientations(canvases)
    onnx = arguments.format == "onnx"
    if onnx and arguments.platforms != PLATFORMS:
        raise ConfigError("--platforms: an ONNX file is for no platform in particular; leave it out")
    if not onnx and arguments.out.endswith(".onnx"):
        raise ConfigError(f"--out {arguments.out}: an artifact is a zip archive; add --format onnx for an ONNX file")
    batch_sizes = arguments.batch_sizes
    if not batch_sizes and (onnx or not any_batch_size(config.inference, config.model.detector)):
        batch_sizes = (config.inference.batch_size,)
    scores = None
    if arguments.min_score:
        weights = Path(arguments.weights or source)
        names = config.classes or [f"class {k}" for k in range(config.model.num_classes)]
        best = read_card(weights).min_scores if is_packaged(weights) else weights
        scores = min_scores(arguments.min_score, names, best, query=config.inference.query)
    file = "detector.onnx" if onnx else "detector.zip"
    out = Path(arguments.out) if arguments.out else results_folder(source, config) / file
    begun = time.perf_counter()
    detector = Detector(model, config.inference)
    common: dict[str, Any] = dict(canvases=canvases, batch_sizes=batch_sizes, min_scores=scores)
    if onnx:
        write_onnx(out, detector, config, **common)
    else:
        write_artifact(out, detector, config, platforms=arguments.platforms, **common)
    count = len(canvases) * max(len(batch_sizes), 1)
    shapes = ", ".join(f"{height}x{width}" for height, width in canvases)
    numbers = ", ".join(map(str, batch_sizes)) if batch_sizes else "any"
    counts = "" if scores is None else f", scores from {score_text(scores)}"
    runtime = "ONNX Runtime" if onnx else ", ".join(arguments.platforms)
    print(
        f"{out}: {out.stat().st_size / 1e6:.1f} MB, {count} program{'s' * (count > 1)} in "
        f"{time.perf_counter() - begun:.1f} s; {config.inference.query}, canvases {shapes}, batch size {numbers}, for "
        f"{runtime}{counts}\nuse it with: querydet predict {out} --images PICTURE_OR_FOLDER"
    )
