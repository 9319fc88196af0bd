"""`querydet export`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from querydet_jax.cli.arguments import parse
from querydet_jax.data.plan import both_orientations
from querydet_jax.inference.detector import Detector
from querydet_jax.inference.export.writer import PLATFORMS, any_batch_size, write_artifact
from querydet_jax.inference.min_scores import min_scores
from querydet_jax.inference.runs import open_model
from querydet_jax.runtime import machine
from querydet_jax.viz.text import score_text


@dataclass(frozen=True)
class ExportArguments:
    out: str = ""
    """The file to write (default: detector.zip in the run folder, or in runs/NAME)."""
    weights: str = ""
    """Weight file (.pth .pkl .npz .safetensors) or run folder, if the source is a card."""
    platforms: tuple[Literal["cpu", "cuda", "tpu"], ...] = PLATFORMS
    """Platforms to compile for; none needs to be present."""
    batch_sizes: tuple[int, ...] = ()
    """Images per call, one program each (default: for dense inference any number, in one program; for Faster R-CNN
    and otherwise inference.batch_size, because buffers are pooled over the batch)."""
    both_orientations: bool = True
    """Also accept every canvas of data.test-canvases turned on its side, as predict does."""
    min_score: str = ""
    """The score from which detections count, for whoever runs the file; the programs give all. A number; best, each
    class's with the largest F1 in the run's last evaluation; or best,CLASS=0.4,CLASS=0.2 (default: none)."""


def export(words: Sequence[str], program: str) -> None:
    """Compile a detector ahead of time into one file."""
    arguments, config, source = parse(
        ExportArguments,
        "Write a detector, weights included, as one file that runs with jax alone: uint8 pictures to detections. "
        "Canvases, resize rule and inference settings are fixed in it.",
        words,
        program,
    )
    machine.prepare()
    model = open_model(config, source, arguments.weights or None)
    canvases = config.data.test_canvases
    if arguments.both_orientations:
        canvases = both_orientations(canvases)
    batch_sizes = arguments.batch_sizes
    if not batch_sizes and not any_batch_size(config.inference, config.model.detector):
        batch_sizes = (config.inference.batch_size,)
    scores = None
    if arguments.min_score:
        weights = Path(arguments.weights or source)
        names = config.classes or [f"class {k}" for k in range(config.model.num_classes)]
        scores = min_scores(
            arguments.min_score, names, weights if weights.is_dir() else None, query=config.inference.query
        )
    folder = source if source.is_dir() else Path("runs") / config.name
    out = Path(arguments.out) if arguments.out else folder / "detector.zip"
    begun = time.perf_counter()
    manifest = write_artifact(
        out,
        Detector(model, config.inference),
        config,
        canvases=canvases,
        batch_sizes=batch_sizes,
        platforms=arguments.platforms,
        min_scores=scores,
    )
    count = len(manifest["programs"])
    shapes = ", ".join(f"{height}x{width}" for height, width in canvases)
    numbers = ", ".join(map(str, batch_sizes)) if batch_sizes else "any"
    counts = "" if scores is None else f", scores from {score_text(scores)}"
    print(
        f"{out}: {out.stat().st_size / 1e6:.1f} MB, {count} program{'s' * (count > 1)} in "
        f"{time.perf_counter() - begun:.1f} s; {config.inference.query}, canvases {shapes}, batch size {numbers}, for "
        f"{', '.join(arguments.platforms)}{counts}\nuse it with: querydet predict {out} --images PICTURE_OR_FOLDER"
    )
