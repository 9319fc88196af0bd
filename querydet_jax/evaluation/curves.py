"""Recall-precision curves of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

RECALL = np.arange(101) / 100
IOUS = tuple(range(50, 100, 5))
"""Thresholds in percent."""
MEAN = "mean of classes"


@dataclass(frozen=True, eq=False)
class Line:
    """One curve.

    Attributes:
      name: class, or ``MEAN``.
      iou: threshold or thresholds, e.g. 0.50 or 0.50:0.95.
      ap: average precision in percent, as the evaluation states it; nan without an object to find.
      precision: float64 [101], percent, at recall 0, 1 .. 100 %: the largest at this recall or a higher one,
        0 beyond the recall reached; nan without an object to find.
    """

    name: str
    iou: str
    ap: float
    precision: np.ndarray


@dataclass(frozen=True, eq=False)
class Curves:
    """Curves of one detector.

    Attributes:
      means: over the classes, weighed as in the evaluation's AP: at IoU 0.50, 0.55 .. 0.95, then over these.
      classes: of each class at IoU 0.50, in the data set's order.
    """

    means: tuple[Line, ...]
    classes: tuple[Line, ...]


def mean_lines(by_iou: Mapping[int, tuple[float, np.ndarray]]) -> tuple[Line, ...]:
    """``Curves.means`` of (AP, precision [101]) by IoU in percent."""
    aps, precision = zip(*by_iou.values(), strict=True)
    lines = [Line(MEAN, f"{iou / 100:.2f}", ap, values) for iou, (ap, values) in by_iou.items()]
    span = f"{min(by_iou) / 100:.2f}:{max(by_iou) / 100:.2f}"
    return (*lines, Line(MEAN, span, float(np.mean(aps)), np.mean(precision, axis=0)))
