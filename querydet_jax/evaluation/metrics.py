"""Results of a COCO evaluation: size bins, and metrics with their JSON and text forms."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from querydet_jax.evaluation.curves import Curves
from querydet_jax.evaluation.thresholds import BestThreshold
from querydet_jax.runtime.errors import DataError, shown
from querydet_jax.viz.text import percent, shorten, text_table


class SizeBin(NamedTuple):
    """Objects with ``low <= sqrt(area) < high``, in px."""

    low: float
    high: float

    @property
    def key(self) -> str:
        """The suffix of a metric's name, e.g. ``8_16`` or ``96_inf``."""
        return f"{self.low:g}_{self.high:g}"

    @property
    def label(self) -> str:
        """The label in tables, e.g. ``8-16 px``, ``<8 px`` or ``>=96 px``."""
        if math.isinf(self.high):
            return f">={self.low:g} px"
        return f"<{self.high:g} px" if self.low == 0 else f"{self.low:g}-{self.high:g} px"


# Finer than COCO's small, medium and large at the sizes of small objects; the last overlaps the first two.
DEFAULT_BINS = (
    SizeBin(0, 8),
    SizeBin(8, 16),
    SizeBin(16, 32),
    SizeBin(32, 96),
    SizeBin(96, math.inf),
    SizeBin(0, 16),
)


def as_bins(bins: Iterable[tuple[float, float]]) -> tuple[SizeBin, ...]:
    """Return ``(low, high)`` pairs as SizeBins; raise DataError unless ``0 <= low < high`` and all differ."""
    try:
        out = tuple(SizeBin(float(low), float(high)) for low, high in bins)
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"size_bins: {shown(bins)}, expected pairs of numbers (low, high), in px") from None
    for entry in out:
        if not 0 <= entry.low < entry.high:
            raise DataError(f"size_bins: ({entry.low:g}, {entry.high:g}) is not a range; give 0 <= low < high, in px")
    if len({entry.key for entry in out}) < len(out):
        raise DataError(f"size_bins: {[entry.key for entry in out]} names a range twice; drop one")
    return out


@dataclass(frozen=True)
class CocoMetrics:
    """Average precision and recall in percent (0..100), nan where there are no objects.

    Attributes:
      metrics: AP, AP50, AP75, APs, APm, APl; AR1, AR10, AR100 (one per limit on detections per image);
        ARs, ARm, ARl; then ``AP_low_high`` and ``AR_low_high`` of every size bin. All except AR1, AR10
        and AR100 use the largest of ``max_detections``; a limit of ``recall_at`` adds an AR alone.
      per_class: {class name: AP, AP50, APs, AR, number of objects}, in the data set's order.
      objects: number of ground-truth objects without crowds: ``all``, ``s``, ``m``, ``l`` and each bin's key.
      num_images: images evaluated.
      num_detections: detections in these images.
      curves: recall and precision at the largest limit.
      best: {class: the score from which F1 is largest, at IoU 0.5 and the largest limit}, None for a class without
        objects or without right detections; the classes as in ``per_class``.
      size_bins: the bins behind the ``_low_high`` names.
      notes: warnings about the numbers, e.g. that there was no ground truth.
    """

    metrics: dict[str, float]
    per_class: dict[str, dict[str, float]]
    objects: dict[str, int]
    num_images: int
    num_detections: int
    curves: Curves
    best: dict[str, BestThreshold | None]
    size_bins: tuple[SizeBin, ...] = DEFAULT_BINS
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain types only; nan becomes None, because JSON has no nan."""
        return {
            "metrics": without_nan(self.metrics),
            "per_class": {name: without_nan(row) for name, row in self.per_class.items()},
            "best_thresholds": {name: None if best is None else vars(best) for name, best in self.best.items()},
            "objects": dict(self.objects),
            "num_images": self.num_images,
            "num_detections": self.num_detections,
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """Return ``to_dict`` as strict JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def table(self) -> str:
        """Return a text table of at most 100 columns: headline, by object size, by class. ``-`` is nan."""
        parts = [
            f"{self.num_images:,} images, {self.objects['all']:,} objects, {self.num_detections:,} detections",
            *(f"warning: {note}" for note in self.notes),
        ]
        sized = {f"{kind}_{entry.key}" for kind in ("AP", "AR") for entry in self.size_bins}
        for kind in ("AP", "AR"):
            row = {name: value for name, value in self.metrics.items() if name.startswith(kind) and name not in sized}
            parts += ["", text_table(list(row), [[percent(value) for value in row.values()]], left=0)]
        if self.size_bins:
            rows = [
                [
                    entry.label,
                    f"{self.objects[entry.key]:,}",
                    percent(self.metrics[f"AP_{entry.key}"]),
                    percent(self.metrics[f"AR_{entry.key}"]),
                ]
                for entry in self.size_bins
            ]
            parts += ["", text_table(["sqrt(area)", "objects", "AP", "AR"], rows)]
        if self.per_class:
            parts += ["", self._class_table()]
        return "\n".join(parts)

    def _class_table(self) -> str:
        # With many classes, print two columns side by side, without AP50 to fit 100 columns.
        many = len(self.per_class) > 30
        columns = ["AP", "APs", "AR"] if many else ["AP", "AP50", "APs", "AR"]
        header = ["class", "objects", *columns, *([] if many else ["best F1", "at score"])]
        rows = []
        for name, row in self.per_class.items():
            best = self.best[name]
            at = ["-", "-"] if best is None else [percent(100 * best.f1), f"{best.score:.3f}"]
            cells = [f"{int(row['objects']):,}", *(percent(row[key]) for key in columns), *([] if many else at)]
            rows.append([shorten(name, 14 if many else 24), *cells])
        if not many:
            return text_table(header, rows)
        half = (len(rows) + 1) // 2
        sides = [text_table(header, part).splitlines() for part in (rows[:half], rows[half:])]
        sides[1] += [""] * (len(sides[0]) - len(sides[1]))
        width = max(map(len, sides[0]))
        return "\n".join(f"{a:<{width}}  |  {b}".rstrip() for a, b in zip(*sides, strict=True))


def as_numbers(values: Any, name: str) -> np.ndarray:
    """Return values as a float64 array; raise DataError if they are not numbers."""
    try:
        return np.asarray(values, np.float64)
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"{name} are not an array of numbers") from None


def nan_to_none(value: float | None) -> float | None:
    """Return the value, or None for nan, which JSON does not have."""
    return None if value is None or math.isnan(value) else value


def without_nan(values: dict[str, float]) -> dict[str, float | None]:
    return {key: nan_to_none(value) for key, value in values.items()}
