"""What an evaluation by VisDrone's protocol yields."""

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
# Of the recall-precision tables: IoU in percent, recall.
_TABLES = (50, 75)
_RECALL = np.arange(1, 10) / 10


@dataclass(frozen=True, eq=False)
class Curve:
    """Recall and precision of one class at one IoU threshold, at each hit from the highest score down.

    Attributes:
      recall: float64 [t], 0..1, rising in equal steps.
      precision: float64 [t], 0..1, interpolated: the largest at this recall or a higher one, so never rising.
      scores: float32 [t], score of the hit.
    """

    recall: np.ndarray
    precision: np.ndarray
    scores: np.ndarray

    @property
    def ap(self) -> float:
        """Average precision in percent, the area under the curve."""
        return 100 * float(self.recall[-1] * self.precision.mean()) if len(self.recall) else 0.0

    def at(self, recall: ArrayLike) -> np.ndarray:
        """Precision at each recall, float64 of the same shape; 0 beyond the recall reached."""
        # 0.3 and 3/10 of a count may differ in the last bit.
        index = np.searchsorted(self.recall, np.asarray(recall) - 1e-9)
        return np.append(self.precision, 0.0)[index]


@dataclass(frozen=True, eq=False)
class VisDroneMetrics:
    """Average precision and recall in percent (0..100), nan where there is no object to find.

    Attributes:
      metrics: AP, AP50, AP75, AR1, AR10, AR100, AR500 as the toolkit prints them: classes weighted by the number of
        images that hold them. Then the same names with ``_mean``: plain means over the classes that have objects.
      per_class: class to AP, AP50, AP75, AR500 and the numbers of objects and of images that hold it.
      per_size: key of a size bin to AP, AP50, AR500 weighted by the images that hold an object of the class and
        bin, AP_mean over the classes that have one, and the number of objects.
      curves: class to IoU in percent (50, 55 .. 95) to its curve; empty arrays where nothing was found.
      num_images: images evaluated.
      num_objects: objects of the classes outside ignored regions, those of score 0 included.
      num_detections: detections of the classes outside ignored regions, at most 500 an image.
      size_bins: the bins behind ``per_size``.
      notes: what a reader must know before trusting the numbers.
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
        """AP of the ten classes as the toolkit prints it, float64 [10]: 0 for a class without objects."""
        return np.nan_to_num([row["AP"] for row in self.per_class.values()])

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, nan as None for JSON; precision in percent at recall 10, 20 .. 90 %, as in ``table``."""
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
        """``to_dict`` as strict JSON text."""
        return json.dumps(self.to_dict(), allow_nan=False)

    def table(self) -> str:
        """Plain text, at most 100 columns wide: headline, by class, by size, by recall. ``-`` stands for nan."""
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
        """The curves of the classes and of their means, which weigh them by images as the toolkit does."""
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
        """Precision in percent of a class at each recall; nan for a class without objects."""
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
    """Means over classes and thresholds.

    Args:
      precision, recall: [10, L+B, 10], percent, of each class at each limit (L), then in each bin (B), by IoU; of
        the limits only the last has a precision.
      objects, weights: int [10, 1+B], objects of each class and images that hold one, of every size, then by bin.
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
