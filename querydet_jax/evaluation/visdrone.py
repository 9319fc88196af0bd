"""VisDrone evaluation by the protocol of the VisDrone2018-DET toolkit, following its Python port.

The published code contains the port (``visdrone_eval/viseval``); the tests compare with its recorded figures. Rules:

- Truth of category 0 is an ignored region. First, truth and detections at least half inside regions are removed.
  Coordinates are rounded, half to even, and at least 1. A region is one pixel wider and higher than its box. The share
  of a box inside is counted over the box shifted right and down by one pixel and cut at the image, and divided by the
  whole area of the box.
- Truth of score 0 is ignored: a detection that matches no other object, and whose share inside such truth
  (intersection over the detection's area) reaches the threshold, does not count. Such truth still counts as an object.
- A limit keeps the first 1, 10, 100 or 500 detections of the image in file order over all categories, including those
  not evaluated. Only then are the detections of a class selected.
- In descending order of score, each detection takes the free object of its class and image with the largest IoU; of
  equal IoUs, the later object. Of equal scores, the later detection is matched first. (The port's order of equal
  scores depends on the machine, because it reverses an unstable sort; the sort here is stable.)
- AP is the area under the interpolated recall-precision curve at every recall (VOC from 2010), AR the recall reached.
- Boxes and scores are float32; areas do not add a pixel.
- The headline mean has one entry per image and class it contains, so classes are weighted by their number of images.

Matching runs in rounds: round k matches the k-th detection of every image and class, for all thresholds, limits and
bins at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from querydet_jax.evaluation.metrics import DEFAULT_BINS, SizeBin, as_bins
from querydet_jax.evaluation.visdrone_files import checked_rows
from querydet_jax.evaluation.visdrone_results import CLASSES, Curve, VisDroneMetrics, summarize
from querydet_jax.runtime.errors import DataError, shown

LIMITS = (1, 10, 100, 500)
THRESHOLDS = np.linspace(0.5, 0.95, 10)
_SLOTS = len(CLASSES) + 1  # classes are 1..10

# Added to the preference of objects inside the size bin, so that they precede all others whatever their IoU.
_INSIDE = 1 << 24


@dataclass(frozen=True, eq=False)
class VisDroneImage:
    """One image's truth and detections.

    Attributes:
      name: the image's name in messages; the result file's stem.
      size: (height, width), px.
      truth: [n,8] as in the annotation file: x, y, w, h, score, category, truncation, occlusion. Score 1 counts,
        0 is ignored; category 0 is an ignored region, 1..10 are the classes, 11 others.
      detections: [m,6..8] as in the result file, in its order: x, y, w, h, score, category.

    The last two columns of both arrays are optional. Any empty array stands for no rows.

    Raises:
      DataError: a shape differs, a value is not finite, a side is negative, a category is outside 0..11, or truth has
        a fraction or a score other than 0 and 1.
    """

    name: str
    size: tuple[int, int]
    truth: np.ndarray
    detections: np.ndarray

    def __post_init__(self) -> None:
        sides = self.size if isinstance(self.size, tuple) else ()
        if len(sides) != 2 or not all(isinstance(side, (int, np.integer)) and side >= 1 for side in sides):
            raise DataError(f"{self.name}: size {shown(self.size)}, expected (height, width), both 1 or more")
        for field in ("truth", "detections"):
            object.__setattr__(self, field, checked_rows(getattr(self, field), f"{self.name}: {field}"))
        if not (self.truth == np.rint(self.truth)).all():
            raise DataError(f"{self.name}: truth has fractions; give the annotation file's whole numbers")
        if not np.isin(self.truth[:, 4], (0, 1)).all():
            raise DataError(
                f"{self.name}: truth has a score other than 0 and 1; give the annotation file's fifth column"
            )


class _Found(NamedTuple):
    """Objects, detections and candidate pairs of all images, after ignored regions and the largest limit.

    Objects [T] and detections [D] are of the ten classes, ordered by image; detections are in matching order. A pair
    [P] is a detection and a non-ignored object of the same class and image with IoU at least the lowest threshold.
    Pairs are ordered by detection, best object first.
    """

    truth_image: np.ndarray
    truth_class: np.ndarray
    truth_size: np.ndarray  # sqrt(area), px
    image: np.ndarray
    label: np.ndarray
    score: np.ndarray  # float32
    rank: np.ndarray  # position in the file, without detections in ignored regions
    size: np.ndarray
    absorbed: np.ndarray  # largest share inside an ignored object of the class
    pair_detection: np.ndarray
    pair_truth: np.ndarray
    pair_iou: np.ndarray  # float32


class _Columns(NamedTuple):
    """The C combinations matched side by side: each threshold at each limit, then each threshold in each bin."""

    threshold: np.ndarray
    limit: np.ndarray
    bin: np.ndarray  # index into the bins; bin 0 holds every size


def evaluate_visdrone(
    images: Iterable[VisDroneImage], *, size_bins: Iterable[tuple[float, float]] = DEFAULT_BINS
) -> VisDroneMetrics:
    """Compute average precision and recall over IoU 0.50, 0.55 .. 0.95, in percent.

    Args:
      images: each image once, including those without detections.
      size_bins: ranges of sqrt(w*h) in px, ``low <= size < high``, for metrics by size; they may overlap. As in
        COCO's evaluation, two kinds of detections do not count in a bin: those that match only an object outside the
        bin, and unmatched ones whose own size is outside.

    Raises:
      DataError: an image is given twice, or a bin is not a range.
    """
    images = list(images)
    if len({image.name for image in images}) < len(images):
        names = [image.name for image in images]
        raise DataError(f"{next(n for n in names if names.count(n) > 1)}: given twice; give every image once")
    bins = as_bins(size_bins)
    ranges = (SizeBin(0, np.inf), *bins)
    found = _gather(images)
    columns = _Columns(
        threshold=np.tile(THRESHOLDS, len(LIMITS) + len(bins)),
        limit=np.repeat([*LIMITS, *[LIMITS[-1]] * len(bins)], len(THRESHOLDS)),
        bin=np.repeat([*[0] * len(LIMITS), *range(1, len(ranges))], len(THRESHOLDS)),
    )
    inside = _members(found.truth_size, ranges)
    outcome = _match(found, columns, inside)
    _mark_uncounted(outcome, found, columns, _members(found.size, ranges))

    # [class, bin]: number of objects, and of images with such an object.
    objects = np.stack([_by_class(found.truth_class[inside[:, k]]) for k in range(len(ranges))], axis=1)
    weights = np.zeros_like(objects)
    for k in range(len(ranges)):
        held = np.unique(found.truth_image[inside[:, k]] * _SLOTS + found.truth_class[inside[:, k]])
        weights[:, k] = _by_class(held % _SLOTS)
    recall = np.stack([np.bincount(found.label[c], minlength=_SLOTS)[1:] for c in (outcome == 1).T], axis=1)
    recall = 100.0 * recall / np.maximum(objects[:, columns.bin], 1)
    precision, curves = _precision(found, outcome, columns, objects)

    shape = (len(CLASSES), len(LIMITS) + len(bins), len(THRESHOLDS))
    return summarize(
        precision.reshape(shape),
        recall.reshape(shape),
        objects,
        weights,
        limits=LIMITS,
        size_bins=bins,
        curves=curves,
        num_images=len(images),
        num_detections=len(found.label),
        notes=_notes(images, found),
    )


def _gather(images: Sequence[VisDroneImage]) -> _Found:
    parts: list[_Found] = []
    objects = detections = 0
    for index, image in enumerate(images):
        truth, rows = _outside_regions(image)
        truth = truth[(truth[:, 5] >= 1) & (truth[:, 5] <= len(CLASSES))]
        rows = rows[: LIMITS[-1]]
        # Reverse a stable sort, so that of equal scores the later row comes first.
        order = np.argsort(rows[:, 4], kind="stable")[::-1]
        order = order[(rows[order, 5] >= 1) & (rows[order, 5] <= len(CLASSES))]
        rows = rows[order]
        overlap, area, truth_area = _overlaps(rows[:, :4], truth[:, :4])
        same = rows[:, None, 5] == truth[None, :, 5]
        ignored = truth[:, 4] == 0
        floor = np.float32(1e-6)  # as in the port, for boxes without area
        share = np.where(same & ignored, overlap / np.maximum(area[:, None], floor), 0)
        iou = overlap / np.maximum(area[:, None] + truth_area - overlap, floor)
        first, second = np.nonzero((iou >= THRESHOLDS[0]) & same & ~ignored)
        values = iou[first, second]
        best = np.lexsort((-second, -values, first))
        parts.append(
            _Found(
                truth_image=np.full(len(truth), index),
                truth_class=truth[:, 5].astype(np.int64),
                truth_size=np.sqrt(truth[:, 2].astype(np.float64) * truth[:, 3]),
                image=np.full(len(rows), index),
                label=rows[:, 5].astype(np.int64),
                score=rows[:, 4],
                rank=order,
                size=np.sqrt(rows[:, 2].astype(np.float64) * rows[:, 3]),
                absorbed=share.max(axis=1, initial=0),
                pair_detection=first[best] + detections,
                pair_truth=second[best] + objects,
                pair_iou=values[best],
            )
        )
        objects, detections = objects + len(truth), detections + len(rows)
    if not parts:
        none = np.zeros(0, np.int64)
        return _Found(*[none] * len(_Found._fields))
    return _Found(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _outside_regions(image: VisDroneImage) -> tuple[np.ndarray, np.ndarray]:
    """Return float32 truth [n,8] without regions, and detections [m,8], both without boxes half or more in regions."""
    truth, detections = image.truth.astype(np.float32), image.detections.astype(np.float32)
    is_region = truth[:, 5] == 0
    regions = image.truth[is_region, :4].astype(np.int64).clip(min=1)
    truth = truth[~is_region]
    if len(regions) == 0:
        return truth, detections
    height, width = image.size
    # The toolkit paints the regions into an image and sums with an integral image. The painted image is constant
    # between the regions' edges, so a grid of these cells gives the same sums without an array of the image's size.
    left, top = regions[:, 0] - 1, regions[:, 1] - 1
    right, bottom = np.minimum(left + 1 + regions[:, 2], width), np.minimum(top + 1 + regions[:, 3], height)
    xs, ys = np.unique(np.concatenate([left, right])), np.unique(np.concatenate([top, bottom]))
    painted = np.zeros((len(ys) - 1, len(xs) - 1))
    for x0, y0, x1, y1 in zip(
        *(np.searchsorted(edges, at) for edges, at in ((xs, left), (ys, top), (xs, right), (ys, bottom))), strict=True
    ):
        painted[y0:y1, x0:x1] = 1

    def outside(boxes: np.ndarray) -> np.ndarray:
        x, y, w, h = np.clip(np.round(boxes), 1, 2.0**31).astype(np.int64).T
        # Clamp corners to the image's size minus one, as in the port (the Matlab original clamps to the size).
        x, y = np.clip(x, 1, max(width - 1, 1)), np.clip(y, 1, max(height - 1, 1))
        across = _shared(x, np.minimum(x + w, width), xs)
        down = _shared(y, np.minimum(y + h, height), ys)
        return ((down @ painted) * across).sum(axis=1) / (h * w) < 0.5

    return truth[outside(truth[:, :4])], detections[outside(detections[:, :4])]


def _shared(low: np.ndarray, high: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return the overlap of each interval [low, high) [n] with each interval between edges [e], float64 [n,e-1]."""
    shared = np.minimum(high[:, None], edges[1:]) - np.maximum(low[:, None], edges[:-1])
    return np.maximum(shared, 0).astype(np.float64)


