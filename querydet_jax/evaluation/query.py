"""Query recall: how many objects the queries find, and how many cells that activates.

Average precision shows whether cascaded sparse query costs accuracy; query recall shows why. An
object whose centre cell is not a key on a level gets no detection from that level's sparse head. A
lower threshold yields more keys and more active cells. Shape letters: h w map, n boxes, T
thresholds, S size bins.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from querydet_jax.evaluation.metrics import DEFAULT_BINS, as_bins, as_numbers, nan_to_none, without_nan
from querydet_jax.runtime.errors import DataError
from querydet_jax.viz.text import percent, text_table

THRESHOLDS = (0.02, 0.05, 0.10, 0.12, 0.15, 0.20, 0.30, 0.40, 0.50)
"""Query thresholds that an evaluation tries in addition to the configured one."""


def query_recall(
    boxes: ArrayLike, keys: ArrayLike, stride: float, bins: Iterable[tuple[float, float]] = DEFAULT_BINS
) -> tuple[np.ndarray, np.ndarray]:
    """Count the ground-truth boxes whose centre lies in a key cell, by size.

    Args:
      boxes: [n,4] xyxy in px of the network input.
      keys: bool [...,h,w], the cells of one level of one image at which the sparse head gives outputs. Leading axes,
        such as thresholds, are kept.
      stride: px per cell.
      bins: ranges of sqrt(area) of the boxes in px; they may overlap.

    Returns:
      hits int64 [...,S], totals int64 [S]. A box whose centre is outside the map counts as missed.

    Raises:
      DataError: a shape differs from these, boxes are not finite numbers, or keys are not boolean.
    """
    bins = as_bins(bins)
    boxes = as_numbers(boxes, "boxes")
    boxes, keys = boxes.reshape(-1, 4) if boxes.size == 0 else boxes, np.asarray(keys)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise DataError(f"boxes: shape {list(boxes.shape)}, expected [n,4] xyxy")
    if not (np.abs(boxes) < 1e9).all():  # false for nan, too
        raise DataError("boxes hold values that are not finite or beyond 1e9; give xyxy in px")
    boxes = boxes.astype(np.float32)
    if keys.ndim < 2 or keys.dtype != np.bool_:
        raise DataError(f"keys: {keys.dtype} {list(keys.shape)}, expected bool [...,h,w] of one image and level")
    if not stride > 0:
        raise DataError(f"stride: {stride}, expected px per cell, above 0")
    hit = centre_is_key(boxes, keys, stride)
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 0)
    size = np.sqrt(sides[:, 0] * sides[:, 1])
    member = (
        np.stack([(size >= low) & (size < high) for low, high in bins]) if bins else np.zeros((0, len(boxes)), bool)
    )
    return (member & hit[..., None, :]).sum(axis=-1), member.sum(axis=1)


def centre_is_key(boxes: np.ndarray, keys: np.ndarray, stride: float) -> np.ndarray:
    """Return whether the centre of each box lies in a key cell, bool [...,n]; arguments as in ``query_recall``."""
    h, w = keys.shape[-2:]
    x = np.floor((boxes[:, 0] + boxes[:, 2]) / 2 / stride).astype(np.int64)
    y = np.floor((boxes[:, 1] + boxes[:, 3]) / 2 / stride).astype(np.int64)
    inside = (x >= 0) & (x < w) & (y >= 0) & (y < h)
    hit = np.zeros((*keys.shape[:-2], len(boxes)), bool)
    hit[..., inside] = keys[..., y[inside], x[inside]]
    return hit


class QueryRecall:
    """Query recall and active cells of one level, summed over images, at several thresholds.

    On the level below the start level, recall never falls when the threshold is lowered. On finer levels it may fall
    slightly: sparse convolution computes their query probabilities, which depend on the active cells.

    Attributes:
      thresholds: ascending, with ``configured`` among them.
      configured: the threshold that inference uses.
      bins: ranges of sqrt(area) in px.
      hits: int64 [T,S], number of boxes whose centre is in a key cell.
      totals: int64 [S], number of boxes.
    """

    def __init__(
        self,
        configured: float,
        thresholds: Iterable[float] = THRESHOLDS,
        bins: Iterable[tuple[float, float]] = DEFAULT_BINS,
    ):
        self.configured = configured
        self.thresholds = tuple(sorted({*thresholds, configured}))
        self.bins = as_bins(bins)
        self.hits = np.zeros((len(self.thresholds), len(self.bins)), np.int64)
        self.totals = np.zeros(len(self.bins), np.int64)
        self._active = np.zeros(len(self.thresholds))
        self._images = 0

    def add(self, boxes: ArrayLike, keys: ArrayLike, active: ArrayLike, stride: float) -> None:
        """Count one image.

        Args:
          boxes, stride: as in ``query_recall``.
          keys, active: bool [T,h,w], the key and the active cells at each threshold.
        """
        keys, active = np.asarray(keys), np.asarray(active)
        if keys.ndim != 3 or len(keys) != len(self.thresholds) or active.shape != keys.shape:
            raise DataError(
                f"keys {list(keys.shape)}, active {list(active.shape)}: expected [T,h,w] each, "
                f"T the {len(self.thresholds)} thresholds"
            )
        hits, totals = query_recall(boxes, keys, stride, self.bins)
        self.hits += hits
        self.totals += totals
        self._active += active.mean(axis=(1, 2))
        self._images += 1

    def merge(self, other: QueryRecall) -> None:
        """Add the counts of other images, made with the same thresholds and bins."""
        self.hits += other.hits
        self.totals += other.totals
        self._active += other._active
        self._images += other._images

    def recall(self, threshold: float | None = None) -> dict[str, float]:
        """Return {bin key: percent of boxes found}, nan for a bin without boxes.

        Args:
          threshold: one of ``thresholds``; None is the configured one.
        """
        row = self.hits[self.thresholds.index(self.configured if threshold is None else threshold)]
        return {
            entry.key: 100.0 * int(hits) / int(total) if total else float("nan")
            for entry, hits, total in zip(self.bins, row, self.totals, strict=True)
        }

    def active_share(self) -> dict[float, float]:
        """Return {threshold: active share of the level's cells, 0..1}, mean over images; nan without images."""
        shares = self._active / self._images if self._images else np.full(len(self.thresholds), np.nan)
        return dict(zip(self.thresholds, shares.tolist(), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Return plain types only; nan becomes None, because JSON has no nan."""
        return {
            "threshold": self.configured,
            "objects": {entry.key: int(total) for entry, total in zip(self.bins, self.totals, strict=True)},
            "by_threshold": {
                str(threshold): {
                    "recall": without_nan(self.recall(threshold)),
                    "active_share": nan_to_none(share),
                }
                for threshold, share in self.active_share().items()
            },
        }

    def table(self) -> str:
        """Return a text table, one row per size bin: objects, objects found, and percent found at each threshold.

        The last row gives the active cells in percent of the level's. An asterisk marks the configured threshold.
        """
        marked = self.thresholds.index(self.configured)
        recalls = [self.recall(threshold) for threshold in self.thresholds]
        rows = [
            [entry.label, f"{total:,}", f"{hits:,}", *_percentages([recall[entry.key] for recall in recalls])]
            for entry, total, hits in zip(self.bins, self.totals, self.hits[marked], strict=True)
        ]
        rows.append(["active cells", "", "", *_percentages([100 * share for share in self.active_share().values()])])
        names = [str(threshold) + "*" * (i == marked) for i, threshold in enumerate(self.thresholds)]
        return text_table(["sqrt(area)", "objects", "at keys*", *names], rows)


def _percentages(values: Sequence[float]) -> list[str]:
    return [percent(value, 1) for value in values]
