"""Which images make up which batch, computed ahead of any reading.

The plan of training depends on the seed, the global batch size and the data set alone, so every
host, thread and worker process computes the same one, and a resumed run starts anywhere in it.
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

# Third word of the plan's seed, where the augmentation of an image has its position. (Leaving it
# out would be the same as 0.)
_PLAN = 2**32 - 1
_KEPT = 64  # steps back that can be asked for without walking through the epochs from the first


@dataclass(frozen=True)
class Item:
    """One image of a batch.

    Attributes:
      index: position in the data set.
      epoch: the pass over the data that it belongs to; with the index, the seed of its augmentation.
      shape: (height, width) to resize it to.
      canvas: (height, width) to pad it to.
    """

    index: int
    epoch: int
    shape: tuple[int, int]
    canvas: tuple[int, int]


def choose_canvas(shape: tuple[int, int], canvases: tuple[tuple[int, int], ...]) -> int:
    """Position of the smallest canvas by area, the first of equals, that holds ``shape``; -1 for none."""
    fits = [i for i, c in enumerate(canvases) if shape[0] <= c[0] and shape[1] <= c[1]]
    return min(fits, key=lambda i: canvases[i][0] * canvases[i][1], default=-1)


def both_orientations(canvases: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """The canvases, then each on its side: one's own pictures come in either orientation, whatever a data set had."""
    return tuple(dict.fromkeys([*canvases, *((width, height) for height, width in canvases)]))


def _choose_cropped(shape: tuple[int, int], canvases: tuple[tuple[int, int], ...]) -> int:
    """Position of the canvas, the first of equals, that shows most of an image of ``shape``."""
    return max(range(len(canvases)), key=lambda i: min(shape[0], canvases[i][0]) * min(shape[1], canvases[i][1]))


@dataclass(frozen=True)
class _Epoch:
    """One pass. The arrays are int32 and hold, for each image, its position in the training list
    and its draw of the short side; ``first`` is the step of the first batch."""

    first: int
    canvases: np.ndarray  # [batches]
    batches: np.ndarray  # [batches, B, 3]: position, draw, epoch it was drawn in
    left: tuple[np.ndarray, ...]  # one a canvas, [fewer than B, 3]


class TrainPlan:
    """Batches of images that share a canvas, for any step.

    Each epoch draws a permutation of the training images and, for each, one of ``train_short``. An
    image goes to the smallest canvas that holds it at that size (with ``data.crop``, an image that
    none holds goes to the one that shows most of it). Walking through the permutation, a batch is
    complete when its canvas has ``batch_size`` images, and batches come in order of completion.
    What is left of a canvas at the end of an epoch opens that canvas's first batch of the next, so
    every image is seen exactly once an epoch, at most a batch late.

    Training images are those with a box that is not a crowd box, or all with ``data.keep_empty``.

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
        # Images share few sizes: canvases are looked up by size and draw, not worked out an image.
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
        none = np.zeros((0, 3), np.int32)
        self._epochs: dict[int, _Epoch] = {0: self._walk(0, 0, (none,) * len(self._canvases))}

    def __getstate__(self) -> dict[str, Any]:  # a lock cannot be pickled
        return {k: v for k, v in self.__dict__.items() if k != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def item(self, step: int, row: int) -> Item:
        """Image ``row`` (0 <= row < batch_size) of a step's batch; all rows share a canvas.

        A step far ahead of the last one asked for is found by walking through the epochs between,
        about 5 ms for each 100,000 images.
        """
        epoch = self._epoch_of(step)
        position, draw, drawn_in = epoch.batches[step - epoch.first, row].tolist()
        return self._item(position, draw, drawn_in, int(epoch.canvases[step - epoch.first]))

    def substitutes(self, item: Item) -> list[Item]:
        """What may stand in for an image that cannot be read, in order of preference.

        The images that follow it in its epoch's permutation (from its end on, the beginning) and
        have its canvas; then the remaining ones, to be cropped where they exceed it.
        """
        order, draws = self._draw(item.epoch)
        at = int(np.argmax(self.indices[order] == item.index)) + 1
        order = np.roll(order, -at)[:-1]
        canvas = self._canvases.index(item.canvas)
        same = self._canvas_of[self._kind[order], draws[order]] == canvas
        order = np.concatenate([order[same], order[~same]])
        return [self._item(p, int(draws[p]), item.epoch, canvas) for p in order.tolist()]

    def _item(self, position: int, draw: int, epoch: int, canvas: int) -> Item:
        shape = self._shape_of[self._kind[position]][draw]
        return Item(int(self.indices[position]), epoch, shape, self._canvases[canvas])

    def _draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's permutation of training positions and each position's draw of the short side."""
        rng = np.random.default_rng((self._seed, epoch, _PLAN))
        order = rng.permutation(len(self.indices)).astype(np.int32)
        return order, rng.integers(len(self._shorts), size=len(order), dtype=np.int32)

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
                # Readers are only a prefetch buffer apart: what lies further back is not asked for again.
                self._epochs = {n: e for n, e in self._epochs.items() if e.first + len(e.batches) > epoch.first - _KEPT}
                self._epochs[number + 1] = epoch
                if step < epoch.first + len(epoch.batches):
                    return epoch

    def _walk(self, number: int, first: int, left: tuple[np.ndarray, ...]) -> _Epoch:
        order, draws = self._draw(number)
        canvas = self._canvas_of[self._kind[order], draws[order]]
        rows = np.stack([order, draws[order], np.full_like(order, number)], axis=1)
        b = self._batch_size
        batches, completed, canvases, rest = [], [], [], []
        for c, carried in enumerate(left):
            here = np.flatnonzero(canvas == c)
            queue = np.concatenate([carried, rows[here]])
            full = len(queue) // b
            batches.append(queue[: full * b].reshape(full, b, 3))
            # A carried image alone completes no batch, so a completing one is always of this epoch.
            completed.append(here[np.arange(1, full + 1) * b - 1 - len(carried)])
            canvases.append(np.full(full, c, np.int32))
            rest.append(queue[full * b :])
        by_time = np.argsort(np.concatenate(completed), kind="stable")
        return _Epoch(first, np.concatenate(canvases)[by_time], np.concatenate(batches)[by_time], tuple(rest))


def eval_plan(dataset: Dataset, data: DataConfig, batch_size: int, indices: list[int]) -> list[list[tuple[Item, bool]]]:
    """Batches of images that share a canvas, in order of the canvases, then of ``indices``.

    Every index comes exactly once as valid; the last batch of a canvas is filled with repetitions
    of its first images, marked False.

    Raises:
      DataError: an image that fits no test canvas.
    """
    groups: dict[int, list[Item]] = {c: [] for c in range(len(data.test_canvases))}
    for i in indices:
        size = dataset.size(i)
        shape = resize_shape(*size, data.test_short, data.test_max)
        c = choose_canvas(shape, data.test_canvases)
        if c < 0:
            raise DataError(
                f"{dataset.file_name(i)}: {size[0]}x{size[1]} (height x width) is resized to {shape[0]}x{shape[1]}, "
                "which fits no test canvas; add one to data.test_canvases, or lower data.test_max or data.test_short"
            )
        groups[c].append(Item(i, 0, shape, data.test_canvases[c]))
    batches = []
    for items in groups.values():
        for start in range(0, len(items), batch_size):
            part = [(item, True) for item in items[start : start + batch_size]]
            batches.append([*part, *((part[n % len(part)][0], False) for n in range(batch_size - len(part)))])
    return batches
