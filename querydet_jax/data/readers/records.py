"""Random access to records that tensorflow_datasets stored as ArrayRecord.

TensorFlow is not needed: images stay encoded, and are decoded like those of any other source.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from absl import logging as absl_logging

from querydet_jax.data.readers.record_files import RecordFiles
from querydet_jax.runtime.stores import download, is_url


class Records:
    """The records of one split of a prepared folder, by index; ``image`` holds encoded bytes.

    Instances are picklable and thread-safe. The first access opens the files; damaged files raise
    the libraries' own errors.

    Args:
      folder: the version folder, with ``dataset_info.json``.
      split: TFDS's name of the split.
    """

    def __init__(self, folder: Path, split: str):
        self._folder, self._split = folder, split
        self._lock = threading.Lock()
        self._opened: tuple[RecordFiles, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def __len__(self) -> int:
        return len(self.open()[0])

    def __getitem__(self, i: int) -> dict[str, Any]:
        files, features = self.open()
        return features.deserialize_example_np(files[i], decoders={"image": tfds.decode.SkipDecoding()})

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def open(self) -> tuple[RecordFiles, Any]:
        """Return the stored records, and the features that they hold."""
        with self._lock:
            if self._opened is None:
                with builder_of(self._folder) as builder:
                    split = builder.info.splits[self._split]
                    files = [self._folder / Path(file).name for file in split.filepaths]
                    self._opened = RecordFiles(files, split.shard_lengths), builder.info.features
            return self._opened


@contextlib.contextmanager
def builder_of(folder: Path) -> Iterator[Any]:
    """Yield the builder of a prepared folder. It may be in a store: then a copy of what describes it is read."""
    with contextlib.ExitStack() as held:
        if is_url(folder):
            here = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="querydet-"))) / folder.name
            download(folder, here, lambda name: "/" not in name and name.endswith((".json", ".txt")))
        else:
            here = folder
        with quiet():
            builder = tfds.builder_from_directory(here)
        yield builder


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence tensorflow_datasets, which reports downloads although nothing is downloaded."""
    before = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
        absl_logging.set_verbosity(before)
