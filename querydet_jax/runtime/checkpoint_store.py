"""Checkpoints on disk: trees of arrays by step and item name, complete or absent. The only file that names orbax.

A folder holds ``<step>/<item>/``. Orbax writes a step under another name and renames it when it is complete.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.options import MultiprocessingOptions

from querydet_jax.runtime.errors import QueryDetError, WeightsError
from querydet_jax.runtime.files import reason, writing

FOLDER = "checkpoints"  # in a run's folder
_UNFINISHED = ".orbax-checkpoint-tmp"  # in the names of folders that orbax has not finished


class CheckpointStore:
    """The checkpoints of one process in a folder, which is created.

    ``save`` hands the arrays to a thread. If they cannot be written, the next ``check``, ``wait`` or ``save`` raises
    QueryDetError and removes what was written of them; complete checkpoints stay.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder.resolve(), keep
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._checkpointer = _checkpointer()
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._pending: tuple[int, int, Future[None]] | None = None  # step, bytes

    def latest(self) -> int | None:
        """Return the newest complete step, after waiting for the one being written; None if there is none."""
        self.wait()
        return max(_steps(self.folder), default=None)

    def save(self, step: int, items: Mapping[str, Any]) -> None:
        """Write ``items`` (name to tree of NumPy arrays) in the background; a step that exists is left as it is."""
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
          WeightsError: it is damaged.
        """
        return _read(self._checkpointer, self.folder, step, item)

    def remove_unfinished(self) -> None:
        """Delete what a killed run or a full disk has left of checkpoints."""
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
        arguments = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        with _errors_logged_once():
            self._checkpointer.save(self.folder / str(step), args=ocp.args.Composite(**arguments))
        for old in sorted(_steps(self.folder))[: -self.keep]:
            # Renamed first: a step that is half deleted must not look complete.
            shutil.rmtree((self.folder / str(old)).rename(self.folder / f"{old}{_UNFINISHED}"), ignore_errors=True)


def read_checkpoint(path: str | Path, item: str) -> Any:
    """Return an item of a run's newest checkpoint as a tree of NumPy arrays.

    Args:
      path: a run folder, its ``checkpoints`` folder, or the folder of one step.
      item: name of the item, such as ``model``.

    Raises:
      WeightsError: there is no checkpoint, or it is damaged.
    """
    path = Path(path).resolve()
    if not path.is_dir():
        raise WeightsError(f"{path}: no such folder; give a run folder or a weight file")
    if path.name.isdigit() and (path / item).is_dir():
        folder, steps = path.parent, [int(path.name)]
    else:
        folder = path / FOLDER if (path / FOLDER).is_dir() else path
        steps = _steps(folder)
    if not steps:
        found = "no finished checkpoint" if list(folder.glob(f"*{_UNFINISHED}*")) else "no checkpoint"
        raise WeightsError(f"{folder}: holds {found}; give a run folder of a training that has saved one")
    with contextlib.closing(_checkpointer()) as checkpointer:
        return _read(checkpointer, folder, max(steps), item)


def _steps(folder: Path) -> list[int]:
    return [int(child.name) for child in folder.iterdir() if child.name.isdigit()]


def _checkpointer() -> ocp.Checkpointer:
    """Orbax's writer and reader of one process, which waits for no other host."""
    alone = MultiprocessingOptions(primary_host=jax.process_index(), active_processes={jax.process_index()})
    handler = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(multiprocessing_options=alone))
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _read(checkpointer: ocp.Checkpointer, folder: Path, step: int, item: str) -> Any:
    arguments = ocp.args.Composite(**{item: ocp.args.StandardRestore()})
    # Whichever layer of orbax meets damage first reports it; a user needs the name of the folder.
    try:
        return checkpointer.restore(folder / str(step), args=arguments)[item]
    except Exception as error:
        raise WeightsError(
            f"{folder}/{step}: checkpoint item {item!r} cannot be read ({reason(error)}); "
            "delete this step's folder to fall back to the one before"
        ) from error


@contextlib.contextmanager
def _errors_logged_once() -> Iterator[None]:
    """Orbax logs a traceback in every thread that meets an error, which it then raises: keep the raised one only."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
