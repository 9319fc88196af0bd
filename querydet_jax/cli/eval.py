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
from querydet_jax.data.plan import both_orientations
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
    evaluate_tiled,
    first_images,
)
from querydet_jax.evaluation.worst import PAGE, check_apart, find_worst, write_worst
from querydet_jax.inference.results import run_on_images
from querydet_jax.inference.runs import open_model
from querydet_jax.inference.tiling import OVERLAP, Tiles, parse_tiles, run_tiled
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
    tiles: str = "off"
    """As `querydet predict --tiles`: auto cuts large images that would be shrunk into windows at their own scale; a
    number cuts every image into that many windows along its longer side; off sees every image whole."""
    overlap: float = OVERLAP
    """With --tiles: least share of a window that the next one shows, too."""
    query_recall: bool = True
    """Also count which objects the queries reach, at several thresholds (a second, untimed pass; not with --tiles)."""
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
    tiles = parse_tiles(arguments.tiles, arguments.overlap, ("--tiles", "--overlap"))
    if tiles and arguments.missed:
        raise ConfigError("--missed: is of whole images; leave out --tiles")
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
    data, batch_size = config.data, config.inference.batch_size
    if tiles:  # predict's canvases, and so its windows
        data = dataclasses.replace(data, test_canvases=both_orientations(data.test_canvases))
    detectors = detectors_to_compare(model, dataclasses.replace(config, data=data), arguments.methods)
    indices = first_images(dataset, arguments.images)
    if tiles:
        runs = evaluate_tiled(
            detectors, dataset, data, tiles, batch_size=batch_size, indices=indices, judge=arguments.judge
        )
    else:
        runs = evaluate_detectors(
            detectors,
            dataset,
            data,
            batch_size=batch_size,
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
            lost[name] = count_missed(detector, dataset, data, score=_MISSED_AT, batch_size=batch_size, indices=indices)
            print(f"\nwhere objects are lost ({name}), percent, at score {_MISSED_AT}\n{lost[name].table()}")
    cut = f"\nin windows: --tiles {arguments.tiles} --overlap {tiles.overlap:g}" if tiles else ""
    print(f"\n{comparison_table(runs)}{cut}\n\n{machine.one_line()}")
    write_json(out / "report.json", _report(config, weights, step, runs, lost, indices, tiles), indent=2)
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
        last, nms_iou = list(detectors.values())[-1], config.inference.nms_iou
        if tiles:
            seen = run_tiled(
                last, dataset, data, tiles, min_scores=0.0, nms_iou=nms_iou, batch_size=batch_size, indices=drawn
            )
        else:
            seen = run_on_images(last, dataset, data, drawn)
        for result in seen:
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
    tiles: Tiles | None,
) -> dict[str, Any]:
    batch_size = config.inference.batch_size
    timed = f"images, {batch_size} windows at a time" if tiles else f"batches of {batch_size}"
    first = next(iter(runs.values())).ms_median
    return {
        "config": dataclasses.asdict(config),
        "weights": str(weights),
        "step": step,
        "machine": machine.describe(),
        "images": "all" if indices is None else len(indices),
        **({"tiles": tiles.number or "auto", "overlap": tiles.overlap} if tiles else {}),
        "methods": {name: run.to_dict() for name, run in runs.items()},
        **({"missed": {name: counts.to_dict() for name, counts in lost.items()}} if lost else {}),
        "speed_up": {name: first / run.ms_median for name, run in runs.items() if not np.isnan(run.ms_median)},
        "timing": f"median over {timed}, detectors in turn, {jax.default_backend()}",
    }


def _spread(total: int, count: int) -> list[int]:
    """Return ``count`` positions spread evenly over ``total``."""
    return sorted({int(i) for i in np.linspace(0, total - 1, min(count, total))}) if total and count else []
