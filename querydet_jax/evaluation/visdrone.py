"""VisDrone evaluation by the protocol of the VisDrone2018-DET toolkit, as the Python port runs it.

The port ships with the published code, whose recorded figures the tests compare with. Its rules:

- Ignored regions are truth of category 0. Truth and detections at least half inside them go first. Coordinates are
  rounded, half to even, and 1 or more. A region is a pixel wider and higher than its box, and the share of a box inside
  is counted a pixel to the right and below of it, cut at the image, over its whole area.
- Truth of score 0 is ignored: a detection that matches nothing else and lies inside it by the threshold
  (intersection over the detection's area) does not count. Such truth still counts in the number of objects.
- A limit takes the first 1, 10, 100 or 500 detections of the image in file order, all categories together,
  also of categories that are not evaluated, and only then those of the class.
- By descending score each detection takes the free object of its class and image with the largest IoU, of equal ones
  the later. The port reverses an ascending sort whose order of equal scores depends on the machine; here the sort is
  stable, so of equal scores the later detection is matched first.
- AP is the area under the interpolated recall-precision curve at every recall (VOC from 2010), AR the recall reached.
- Boxes and scores are float32, areas have no added pixel.
- The headline mean has one entry an image that holds the class: classes weigh by the images they are in.

Detections are matched in rounds, the k-th of every image and class at once, over all thresholds, limits and bins.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from querydet_jax.evaluation.metrics import DEFAULT_BINS, SizeBin, as_bins
from querydet_jax.evaluation.visdrone_files import checked_rows
from querydet_jax.evaluation.visdrone_results import CLASSES, Curve, VisDroneMetrics, summarize
from querydet_jax.runtime.errors import DataError

LIMITS = (1, 10, 100, 500)
THRESHOLDS = np.linspace(0.5, 0.95, 10)
_SLOTS = len(CLASSES) + 1  # classes are 1..10

# An object inside the size bin goes before any outside, whatever their IoU; more than objects an image.
_INSIDE = 1 << 24


@dataclass(frozen=True, eq=False)
class VisDroneImage:
    """One image's truth and detections.

    Attributes:
      name: of the image, for messages; the result file's stem.
      size: (height, width), px.
      truth: [n,8] as in the annotation file: x, y, w, h, score, category, truncation, occlusion. Score 1 counts,
        0 is ignored; category 0 is an ignored region, 1..10 are the classes, 11 others.
      detections: [m,6..8] as in the result file, in its order: x, y, w, h, score, category.
        The last two columns of either may be left out; without rows any empty array will do.

    Raises:
      DataError: other shapes, values that are not finite, negative sides, categories outside 0..11, truth that is
        not whole numbers or whose score is neither 0 nor 1.
    """

    name: str
    size: tuple[int, int]
    truth: np.ndarray
    detections: np.ndarray

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 1:
            raise DataError(f"{self.name}: size {tuple(self.size)}, expected (height, width), both 1 or more")
        for field in ("truth", "detections"):
            object.__setattr__(self, field, checked_rows(getattr(self, field), f"{self.name}: {field}"))
        if not (self.truth == np.rint(self.truth)).all():
            raise DataError(f"{self.name}: truth has fractions; give the annotation file's whole numbers")
        if not np.isin(self.truth[:, 4], (0, 1)).all():
            raise DataError(
                f"{self.name}: truth has a score other than 0 and 1; give the annotation file's fifth column"
            )


class _Found(NamedTuple):
    """What is left of all images after regions and limits.

    Objects [T] and detections [D] of the classes only, images in turn, detections in the order they are matched.
    Pairs [P] of a detection and an object that count, same class and image, IoU at least the lowest threshold; by
    detection, best object first.
    """

    truth_image: np.ndarray
    truth_class: np.ndarray
    truth_size: np.ndarray  # sqrt(area), px
    image: np.ndarray
    label: np.ndarray
    score: np.ndarray  # float32
    rank: np.ndarray  # position in the file, regions apart
    size: np.ndarray
    absorbed: np.ndarray  # largest share inside ignored truth of the class
    pair_detection: np.ndarray
    pair_truth: np.ndarray
    pair_iou: np.ndarray  # float32


class _Columns(NamedTuple):
    """What is matched side by side, [C]: every threshold at every limit, then every threshold in every bin."""

    threshold: np.ndarray
    limit: np.ndarray
    bin: np.ndarray  # index into the bins, of which the first holds every size


def evaluate_visdrone(
    images: Iterable[VisDroneImage], *, size_bins: Iterable[tuple[float, float]] = DEFAULT_BINS
) -> VisDroneMetrics:
    """Average precision and recall over IoU 0.50, 0.55 .. 0.95, in percent.

    Args:
      images: each once. An image without a file of results has no detections, not no entry.
      size_bins: ranges of sqrt(w*h) in px, ``low <= size < high``, for figures by size; they may overlap. Within a
        bin, as in COCO's evaluation: an object outside it may be taken by a detection that no object inside
        matches, and the detection then does not count; nor does an unmatched detection of a size outside.

    Raises:
      DataError: an image twice, or bins that are no ranges.
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
    _leave_out(outcome, found, columns, _members(found.size, ranges))

    # [class, bin]: objects, and images with such an object.
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
        # Reversed after a stable sort: of equal scores the later row comes first.
        order = np.argsort(rows[:, 4], kind="stable")[::-1]
        order = order[(rows[order, 5] >= 1) & (rows[order, 5] <= len(CLASSES))]
        rows = rows[order]
        overlap, area, truth_area = _overlaps(rows[:, :4], truth[:, :4])
        same = rows[:, None, 5] == truth[None, :, 5]
        ignored = truth[:, 4] == 0
        floor = np.float32(1e-6)  # the port's, against boxes without area
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
    """float32 truth [n,8] without regions and detections [m,8], each without what lies half or more in a region."""
    truth, detections = image.truth.astype(np.float32), image.detections.astype(np.float32)
    is_region = truth[:, 5] == 0
    regions = image.truth[is_region, :4].astype(np.int64).clip(min=1)
    truth = truth[~is_region]
    if len(regions) == 0:
        return truth, detections
    height, width = image.size
    # The toolkit paints the regions and sums in an integral image. Between the regions' edges the painted map is
    # constant: the same sums follow from its cells, without an array of the image's size.
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
        # Corners clamp to one less than the image, as in the port (the Matlab original: to the image).
        x, y = np.clip(x, 1, max(width - 1, 1)), np.clip(y, 1, max(height - 1, 1))
        across = _shared(x, np.minimum(x + w, width), xs)
        down = _shared(y, np.minimum(y + h, height), ys)
        return ((down @ painted) * across).sum(axis=1) / (h * w) < 0.5

    return truth[outside(truth[:, :4])], detections[outside(detections[:, :4])]


