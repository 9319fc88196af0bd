"""`querydet report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from querydet_jax.analysis import figure
from querydet_jax.analysis.augmented import augmented_sheet
from querydet_jax.analysis.findings import image_rows, measure, results
from querydet_jax.analysis.tables import text
from querydet_jax.cli.arguments import parse
from querydet_jax.config import Config
from querydet_jax.data import open_dataset
from querydet_jax.runtime import machine
from querydet_jax.runtime.errors import ConfigError
from querydet_jax.runtime.files import write_csv, write_json, writing
from querydet_jax.runtime.names import printable
from querydet_jax.runtime.stores import as_path
from querydet_jax.viz.draw import save_image
from querydet_jax.viz.plots import NEEDS, save_plot
from querydet_jax.viz.training_curves import save_curves


@dataclass(frozen=True)
class ReportArguments:
    split: Literal["train", "val"] = "train"
    """Which half of the data set, under its own resize rule."""
    out: str = ""
    """Folder for report.json, images.csv and report.png (default: data-SPLIT in the run folder, or in runs/NAME); for
    curves.png (default: the run folder)."""
    augmented: int = 0
    """Also draw the first N training images, as resized, cropped and augmented (augmented.jpg)."""
    curves: bool = False
    """Draw a run's losses, learning rate and metrics (curves.png) from its metrics.jsonl, and count nothing."""


def report(words: Sequence[str], program: str) -> None:
    """Count what a data set asks of a configuration: sizes, anchors, queries, buffers."""
    arguments, config, source = parse(
        ReportArguments,
        "Count what a data set asks of a configuration, without reading an image (--augmented reads some). "
        "With --curves, draw how a run's training went instead.",
        words,
        program,
    )
    machine.prepare()
    if arguments.curves:
        _draw_curves(source, config, as_path(arguments.out) if arguments.out else source)
        return
    above = source if source.is_dir() else Path("runs") / config.name
    out = as_path(arguments.out) if arguments.out else above / f"data-{arguments.split}"
    if arguments.augmented < 0 or (arguments.augmented and arguments.split != "train"):
        raise ConfigError(f"--augmented {arguments.augmented}: give a number of images, with --split train")
    dataset = open_dataset(config.data, arguments.split)
    found = measure(dataset, config, arguments.split)
    counted: dict[str, Any] = results(found)
    print(printable(text(counted, config)))
    write_json(out / "report.json", counted, indent=2)
    write_csv(out / "images.csv", image_rows(found))
    with writing(out / "report.png"):
        plotted = save_plot(partial(figure.draw, found=found, results=counted), out / "report.png", figure.SIZE)
    written = ["report.json", "images.csv", "report.png" if plotted else f"no report.png, which {NEEDS}"]
    if arguments.augmented:
        save_image(out / "augmented.jpg", augmented_sheet(dataset, config, arguments.augmented))
        written.append("augmented.jpg")
    print(f"wrote to {out}: {', '.join(written)}")


def _draw_curves(run: Path, config: Config, out: Path) -> None:
    if not run.is_dir():
        raise ConfigError(f"--curves: {run} is no run; give the folder that `querydet train` wrote")
    path = out / "curves.png"
    if not save_curves(run / "metrics.jsonl", path, config.train.best_metric):
        raise ConfigError(f"--curves: {NEEDS}")
    print(f"wrote {path}")
