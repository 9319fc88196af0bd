"""Pack a run's detector under a name, and measure what 16 bits lose: `python -m benchmarks.packaged_weights --help`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from querydet_jax.cli.process import run as run_process
from querydet_jax.config import load_config
from querydet_jax.data import open_split
from querydet_jax.evaluation.runner import comparison_table, evaluate_detectors, first_images
from querydet_jax.inference.detector import Detector
from querydet_jax.inference.min_scores import BEST, REPORT, min_scores
from querydet_jax.inference.runs import open_model
from querydet_jax.runtime.errors import ConfigError
from querydet_jax.runtime.reading import read_json
from querydet_jax.weights import state_dict
from querydet_jax.weights.packaged import ModelCard, write_packaged

_TEXTS = ("title", "data", "licence", "attribution", "recipe", "limits")
_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")
_OF_CLASS = ("AP", "AP50", "APs", "objects")


@dataclass(frozen=True)
class PackArguments:
    """Write packaged weights from a run that `querydet eval RUN` has evaluated last, and compare them with the run."""

    run: tyro.conf.Positional[str]
    """Run folder."""
    folder: tyro.conf.Positional[str]
    """Folder to write, which gives the name: querydet_jax/zoo/NAME."""
    card: str
    """JSON file with the texts of the model card: title, data, licence, attribution, recipe, limits."""
    storage: Literal["float16", "float32"] = "float16"
    """Type of the kernels; the rest is float32."""
    images: int = 0
    """Compare on the first N validation images (0: all)."""


def pack(arguments: PackArguments) -> None:
    """Write, read back, compare on validation images, print sizes and the largest differences."""
    run, folder = Path(arguments.run), Path(arguments.folder)
    config = load_config(run)
    query = config.inference.query
    texts = read_json(arguments.card, ConfigError)
    if not isinstance(texts, dict) or set(texts) != set(_TEXTS):
        raise ConfigError(f"{arguments.card}: give these texts and no others: {', '.join(_TEXTS)}")
    best = min_scores(BEST, config.classes, run, query=query)
    facts = _facts(read_json(run / REPORT, ConfigError), query)
    card = ModelCard(**texts, **facts, min_scores=dict(zip(config.classes, map(_short, best), strict=True)))
    model = open_model(config, run)
    tensors = state_dict(model)
    write_packaged(folder, tensors, config, card, storage=arguments.storage)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    print(f"{folder}: {sum(sizes.values()) / 1e6:.2f} MB: " + ", ".join(f"{n} {s:,}" for n, s in sizes.items()))

    packed = open_model(load_config(folder), folder)
    read = state_dict(packed)
    name = max(tensors, key=lambda name: _difference(tensors[name], read[name]))
    print(
        f"largest difference of a tensor, relative to its largest value: {_difference(tensors[name], read[name]):.1e}"
    )
    dataset = open_split(config, "val", str(run))
    detector, runs = Detector(model, config.inference), {}
    for title, weights in (("run", model), ("packaged", packed)):
        detector.update(weights)
        runs |= evaluate_detectors(
            {title: detector}, dataset, config.data, indices=first_images(dataset, arguments.images), size_bins=()
        )
    print(comparison_table(runs))
    print(compare(runs["run"].scores.results, runs["packaged"].scores.results, least=0.1))


def compare(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]], least: float) -> str:
    """Return in words how much two lists of COCO results differ in the detections that score at least ``least``.

    Each is compared with the other list's detection of the same image and class whose box is nearest.
    """
    rows: dict[tuple[int, int], list[list[float]]] = {}
    for result in other:
        rows.setdefault((result["image_id"], result["category_id"]), []).append([*result["bbox"], result["score"]])
    differences, alone = [(0.0, 0.0)], 0
    certain = [result for result in one if result["score"] >= least]
    for result in certain:
        near = np.array(rows.get((result["image_id"], result["category_id"]), np.zeros((0, 5)))).reshape(-1, 5)
        apart = np.abs(near - [*result["bbox"], result["score"]])
        apart = apart[apart[:, :4].max(1, initial=0) < 4]
        if not len(apart):
            alone += 1
            continue
        nearest = apart[apart[:, :4].max(1).argmin()]
        differences.append((float(nearest[:4].max()), float(nearest[4])))
    box, score = np.max(differences, axis=0)
    return (
        f"{len(certain):,} detections from {least} on: boxes differ by at most {box:.2f} px, scores by {score:.4f}; "
        f"{alone} are in one list alone"
    )


def _facts(report: Any, query: str) -> dict[str, Any]:
    """Return ``metrics``, ``classes`` and ``measured`` of a card from a run's evaluation."""
    method, machine = report["methods"][query], report["machine"]
    return {
        "metrics": {
            name: {key: values["metrics"].get(key) for key in _METRICS} for name, values in report["methods"].items()
        },
        "classes": {name: {key: row.get(key) for key in _OF_CLASS} for name, row in method["per_class"].items()},
        "measured": (
            f"`querydet eval`, {method['num_images']} validation pictures, percent; {machine['processor']}, "
            f"{machine['cores']} cores, jax {machine['jax']}, Python {machine['python']}. By class: {query}."
        ),
    }


def _short(score: np.float32) -> float:
    return round(float(score), 4)


def _difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max() / max(np.abs(one).max(), 1e-12))


if __name__ == "__main__":
    run_process(lambda: pack(tyro.cli(PackArguments, description=PackArguments.__doc__)))