def _shared(low: np.ndarray, high: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Length that each [low, high) [n] shares with each interval between edges [e]: float64 [n,e-1]."""
    shared = np.minimum(high[:, None], edges[1:]) - np.maximum(low[:, None], edges[:-1])
    return np.maximum(shared, 0).astype(np.float64)


def _overlaps(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Intersections [n,m] of float32 xywh boxes [n,4] and [m,4], and their areas [n], [m]; float32 throughout."""
    a_end, b_end = a[:, :2] + a[:, 2:], b[:, :2] + b[:, 2:]
    x, y = (
        np.maximum(np.minimum(a_end[:, None, k], b_end[:, k]) - np.maximum(a[:, None, k], b[:, k]), np.float32(0))
        for k in (0, 1)
    )
    # From the corners: in float32 x + w - x is not always w.
    return x * y, np.prod(a_end - a[:, :2], axis=1), np.prod(b_end - b[:, :2], axis=1)


def _members(sizes: np.ndarray, ranges: Sequence[SizeBin]) -> np.ndarray:
    return np.stack([(sizes >= low) & (sizes < high) for low, high in ranges], axis=1)


def _match(found: _Found, columns: _Columns, inside: np.ndarray) -> np.ndarray:
    """int8 [D,C]: 1 matched an object inside the bin, -1 one outside it, 0 none."""
    outcome = np.zeros((len(found.label), len(columns.bin)), np.int8)
    if len(found.pair_iou) == 0:
        return outcome
    # Only detections of one image and class compete. Those with a pair are numbered within theirs; in a round all
    # with the same number are matched, no two of them over one object.
    candidates, first = np.unique(found.pair_detection, return_index=True)
    group = found.image[candidates] * _SLOTS + found.label[candidates]
    by_group = np.argsort(group, kind="stable")
    begins = np.flatnonzero(np.diff(group[by_group], prepend=-1))
    number = np.empty(len(candidates), np.int64)
    number[by_group] = np.arange(len(candidates)) - np.repeat(begins, np.diff(begins, append=len(candidates)))
    counts = np.diff(first, append=len(found.pair_iou))
    pair_round = np.repeat(number, counts)
    # Better objects have the larger preference, 1 or more.
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


def _leave_out(outcome: np.ndarray, found: _Found, columns: _Columns, inside: np.ndarray) -> None:
    """Mark -1, in place, the unmatched in ignored truth or of a size outside the bin; inside: bool [D, bins]."""
    absorbed = np.flatnonzero(found.absorbed >= THRESHOLDS[0])
    rows = outcome[absorbed]
    rows[(rows == 0) & (found.absorbed[absorbed, None] >= columns.threshold)] = -1
    outcome[absorbed] = rows
    for k in range(1, inside.shape[1]):
        block = outcome[:, columns.bin == k]
        block[(block == 0) & ~inside[:, k, None]] = -1
        outcome[:, columns.bin == k] = block


def _by_class(classes: np.ndarray) -> np.ndarray:
    """How often each of 1..10 is among them, int64 [10]."""
    return np.bincount(classes, minlength=_SLOTS)[1:]


def _precision(
    found: _Found, outcome: np.ndarray, columns: _Columns, objects: np.ndarray
) -> tuple[np.ndarray, dict[str, dict[int, Curve]]]:
    """AP in percent, float64 [class, C] (of limits other than the largest 0), and the curves by class and IoU."""
    out = np.zeros((len(CLASSES), len(columns.bin)))
    curves: dict[str, dict[int, Curve]] = {name: {} for name in CLASSES}
    chosen = np.flatnonzero(columns.limit == LIMITS[-1])
    for k, name in enumerate(CLASSES):
        of_class = np.flatnonzero(found.label == k + 1)
        # The port reverses a second time: of equal scores the later image comes first, in it the earlier row.
        order = of_class[np.argsort(found.score[of_class], kind="stable")[::-1]]
        results, scores = outcome[order].T.copy(), found.score[order]
        for column in chosen:
            hits = results[column] == 1
            # Precision is largest at a hit, and recall moves only there. What is left out has no position.
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
        notes.append(f"{foreign:,} detections of category 0 or 11: not evaluated, but they use up the limits")
    crowded = sum(len(image.detections) > LIMITS[-1] for image in images)
    if crowded:
        notes.append(f"more than {LIMITS[-1]} detections in {crowded:,} images: only the first {LIMITS[-1]} count")
    unsorted = sum(bool((np.diff(image.detections[:, 4]) > 0).any()) for image in images)
    if unsorted:
        notes.append(f"detections not by descending score in {unsorted:,} images: limits take the first in file order")
    return tuple(notes)
