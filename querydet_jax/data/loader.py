"""Training and evaluation batches, read in parallel by grain.

Letters: B images per batch of this shard, H W canvas, G padded boxes. ``plan`` chooses each image,
its size and its canvas; worker threads or processes read examples ahead; ``_stack`` forms the batch.
Every random choice is a function of (seed, epoch, image), so batches do not depend on the number of
workers.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import signal
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import grain.python as grain
import numpy as np
from absl import flags

from querydet_jax.config import DataConfig
from querydet_jax.data.augment import Sample, train_example
from querydet_jax.data.dataset import Dataset
from querydet_jax.data.plan import Item, TrainPlan, eval_item, eval_plan
from querydet_jax.data.transforms import place, resize
from querydet_jax.runtime.errors import ConfigError, DataError

_log = logging.getLogger("querydet_jax")

# Skip damaged images until at least _TOLERATED of them, and more than _TOLERATED_SHARE of the
# images tried, have failed. Beyond that the folder itself is wrong.
_TOLERATED, _TOLERATED_SHARE = 8, 0.1
_ENDLESS = 2**40  # examples

Batch = dict[str, np.ndarray]


def train_batches(
    dataset: Dataset,
    data: DataConfig,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    shard: int = 0,
    num_shards: int = 1,
) -> TrainBatches:
    """Iterate endlessly over shuffled batches of augmented images.

    Args:
      dataset: the images.
      data: sizes, canvases, augmentation and workers.
      batch_size: images per step over all shards. Each shard gets ``batch_size / num_shards`` rows,
        starting at row ``shard * batch_size / num_shards``.
      seed: seed of the order and of every augmentation, not negative.
      start_step: the first step to yield. The content of a step's batch does not depend on it.
      shard: index of this host.
      num_shards: number of hosts.

    Returns:
      An iterator of dictionaries: ``images`` uint8 [B, H, W, 3], padded with 0 on the bottom and
      right; ``sizes`` int32 [B, 2], (h, w) of the valid pixels; ``boxes`` float32 [B, G, 4], pixels
      of ``images``, padded with 0; ``classes`` int32 [B, G], padded with -1; ``image_ids`` int64 [B].

    Raises:
      ConfigError: a field is invalid, or the number of shards does not divide the batch size.
      DataError: at once, if there are no images to train on or an image fits no canvas; while
        iterating, if too many images cannot be read or a loader process has ended.
    """
    return TrainBatches(dataset, data, batch_size, seed, start_step, shard, num_shards)


def eval_batches(
    dataset: Dataset,
    data: DataConfig,
    *,
    batch_size: int,
    indices: Sequence[int] | None = None,
    shard: int = 0,
    num_shards: int = 1,
    on_broken: Callable[[str], None] | None = None,
    in_order: bool = False,
) -> EvalBatches:
    """Iterate once over all images, resized but not augmented, grouped by canvas.

    Args:
      dataset: the images.
      data: sizes, canvases and workers.
      batch_size: images per batch of this shard.
      indices: positions of the images; None selects all.
      shard: index of this host.
      num_shards: number of hosts. All get the same number of batches, with the same shapes in the
        same order.
      on_broken: called with a message for each image of this shard that fits no canvas or cannot be read, which is
        then left out; None raises.
      in_order: batches follow the order of their first images instead of the canvases: with one image per batch, the
        order of ``indices``.

    Returns:
      An iterator of dictionaries, with a ``len``: ``images`` uint8 [B, H, W, 3]; ``sizes`` int32
      [B, 2], (h, w) of the valid pixels; ``original_sizes`` int32 [B, 2], (h, w) before resizing;
      ``image_ids`` int64 [B]; ``valid`` bool [B], false for repeated images that fill up a batch and for broken ones.

    Raises:
      ConfigError: a field is invalid.
      DataError: without ``on_broken``: at once, if an image fits no canvas; while iterating, if one cannot be read.
    """
    return EvalBatches(dataset, data, batch_size, indices, shard, num_shards, on_broken, in_order)


class TrainBatches:
    """The iterator that ``train_batches`` returns.

    Attributes:
      step: the step of the next batch.
      skipped: number of unreadable image files so far. Each is logged once and replaced by another.
    """

    def __init__(
        self,
        dataset: Dataset,
        data: DataConfig,
        batch_size: int,
        seed: int,
        start_step: int,
        shard: int,
        num_shards: int,
    ):
        _check(data, batch_size, shard, num_shards)
        if batch_size % num_shards:
            raise ConfigError(f"train.batch_size {batch_size}: not a multiple of the {num_shards} hosts")
        if seed < 0 or start_step < 0:
            raise ConfigError(f"train.seed {seed}, start step {start_step}: must not be negative")
        plan = TrainPlan(dataset, data, batch_size, seed)
        _warn_of_crowding(dataset, plan, data.max_boxes)
        if len(plan.indices) < len(dataset):
            _log.info(
                "%d of %d training images are left out, because they have no box (or crowd boxes only); "
                "data.keep_empty trains on them too",
                len(dataset) - len(plan.indices),
                len(dataset),
            )
        if len(plan.repeats) < plan.repeats.sum():
            repeated = [f"{name} {r:.1f}" for name, r in zip(dataset.classes, plan.class_repeats, strict=True) if r > 1]
            _log.info(
                "data.repeat_below %g: an epoch has %.0f images in place of %d; copies of images by class: %s",
                data.repeat_below, plan.repeats.sum(), len(plan.indices), ", ".join(repeated),
            )  # fmt: skip
        self.step = start_step
        self._dataset, self._num_images = dataset, len(plan.indices)
        self._tried, self._failed = 0, set()
        rows = batch_size // num_shards
        read = _ReadTrain(dataset, data, plan, seed, start_step, rows, shard * rows)
        self._examples = _parallel(read, _ENDLESS, data, rows)
        self._close = weakref.finalize(self, self._examples.close)  # runs at exit, before modules are torn down

    @property
    def skipped(self) -> int:
        return len(self._failed)

    def __iter__(self) -> TrainBatches:
        return self

    def __next__(self) -> Batch:
        examples = _next(self._examples)
        for example in examples:
            self._tried += 1
            for index, message in example.pop("failures"):
                self._record_failure(index, message)
        self.step += 1
        return _stack(examples)

    def _record_failure(self, index: int, message: str) -> None:
        self._tried += 1
        if index in self._failed:
            return
        self._failed.add(index)
        _log.warning("skipped %s", message)
        tried = min(self._tried, self._num_images)
        if len(self._failed) >= _TOLERATED and len(self._failed) > _TOLERATED_SHARE * tried:
            raise DataError(f"{len(self._failed)} of {tried} training images could not be read, the last: {message}")

    def close(self) -> None:
        """Stop the workers."""
        self._close()
        self._examples = iter(())


class EvalBatches:
    """The iterator that ``eval_batches`` returns."""

    def __init__(
        self,
        dataset: Dataset,
        data: DataConfig,
        batch_size: int,
        indices: Sequence[int] | None,
        shard: int,
        num_shards: int,
        on_broken: Callable[[str], None] | None,
        in_order: bool,
    ):
        _check(data, batch_size, shard, num_shards)
        chosen = list(range(len(dataset))) if indices is None else [int(i) for i in indices]
        self._on_broken = on_broken
        if on_broken is not None:
            chosen = _fitting(dataset, data, chosen, on_broken)
        batches = eval_plan(dataset, data, batch_size * num_shards, chosen)
        if in_order:
            place = {index: at for at, index in enumerate(chosen)}
            batches.sort(key=lambda batch: place[batch[0][0].index])
        rows = slice(shard * batch_size, (shard + 1) * batch_size)
        items = [item for batch in batches for item in batch[rows]]
        self._length = len(batches)
        self._examples = _parallel(_ReadEval(dataset, items, on_broken is not None), len(items), data, batch_size)
        self._close = weakref.finalize(self, self._examples.close)  # as above

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> EvalBatches:
        return self

    def __next__(self) -> Batch:
        examples = _next(self._examples)
        for message in [example.pop("failure") for example in examples]:
            if message and self._on_broken is not None:
                self._on_broken(message)
        return _stack(examples)

    def close(self) -> None:
        """Stop the workers."""
        self._close()
        self._examples = iter(())


class _ReadTrain:
    """Read the n-th example of this shard, and report the images that failed before one could be read."""

    def __init__(
        self, dataset: Dataset, data: DataConfig, plan: TrainPlan, seed: int, start_step: int, rows: int, first_row: int
    ):
        self._dataset, self._data, self._plan, self._seed = dataset, data, plan, seed
        self._start_step, self._rows, self._first_row = start_step, rows, first_row

    def __call__(self, n: int) -> dict[str, Any]:
        item = self._plan.item(self._start_step + n // self._rows, self._first_row + n % self._rows)
        failures: list[tuple[int, str]] = []
        limit = max(_TOLERATED, int(_TOLERATED_SHARE * len(self._plan.indices)))
        candidates, following = [item], 0
        while True:
            try:
                return {**self._read(candidates[following], failures), "failures": failures}
            except DataError as error:
                failures.append((candidates[following].index, str(error)))
            except Exception as error:
                raise _unexpected(error, self._dataset, candidates[following]) from error
            if not following:
                candidates += self._plan.substitutes(item)
            following += 1
            if following == len(candidates) or len(failures) > limit:
                raise DataError(
                    f"none of {len(failures)} training images in a row could be read, the last: {failures[-1][1]}"
                )

    def _read(self, item: Item, failures: list[tuple[int, str]]) -> dict[str, Any]:
        example = train_example(
            self._sample(item.index),
            shape=item.shape,
            canvas=item.canvas,
            flip_probability=self._data.flip,
            capacity=self._data.max_boxes,
            rng=np.random.default_rng((self._seed, item.epoch, item.index, *([item.copy] if item.copy else ()))),
            augment=self._data.augment,
            class_odds=self._plan.class_repeats,
            another=partial(self._another, failures),
        )
        return {**example, "image_id": np.int64(self._dataset.image_id(item.index))}

    def _sample(self, index: int) -> Sample:
        truth = self._dataset.annotation(index)
        return Sample(self._dataset.load(index), truth.boxes[~truth.crowd], truth.classes[~truth.crowd])

    def _another(self, failures: list[tuple[int, str]], rng: np.random.Generator) -> tuple[Sample, tuple[int, int]]:
        """Return a random image to join to another, and its size; one that cannot be read is reported and replaced."""
        while True:
            index, shape = self._plan.any(rng)
            try:
                return self._sample(index), shape
            except DataError as error:
                failures.append((index, str(error)))
                if len(failures) > _TOLERATED:
                    raise


class _ReadEval:
    """Read the n-th image of a list."""

    def __init__(self, dataset: Dataset, items: list[tuple[Item, bool]], skip_broken: bool):
        self._dataset, self._items, self._skip_broken = dataset, items, skip_broken

    def __call__(self, n: int) -> dict[str, Any]:
        item, valid = self._items[n]
        try:
            try:
                image = self._dataset.load(item.index)
                return self._example(item, valid, place(resize(image, item.shape), item.canvas), image.shape[:2])
            except DataError:
                raise
            except Exception as error:
                raise _unexpected(error, self._dataset, item) from error
        except DataError as error:
            if not self._skip_broken:
                raise
            blank = self._example(item, False, np.zeros((*item.canvas, 3), np.uint8), item.shape)
            return {**blank, "failure": str(error) if valid else ""}  # not once more for a repeated image

    def _example(self, item: Item, valid: bool, image: np.ndarray, original: tuple[int, ...]) -> dict[str, Any]:
        return {
            "image": image,
            "size": np.array(item.shape, np.int32),
            "original_size": np.array(original, np.int32),
            "image_id": np.int64(self._dataset.image_id(item.index)),
            "valid": np.bool_(valid),
            "failure": "",
        }


def _fitting(dataset: Dataset, data: DataConfig, indices: list[int], on_broken: Callable[[str], None]) -> list[int]:
    fitting = []
    for i in indices:
        try:
            eval_item(dataset, data, i)
        except DataError as error:
            on_broken(str(error))
        else:
            fitting.append(i)
    return fitting


def _unexpected(error: Exception, dataset: Dataset, item: Item) -> DataError:
    """Wrap an exception that no check anticipates. The traceback stays in the worker, so name the source line."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    return DataError(
        f"{dataset.file_name(item.index)}: {type(error).__name__} while it was read or resized ({error}; "
        f"{Path(at.filename).name}:{at.lineno}): remove this image from the data set, or fix the cause"
    )


