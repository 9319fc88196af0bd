"""Compare detections with recorded ones."""

from __future__ import annotations

import numpy as np


def as_recorded(
    found: tuple[np.ndarray, np.ndarray, np.ndarray],
    recorded: tuple[np.ndarray, np.ndarray, np.ndarray],
    *,
    scores: float,
    boxes: float,
) -> None:
    """Assert that detections (boxes, scores, classes), best first, are the recorded ones within tolerances.

    Where scores differ by less than their tolerance, processors order them by their own rounding: there, neighbours may
    have changed places.
    """
    assert len(found[1]) == len(recorded[1])
    np.testing.assert_allclose(found[1], recorded[1], atol=scores, rtol=0)
    left, order = list(range(len(found[1]))), []
    for box, score, label in zip(*recorded, strict=True):
        tied = [i for i in left[:8] if abs(found[1][i] - score) <= scores and found[2][i] == label]
        order.append(min(tied, key=lambda i: np.abs(found[0][i] - box).max(), default=left[0]))
        left.remove(order[-1])
    np.testing.assert_array_equal(found[2][order], recorded[2])
    np.testing.assert_allclose(found[1][order], recorded[1], atol=scores, rtol=0)
    np.testing.assert_allclose(found[0][order], recorded[0], atol=boxes, rtol=1e-5)
