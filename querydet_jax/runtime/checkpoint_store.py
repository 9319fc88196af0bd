"""Checkpoints on disk: trees of arrays by step and item name, complete or absent. The only file that names orbax.

A folder holds ``<step>/<item>/``. A step is written under another name, with the checksums of its files, and renamed
when it is complete. In an object store, where nothing can be renamed, it is written on this machine first, then
uploaded, the checksums last: a step without them is not finished. Reading an item compares its files with their
checksums; steps without any, which version 0.1.0 wrote, are read as they are.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.options import MultiprocessingOptions

from querydet_jax.runtime import stores
from querydet_jax.runtime.errors import QueryDetError, WeightsError
from querydet_jax.runtime.files import reason, writing
from querydet_jax.runtime.stores import StoreError, as_path, is_url

FOLDER = "checkpoints"  # in a run's folder
_UNFINISHED = ".orbax-checkpoint-tmp"  # in the names of folders that are not finished
_STRAY = ".stray"  # after the name of what was found in a checkpoint's place
_CHECKSUMS = "checksums.sha256"  # as `sha256sum` writes it and `sha256sum --check` reads it
_METADATA = ("_CHECKPOINT_METADATA", "*/_METADATA", "*/manifest.ocdbt")  # orbax's, of a step and of its items

_log = logging.getLogger("querydet_jax")


class CheckpointStore:
    """The checkpoints of one process in a folder, which is created.

    ``save`` hands the arrays to a thread. If they cannot be written, the next ``check``, ``wait`` or ``save`` raises
    QueryDetError and removes what was written of them; complete checkpoints stay.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder.resolve(), keep
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        _report_errors_once()
        self._checkpointer = _checkpointer()
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._pending: tuple[int, int, Future[None]] | None = None  # step, bytes

    def latest(self) -> int | None:
        """Return the newest complete step, after waiting for the one being written; None if there is none."""
        self.wait()
        return _newest(self.folder)

    def save(self, step: int, items: Mapping[str, Any]) -> None:
        """Write ``items`` (name to tree of NumPy arrays) in the background; a step that exists is left as it is.

        What else lies in its place (an empty folder, a file, a link) is renamed.
        """
        self.wait()
        if step not in _steps(self.folder):
            size = sum(x.nbytes for x in jax.tree.leaves(dict(items)))
            self._pending = step, size, self._thread.submit(self._write, step, items)

    def check(self) -> None:
        """Raise QueryDetError if the background write has failed; do not wait for it."""
        if self._pending is not None and self._pending[2].done():
            self.wait()

    def wait(self) -> None:
        """Wait until the background write is complete."""
        if self._pending is None:
            return
        (step, size, written), self._pending = self._pending, None
        try:
            written.result()
        except StoreError as error:  # asking the store for more may fail as well
            raise QueryDetError(
                f"{self.folder}: checkpoint {step} could not be uploaded ({reason(error)}): mend that, then add "
                "--resume to go on from the one before"
            ) from error
        except Exception as error:  # of orbax, tensorstore or the system
            self.remove_unfinished()
            newest = max(_steps(self.folder), default=None)
            last = "none before it" if newest is None else f"the last good one is {newest}"
            raise QueryDetError(
                f"{self.folder}: checkpoint {step} could not be written ({reason(error)}), {last}: free space there "
                f"(a checkpoint takes {max(1, round(size / 1e6))} MB; train.keep_checkpoints says how many are kept), "
                f"then {'start again' if newest is None else 'add --resume to go on from it'}"
            ) from error

    def read(self, step: int, item: str) -> Any:
        """Return an item of a complete step as a tree of NumPy arrays.

        Raises:
          WeightsError: it is damaged: a file is missing, or not the one that was written.
        """
        return _read(self._checkpointer, self.folder, step, item)

    def remove_unfinished(self) -> None:
        """Delete what a killed run or a full disk has left of checkpoints."""
        if is_url(self.folder):
            for name in _unfinished(self.folder):
                stores.remove(self.folder / name)
            return
        for path in self.folder.glob(f"*{_UNFINISHED}*"):
            deadline = time.monotonic() + 5
            while path.exists() and time.monotonic() < deadline:
                shutil.rmtree(path, ignore_errors=True)
                time.sleep(0.1)  # some of tensorstore's writes may still be under way

    def close(self) -> None:
        """Wait for the background write and release the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._checkpointer.close()

    def _write(self, step: int, items: Mapping[str, Any]) -> None:
        if is_url(self.folder):
            self._upload(step, items)
            return
        arguments = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        path, aside = self.folder / str(step), self.folder / f"{step}{_UNFINISHED}-checksums"
        shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
        self._checkpointer.save(aside, args=ocp.args.Composite(**arguments))
        _write_checksums(aside)
        if os.path.lexists(path):
            stray = path.rename(f"{path}{_STRAY}-{time.time_ns()}")
            _log.warning("%s: was not a checkpoint; renamed to %s", path, stray.name)
        aside.rename(path)
        for old in sorted(_steps(self.folder))[: -self.keep]:
            # Renamed first: a step that is half deleted must not look complete.
            shutil.rmtree((self.folder / str(old)).rename(self.folder / f"{old}{_UNFINISHED}"), ignore_errors=True)

    def _upload(self, step: int, items: Mapping[str, Any]) -> None:
        """Write a step on this machine, and upload it; then delete old ones."""
        arguments = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        path = self.folder / str(step)
        with tempfile.TemporaryDirectory(prefix="querydet-") as folder:
            here = Path(folder) / str(step)
            self._checkpointer.save(here, args=ocp.args.Composite(**arguments))
            _write_checksums(here)
            stores.remove(path)  # what a killed run has left
            checksums = (here / _CHECKSUMS).rename(Path(folder) / _CHECKSUMS)
            stores.upload(here, path)
            stores.upload(checksums, path / _CHECKSUMS)
        for old in sorted(_steps(self.folder))[: -self.keep]:
            (self.folder / str(old) / _CHECKSUMS).unlink(missing_ok=True)  # first: half a step must not look complete
            stores.remove(self.folder / str(old))


def read_checkpoint(path: str | Path, item: str) -> Any:
    """Return an item of a run's newest checkpoint as a tree of NumPy arrays.

    Args:
      path: a run folder, its ``checkpoints`` folder, or the folder of one step.
      item: name of the item, such as ``model``.

    Raises:
      WeightsError: there is no checkpoint, or it is damaged.
    """
    path = as_path(path).resolve()
    if not path.is_dir():
        raise WeightsError(f"{path}: no such folder; give a run folder or a weight file")
    if _step(path) is not None:
        folder, step = path.parent, _step(path)
    else:
        folder = path / FOLDER if (path / FOLDER).is_dir() else path
        step = _newest(folder)
    if step is None:
        left = _unfinished(folder) if is_url(folder) else list(folder.glob(f"*{_UNFINISHED}*"))
        found = "no finished checkpoint" if left else "no checkpoint"
        raise WeightsError(f"{folder}: holds {found}; give a run folder of a training that has saved one")
    with contextlib.closing(_checkpointer()) as checkpointer:
        try:
            return _read(checkpointer, folder, step, item)
        except WeightsError:
            if (folder / str(step)).exists() or not _steps(folder):
                raise
            return _read(checkpointer, folder, max(_steps(folder)), item)  # a training has replaced it meanwhile


def newest_step(path: str | Path) -> int | None:
    """Return the step that ``read_checkpoint`` reads of a run folder, None if there is none; raise WeightsError."""
    path = as_path(path)
    return _newest(path.resolve() / FOLDER) if (path / FOLDER).is_dir() else None


def _newest(folder: Path) -> int | None:
    """Return the newest complete step in a folder of checkpoints, None if there is none; warn of what is none.

    Raises:
      WeightsError: the folder cannot be read.
    """
    if is_url(folder):
        return max(_steps(folder), default=None)
    try:
        strays = [child for child in sorted(folder.iterdir()) if child.name.isdecimal() and _step(child) is None]
        strays = [child.name for child in strays if os.path.lexists(child)]  # else a training has just removed it
        if strays:
            _warn_of_strays(folder, ", ".join(strays[:5]))
        return max(_steps(folder), default=None)
    except OSError as error:
        raise WeightsError(f"{folder}: cannot be read ({reason(error)}); check its permissions") from None


@functools.cache  # once
def _warn_of_strays(folder: Path, names: str) -> None:
    _log.warning("%s: passed over %s: a link, or no checkpoint", folder, names)


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():  # removed while a training runs
        return []
    return [step for child in folder.iterdir() if (step := _step(child)) is not None]


def _step(path: Path) -> int | None:
    """Return the number of the step that a folder holds, None for anything else."""
    if not re.fullmatch("0|[1-9][0-9]{0,8}", path.name) or path.is_symlink() or not path.is_dir():
        return None
    if is_url(path):
        return int(path.name) if (path / _CHECKSUMS).is_file() else None
    return int(path.name) if any(any(path.glob(name)) for name in (_CHECKSUMS, *_METADATA)) else None


def _unfinished(folder: Path) -> list[str]:
    """Return the names of steps in a store that have no checksums."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return [name for name in names if name.isdecimal() and _step(folder / name) is None]


