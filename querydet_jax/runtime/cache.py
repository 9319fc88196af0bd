"""Copies on this machine of objects that are read from a store again and again.

A copy is a file ``NAME/SIZE-VERSION`` in a cache's folder: NAME stands for the address, VERSION for all that the store
says of the object. It appears whole. Its access time is that of its last use, its modification time that of its last
comparison with the store. ``locks/`` has files that processes lock, and in ``locks/size`` the bytes of all copies.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from querydet_jax.runtime.errors import ConfigError
from querydet_jax.runtime.files import cannot_write, check_writable, writing, written_aside
from querydet_jax.runtime.locks import HELD, NO_LOCKS, lock
from querydet_jax.runtime.stores import StoreError, StorePath

_log = logging.getLogger("querydet_jax")

_KEPT = 0.9  # of the limit, when copies have to go: looking for the oldest takes time
_ABANDONED = 86_400  # seconds after which what a killed process has left may go
_POLL = 0.02  # seconds between two attempts to lock

Value = TypeVar("Value")


@dataclass(frozen=True)
class Cache:
    """A folder of copies, which several processes may use at once.

    Attributes:
      folder: where they are.
      limit: most bytes of all copies; before it is exceeded, those not used for longest go. 0: none go.
      since: a time, ns. A copy that was compared with the store after it is used without asking the store.
    """

    folder: Path
    limit: int
    since: int

    @classmethod
    def open(cls, folder: str | Path, limit: int) -> Cache:
        """Return the cache in ``folder``, which is created, with each copy still to be compared with the store.

        Raises:
          QueryDetError: the folder cannot be written.
        """
        check_writable(folder)
        return cls(Path(folder).absolute(), limit, time.time_ns())

    def use(self, path: StorePath, do: Callable[[Path], Value]) -> Value:
        """Return ``do(copy)``, where ``copy`` is a file with the object's content.

        Raises:
          ConfigError: the object is larger than the limit.
          QueryDetError: the copy cannot be written.
          StoreError: the store does not answer, refuses or has no such object.
        """
        while True:
            copy = self._copy(path)
            try:
                return do(copy)
            except Exception:
                if copy.exists():
                    raise  # else another process has just removed it

    def _copy(self, path: StorePath) -> Path:
        place = self.folder / hashlib.sha256(str(path).encode()).hexdigest()[:32]
        found = self._compared(place)
        if found is None:
            with writing(self.folder), self._locked(place.name[:2]):
                found = self._compared(place) or self._fetch(path, place)
        with contextlib.suppress(OSError):
            os.utime(found, ns=(time.time_ns(), found.stat().st_mtime_ns))
        return found

    def _compared(self, place: Path) -> Path | None:
        """Return the whole copy that was compared with the store after ``since``."""
        with contextlib.suppress(FileNotFoundError), os.scandir(place) as entries:
            for entry in entries:
                about = entry.stat()
                if about.st_mtime_ns >= self.since and entry.name.startswith(f"{about.st_size}-"):
                    return Path(entry.path)
        return None

    def _fetch(self, path: StorePath, place: Path) -> Path:
        about = path.ask("info")
        size, version = int(about["size"]), hashlib.sha256(repr(sorted(about.items())).encode()).hexdigest()[:32]
        copy = place / f"{size}-{version}"
        if not copy.is_file() or copy.stat().st_size != size:
            self._make_room(path, size)
            with written_aside(copy) as aside:
                try:
                    path.ask("get_file", str(aside))
                except StoreError as error:
                    if isinstance(error.__cause__, OSError) and cannot_write(error.__cause__):
                        raise error.__cause__ from None
                    raise
                if aside.stat().st_size != size:
                    raise StoreError(errno.EIO, "changed, or was cut, while it was read", str(path))
        now = time.time_ns()
        os.utime(copy, ns=(now, now))
        for other in place.iterdir():
            if other.name != copy.name:  # an earlier version, or what a killed process has left
                _remove(other)
        return copy

    def _make_room(self, path: StorePath, size: int) -> None:
        """Count ``size`` more bytes, after removing the copies not used for longest if there would be too many."""
        if self.limit and size > self.limit:
            raise ConfigError(f"{path}: {size / 1e9:g} GB, more than data.cache_gb {self.limit / 1e9:g}; raise it")
        with self._locked("size") as file:
            text = file.read(30).decode("ascii", "replace")
            total = int(text) if text.isdecimal() else -1  # not known
            if self.limit and not 0 <= total <= self.limit - size:
                total = self._shrink(size)
            if total >= 0:
                file.seek(0)
                file.truncate()
                file.write(str(total + size).encode())

    def _shrink(self, size: int) -> int:
        """Make room for ``size`` bytes, and return those of the copies that are left."""
        copies, total = list[tuple[float, int, Path]](), 0
        for inside in self.folder.glob("*/*-*"):
            with contextlib.suppress(FileNotFoundError):
                about = inside.stat()
                if inside.is_dir():  # in which a copy is being written
                    if about.st_mtime < time.time() - _ABANDONED:
                        _remove(inside)
                    continue
                copies.append((about.st_atime, about.st_size, inside))
                total += about.st_size
        if total + size <= self.limit:
            return total
        for _, bytes_of, copy in sorted(copies):
            if total + size <= _KEPT * self.limit:
                break
            _remove(copy)
            with contextlib.suppress(OSError):  # not empty
                copy.parent.rmdir()
            total -= bytes_of
        return total

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[IO[bytes]]:
        path = self.folder / "locks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0) as file:
            while True:
                try:
                    lock(file.fileno())
                except OSError as error:
                    if error.errno in HELD:
                        time.sleep(_POLL)
                        continue
                    if error.errno not in NO_LOCKS:  # without locks an object may be fetched twice
                        raise
                break
            yield file


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
