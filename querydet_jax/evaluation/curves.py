"""Recall-precision curves of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

RECALL = np.arange(101) / 100
IOUS = tuple(range(50, 100, 5))
"""IoU thresholds in percent."""
MEAN = "mean of classes"


@dataclass(frozen=True, eq=False)
class Line:
    """One curve.

    Attributes:
      name: class, or ``MEAN``.
      iou: threshold or range of thresholds, e.g. 0.50 or 0.50:0.95.
      ap: average precision in percent, as in the evaluation's metrics; nan if there are no objects.
      precision: float64 [101], percent, at recall 0, 1 .. 100 %, interpolated: the largest at this recall or a
        higher one, 0 beyond the recall reached, nan if there are no objects.
    """

    name: str
    iou: str
    ap: float
    precision: np.ndarray


@dataclass(frozen=True, eq=False)
class Curves:
    """Curves of one detector.

    Attributes:
      means: means over the classes, weighted as in the evaluation's AP, at IoU 0.50, 0.55 .. 0.95; last their mean.
      classes: one curve per class at IoU 0.50, in the data set's order.
    """

    means: tuple[Line, ...]
    classes: tuple[Line, ...]


def mean_lines(by_iou: Mapping[int, tuple[float, np.ndarray]]) -> tuple[Line, ...]:
    """Return ``Curves.means`` from {IoU in percent: (AP, precision [101])}."""
    aps, precision = zip(*by_iou.values(), strict=True)
    lines = [Line(MEAN, f"{iou / 100:.2f}", ap, values) for iou, (ap, values) in by_iou.items()]
    span = f"{min(by_iou) / 100:.2f}:{max(by_iou) / 100:.2f}"
    return (*lines, Line(MEAN, span, float(np.mean(aps)), np.mean(precision, axis=0)))
