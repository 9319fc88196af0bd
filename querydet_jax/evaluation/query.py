"""Query recall: are the cells that must be looked at, looked at?

Average precision says whether cascaded sparse query costs accuracy; query recall says why. An object
whose centre cell is not a key on a level gets no detection from that level's sparse head.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from querydet_jax.errors import DataError
from querydet_jax.evaluation.metrics import DEFAULT_BINS, SizeBin, as_bins, percent, text_table


def query_recall(
    boxes: ArrayLike, keys: ArrayLike, stride: float, bins: Iterable[tuple[float, float]] = DEFAULT_BINS
) -> tuple[np.ndarray, np.ndarray]:
    """Count the ground-truth boxes whose centre lies in a key cell, by size.

    Args:
      boxes: [n,4] xyxy in px of the network input.
      keys: bool [h,w], the cells of one level of one image at which the sparse head answers.
      stride: px a cell.
      bins: ranges of sqrt(area) of the boxes in px; they may overlap.

    Returns:
      hits, totals: int64 [number of bins] each. A box with its centre outside the map counts as missed.

    Raises:
      DataError: shapes other than these, or keys not boolean.
    """
    bins = as_bins(bins)
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4) if np.size(boxes) == 0 else np.asarray(boxes, np.float32)
    keys = np.asarray(keys)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise DataError(f"boxes: shape {list(boxes.shape)}, expected [n,4] xyxy")
    if keys.ndim != 2 or keys.dtype != np.bool_:
        raise DataError(f"keys: {keys.dtype} {list(keys.shape)}, expected bool [h,w] of one image and level")
    if not stride > 0:
        raise DataError(f"stride: {stride}, expected px a cell, above 0")
    h, w = keys.shape
    x = np.floor((boxes[:, 0] + boxes[:, 2]) / 2 / stride).astype(np.int64)
    y = np.floor((boxes[:, 1] + boxes[:, 3]) / 2 / stride).astype(np.int64)
    inside = (x >= 0) & (x < w) & (y >= 0) & (y < h)
    hit = np.zeros(len(boxes), bool)
    hit[inside] = keys[y[inside], x[inside]]
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 0)
    size = np.sqrt(sides[:, 0] * sides[:, 1])
    member = (
        np.stack([(size >= low) & (size < high) for low, high in bins]) if bins else np.zeros((0, len(boxes)), bool)
    )
    return (member & hit).sum(axis=1), member.sum(axis=1)


@dataclass
class QueryRecall:
    """Sums ``query_recall`` over images, for one level."""

    bins: tuple[SizeBin, ...] = DEFAULT_BINS
    hits: np.ndarray = field(init=False)
    totals: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.bins = as_bins(self.bins)
        self.hits = np.zeros(len(self.bins), np.int64)
        self.totals = np.zeros(len(self.bins), np.int64)

    def add(self, boxes: ArrayLike, keys: ArrayLike, stride: float) -> None:
        """Count one image; arguments as of ``query_recall``."""
        hits, totals = query_recall(boxes, keys, stride, self.bins)
        self.hits += hits
        self.totals += totals

    def recall(self) -> dict[str, float]:
        """Bin key to percent of boxes found, nan for a bin without boxes."""
        return {
            entry.key: 100.0 * int(hits) / int(totals) if totals else float("nan")
            for entry, hits, totals in zip(self.bins, self.hits, self.totals, strict=True)
        }

    def table(self) -> str:
        """Plain text: one row a size bin."""
        recall = self.recall()
        rows = [
            [entry.label, f"{totals:,}", f"{hits:,}", percent(recall[entry.key])]
            for entry, hits, totals in zip(self.bins, self.hits, self.totals, strict=True)
        ]
        return text_table(["sqrt(area)", "objects", "at keys", "recall"], rows)
