"""What `train.py`, `eval.py` and `predict.py` do."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from querydet_jax.cli.command_line import parse, parse_for_artifact
from querydet_jax.config import Config, DataConfig, InferenceConfig, override
from querydet_jax.data import Dataset, open_dataset
from querydet_jax.data.plan import both_orientations
from querydet_jax.data.readers.pictures import Pictures
from querydet_jax.data.sources import check_classes
from querydet_jax.evaluation.output import write_scores
from querydet_jax.evaluation.runner import Evaluation, comparison_table, evaluate_detectors, first_images
from querydet_jax.inference.detector import Detector
from querydet_jax.inference.export.artifact import Artifact
from querydet_jax.inference.runs import open_model
from querydet_jax.inference.views import look, overview, pictures_of
from querydet_jax.models import DenseDetector
from querydet_jax.runtime import machine
from querydet_jax.runtime.errors import ConfigError, DataError
from querydet_jax.runtime.files import write_json
from querydet_jax.runtime.hosts import Hosts, is_first, join, on_every
from querydet_jax.training import train as run_training
from querydet_jax.viz.draw import save_image


@dataclass(frozen=True)
class TrainArguments:
    run: str = ""
    """Folder of the run: configuration, metrics, checkpoints (default: runs/NAME, or the run folder given)."""
    resume: bool = False
    """Go on from the run's newest checkpoint."""
    profile: bool = False
    """Also write a trace of a few steps to RUN/profile, for TensorBoard's profiler and ui.perfetto.dev."""
    hosts: Hosts = field(default_factory=Hosts)


def train() -> None:
    """Train a detector."""
    arguments, config, source = parse(TrainArguments, "Train a detector on all devices, of one host or several.")
    join(arguments.hosts, preemptible=True)
    run = Path(arguments.run or (source if Path(source).is_dir() else f"runs/{config.name}"))

    detectors: dict[str, Detector] = {}

    def evaluate(model: DenseDetector, dataset: Dataset, between: Callable[[], None]) -> dict[str, float]:
        for detector in detectors.values():
            detector.update(model)
        if not detectors:
            detectors.update(_detectors(model, config, ()))
        runs = evaluate_detectors(
            detectors, dataset, config.data, batch_size=config.inference.batch_size,
            indices=first_images(dataset, config.train.eval_images), size_bins=(), between=between,
        )  # fmt: skip
        if is_first():
            print(comparison_table(runs), flush=True)
        return {
            f"{name}/{key}": value
            for name, result in runs.items()
            for key, value in {**result.scores.named(), "ms_per_image": result.ms_median}.items()
        }

    run_training(config, run, resume=arguments.resume, evaluate=evaluate, profile=arguments.profile)
    if is_first():
        print(f"trained; evaluate with: python eval.py {run}")


@dataclass(frozen=True)
class EvalArguments:
    weights: str = ""
    """Weight file (.pth .pkl .npz .safetensors) or run folder, where the source is a configuration file."""
    out: str = ""
    """Folder for report.json, detections, curves and pictures (default: the run folder, or runs/NAME)."""
    methods: tuple[str, ...] = ()
    """Of dense, csq, cq, ccq (default: dense and, if the model has a query head, inference.query or csq)."""
    images: int = 0
    """Use the first so many images only (0: all)."""
    pictures: int = 6
    """Images to draw."""
    query_recall: bool = True
    """Also count which objects the queries reach, at several thresholds (a second, untimed pass)."""
    hosts: Hosts = field(default_factory=Hosts)


