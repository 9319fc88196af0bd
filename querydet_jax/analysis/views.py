"""All boxes of a data set in flat arrays, before and after resizing. Letters: I images, N boxes, B images per group."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from querydet_jax.config import DataConfig
from querydet_jax.data.dataset import Dataset
from querydet_jax.data.plan import choose_canvas
from querydet_jax.data.readers.visdrone import training_rows
from querydet_jax.data.transforms import resize_boxes, resize_shape

_MULTIPLE = 32  # canvas sides are multiples of this
_BATCH_CELLS = 2**21  # cells of the finest map per group; bounds memory and keeps the number of calls small


@dataclass(frozen=True)
class Truth:
    """All boxes of a data set, in order of its images.

    Attributes:
      sizes: int32 [I,2], (height, width) of the images.
      boxes: float32 [N,4] xyxy px of the image, without crowd boxes.
      classes: int32 [N], 0..K-1.
      image: int64 [N], image of each box, ascending.
      crowd: int64 [I], number of crowd boxes.
      ignored: number of ignored regions and objects of no class; 0 for data sets without them.
    """

    sizes: np.ndarray
    boxes: np.ndarray
    classes: np.ndarray
    image: np.ndarray
    crowd: np.ndarray
    ignored: int

    @cached_property
    def counts(self) -> np.ndarray:
        """Boxes per image, int64 [I]."""
        return np.bincount(self.image, minlength=len(self.sizes))

    @cached_property
    def starts(self) -> np.ndarray:
        """Offsets int64 [I+1]: image i has the boxes starts[i] to starts[i + 1]."""
        return np.concatenate([[0], np.cumsum(self.counts)])


def read_truth(dataset: Dataset) -> Truth:
    """Read all annotations of a data set."""
    boxes, classes, image, crowd, ignored = [np.zeros((0, 4), np.float32)], [np.zeros(0, np.int32)], [], [], 0
    for i in range(len(dataset)):
        annotation = dataset.annotation(i)
        boxes.append(annotation.boxes[~annotation.crowd])
        classes.append(annotation.classes[~annotation.crowd])
        image.append(len(boxes[-1]))
        crowd.append(int(annotation.crowd.sum()))
        rows = dataset.official_truth(i)
        ignored += 0 if rows is None else len(rows) - len(training_rows(rows))
    return Truth(
        np.array([dataset.size(i) for i in range(len(dataset))], np.int32).reshape(-1, 2),
        np.concatenate(boxes),
        np.concatenate(classes),
        np.repeat(np.arange(len(dataset)), image),
        np.array(crowd, np.int64),
        ignored,
    )


@dataclass(frozen=True)
class View:
    """A data set after resizing.

    Attributes:
      rule: the resize rule in words.
      shapes: int32 [I,2], (height, width) after resizing.
      canvases: (height, width) each.
      canvas: int64 [I], index of the canvas that holds the image, -1 for none.
      boxes: float32 [N,4] xyxy px of the resized image.
    """

    rule: str
    shapes: np.ndarray
    canvases: tuple[tuple[int, int], ...]
    canvas: np.ndarray
    boxes: np.ndarray

    @cached_property
    def inputs(self) -> np.ndarray:
        """(height, width) int32 [I,2] of the network's input: the canvas, or the whole image if it fits none."""
        padded = -(-self.shapes // _MULTIPLE) * _MULTIPLE
        return np.where(self.canvas[:, None] < 0, padded, np.array(self.canvases, np.int32)[self.canvas])


def training_view(truth: Truth, data: DataConfig, seed: int) -> View:
    """Resize every image to one of ``data.train_short``, drawn at random as in an epoch, without cropping."""
    shorts = np.random.default_rng(seed).choice(np.array(data.train_short), len(truth.sizes))
    drawn = "/".join(map(str, data.train_short))
    several = ", one drawn per image" if len(data.train_short) > 1 else ""
    rule = f"training: short side {drawn}{several}, long side at most {data.train_max}"
    return _view(truth, shorts, data.train_max, data.train_canvases, rule)


def inference_view(truth: Truth, data: DataConfig) -> View:
    """Resize every image as inference does."""
    shorts = np.full(len(truth.sizes), data.test_short)
    rule = f"inference: short side {data.test_short}, long side at most {data.test_max}"
    return _view(truth, shorts, data.test_max, data.test_canvases, rule)


def _view(truth: Truth, shorts: np.ndarray, maximum: int, canvases: tuple[tuple[int, int], ...], rule: str) -> View:
    known: dict[tuple[int, int, int], tuple[tuple[int, int], int]] = {}
    shapes, canvas, boxes = [], [], np.empty_like(truth.boxes)
    for i, (h, w) in enumerate(truth.sizes.tolist()):
        key = (h, w, int(shorts[i]))
        if key not in known:
            shape = resize_shape(h, w, key[2], maximum)
            known[key] = shape, choose_canvas(shape, canvases)
        shape, position = known[key]
        shapes.append(shape)
        canvas.append(position)
        part = slice(truth.starts[i], truth.starts[i + 1])
        boxes[part] = resize_boxes(truth.boxes[part], (h, w), shape)
    return View(rule, np.array(shapes, np.int32).reshape(-1, 2), canvases, np.array(canvas, np.int64), boxes)


def unfit_for_training(truth: Truth, data: DataConfig) -> int:
    """Return how many images fit no training canvas at some value of ``data.train_short``."""
    sizes, counts = np.unique(truth.sizes, axis=0, return_counts=True)
    return sum(
        int(count)
        for (h, w), count in zip(sizes.tolist(), counts, strict=True)
        if any(choose_canvas(resize_shape(h, w, s, data.train_max), data.train_canvases) < 0 for s in data.train_short)
    )


class Group(NamedTuple):
    """Images whose network inputs have the same size.

    Attributes:
      input: (height, width) of the network input.
      images: int64 [B], positions.
      boxes: float32 [n,4].
      owner: int64 [n], index into ``images`` of each box, ascending.
      room: largest number of images in a group of this size, at least B.
    """

    input: tuple[int, int]
    images: np.ndarray
    boxes: np.ndarray
    owner: np.ndarray
    room: int


def groups(truth: Truth, view: View, images: np.ndarray, stride: int) -> Iterator[Group]:
    """Split ``images`` (positions [m]) into groups small enough for dense maps of ``stride`` px per cell."""
    inputs, kind = np.unique(view.inputs[images], axis=0, return_inverse=True)
    for number, (height, width) in enumerate(inputs.tolist()):
        members = images[kind.reshape(-1) == number]
        room = min(max(1, _BATCH_CELLS * stride**2 // (height * width)), 64, len(members))
        for first in range(0, len(members), room):
            chosen = members[first : first + room]
            counts = truth.counts[chosen]
            owner = np.repeat(np.arange(len(chosen)), counts)
            within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
            boxes = view.boxes[truth.starts[chosen][owner] + within]
            yield Group((height, width), chosen, boxes, owner, room)
