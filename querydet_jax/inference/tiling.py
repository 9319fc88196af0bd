"""Large pictures: detect in overlapping windows at the picture's own scale, and join what the cuts divide.

The windows of a picture are rows and columns of one size on one canvas, so one compiled program serves them all.
Shape letters: n detections, K classes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from typing import Any, NamedTuple

import jax
import numpy as np

from querydet_jax.config import DataConfig
from querydet_jax.data import Dataset
from querydet_jax.data.plan import choose_canvas, eval_item
from querydet_jax.data.transforms import place, rescale_to_original, resize, resize_shape
from querydet_jax.inference.prediction import Prediction
from querydet_jax.runtime.errors import ConfigError, DataError, shown

_log = logging.getLogger("querydet_jax")

OVERLAP = 0.2  # share of a window's side; objects up to that size are seen whole by some window
_MOST_OVERLAP = 0.75
_MOST_TILES = 100
_SMALLEST = 32  # px of the picture, longer side of a window

# A box is taken to be cut where it ends nearer to an inner border than this share of its side, and than these px.
_NEAR, _NEAR_PX = 0.1, 2.0
_ALIKE = 0.5  # least IoU, along the cut, of two parts of an object
_FAINTER = 0.25  # least share of the better part's score that the other part has
_PAIRS = 1 << 20  # pairs of boxes compared at a time, for the memory's sake


@dataclass(frozen=True)
class Tiles:
    """How pictures are cut.

    Attributes:
      number: windows along the longer side, to which the picture is scaled; 0: as many as its own scale needs, and none
        for a picture that the run's resize rule does not shrink, or that a canvas holds.
      overlap: least share of a window's side that the next window shows, too.
    """

    number: int = 0
    overlap: float = OVERLAP


def parse_tiles(value: Any, overlap: Any = OVERLAP, flags: tuple[str, str] = ("tiles", "overlap")) -> Tiles | None:
    """Return what ``off`` (None), ``auto`` or a number of windows along the longer side means.

    Args:
      flags: what messages call the two values.

    Raises:
      ConfigError: it is none of these, ``overlap`` is not a number from 0 to 0.75, or is set for ``off``.
    """
    text = str(value)
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 9 else 0
    if text not in ("off", "auto") and (isinstance(value, bool) or not 2 <= number <= _MOST_TILES):
        raise ConfigError(
            f"{flags[0]} {shown(value)}: give auto, off, or the number of windows along the longer side, 2 to "
            f"{_MOST_TILES}"
        )
    if isinstance(overlap, bool) or not isinstance(overlap, int | float) or not 0 <= overlap <= _MOST_OVERLAP:
        raise ConfigError(
            f"{flags[1]} {shown(overlap)}: give the share of a window that the next one shows, too, from 0 to "
            f"{_MOST_OVERLAP}"
        )
    if text == "off":
        if overlap != OVERLAP:
            raise ConfigError(f"{flags[1]} {overlap}: is for windows; set {flags[0]} to auto or to a number")
        return None
    return Tiles(number, float(overlap))


@dataclass(frozen=True)
class Grid:
    """The windows of a picture, one for each row and column.

    Attributes:
      picture: (height, width) px.
      window: (height, width) of every window, px of the picture.
      starts: the windows' tops and lefts, each int64 ``[rows or columns]``, px of the picture.
      shape: (height, width) of every window on the canvas.
      canvas: (height, width).
    """

    picture: tuple[int, int]
    window: tuple[int, int]
    starts: tuple[np.ndarray, np.ndarray]
    shape: tuple[int, int]
    canvas: tuple[int, int]

    def __len__(self) -> int:
        return len(self.starts[0]) * len(self.starts[1])

    @property
    def scale(self) -> float:
        """Pixels of the picture per pixel of the canvas."""
        return max(self.window[0] / self.shape[0], self.window[1] / self.shape[1])


class Found(NamedTuple):
    """Detections of all windows of a picture: xyxy float32 ``[n, 4]`` px of the picture, scores and classes ``[n]``,
    and the (row, column) of the window that each comes from, int64 ``[n, 2]``."""

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    windows: np.ndarray

    def take(self, chosen: np.ndarray) -> Found:
        return Found(*(x[chosen] for x in self))


def run_tiled(
    detector: Callable[..., Any],
    dataset: Dataset,
    data: DataConfig,
    tiles: Tiles,
    *,
    min_scores: np.ndarray | float,
    nms_iou: float,
    batch_size: int = 1,
    indices: Sequence[int] | None = None,
    on_broken: Callable[[str], None] | None = None,
) -> Iterator[Prediction]:
    """Run a detector over pictures in windows and yield a result per picture, in their order.

    One picture is in memory at a time. The detector's limit of detections holds for each window; a picture has none.

    Args:
      min_scores: the score from which a detection counts, of all classes or per class ``[K]``.
      nms_iou: of two detections of a class in different windows whose IoU is larger, the better one stays.
      batch_size: windows per call.
      indices: positions of the pictures; None: all.
      on_broken: called with a message for each picture that fits no canvas or cannot be read; None raises.

    Raises:
      DataError: a picture is broken, without ``on_broken``.
    """
    for i in range(len(dataset)) if indices is None else indices:
        try:
            grid = plan_windows(tiles, dataset, i, data)
            image = dataset.load(i)
        except DataError as error:
            if on_broken is None:
                raise
            on_broken(str(error))
            continue
        found, full = _detect(detector, image, grid, min_scores, batch_size)
        del image  # before the next one is read
        if full:
            _log.warning(
                "%s: %d of %d windows hold as many detections as the detector returns, all of which count; further "
                "ones are missing there: raise inference.max_detections, or the least score",
                dataset.file_name(i), full, len(grid),
            )  # fmt: skip
        boxes, scores, classes = merge(found, grid, nms_iou)
        yield Prediction(
            index=i,
            size=grid.picture,
            boxes=boxes,
            scores=scores,
            classes=classes,
            class_names=dataset.classes,
            scale=grid.scale,
            min_scores=min_scores,
            load=cache(partial(dataset.load, i)),
        )


def plan_windows(tiles: Tiles, dataset: Dataset, i: int, data: DataConfig) -> Grid:
    """Return the windows of picture i, all of it as one window where it is not cut.

    Of several canvases, the one with the largest scale is used; then, the one with the fewest windows.

    Raises:
      DataError: it is not cut and fits no canvas.
    """
    size = dataset.size(i)
    shrinks = math.prod(resize_shape(*size, data.test_short, data.test_max)) < math.prod(size)
    if not tiles.number and (not shrinks or choose_canvas(size, data.test_canvases) >= 0):
        item = eval_item(dataset, data, i)
        return Grid(size, size, (np.zeros(1, np.int64), np.zeros(1, np.int64)), item.shape, item.canvas)
    return min((_grid(size, canvas, tiles) for canvas in data.test_canvases), key=lambda grid: (grid.scale, len(grid)))


def merge(found: Found, grid: Grid, nms_iou: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return boxes, scores and classes of a picture, best first, every object once.

    A box that ends at an inner border of its window is taken for a part of an object, and left out where a window that
    reaches beyond the border shows all of the box. Where none does, because the object is larger than the overlap, its
    parts are joined. Then class-wise NMS decides between different windows.
    """
    best_first = np.argsort(-found.scores, kind="stable")
    found = found.take(best_first)
    if len(grid) > 1:
        cut, elsewhere = _cut(found, grid)
        found, cut = found.take(~elsewhere), cut[~elsewhere]
        found = _join(found, cut, nms_iou)
        found = found.take(_kept(found, nms_iou))
    return found.boxes, found.scores, found.classes


