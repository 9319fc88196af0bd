"""Write files so that they appear whole or not at all, on this machine and in object stores (``stores``)."""

from __future__ import annotations

import contextlib
import csv
import errno
import json
import logging
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from querydet_jax.runtime import stores
from querydet_jax.runtime.errors import QueryDetError
from querydet_jax.runtime.stores import StoreError, as_path, is_url

_log = logging.getLogger("querydet_jax")

# Errors of writing alone: no room, a quota, a limit on the size of a file, a read-only medium.
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_UPLOAD_EVERY = 30  # seconds, of files that grow


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn an OSError of a block that writes to ``path`` into a QueryDetError that names it."""
    try:
        yield
    except StoreError:
        raise  # says it
    except OSError as error:
        raise QueryDetError(
            f"{path}: cannot be written ({reason(error)}): free space there, or choose a folder that can be written to"
        ) from error


def cannot_write(error: OSError) -> bool:
    """Return whether an error can only come from writing."""
    return error.errno in _CANNOT_WRITE


def reason(error: BaseException) -> str:
    """Return an error's reason in a few words: the system's, also where tensorstore has wrapped its code."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return os.strerror(int(code[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__


class LineFile:
    """A file to append lines to, after its last whole one. A line that cannot be written is dropped, with one warning.

    An object of a store cannot be appended to: the lines go to a copy on this machine, ``local``, which is uploaded as
    a whole by ``upload``, by ``close``, and in the background when a line comes half a minute after the last time.

    Raises:
      QueryDetError: the file cannot be opened.
    """

    def __init__(self, path: Path):
        self.path, self.local, self._warned = path, path, False
        with contextlib.ExitStack() as held:
            if is_url(path):
                folder = held.enter_context(tempfile.TemporaryDirectory(prefix="querydet-"))
                self._sender = held.enter_context(ThreadPoolExecutor(1, "lines"))
                self.local, self._sent = Path(folder) / path.name, time.monotonic()
                if path.is_file():
                    stores.download(path, self.local)
            with writing(path):
                self.local.parent.mkdir(parents=True, exist_ok=True)
                # A pipe would wait for a reader.
                if self.local.exists() and not self.local.is_file() and str(path) != os.devnull:
                    raise FileExistsError(errno.EEXIST, "what has this name is no file")
                self._file = held.enter_context(self.local.open("ab", buffering=0))
                self._truncate()  # a crash of the machine may have left part of a line
            self._held = held.pop_all()

    def write(self, line: str) -> None:
        data = line.encode() + b"\n"
        try:
            if self._file.write(data) < len(data):  # the system gives the reason at the next write only
                self._truncate()
                raise OSError(errno.ENOSPC, "only part of a line was written")
        except OSError as error:
            self._warn(error)
        if is_url(self.path) and time.monotonic() > self._sent + _UPLOAD_EVERY:
            self.upload(wait=False)

    def upload(self, *, wait: bool = True) -> None:
        """Bring a store's object up to date; do nothing for a file on this machine."""
        if is_url(self.path):
            self._sent = time.monotonic()
            sending = self._sender.submit(self._send)
            if wait:
                sending.result()

    def close(self) -> None:
        with self._held:
            self.upload()

    def _send(self) -> None:
        try:
            with written_aside(self.path) as aside:
                shutil.copyfile(self.local, aside)
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            _log.warning("%s: cannot be written (%s); lines are lost until there is room", self.path, reason(error))
        self._warned = True

    def _truncate(self) -> None:
        whole = self.local.read_bytes().rfind(b"\n") + 1 if self.local.is_file() else 0  # os.devnull is no file
        if whole < self._file.tell():
            self._file.truncate(whole)


@contextlib.contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """Yield a path of the same name to write to, in a new folder beside ``path``; rename it to ``path`` if the block
    succeeds.

    The folder's name is random and it is this user's alone, so that nobody can leave a link there to write through.
    The folder of ``path`` is created. If the block fails, nothing is left behind and a former ``path`` stays.
    For a URL the new folder is among this machine's temporary ones, and what is written is uploaded.
    """
    path = as_path(path)
    if is_url(path):
        with _uploaded(path) as aside:
            yield aside
        return
    with _own_folder(path.parent) as folder:
        yield folder / path.name
        os.replace(folder / path.name, path)


@contextlib.contextmanager
def folder_written_aside(path: str | Path) -> Iterator[Path]:
    """Yield a new folder to fill; rename it to ``path``, replacing a former one, if the block succeeds.

    If the block fails, nothing is left behind and a former ``path`` stays. In a store, where nothing can be renamed,
    the files appear one by one when the block has succeeded, each whole, and those of a former folder then go.
    """
    path = as_path(path).resolve()
    if is_url(path):
        former = stores.files_below(path)
        with _uploaded(path) as aside:
            aside.mkdir()
            yield aside
            new = {inside.relative_to(aside).as_posix() for inside in aside.rglob("*") if inside.is_file()}
        for name in former:
            if name not in new:
                (path / name).unlink(missing_ok=True)
        return
    with _own_folder(path.parent) as folder:
        aside, former = folder / "new", folder / "former"
        aside.mkdir()
        try:
            yield aside
            if path.exists():
                os.rename(path, former)
            os.rename(aside, path)
        finally:
            if former.exists() and not path.exists():  # the block ended between the two renames
                os.rename(former, path)


@contextlib.contextmanager
def _uploaded(path: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="querydet-") as folder:
        aside = Path(folder) / path.name
        yield aside
        stores.upload(aside, path)


@contextlib.contextmanager
def _own_folder(above: Path) -> Iterator[Path]:
    above.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(prefix=".querydet-", dir=above)
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_writable(folder: str | Path) -> None:
    """Create a folder, and raise QueryDetError if no file can be written to it; ask before hours of work."""
    folder = as_path(folder)
    with writing(folder):
        if is_url(folder):
            probe = folder / f".querydet-{secrets.token_hex(8)}"
            with written_aside(probe) as aside:
                aside.touch()
            probe.unlink()
            return
        with _own_folder(folder):
            pass


def write_json(path: str | Path, value: Any, **options: Any) -> None:
    """Write strict JSON (no nan); ``options`` go to ``json.dumps``.

    Raises:
      TypeError, ValueError: a value that JSON cannot hold.
      QueryDetError: the file cannot be written.
    """
    text = json.dumps(value, allow_nan=False, **options)
    with writing(path), written_aside(path) as aside:
        aside.write_text(text + "\n")


def write_csv(path: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a table with a header of all rows' keys in the order of their first appearance; None becomes empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with writing(path), written_aside(path) as aside, aside.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows(rows)


def beside(path: Path, inputs: Collection[tuple[object, object] | None]) -> Path:
    """Return the path, with ``_`` appended while it is one of the files ``inputs``."""
    while identity(path) in inputs:
        path = path.with_stem(f"{path.stem}_")
    return path


def identity(path: Path) -> tuple[object, object] | None:
    """Return what tells a file from others under any name; None if there is none. A URL is an object's only name."""
    if is_url(path):
        return None, str(path)
    try:
        about = path.stat()
    except OSError:
        return None
    return about.st_dev, about.st_ino
