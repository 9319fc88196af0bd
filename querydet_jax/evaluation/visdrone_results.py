"""Results of a VisDrone evaluation, with their JSON and text forms."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from querydet_jax.data.readers.visdrone import CLASSES
from querydet_jax.evaluation.curves import IOUS, RECALL, Curves, Line, mean_lines
from querydet_jax.evaluation.metrics import DEFAULT_BINS, SizeBin, without_nan
from querydet_jax.viz.text import percent, text_table

_HEADLINE = ("AP", "AP50", "AP75", "AR1", "AR10", "AR100", "AR500")
# IoU thresholds (percent) and recalls of the recall-precision tables.
_TABLES = (50, 75)
_RECALL = np.arange(1, 10) / 10


@dataclass(frozen=True, eq=False)
class Curve:
    """Recall and precision of one class at one IoU threshold, at each true positive by descending score.

    Attributes:
      recall: float64 [t], 0..1, rising in equal steps.
      precision: float64 [t], 0..1, interpolated: the largest at this recall or a higher one, so never rising.
      scores: float32 [t], scores of the true positives.
    """

    recall: np.ndarray
    precision: np.ndarray
    scores: np.ndarray

    @property
    def ap(self) -> float:
        """Average precision in percent: the area under the curve."""
        return 100 * float(self.recall[-1] * self.precision.mean()) if len(self.recall) else 0.0

    def at(self, recall: ArrayLike) -> np.ndarray:
        """Return the precision at each recall, float64 of the same shape; 0 beyond the recall reached."""
        # A tolerance, because 0.3 and 3 hits of 10 may differ in the last bit.
        index = np.searchsorted(self.recall, np.asarray(recall) - 1e-9)
        return np.append(self.precision, 0.0)[index]


@dataclass(frozen=True, eq=False)
class VisDroneMetrics:
    """Average precision and recall in percent (0..100), nan where there are no objects.

    Attributes:
      metrics: AP, AP50, AP75, AR1, AR10, AR100, AR500 as the toolkit prints them, with classes weighted by the number
        of images that contain them. The same names with ``_mean`` are plain means over the classes with objects.
      per_class: {class: AP, AP50, AP75, AR500, number of objects, number of images that contain it}.
      per_size: {key of the size bin: AP, AP50, AR500, with classes weighted by the number of images that contain such
        an object; AP_mean over the classes with objects; number of objects}.
      curves: {class: {IoU in percent (50, 55 .. 95): curve}}, with empty arrays if nothing was found.
      num_images: images evaluated.
      num_objects: objects of the classes outside ignored regions, including those of score 0.
      num_detections: detections of the classes outside ignored regions, at most 500 per image.
      size_bins: the bins of ``per_size``.
      notes: warnings about the numbers.
    """

    metrics: dict[str, float]
    per_class: dict[str, dict[str, float]]
    per_size: dict[str, dict[str, float]]
    curves: dict[str, dict[int, Curve]]
    num_images: int
    num_objects: int
    num_detections: int
    size_bins: tuple[SizeBin, ...] = DEFAULT_BINS
    notes: tuple[str, ...] = ()

    @property
    def classwise(self) -> np.ndarray:
        """AP of the ten classes as the toolkit prints it, float64 [10]; 0 for a class without objects."""
        return np.nan_to_num([row["AP"] for row in self.per_class.values()])

    def to_dict(self) -> dict[str, Any]:
        """Return plain types only, nan as None; precision in percent at recall 10, 20 .. 90 %, as in ``table``."""
        return {
            "metrics": without_nan(self.metrics),
            "per_class": {name: without_nan(row) for name, row in self.per_class.items()},
            "per_size": {key: without_nan(row) for key, row in self.per_size.items()},
            "precision": {name: self._row(name) for name in self.per_class},
            "num_images": self.num_images,
            "num_objects": self.num_objects,
            "num_detections": self.num_detections,
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """Return ``to_dict`` as strict JSON text."""
        return json.dumps(self.to_dict(), allow_nan=False)

    def table(self) -> str:
        """Return text tables of at most 100 columns: headline, by class, by size, by recall. ``-`` is nan."""
        counts = f"{self.num_images:,} images, {self.num_objects:,} objects, {self.num_detections:,} detections"
        parts = [counts, *(f"warning: {note}" for note in self.notes)]
        rows = [
            [label, *(percent(self.metrics[name + suffix]) for name in _HEADLINE)]
            for label, suffix in (("by images (official)", ""), ("plain", "_mean"))
        ]
        parts += ["", text_table(["mean of classes", *_HEADLINE], rows)]
        columns = ("AP", "AP50", "AP75", "AR500")
        rows = [
            [name, f"{row['objects']:,}", f"{row['images']:,}", *(percent(row[key]) for key in columns)]
            for name, row in self.per_class.items()
        ]
        parts += ["", text_table(["class", "objects", "images", *columns], rows)]
        if self.size_bins:
            columns = ("AP", "AP50", "AR500", "AP_mean")
            rows = [
                [entry.label, f"{row['objects']:,}", *(percent(row[key]) for key in columns)]
                for entry, row in zip(self.size_bins, self.per_size.values(), strict=True)
            ]
            parts += ["", text_table(["sqrt(w*h)", "objects", *columns], rows)]
        for iou in _TABLES:
            rows = [
                [name, *(percent(value) for value in self._precision(name, iou, _RECALL))] for name in self.per_class
            ]
            parts += ["", text_table([f"precision, IoU {iou} %", *(f"R {100 * r:.0f} %" for r in _RECALL)], rows)]
        return "\n".join(parts)

    def recall_precision(self) -> Curves:
        """Return the curves of the classes, and their means weighted by images as in the toolkit."""
        known = [name for name, row in self.per_class.items() if row["objects"] > 0]
        weights = np.array([self.per_class[name]["images"] for name in known], np.float64)
        by_iou = {}
        for iou in IOUS:
            aps = np.array([self.curves[name][iou].ap for name in known])
            precision = [self._precision(name, iou, RECALL) for name in known]
            mean = np.average(precision, axis=0, weights=weights) if known else np.full(len(RECALL), np.nan)
            by_iou[iou] = (_mean(aps, weights), mean)
        classes = tuple(
            Line(name, "0.50", row["AP50"], self._precision(name, 50, RECALL)) for name, row in self.per_class.items()
        )
        return Curves(mean_lines(by_iou), classes)

    def _row(self, name: str) -> dict[str, dict[str, float | None]]:
        names = [f"R{round(100 * r)}" for r in _RECALL]
        rows = {iou: self._precision(name, iou, _RECALL).tolist() for iou in _TABLES}
        return {f"IoU{iou}": without_nan(dict(zip(names, row, strict=True))) for iou, row in rows.items()}

    def _precision(self, name: str, iou: int, recall: np.ndarray) -> np.ndarray:
        """Return the precision of a class in percent at each recall; nan for a class without objects."""
        known = self.per_class[name]["objects"] > 0
        return 100 * self.curves[name][iou].at(recall) if known else np.full(recall.shape, np.nan)


def summarize(
    precision: np.ndarray,
    recall: np.ndarray,
    objects: np.ndarray,
    weights: np.ndarray,
    *,
    limits: Sequence[int],
    size_bins: tuple[SizeBin, ...],
    curves: dict[str, dict[int, Curve]],
    num_images: int,
    num_detections: int,
    notes: tuple[str, ...],
) -> VisDroneMetrics:
    """Average over classes and thresholds.

    Args:
      precision, recall: [10, L+B, 10], percent: class, then limit (L) or bin (B), then IoU. Among the limits, only the
        last has a precision.
      objects, weights: int [10, 1+B], number of objects per class, and of images that contain one: all sizes, then
        each bin.
    """
    whole, first_bin = len(limits) - 1, len(limits)
    by_iou, recall = precision[:, whole], recall.mean(axis=2)
    columns = {"AP": by_iou.mean(axis=1), "AP50": by_iou[:, 0], "AP75": by_iou[:, 5]}
    columns |= {f"AR{limit}": recall[:, i] for i, limit in enumerate(limits)}
    metrics = {name: _mean(values, weights[:, 0]) for name, values in columns.items()}
    metrics |= {f"{name}_mean": _mean(values, weights[:, 0] > 0) for name, values in columns.items()}
    per_class: dict[str, dict[str, float]] = {}
    for k, name in enumerate(CLASSES):
        known = objects[k, 0] > 0
        per_class[name] = {
            key: float(columns[key][k]) if known else math.nan for key in ("AP", "AP50", "AP75", "AR500")
        }
        per_class[name] |= {"objects": int(objects[k, 0]), "images": int(weights[k, 0])}
    per_size: dict[str, dict[str, float]] = {}
    for i, entry in enumerate(size_bins):
        by_iou, held = precision[:, first_bin + i], weights[:, 1 + i]
        per_size[entry.key] = {
            "AP": _mean(by_iou.mean(axis=1), held),
            "AP50": _mean(by_iou[:, 0], held),
            "AR500": _mean(recall[:, first_bin + i], held),
            "AP_mean": _mean(by_iou.mean(axis=1), held > 0),
            "objects": int(objects[:, 1 + i].sum()),
        }
    return VisDroneMetrics(
        metrics, per_class, per_size, curves, num_images, int(objects[:, 0].sum()), num_detections, size_bins, notes
    )


def _mean(values: np.ndarray, weights: np.ndarray) -> float:
    return float(np.average(values, weights=weights)) if weights.any() else math.nan
