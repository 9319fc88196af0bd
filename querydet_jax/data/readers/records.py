"""Random access to records that tensorflow_datasets stored as ArrayRecord.

TensorFlow is not needed: images stay encoded, and are decoded like those of any other source.
"""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from absl import logging as absl_logging


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
        self._opened: Any = None

    def __getstate__(self) -> dict[str, Any]:  # open files stay in their process
        return {**self.__dict__, "_opened": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def __len__(self) -> int:
        return len(self._source())

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self._source()[i]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._source())

    def _source(self) -> Any:
        with self._lock:
            if self._opened is None:
                with quiet():
                    builder: Any = tfds.builder_from_directory(self._folder)
                    self._opened = builder.as_data_source(
                        split=self._split, decoders={"image": tfds.decode.SkipDecoding()}
                    )
            return self._opened


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
