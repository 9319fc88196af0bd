"""Assign images to batches before any image is read.

The training plan depends only on the seed, the global batch size and the data set. Every host,
thread and worker process computes the same plan, and a resumed run can start at any step.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from querydet_jax.config import DataConfig
from querydet_jax.data.dataset import Dataset
from querydet_jax.data.transforms import resize_shape
from querydet_jax.runtime.errors import DataError

# Third word of the plan's seed. The seeds of augmentation have the image's index there, and NumPy
# treats a missing word as 0.
_PLAN = 2**32 - 1
_KEPT = 64  # steps back that need no walk through the epochs from the first


@dataclass(frozen=True)
class Item:
    """One image of a batch.

    Attributes:
      index: position in the data set.
      epoch: its pass over the data. Epoch, index and copy seed its augmentation.
      shape: (height, width) to resize it to.
      canvas: (height, width) to pad it to.
      copy: how often the epoch had the image before, with ``data.repeat_below``.
    """

    index: int
    epoch: int
    shape: tuple[int, int]
    canvas: tuple[int, int]
    copy: int = 0


def choose_canvas(shape: tuple[int, int], canvases: tuple[tuple[int, int], ...]) -> int:
    """Return the index of the smallest canvas (by area, first of ties) that holds ``shape``, or -1."""
    fits = [i for i, c in enumerate(canvases) if shape[0] <= c[0] and shape[1] <= c[1]]
    return min(fits, key=lambda i: canvases[i][0] * canvases[i][1], default=-1)


def both_orientations(canvases: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """Return the canvases, then their transposes: users' images may be upright where the data set's were not."""
    return tuple(dict.fromkeys([*canvases, *((width, height) for height, width in canvases)]))


def _choose_cropped(shape: tuple[int, int], canvases: tuple[tuple[int, int], ...]) -> int:
    """Return the index of the canvas (first of ties) that shows most of an image of ``shape``."""
    return max(range(len(canvases)), key=lambda i: min(shape[0], canvases[i][0]) * min(shape[1], canvases[i][1]))


@dataclass(frozen=True)
class _Epoch:
    """One pass over the data. Arrays are int32; a row holds the image's position in the training
    list, the index of its short side, the epoch that drew it and its copy."""

    first: int  # step of the first batch
    canvases: np.ndarray  # [batches]
    batches: np.ndarray  # [batches, B, 4]
    left: tuple[np.ndarray, ...]  # per canvas, [fewer than B, 4]


class TrainPlan:
    """The training batches by step; all images of a batch share a canvas.

    Each epoch draws a permutation of the training images and one of ``train_short`` per image. An
    image goes to the smallest canvas that holds it at that size; with ``data.crop``, an image too
    large for all goes to the canvas that shows most of it. In the order of the permutation, a batch
    is complete when its canvas has ``batch_size`` images; batches follow in order of completion.
    Images left on a canvas at the end of an epoch open its first batch of the next epoch, so every
    epoch uses every image once, at most one batch late.

    Training images have at least one box that is not crowd; ``data.keep_empty`` uses all images.
    With ``data.repeat_below``, an epoch has several copies of images of rare classes.

    Attributes:
      indices: positions of the training images in the data set, int64 [n].
      repeats: mean number of copies of each in an epoch, float64 [n].
      class_repeats: the same per class, float64 [K].

    Raises:
      DataError: no training images, or one that fits no canvas while ``data.crop`` is off.
    """

    def __init__(self, dataset: Dataset, data: DataConfig, batch_size: int, seed: int):
        self._canvases, self._shorts, self._maximum = data.train_canvases, data.train_short, data.train_max
        self._batch_size, self._seed = batch_size, seed
        self.indices = np.array(
            [i for i in range(len(dataset)) if data.keep_empty or not dataset.annotation(i).crowd.all()], np.int64
        )
        if not len(self.indices):
            raise DataError("no image has a box to train on; check the annotations, or set data.keep_empty")
        self.class_repeats, self.repeats = _repeat_factors(dataset, self.indices, data.repeat_below)
        self._repeated = bool((self.repeats != 1).any())
        self._odds = np.cumsum(self.repeats / self.repeats.sum())
        # Images share few sizes, so tabulate canvases by size and short side instead of per image.
        sizes = [dataset.size(int(i)) for i in self.indices]
        kinds = {size: kind for kind, size in enumerate(dict.fromkeys(sizes))}
        self._kind = np.array([kinds[size] for size in sizes], np.int32)
        self._shape_of = [[resize_shape(*size, short, self._maximum) for short in self._shorts] for size in kinds]
        self._canvas_of = np.array(
            [[choose_canvas(s, self._canvases) for s in row] for row in self._shape_of], np.int32
        )
        if (self._canvas_of < 0).any() and not data.crop:
            kind, draw = np.argwhere(self._canvas_of < 0)[0]
            i = int(self.indices[int(np.argmax(self._kind == kind))])
            (h, w), (nh, nw) = dataset.size(i), self._shape_of[kind][draw]
            raise DataError(
                f"{dataset.file_name(i)}: {h}x{w} (height x width) is resized to {nh}x{nw}, which fits no training "
                "canvas; add one to data.train_canvases, lower data.train_max or data.train_short, or set data.crop"
            )
        for kind, draw in np.argwhere(self._canvas_of < 0):
            self._canvas_of[kind, draw] = _choose_cropped(self._shape_of[kind][draw], self._canvases)
        self._lock = threading.Lock()
        self._restart()

    def _restart(self) -> None:
        none = np.zeros((0, 4), np.int32)
        self._epochs: dict[int, _Epoch] = {0: self._walk(0, 0, (none,) * len(self._canvases))}

    def __getstate__(self) -> dict[str, Any]:  # a lock cannot be pickled
        return {k: v for k, v in self.__dict__.items() if k != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def item(self, step: int, row: int) -> Item:
        """Return image ``row`` (0 <= row < batch_size) of a step's batch.

        A jump ahead walks through the epochs in between, about 5 ms per 100,000 images.
        """
        epoch = self._epoch_of(step)
        position, draw, drawn_in, copy = epoch.batches[step - epoch.first, row].tolist()
        return self._item(position, draw, drawn_in, int(epoch.canvases[step - epoch.first]), copy)

    def substitutes(self, item: Item) -> list[Item]:
        """Return the replacements for an image that cannot be read, in order of preference.

        First the images on the same canvas, in the order that follows it in its epoch's permutation
        (cyclically), then the others, cropped where they exceed that canvas.
        """
        order, draws = self._draw(item.epoch)
        at = int(np.argmax(self.indices[order] == item.index)) + 1
        order = np.roll(order, -at)[:-1]
        canvas = self._canvases.index(item.canvas)
        same = self._canvas_of[self._kind[order], draws[order]] == canvas
        order = np.concatenate([order[same], order[~same]])
        return [self._item(p, int(draws[p]), item.epoch, canvas) for p in order.tolist()]

    def any(self, rng: np.random.Generator) -> tuple[int, tuple[int, int]]:
        """Draw a training image, with the odds of ``repeats``, and the (height, width) to resize it to."""
        if self._repeated:
            position = min(int(np.searchsorted(self._odds, rng.random(), side="right")), len(self.indices) - 1)
        else:
            position = int(rng.integers(len(self.indices)))
        draw = int(rng.integers(len(self._shorts)))
        return int(self.indices[position]), self._shape_of[self._kind[position]][draw]

    def _item(self, position: int, draw: int, epoch: int, canvas: int, copy: int = 0) -> Item:
        shape = self._shape_of[self._kind[position]][draw]
        return Item(int(self.indices[position]), epoch, shape, self._canvases[canvas], copy)

    def _draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw the epoch's permutation of training positions and the short-side index of each position."""
        rng = np.random.default_rng((self._seed, epoch, _PLAN))
        order = rng.permutation(len(self.indices)).astype(np.int32)
        return order, rng.integers(len(self._shorts), size=len(order), dtype=np.int32)

    def _copies(self, epoch: int, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the epoch's positions, with repetitions in a random order, and the number of the copy of each."""
        if not self._repeated:
            return order, np.zeros_like(order)
        rng = np.random.default_rng((self._seed, epoch, _PLAN, 1))
        counts = np.floor(self.repeats + rng.random(len(self.repeats))).astype(np.int32)[order]
        copies = np.arange(counts.sum(), dtype=np.int32) - np.repeat(np.cumsum(counts) - counts, counts)
        shuffled = rng.permutation(len(copies))
        return np.repeat(order, counts)[shuffled], copies[shuffled].astype(np.int32)

    def _epoch_of(self, step: int) -> _Epoch:
        with self._lock:
            if step < next(iter(self._epochs.values())).first:
                self._restart()
            for epoch in reversed(self._epochs.values()):
                if epoch.first <= step < epoch.first + len(epoch.batches):
                    return epoch
            while True:
                number, last = next(reversed(self._epochs.items()))
                epoch = self._walk(number + 1, last.first + len(last.batches), last.left)
                # Readers are at most a prefetch buffer apart, so none asks for earlier epochs again.
                self._epochs = {n: e for n, e in self._epochs.items() if e.first + len(e.batches) > epoch.first - _KEPT}
                self._epochs[number + 1] = epoch
                if step < epoch.first + len(epoch.batches):
                    return epoch

    def _walk(self, number: int, first: int, left: tuple[np.ndarray, ...]) -> _Epoch:
        order, draws = self._draw(number)
        order, copies = self._copies(number, order)
        canvas = self._canvas_of[self._kind[order], draws[order]]
        rows = np.stack([order, draws[order], np.full_like(order, number), copies], axis=1)
        b = self._batch_size
        batches, completed, canvases, rest = [], [], [], []
        for c, carried in enumerate(left):
            here = np.flatnonzero(canvas == c)
            queue = np.concatenate([carried, rows[here]])
            full = len(queue) // b
            batches.append(queue[: full * b].reshape(full, b, 4))
            # Fewer than B images are carried over, so the image that completes a batch is of this epoch.
            completed.append(here[np.arange(1, full + 1) * b - 1 - len(carried)])
            canvases.append(np.full(full, c, np.int32))
            rest.append(queue[full * b :])
        by_time = np.argsort(np.concatenate(completed), kind="stable")
        return _Epoch(first, np.concatenate(canvases)[by_time], np.concatenate(batches)[by_time], tuple(rest))


def images_per_epoch(dataset: Dataset, data: DataConfig) -> int:
    """Return how many images a pass over the training images has on average: without those left out, with copies.

    Raises:
      DataError: see ``TrainPlan``.
    """
    return round(float(TrainPlan(dataset, data, batch_size=1, seed=0).repeats.sum()))


def _repeat_factors(dataset: Dataset, indices: np.ndarray, below: float) -> tuple[np.ndarray, np.ndarray]:
    """Return how often an epoch shows each class and each image (Gupta et al. 2019).

    A class on a share f of the images counts max(1, sqrt(below / f)), an image as much as its rarest class.
    """
    if not below:  # spare large data sets the look at every annotation
        return np.ones(len(dataset.classes)), np.ones(len(indices))
    shown = np.zeros((len(indices), len(dataset.classes)), bool)
    for row, i in zip(shown, indices, strict=True):
        truth = dataset.annotation(int(i))
        row[truth.classes[~truth.crowd]] = True
    share = np.maximum(shown.mean(axis=0), 1 / len(indices))
    of_class = np.maximum(1.0, np.sqrt(below / share))
    return of_class, np.where(shown, of_class, 1.0).max(axis=1, initial=1.0)


def eval_item(dataset: Dataset, data: DataConfig, i: int) -> Item:
    """Return image i with its size and canvas in evaluation; raise DataError if it fits none."""
    return Item(i, 0, *fit(dataset.size(i), data, dataset.file_name(i)))


def fit(size: tuple[int, int], data: DataConfig, name: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the size, and the canvas, of a picture of ``size`` in evaluation; raise DataError if it fits none."""
    shape = resize_shape(*size, data.test_short, data.test_max)
    c = choose_canvas(shape, data.test_canvases)
    if c < 0:
        raise DataError(
            f"{name}: {size[0]}x{size[1]} (height x width) is resized to {shape[0]}x{shape[1]}, "
            "which fits no test canvas; add one to data.test_canvases, or lower data.test_max or data.test_short"
        )
    return shape, data.test_canvases[c]


def eval_plan(dataset: Dataset, data: DataConfig, batch_size: int, indices: list[int]) -> list[list[tuple[Item, bool]]]:
    """Return batches of images that share a canvas, ordered by canvas, then as in ``indices``.

    Every index is valid (True) exactly once. The last batch of a canvas is filled up by repeating
    its own images, marked False.

    Raises:
      DataError: an image fits no test canvas.
    """
    groups: dict[tuple[int, int], list[Item]] = {canvas: [] for canvas in data.test_canvases}
    for i in indices:
        item = eval_item(dataset, data, i)
        groups[item.canvas].append(item)
    batches = []
    for items in groups.values():
        for start in range(0, len(items), batch_size):
            part = [(item, True) for item in items[start : start + batch_size]]
            batches.append([*part, *((part[n % len(part)][0], False) for n in range(batch_size - len(part)))])
    return batches
