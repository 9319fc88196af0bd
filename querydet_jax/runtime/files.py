"""Writing files so that they appear whole or not at all."""

from __future__ import annotations

import contextlib
import csv
import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from querydet_jax.runtime.errors import QueryDetError

_log = logging.getLogger("querydet_jax")

# Errors that writing alone can have: no room, a quota, a limit on the size of a file, a medium that is read only.
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Around a block that writes to ``path``: where the system refuses, one line says where and why."""
    try:
        yield
    except OSError as error:
        raise QueryDetError(
            f"{path}: cannot be written ({reason(error)}): free space there, or choose a folder that can be written to"
        ) from error


def cannot_write(error: OSError) -> bool:
    """Whether it is no error of reading."""
    return error.errno in _CANNOT_WRITE


def reason(error: BaseException) -> str:
    """A few words: the system's where there are some, also in what tensorstore makes of them."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return os.strerror(int(code[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__


class Lines:
    """A file to which lines are appended, after the last whole one that it has.

    A line that the system refuses is kept and written with those after it, once there is room: what is logged is no
    reason to stop.
    """

    def __init__(self, path: Path):
        self.path, self._waiting, self._warned = path, b"", False
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
            whole = path.read_bytes().rfind(b"\n") + 1 if path.is_file() else 0  # not os.devnull
            if whole < self._file.tell():
                self._file.truncate(whole)

    def write(self, line: str) -> None:
        self._waiting += line.encode() + b"\n"
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not self._warned:
                _log.warning("%s: cannot be written (%s); lines wait until there is room", self.path, reason(error))
            self._warned = True

    def close(self) -> None:
        if self._waiting:
            _log.warning("%s: %d lines were not written", self.path, self._waiting.count(b"\n"))
        self._file.close()


@contextlib.contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """A path beside ``path``, with its suffix, to write to; renamed to ``path`` if the block succeeds.

    The folder is made. If the block fails nothing is left behind, and a former ``path`` stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_written_aside(path: str | Path) -> Iterator[Path]:
    """A new folder beside ``path`` to fill; renamed to ``path``, in place of a former one, if the block succeeds.

    If the block fails nothing is left behind, and a former ``path`` stays.
    """
    path = Path(path).resolve()
    aside, former = (path.with_name(f".{path.name}.{os.getpid()}{end}") for end in ("", ".old"))
    try:
        aside.mkdir(parents=True)
        yield aside
        if path.exists():
            os.rename(path, former)
        os.rename(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if former.exists() and not path.exists():  # it ended between the two renames
            os.rename(former, path)
        shutil.rmtree(former, ignore_errors=True)


def write_json(path: str | Path, value: Any, **options: Any) -> None:
    """Write strict JSON (no nan); ``options`` go to ``json.dumps``.

    Raises:
      TypeError, ValueError: a value that JSON cannot hold.
      QueryDetError: the system does not let it be written.
    """
    text = json.dumps(value, allow_nan=False, **options)
    with writing(path), written_aside(path) as aside:
        aside.write_text(text + "\n")


def write_csv(path: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a table: a header of all keys of all rows, in the order in which they first appear; None is empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with writing(path), written_aside(path) as aside, aside.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows(rows)
