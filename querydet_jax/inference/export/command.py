"""What `export.py` does."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from querydet_jax.cli.command_line import parse
from querydet_jax.data.plan import both_orientations
from querydet_jax.inference.detector import Detector
from querydet_jax.inference.export.writer import PLATFORMS, write_artifact
from querydet_jax.inference.runs import open_model


@dataclass(frozen=True)
class ExportArguments:
    out: str = ""
    """The file to write (default: detector.zip in the run folder, or in runs/NAME)."""
    weights: str = ""
    """Weight file (.pth .pkl .npz .safetensors) or run folder, where the source is a configuration file."""
    platforms: tuple[Literal["cpu", "cuda", "tpu"], ...] = PLATFORMS
    """Where it shall run; none of them needs to be here."""
    batch_sizes: tuple[int, ...] = ()
    """Numbers of images a call, a program each (default: dense inference any number, in one program; else
    inference.batch_size, because the buffers of the cascade are pooled over the batch)."""
    both_orientations: bool = True
    """Also take every canvas of data.test-canvases on its side, as predict.py does."""


def export() -> None:
    """Compile a detector ahead of time into one file."""
    arguments, config, source = parse(
        ExportArguments,
        "Write a detector, weights included, as one file that runs with jax alone: uint8 pictures to detections. "
        "Canvases, resize rule and inference settings are fixed in it.",
    )
    model = open_model(config, source, arguments.weights or None)
    canvases = config.data.test_canvases
    if arguments.both_orientations:
        canvases = both_orientations(canvases)
    batch_sizes = arguments.batch_sizes
    if not batch_sizes and config.inference.query != "dense":
        batch_sizes = (config.inference.batch_size,)
    folder = Path(source) if Path(source).is_dir() else Path("runs") / config.name
    out = Path(arguments.out) if arguments.out else folder / "detector.zip"
    begun = time.perf_counter()
    manifest = write_artifact(
        out,
        Detector(model, config.inference),
        config,
        canvases=canvases,
        batch_sizes=batch_sizes,
        platforms=arguments.platforms,
    )
    count = len(manifest["programs"])
    shapes = ", ".join(f"{height}x{width}" for height, width in canvases)
    numbers = ", ".join(map(str, batch_sizes)) if batch_sizes else "any"
    print(
        f"{out}: {out.stat().st_size / 1e6:.1f} MB, {count} program{'s' * (count > 1)} in "
        f"{time.perf_counter() - begun:.1f} s; {config.inference.query}, canvases {shapes}, batch size {numbers}, for "
        f"{', '.join(arguments.platforms)}\nuse it with: python predict.py --artifact {out} --images PICTURE_OR_FOLDER"
    )