def _next(examples: Iterator[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    try:
        return next(examples)
    except RuntimeError as error:  # grain raises it within a second of a worker's death
        ended = re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))
        if ended is None:
            raise
        code = int(ended[1])
        raise DataError(
            f"a loader process ended with {signal.Signals(-code).name if code < 0 else f'status {code}'} (usually "
            "killed by the system when memory ran out): lower data.processes (0: threads) or train.batch_size, then "
            "continue with --resume"
        ) from error


def _init_process(index: int, count: int) -> None:
    """Tie a loader process to its parent: ignore SIGTERM and Ctrl-C, and exit when the parent exits.

    Signals sent to the whole process group then leave the parent the data of its current step.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _parallel(
    read: Callable[[int], dict[str, Any]], length: int, data: DataConfig, rows: int
) -> grain.DatasetIterator[list[dict[str, Any]]]:
    """Iterate over ``[read(0), ..., read(rows - 1)]`` and the lists that follow, read ahead by the workers.

    Prefetch two batches of examples, or one example per thread if that is more.
    """
    workers = max(data.processes, 1)
    threads = -(-data.threads // workers)
    ahead = max(-(-2 * rows // workers), threads) if threads else 0
    examples = (
        grain.MapDataset.range(length)
        .map(read)
        .to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead))
    )
    if data.processes:
        if not flags.FLAGS.is_parsed():  # grain reads absl flags, which only absl programs parse
            flags.FLAGS.mark_as_parsed()
        examples = examples.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=data.processes, per_worker_buffer_size=max(1, ahead)),
            _init_process,
        )
    return iter(examples.batch(rows, batch_fn=list))


def _stack(examples: list[dict[str, Any]]) -> Batch:
    """Stack examples to a batch and make its keys plural (``image`` becomes ``images``)."""
    plural = {key: key if key.endswith("s") or key == "valid" else key + "s" for key in examples[0]}
    return {plural[key]: np.stack([example[key] for example in examples]) for key in examples[0]}


def _warn_of_crowding(dataset: Dataset, plan: TrainPlan, capacity: int) -> None:
    """Warn once that boxes will be dropped, instead of once per example."""
    counts = [int((~dataset.annotation(int(i)).crowd).sum()) for i in plan.indices]
    over = sum(n > capacity for n in counts)
    if over:
        most = int(np.argmax(counts))
        _log.warning(
            "%d of %d training images have more than data.max_boxes %d boxes, at most %d (%s); the excess is "
            "dropped, raise data.max_boxes to keep it",
            over, len(counts), capacity, counts[most], dataset.file_name(int(plan.indices[most])),
        )  # fmt: skip


def _check(data: DataConfig, batch_size: int, shard: int, num_shards: int) -> None:
    if batch_size < 1 or not 0 <= shard < num_shards:
        raise ConfigError(
            f"batch size {batch_size}, shard {shard} of {num_shards}: need a positive size and 0 <= shard < shards"
        )
    for name in ("train_short", "train_max", "test_short", "test_max", "max_boxes"):
        value = getattr(data, name)
        if not value or min(value if isinstance(value, tuple) else (value,)) < 1:
            raise ConfigError(f"data.{name} {value}: must be at least 1")
    if not 0 <= data.flip <= 1:
        raise ConfigError(f"data.flip {data.flip}: must be a probability, 0 to 1")
    for name in ("threads", "processes"):
        if getattr(data, name) < 0:
            raise ConfigError(f"data.{name} {getattr(data, name)}: must not be negative")