def _grid(size: tuple[int, int], canvas: tuple[int, int], tiles: Tiles) -> Grid:
    scale = 1.0
    if tiles.number:
        longer = int(size[1] >= size[0])
        share = tiles.number - (tiles.number - 1) * tiles.overlap
        scale = canvas[longer] / max(math.ceil(size[longer] / share - 1e-9), _SMALLEST)
    window = tuple(min(length, math.ceil(c / scale - 1e-9)) for length, c in zip(size, canvas, strict=True))
    shape = tuple(min(c, max(round(w * scale), 1)) for w, c in zip(window, canvas, strict=True))
    tops, lefts = (_starts(length, w, tiles.overlap) for length, w in zip(size, window, strict=True))
    return Grid(size, (window[0], window[1]), (tops, lefts), (shape[0], shape[1]), canvas)


def _starts(length: int, window: int, overlap: float) -> np.ndarray:
    """Return where windows begin along a side, evenly spread, the first at 0 and the last at the end."""
    steps = math.ceil((length - window) / max(window * (1 - overlap), 1) - 1e-9)
    return np.rint(np.linspace(0, length - window, steps + 1)).astype(np.int64)


def _detect(
    detector: Callable[..., Any], image: np.ndarray, grid: Grid, min_scores: np.ndarray | float, batch_size: int
) -> tuple[Found, int]:
    """Return the detections that count, and how many windows are full of them (0 where all count)."""
    tops, lefts = grid.starts
    (height, width), least = grid.window, np.asarray(min_scores, np.float32)
    rows, full = [], 0
    every = list(product(range(len(tops)), range(len(lefts))))
    for windows in (every[n : n + batch_size] for n in range(0, len(every), batch_size)):
        crops = [image[tops[r] : tops[r] + height, lefts[c] : lefts[c] + width] for r, c in windows]
        crops += crops[-1:] * (batch_size - len(crops))  # the program's batch is fixed
        images = np.stack([place(resize(crop, grid.shape), grid.canvas) for crop in crops])
        result = jax.device_get(detector(images, np.tile(np.array(grid.shape, np.int32), (batch_size, 1))))
        for n, (r, c) in enumerate(windows):
            values = (x[n] for x in (result.boxes, result.scores, result.classes, result.valid))
            boxes, scores, classes = rescale_to_original(*values, grid.shape, grid.window)
            counts = scores >= (least[classes] if least.ndim else least)
            full += bool(counts.all() and np.all(result.valid[n]) and least.min() > 0 and len(grid) > 1)
            offset = np.array([lefts[c], tops[r]] * 2, np.float32)
            where = np.full((int(counts.sum()), 2), (r, c))
            rows.append(Found(boxes[counts] + offset, scores[counts], classes[counts], where))
    return Found(*map(np.concatenate, zip(*rows, strict=True))), full


