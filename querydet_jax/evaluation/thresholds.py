"""The score of each class from which its detections have the largest F1."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class BestThreshold:
    """The score of one class from which detections have the largest F1, with precision and recall there (0..1)."""

    score: float
    f1: float
    precision: float
    recall: float


def best_threshold(scores: np.ndarray, right: np.ndarray, objects: int) -> BestThreshold | None:
    """Return the best threshold of one class at one IoU; None without objects or without right detections.

    Args:
      scores: of the detections that count ``[D]``, in any order.
      right: whether each has found an object, bool ``[D]``.
      objects: number of objects that count.
    """
    order = np.argsort(-scores, kind="stable")
    scores, hits, seen = scores[order], np.cumsum(right[order]), np.arange(1, len(order) + 1)
    if not objects or not len(order) or not hits[-1]:
        return None
    f1 = 2 * hits / (seen + objects)
    last = np.append(scores[1:] < scores[:-1], True)  # a threshold keeps all of one score
    i = int(np.argmax(np.where(last, f1, -1.0)))
    return BestThreshold(float(scores[i]), float(f1[i]), float(hits[i] / seen[i]), float(hits[i] / objects))