@contextlib.contextmanager
def _on_this_machine(step: Path, item: str) -> Iterator[Path]:
    """Yield the folder of a step, or a copy that has this item."""
    if not is_url(step):
        yield step
        return
    with tempfile.TemporaryDirectory(prefix="querydet-") as folder:
        copy = Path(folder) / step.name
        stores.download(step, copy, lambda name: "/" not in name or name.startswith(f"{item}/"))
        yield copy


def _checkpointer() -> ocp.Checkpointer:
    """Orbax's writer and reader of one process, which waits for no other host."""
    alone = MultiprocessingOptions(primary_host=jax.process_index(), active_processes={jax.process_index()})
    handler = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(multiprocessing_options=alone))
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _read(checkpointer: ocp.Checkpointer, folder: Path, step: int, item: str) -> Any:
    arguments = ocp.args.Composite(**{item: ocp.args.StandardRestore()})
    # Whichever layer of orbax meets damage first reports it; a user needs the name of the folder.
    try:
        with _on_this_machine(folder / str(step), item) as here:
            _verify(here, item)
            return checkpointer.restore(here, args=arguments)[item]
    except StoreError:
        raise
    except Exception as error:
        before = any(other < step for other in _steps(folder))
        raise WeightsError(
            f"{folder}/{step}: checkpoint item {item!r} cannot be read ({reason(error)}); "
            + (
                "delete this step's folder to fall back to the one before"
                if before
                else "no older one is left: restore this step's folder from a copy, or delete it and start again"
            )
        ) from error


