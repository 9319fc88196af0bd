"""Random access to ArrayRecord files, on this machine or in a store."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from array_record.python.array_record_data_source import ArrayRecordDataSource

from querydet_jax.runtime.stores import with_file


class RecordFiles:
    """The records of ArrayRecord files, one file after the other, by index.

    Instances are picklable and thread-safe. A file is opened, and one of a store is fetched into its cache, when one
    of its records is read first. Damaged files raise the library's own errors.

    Args:
      files: the files.
      counts: number of records of each.
    """

    def __init__(self, files: Sequence[Path], counts: Sequence[int]):
        self._files, self._counts = tuple(files), tuple(counts)
        self._ends = list(itertools.accumulate(counts))
        self._opened: dict[int, ArrayRecordDataSource] = {}

    def __getstate__(self) -> dict[str, Any]:  # open files stay in their process
        return {**self.__dict__, "_opened": {}}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, i: int) -> bytes:
        n = bisect.bisect_right(self._ends, i)
        position = i - self._ends[n] + self._counts[n]
        opened = self._opened.get(n)
        if opened is not None:
            return opened[position]

        def read(file: Path) -> tuple[ArrayRecordDataSource, bytes]:
            source = ArrayRecordDataSource([f"{file}[0:{self._counts[n]}]"])
            return source, source[position]  # which opens the file

        opened, record = with_file(self._files[n], read)
        self._opened.setdefault(n, opened)  # two threads may have opened it
        return record