def _cut(found: Found, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Return which ends of each box lie at an inner border, bool ``[n, 4]`` as xyxy, and, bool ``[n]``, whether a
    window beyond such a border shows all of the box along its axis.

    That window is in the same row or column, so what it shows of the object contains what the box shows, and more. A
    chain of such windows comes to an end at the one that shows most.
    """
    cut, elsewhere = np.zeros((len(found.scores), 4), bool), np.zeros(len(found.scores), bool)
    for axis, (length, window, starts) in enumerate(zip(grid.picture, grid.window, grid.starts, strict=True)):
        low, high = found.boxes[:, 1 - axis], found.boxes[:, 3 - axis]
        near = np.maximum(_NEAR * (high - low), _NEAR_PX * grid.scale)
        # The ends of the picture cut nothing.
        first = np.where(starts > 0, starts, -np.inf)
        last = np.where(starts + window < length, starts + window, np.inf)
        clear_below, clear_above = low[:, None] - near[:, None] >= first, high[:, None] + near[:, None] <= last
        own = found.windows[:, axis, None]
        cut[:, 1 - axis] = ~np.take_along_axis(clear_below, own, axis=1)[:, 0]
        cut[:, 3 - axis] = ~np.take_along_axis(clear_above, own, axis=1)[:, 0]
        elsewhere |= (cut[:, 1 - axis] | cut[:, 3 - axis]) & (clear_below & clear_above).any(axis=1)
    return cut, elsewhere


def _join(found: Found, cut: np.ndarray, nms_iou: float) -> Found:
    """Replace parts of one object, which face each other across a cut, by the box around them, with the best's score.

    Each end of a part joins one other part at most, in the nearest window, the better one first.
    """
    parts = np.flatnonzero(cut.any(axis=1))
    # One part may be shown by several windows: two rows, where a cut between columns divides the object.
    alike = found.take(parts)._replace(classes=found.classes[parts] * 16 + cut[parts] @ (1, 2, 4, 8))
    first = _kept(alike, nms_iou)
    alone = np.ones(len(found.scores), bool)
    alone[parts[~first]] = False
    parts = parts[first]
    boxes, scores, classes, windows = found.take(parts)
    free, group, joined = cut[parts], np.arange(len(parts)), []
    pairs = _sorted_pairs(boxes + np.array([-1, -1, 1, 1], np.float32), classes)  # without overlap, parts only touch
    for one, other in sorted(pairs, key=lambda pair: abs(windows[pair[0]] - windows[pair[1]]).sum()):
        for axis in (0, 1):
            a, b = (one, other) if windows[one, axis] < windows[other, axis] else (other, one)
            facing = windows[a, axis] < windows[b, axis] and free[a, 3 - axis] and free[b, 1 - axis]
            if facing and scores[other] >= _FAINTER * scores[one] and _along(boxes[a], boxes[b], axis) >= _ALIKE:
                free[a, 3 - axis] = free[b, 1 - axis] = False
                group[group == group[other]] = group[one]
    for members in (np.flatnonzero(group == g) for g in np.unique(group)):
        if len(members) > 1:
            alone[parts[members]] = False
            box = np.concatenate([boxes[members, :2].min(axis=0), boxes[members, 2:].max(axis=0)])
            # Of no window, so that NMS compares it with all.
            joined.append(
                Found(box, scores[members[0]], classes[members[0]], np.array([-1, -1 - len(joined)], np.int64))
            )
    found = found.take(alone)
    if joined:
        found = Found(
            *(np.concatenate([x, np.stack(y)]) for x, y in zip(found, zip(*joined, strict=True), strict=True))
        )
    return found.take(np.argsort(-found.scores, kind="stable"))


def _along(a: np.ndarray, b: np.ndarray, axis: int) -> float:
    """Return the IoU of two boxes' extents along a cut between rows (axis 0) or columns (1)."""
    low, high = (a[axis], b[axis]), (a[axis + 2], b[axis + 2])
    return (min(high) - max(low)) / max(max(high) - min(low), 1e-6)


def _kept(found: Found, iou_threshold: float) -> np.ndarray:
    """Run exact greedy class-wise NMS between detections of different windows, best first; return bool ``[n]``."""
    kept, boxes = np.ones(len(found.scores), bool), found.boxes
    for one, other in _sorted_pairs(boxes, found.classes, iou_threshold):
        # One window's own NMS, hard or soft, has decided already.
        if kept[one] and (found.windows[one] != found.windows[other]).any():
            kept[other] = False
    return kept


def _sorted_pairs(boxes: np.ndarray, classes: np.ndarray, iou_threshold: float = 0.0) -> Iterator[list[int]]:
    """Yield the pairs of one class with a larger IoU, each in the order given, sorted by the first, then the second."""
    boxes = boxes.astype(np.float64)
    # Side by side, classes do not meet.
    boxes[:, ::2] += classes[:, None] * (boxes[:, 2].max(initial=0) - boxes[:, 0].min(initial=0) + 1)
    order = np.argsort(boxes[:, 0], kind="stable")
    sides = boxes[order]
    # The boxes that begin before this one ends.
    counts = np.searchsorted(sides[:, 0], sides[:, 2]) - np.arange(len(sides)) - 1
    counts = np.maximum(counts, 0)
    found = [np.zeros((0, 2), np.int64)]
    for rows in np.split(np.arange(len(sides)), np.flatnonzero(np.diff(np.cumsum(counts) // _PAIRS)) + 1):
        first = np.repeat(rows, counts[rows])
        second = first + 1 + np.arange(len(first)) - np.repeat(np.cumsum(counts[rows]) - counts[rows], counts[rows])
        meet = np.minimum(sides[first, 3], sides[second, 3]) > np.maximum(sides[first, 1], sides[second, 1])
        first, second = first[meet], second[meet]
        shared = np.minimum(sides[first, 2:], sides[second, 2:]) - np.maximum(sides[first, :2], sides[second, :2])
        inner, area = shared.prod(axis=1), (sides[:, 2:] - sides[:, :2]).prod(axis=1)
        near = inner > iou_threshold * (area[first] + area[second] - inner)
        found.append(np.sort(np.stack([order[first], order[second]], axis=1)[near], axis=1))
    pairs = np.concatenate(found)
    yield from pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))].tolist()