def _write_checksums(step: Path) -> None:
    """Write the checksums of all files of a step; the last line is that of the lines above."""
    files = sorted(path for path in step.rglob("*") if path.is_file())
    lines = "".join(f"{_sha256(path)}  {path.relative_to(step).as_posix()}\n" for path in files)
    (step / _CHECKSUMS).write_bytes(lines.encode() + _end(lines.encode()))


def _verify(step: Path, item: str) -> None:
    """Raise WeightsError if a file of an item, or of those that all items share, is not the one that was written."""
    if not os.path.lexists(step / _CHECKSUMS):
        _log.warning("%s: has no %s, so damage would not be noticed", step, _CHECKSUMS)
        return
    if not (step / _CHECKSUMS).is_file():
        raise WeightsError(f"{_CHECKSUMS} is damaged: no file")
    data = (step / _CHECKSUMS).read_bytes()
    lines = data[: data.rfind(b"\n", 0, -1) + 1]
    if data != lines + _end(lines):
        raise WeightsError(f"{_CHECKSUMS} is damaged")
    for line in lines.decode().splitlines():
        checksum, name = line.split("  ", 1)
        if "/" in name and not name.startswith(f"{item}/"):
            continue
        if not (step / name).is_file():
            raise WeightsError(f"{name} is missing")
        if _sha256(step / name) != checksum:
            raise WeightsError(f"{name} is damaged: its checksum is not the one in {_CHECKSUMS}")


def _end(lines: bytes) -> bytes:
    return f"# {hashlib.sha256(lines).hexdigest()}\n".encode()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _report_errors_once() -> None:
    """Leave out what orbax and tensorstore print of errors that orbax raises as well: a traceback by every thread that
    meets one, and later, for each write that goes on when its event loop is closed, another."""
    logging.getLogger("absl").addFilter(_is_no_traceback_of_orbax)  # nothing if it is there already
    before = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    if getattr(before, "__name__", "") != "without_closed_loops":
        hook.__name__ = "without_closed_loops"
        sys.unraisablehook = hook


def _is_no_traceback_of_orbax(record: logging.LogRecord) -> bool:
    return not (record.exc_info and "orbax" in record.pathname)
