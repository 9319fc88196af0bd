"""`querydet eval`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from querydet_jax.cli.arguments import parse, results_folder
from querydet_jax.cli.main import SUMMARIES
from querydet_jax.config import Config
from querydet_jax.data import Dataset, open_split
from querydet_jax.data.sources import images_folder
from querydet_jax.evaluation.errors import attribute
from querydet_jax.evaluation.judges import Judge, check_judge
from querydet_jax.evaluation.missed import MissedObjects, count_missed
from querydet_jax.evaluation.output import write_scores
from querydet_jax.evaluation.runner import (
    Evaluation,
    comparison_table,
    detectors_to_compare,
    evaluate_detectors,
    first_images,
)
from querydet_jax.evaluation.worst import PAGE, check_apart, find_worst, write_worst
from querydet_jax.inference.results import run_on_images
from querydet_jax.inference.runs import open_model
from querydet_jax.runtime import machine
from querydet_jax.runtime.checkpoint_store import newest_step
from querydet_jax.runtime.errors import ConfigError
from querydet_jax.runtime.files import beside, check_writable, identity, write_json
from querydet_jax.runtime.hosts import Hosts, is_first, join, on_every
from querydet_jax.runtime.names import result_stems
from querydet_jax.runtime.stores import as_path
from querydet_jax.viz.draw import save_image
from querydet_jax.viz.stages import cascade_pictures, overview

_MISSED_AT = 0.3  # what predict draws and lists from


@dataclass(frozen=True)
class EvalArguments:
    weights: str = ""
    """Weight file (.pth .pkl .npz .safetensors) or run folder, if the source is a card."""
    out: str = ""
    """Folder for report.json, detections, curves and pictures (default: the run folder, or runs/NAME)."""
    methods: tuple[str, ...] = ()
    """Any of dense, csq, cq, ccq (default: dense and, if the model has a query head, inference.query or csq)."""
    images: int = 0
    """Use only the first N images (0: all)."""
    pictures: int = 6
    """Images to draw."""
    query_recall: bool = True
    """Also count which objects the queries reach, at several thresholds (a second, untimed pass)."""
    missed: bool = False
    """Also tell where objects under 32 px are lost, at score 0.3: query, heads or NMS (one host; a further pass)."""
    worst: int = 0
    """Also draw the N images with the gravest errors of each kind (class, location .. missed), of the last method:
    worst/index.html, a page for the browser."""
    judge: Judge = "pycocotools"
    """Who computes COCO's metrics; hotcoco (pip install -r requirements-hotcoco.txt) gives the same ones sooner."""
    hosts: Hosts = field(default_factory=Hosts)


def evaluate(words: Sequence[str], program: str) -> None:
    """Evaluate a trained detector, densely and with Cascade Sparse Query."""
    arguments, config, source = parse(EvalArguments, SUMMARIES["eval"], words, program)
    for name in ("images", "pictures", "worst"):
        if getattr(arguments, name) < 0:
            raise ConfigError(f"--{name} {getattr(arguments, name)}: give 0 or more")
    check_judge(arguments.judge)
    join(arguments.hosts)
    machine.prepare()
    model = open_model(config, source, arguments.weights or None)
    weights = as_path(arguments.weights or source)
    step = newest_step(weights)  # a training may write further ones meanwhile
    dataset = on_every(lambda: open_split(config, "val", str(source)))
    out = as_path(arguments.out or results_folder(source, config))
    if is_first():
        check_writable(out)
        if arguments.worst:
            check_apart(out, images_folder(config.data, "val"))
    detectors = detectors_to_compare(model, config, arguments.methods)
    indices = first_images(dataset, arguments.images)
    runs = evaluate_detectors(
        detectors,
        dataset,
        config.data,
        batch_size=config.inference.batch_size,
        indices=indices,
        query_recall=arguments.query_recall,
        judge=arguments.judge,
    )
    if not is_first():
        return
    for name, result in runs.items():
        print(f"\n{name}: {result.scores.table()}")
        for level, recall in result.recall.items():
            print(
                f"\nquery recall on P{level} ({name}): percent of the objects whose centre cell is a key, "
                f"by query threshold (*: as configured)\n{recall.table()}"
            )
    lost = {}
    if arguments.missed:
        for name, detector in detectors.items():
            batch_size = config.inference.batch_size
            lost[name] = count_missed(
                detector, dataset, config.data, score=_MISSED_AT, batch_size=batch_size, indices=indices
            )
            print(f"\nwhere objects are lost ({name}), percent, at score {_MISSED_AT}\n{lost[name].table()}")
    print(f"\n{comparison_table(runs)}\n\n{machine.one_line()}")
    write_json(out / "report.json", _report(config, weights, step, runs, lost, indices), indent=2)
    written = write_scores(out, {name: result.scores for name, result in runs.items()})
    if arguments.worst:
        count = _draw_worst(out, dataset, list(runs.values())[-1].scores.results, arguments.worst, indices)
        written.append(f"{PAGE} ({count})")
    names = config.classes or dataset.classes
    drawn = _spread(len(dataset) if indices is None else len(indices), arguments.pictures)
    if drawn:
        folder = images_folder(config.data, "val")
        inputs = {identity(folder / dataset.file_name(i)) for i in range(len(dataset))} - {None} if folder else set()
        stems = dict(zip(drawn, result_stems([dataset.file_name(i) for i in drawn]), strict=True))
        for result in run_on_images(list(detectors.values())[-1], dataset, config.data, drawn):
            truth = dataset.annotation(result.index).boxes
            pictures = cascade_pictures(result, names, config.inference.threshold, truth=truth)
            save_image(
                beside(out / "pictures" / f"{stems[result.index]}.jpg", inputs), overview(result.image, pictures)
            )
    pictures_written = [f"pictures/ ({len(drawn)})"] if drawn else []
    print(f"wrote to {out}: {', '.join(['report.json', *written, *pictures_written])}")


def _draw_worst(
    out: Path, dataset: Dataset, results: list[dict[str, Any]], count: int, indices: list[int] | None
) -> int:
    """Draw the images with the gravest errors, and return how many."""
    position = {dataset.image_id(i): i for i in (range(len(dataset)) if indices is None else indices)}
    truth, chosen = dataset.coco_ground_truth(), list(position)
    worst = find_worst(truth, results, attribute(truth, results, image_ids=chosen), count, image_ids=chosen)
    names = {identifier: dataset.file_name(i) for identifier, i in position.items()}
    return write_worst(out, worst, names, lambda identifier: dataset.load(position[identifier]))


def _report(
    config: Config,
    weights: Path,
    step: int | None,
    runs: dict[str, Evaluation],
    lost: dict[str, MissedObjects],
    indices: list[int] | None,
) -> dict[str, Any]:
    first = next(iter(runs.values())).ms_median
    return {
        "config": dataclasses.asdict(config),
        "weights": str(weights),
        "step": step,
        "machine": machine.describe(),
        "images": "all" if indices is None else len(indices),
        "methods": {name: run.to_dict() for name, run in runs.items()},
        **({"missed": {name: counts.to_dict() for name, counts in lost.items()}} if lost else {}),
        "speed_up": {name: first / run.ms_median for name, run in runs.items() if not np.isnan(run.ms_median)},
        "timing": f"median over batches of {config.inference.batch_size}, detectors in turn, {jax.default_backend()}",
    }


def _spread(total: int, count: int) -> list[int]:
    """Return ``count`` positions spread evenly over ``total``."""
    return sorted({int(i) for i in np.linspace(0, total - 1, min(count, total))}) if total and count else []