def _overlaps(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return intersections [n,m] and areas [n], [m] of float32 xywh boxes [n,4] and [m,4], all in float32."""
    a_end, b_end = a[:, :2] + a[:, 2:], b[:, :2] + b[:, 2:]
    x, y = (
        np.maximum(np.minimum(a_end[:, None, k], b_end[:, k]) - np.maximum(a[:, None, k], b[:, k]), np.float32(0))
        for k in (0, 1)
    )
    # Compute areas from corners as the port does: in float32, x + w - x is not always w.
    return x * y, np.prod(a_end - a[:, :2], axis=1), np.prod(b_end - b[:, :2], axis=1)


def _members(sizes: np.ndarray, ranges: Sequence[SizeBin]) -> np.ndarray:
    return np.stack([(sizes >= low) & (sizes < high) for low, high in ranges], axis=1)


def _match(found: _Found, columns: _Columns, inside: np.ndarray) -> np.ndarray:
    """Match; return int8 [D,C]: 1 for a match inside the bin, -1 for one outside it, 0 for none."""
    outcome = np.zeros((len(found.label), len(columns.bin)), np.int8)
    if len(found.pair_iou) == 0:
        return outcome
    # Only detections of the same image and class compete. Number those with a pair within their group; a round
    # matches all with the same number, and no two of them compete for an object.
    candidates, first = np.unique(found.pair_detection, return_index=True)
    group = found.image[candidates] * _SLOTS + found.label[candidates]
    by_group = np.argsort(group, kind="stable")
    begins = np.flatnonzero(np.diff(group[by_group], prepend=-1))
    number = np.empty(len(candidates), np.int64)
    number[by_group] = np.arange(len(candidates)) - np.repeat(begins, np.diff(begins, append=len(candidates)))
    counts = np.diff(first, append=len(found.pair_iou))
    pair_round = np.repeat(number, counts)
    # Larger is better, and at least 1.
    preference = np.repeat(first + counts, counts) - np.arange(len(pair_round))
    by_round = np.argsort(pair_round, kind="stable")
    bounds = np.searchsorted(pair_round[by_round], np.arange(number.max() + 2))

    taken = np.zeros((len(found.truth_class), len(columns.bin)), bool)
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        pairs = by_round[start:stop]
        detection, truth = found.pair_detection[pairs], found.pair_truth[pairs]
        allowed = (found.pair_iou[pairs, None] >= columns.threshold) & (found.rank[detection, None] < columns.limit)
        allowed &= ~taken[truth]
        wish = preference[pairs, None] + _INSIDE * inside[truth][:, columns.bin]
        wish = np.where(allowed, wish, 0)
        begins = np.flatnonzero(np.diff(detection, prepend=-1))
        best = np.maximum.reduceat(wish, begins, axis=0)
        taken[truth] |= allowed & (wish == np.repeat(best, np.diff(begins, append=len(pairs)), axis=0))
        outcome[detection[begins]] = np.where(best > _INSIDE, 1, np.where(best > 0, -1, 0))
    return outcome


def _mark_uncounted(outcome: np.ndarray, found: _Found, columns: _Columns, inside: np.ndarray) -> None:
    """Set to -1, in place, unmatched detections in ignored truth or outside the bin; ``inside`` is bool [D, bins]."""
    absorbed = np.flatnonzero(found.absorbed >= THRESHOLDS[0])
    rows = outcome[absorbed]
    rows[(rows == 0) & (found.absorbed[absorbed, None] >= columns.threshold)] = -1
    outcome[absorbed] = rows
    for k in range(1, inside.shape[1]):
        block = outcome[:, columns.bin == k]
        block[(block == 0) & ~inside[:, k, None]] = -1
        outcome[:, columns.bin == k] = block


def _by_class(classes: np.ndarray) -> np.ndarray:
    """Count the classes 1..10, int64 [10]."""
    return np.bincount(classes, minlength=_SLOTS)[1:]


def _precision(
    found: _Found, outcome: np.ndarray, columns: _Columns, objects: np.ndarray
) -> tuple[np.ndarray, dict[str, dict[int, Curve]]]:
    """Return AP in percent, float64 [class, C] (0 except at the largest limit), and the curves by class and IoU."""
    out = np.zeros((len(CLASSES), len(columns.bin)))
    curves: dict[str, dict[int, Curve]] = {name: {} for name in CLASSES}
    chosen = np.flatnonzero(columns.limit == LIMITS[-1])
    for k, name in enumerate(CLASSES):
        of_class = np.flatnonzero(found.label == k + 1)
        # The port reverses again: of equal scores, the later image comes first, and within it the earlier row.
        order = of_class[np.argsort(found.score[of_class], kind="stable")[::-1]]
        results, scores = outcome[order].T.copy(), found.score[order]
        for column in chosen:
            hits = results[column] == 1
            # Precision peaks and recall changes only at hits. Detections marked -1 have no position.
            position = np.cumsum(results[column] >= 0)[hits]
            reached = np.arange(1, len(position) + 1)
            precision = np.maximum.accumulate((reached / position)[::-1])[::-1]
            total = max(objects[k, columns.bin[column]], 1)
            out[k, column] = 100.0 * precision.sum() / total
            if columns.bin[column] == 0:
                curves[name][round(100 * columns.threshold[column])] = Curve(reached / total, precision, scores[hits])
    return out, curves


def _notes(images: Sequence[VisDroneImage], found: _Found) -> tuple[str, ...]:
    notes = []
    if not images:
        notes.append("no images to evaluate, so every metric is undefined")
    elif len(found.truth_class) == 0:
        notes.append("no objects of categories 1..10 outside ignored regions, so every metric is undefined")
    elif len(found.label) == 0:
        notes.append("no detections of categories 1..10 outside ignored regions; check the score threshold")
    foreign = sum(int(np.isin(image.detections[:, 5], (0, 11)).sum()) for image in images)
    if foreign:
        notes.append(f"{foreign:,} detections of category 0 or 11: not evaluated, but they count towards the limits")
    crowded = sum(len(image.detections) > LIMITS[-1] for image in images)
    if crowded:
        notes.append(f"more than {LIMITS[-1]} detections in {crowded:,} images: only the first {LIMITS[-1]} count")
    unsorted = sum(bool((np.diff(image.detections[:, 4]) > 0).any()) for image in images)
    if unsorted:
        notes.append(f"detections not by descending score in {unsorted:,} images: limits keep the first in file order")
    return tuple(notes)
