"""Score detections on a data set: COCO metrics, and for VisDrone also the official metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from querydet_jax.data.dataset import Dataset
from querydet_jax.evaluation.coco import ImageDetections, evaluate, to_coco_results
from querydet_jax.evaluation.curves import Curves
from querydet_jax.evaluation.judges import Judge
from querydet_jax.evaluation.metrics import DEFAULT_BINS, CocoMetrics
from querydet_jax.evaluation.visdrone import VisDroneImage, evaluate_visdrone
from querydet_jax.evaluation.visdrone_files import as_written
from querydet_jax.evaluation.visdrone_results import VisDroneMetrics


@dataclass(frozen=True)
class Scores:
    """The detections of one detector and their metrics.

    Attributes:
      coco: metrics by COCO's protocol.
      results: COCO results of all images.
      visdrone: metrics by VisDrone's protocol; None for a data set without ``official_truth``.
      rows: {image name: rows of its official result file, float64 [m,6]}, on which ``visdrone`` is computed; empty
        for other data sets.
    """

    coco: CocoMetrics
    results: list[dict[str, Any]]
    visdrone: VisDroneMetrics | None = None
    rows: dict[str, np.ndarray] = field(default_factory=dict)

    def named(self) -> dict[str, float]:
        """Return all metrics by name; VisDrone's begin with ``visdrone_``."""
        official = {} if self.visdrone is None else self.visdrone.metrics
        return {**self.coco.metrics, **{f"visdrone_{name}": value for name, value in official.items()}}

    def headline(self) -> dict[str, float]:
        """Return {column: value} for a table that compares detectors; VisDrone's own metrics come first."""
        coco = self.coco.metrics
        sized = {"APs": coco["APs"], "AP<16": coco.get("AP_0_16", np.nan)}
        if self.visdrone is None:
            recalls = {name: coco[name] for name in coco if name[:2] == "AR" and name[2:].isdecimal()}
            more = {name: value for name, value in recalls.items() if int(name[2:]) >= 100}
            return {**{name: coco[name] for name in ("AP", "AP50", "AP75")}, **sized, **more}
        official = self.visdrone.metrics
        further = {name: official[name] for name in ("AP50", "AP75", "AR500")}
        return {"VisDrone AP": official["AP"], **further, "COCO AP": coco["AP"], **sized}

    def table(self) -> str:
        """Return text tables: VisDrone's metrics, if any, then COCO's."""
        parts = [] if self.visdrone is None else [f"official VisDrone evaluation\n{self.visdrone.table()}"]
        return "\n\n".join([*parts, f"COCO evaluation\n{self.coco.table()}"])

    def curves(self) -> dict[str, Curves]:
        """Return {protocol, coco or visdrone: recall-precision curves}."""
        official = {} if self.visdrone is None else {"visdrone": self.visdrone.recall_precision()}
        return {**official, "coco": self.coco.curves}

    def to_dict(self) -> dict[str, Any]:
        """Return plain types only: COCO's metrics, and VisDrone's under ``visdrone``."""
        return {**self.coco.to_dict(), **({} if self.visdrone is None else {"visdrone": self.visdrone.to_dict()})}


def score(
    dataset: Dataset,
    detections: Sequence[ImageDetections],
    *,
    indices: Sequence[int] | None = None,
    size_bins: Sequence[tuple[float, float]] = DEFAULT_BINS,
    max_detections: int = 100,
    judge: Judge = "pycocotools",
) -> Scores:
    """Score detections against a data set's ground truth.

    Args:
      dataset: the ground truth.
      detections: one entry per image, in any order.
      indices: positions of the images to score; None selects all.
      size_bins: see ``evaluate``.
      max_detections: the most that the detector gives per image. Above 100, COCO's AR is also computed at this
        limit; everything else stays at COCO's 100.
      judge: see ``evaluate``; VisDrone's protocol has its own.

    Raises:
      DataError: see ``to_coco_results``, ``evaluate`` and ``evaluate_visdrone``.
    """
    positions = range(len(dataset)) if indices is None else sorted(indices)
    results = to_coco_results(detections, dataset.category_ids)
    chosen = [dataset.image_id(i) for i in positions]
    recall_at = (max_detections,) if max_detections > 100 else ()
    truth = dataset.coco_ground_truth()
    coco = evaluate(truth, results, image_ids=chosen, size_bins=size_bins, recall_at=recall_at, judge=judge)
    left_out = sum(len(image.scores) for image in detections) - len(results)
    if left_out:
        absent = [name for name, i in zip(dataset.classes, dataset.category_ids, strict=True) if i is None]
        note = f"left out {left_out:,} detections of {', '.join(absent)}, which {dataset.origin} does not have"
        coco = dataclasses.replace(coco, notes=(*coco.notes, note))
    of_image = {image.image_id: image for image in detections}
    images = []
    for i, image_id in zip(positions, chosen, strict=True):
        name, truth = dataset.file_name(i), dataset.official_truth(i)
        if truth is None:
            return Scores(coco, results)
        rows = as_written(_rows(of_image[image_id], dataset.category_ids), name)
        images.append(VisDroneImage(name, dataset.size(i), truth, rows))
    official = evaluate_visdrone(images, size_bins=size_bins)
    return Scores(coco, results, official, {image.name: image.detections for image in images})


def _rows(image: ImageDetections, category_ids: Sequence[int | None]) -> np.ndarray:
    """Return rows float64 [m,6] of the classes that have a category id: x, y, w, h, score, category."""
    boxes = image.boxes.astype(np.float64)
    numbers = np.array([np.nan if i is None else i for i in category_ids])
    categories = numbers[np.asarray(image.classes, np.int64)]
    rows = np.concatenate(
        [boxes[:, :2], boxes[:, 2:] - boxes[:, :2], np.asarray(image.scores)[:, None], categories[:, None]], axis=1
    )
    return rows[~np.isnan(categories)]