def evaluate() -> None:
    """Evaluate a trained detector, densely and with Cascade Sparse Query."""
    arguments, config, source = parse(EvalArguments, "Evaluate a detector, densely and with Cascade Sparse Query.")
    join(arguments.hosts)
    model = open_model(config, source, arguments.weights or None)
    dataset = on_every(lambda: open_dataset(config.data, "val"))
    check_classes(config, dataset)
    out = Path(arguments.out or (source if Path(source).is_dir() else f"runs/{config.name}"))
    detectors = _detectors(model, config, arguments.methods)
    indices = first_images(dataset, arguments.images)
    runs = evaluate_detectors(
        detectors,
        dataset,
        config.data,
        batch_size=config.inference.batch_size,
        indices=indices,
        query_recall=arguments.query_recall,
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
    print(f"\n{comparison_table(runs)}\n\n{machine.one_line()}")
    write_json(out / "report.json", _report(config, runs, indices), indent=2)
    written = write_scores(out, {name: result.scores for name, result in runs.items()})
    names = config.classes or dataset.classes
    drawn = _spread(len(dataset) if indices is None else len(indices), arguments.pictures)
    if drawn:
        for seen in look(list(detectors.values())[-1], dataset, config.data, drawn):
            truth = dataset.annotation(seen.index).boxes
            sheet = overview(seen, pictures_of(seen, names, config.inference.threshold, truth=truth))
            save_image(out / "pictures" / f"{Path(dataset.file_name(seen.index)).stem}.jpg", sheet)
    pictures = [f"pictures/ ({len(drawn)})"] if drawn else []
    print(f"wrote to {out}: {', '.join(['report.json', *written, *pictures])}")


@dataclass(frozen=True)
class PredictArguments:
    images: tuple[str, ...] = ()
    """Pictures, or folders of pictures."""
    out: str = "predictions"
    """Folder for the pictures and detections.json."""
    weights: str = ""
    """Weight file or run folder, where the source is a configuration file."""
    min_score: float = 0.3
    """Draw and list detections above this."""
    artifact: str = ""
    """What export.py has written, in place of CONFIG_OR_RUN: no pictures of queries, and no field to set."""


def predict() -> None:
    """Detect in pictures and draw what was found and, for a run, what was computed."""
    description = "Detect objects in pictures."
    if any(word.split("=")[0] == "--artifact" for word in sys.argv[1:]):
        arguments = parse_for_artifact(PredictArguments, description)
        if arguments.weights:
            raise ConfigError(f"--weights {arguments.weights}: an artifact has its own; export again with these")
        detector = Artifact(arguments.artifact)
        config, batch_size = _artifact_config(detector), min(detector.batch_sizes or (1,))
    else:
        arguments, config, source = parse(PredictArguments, description)
        detector = Detector(open_model(config, source, arguments.weights or None), config.inference)
        canvases = both_orientations(config.data.test_canvases)
        config, batch_size = override(config, {"data.test_canvases": canvases}), 1
    if not arguments.images:
        raise DataError("--images: name at least one picture or folder")
    names = config.classes or tuple(f"class {k}" for k in range(config.model.num_classes))
    pictures = Pictures(arguments.images, names)
    out = Path(arguments.out)
    entries, used = [], set()
    for seen in look(detector, pictures, config.data, batch_size=batch_size):
        file = Path(pictures.file_name(seen.index))
        stem = file.stem
        while stem in used:  # pictures of one name from different folders
            stem += "_"
        used.add(stem)
        drawn = pictures_of(seen, names, config.inference.threshold, min_score=arguments.min_score)
        for title, picture in drawn.items():
            save_image(out / f"{stem}_{title}.jpg", picture)
        kept = seen.scores >= arguments.min_score
        entries.append(
            {
                "file": str(file),
                "height": seen.image.shape[0],
                "width": seen.image.shape[1],
                "detections": [
                    {
                        "class": names[k],
                        "class_id": int(k),
                        "score": float(s),
                        "box_xyxy": [round(float(v), 2) for v in b],
                    }
                    for b, s, k in zip(seen.boxes[kept], seen.scores[kept], seen.classes[kept], strict=True)
                ],
            }
        )
        print(f"{file}: {int(kept.sum())} objects; {', '.join(sorted(drawn))} -> {out}/{stem}_*.jpg", flush=True)
    write_json(
        out / "detections.json", {"images": entries, "model": config.name, "query": config.inference.query}, indent=2
    )


def _artifact_config(artifact: Artifact) -> Config:
    """What an artifact's manifest says about its detector, as a configuration."""
    manifest = artifact.manifest
    resize, inference = manifest["preprocessing"], manifest["inference"]
    return Config(
        name=manifest["name"],
        classes=artifact.classes,
        data=DataConfig(test_short=resize["test_short"], test_max=resize["test_max"], test_canvases=artifact.canvases),
        inference=InferenceConfig(query=inference["query"], threshold=inference["threshold"]),
    )


def _detectors(model: DenseDetector, config: Config, methods: tuple[str, ...]) -> dict[str, Detector]:
    """The dense detector first, so that speed-ups are over it."""
    if not methods:
        configured = config.inference.query if config.inference.query != "dense" else "csq"
        methods = ("dense", configured) if model.query_head is not None else ("dense",)
    known = ("dense", "csq", "cq", "ccq")
    for name in methods:
        if name not in known:
            raise DataError(f"--methods {name}: is not one of {', '.join(known)}")
    return {
        name: Detector(model, dataclasses.replace(config.inference, query=name))
        for name in sorted(methods, key=known.index)
    }


def _report(config: Config, runs: dict[str, Evaluation], indices: list[int] | None) -> dict[str, Any]:
    first = next(iter(runs.values())).ms_median
    return {
        "config": dataclasses.asdict(config),
        "machine": machine.describe(),
        "images": "all" if indices is None else len(indices),
        "methods": {name: run.to_dict() for name, run in runs.items()},
        "speed_up": {name: first / run.ms_median for name, run in runs.items() if not np.isnan(run.ms_median)},
        "timing": f"median over batches of {config.inference.batch_size}, detectors in turn, {jax.default_backend()}",
    }


def _spread(total: int, count: int) -> list[int]:
    """``count`` positions spread evenly over ``total``."""
    return sorted({int(i) for i in np.linspace(0, total - 1, min(count, total))}) if total and count else []
