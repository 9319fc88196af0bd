"""Checkpoints with orbax; the only file that names it.

A run's folder holds ``checkpoints/<step>/``. Each has the network under its torch names (``model``),
readable without this run's optimiser, and what resuming needs besides (``train``). With several hosts
the first one writes and reads, and no other need see the folder.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.options import MultiprocessingOptions

from querydet_jax.models.base import DenseDetector
from querydet_jax.runtime.errors import QueryDetError, WeightsError
from querydet_jax.runtime.files import reason, writing
from querydet_jax.runtime.host_failures import finishing
from querydet_jax.runtime.hosts import from_first, is_first
from querydet_jax.training.step import TrainState, init_state, merge_into
from querydet_jax.weights import load_weights, state_dict

FOLDER = "checkpoints"
_UNFINISHED = ".orbax-checkpoint-tmp"  # in the names of folders that orbax has not finished
_log = logging.getLogger("querydet_jax")


class Checkpoints:
    """The checkpoints of a run. Saving returns at once; leaving the context waits for what is being written.

    Every host calls the same methods. Those of them that meet a checkpoint that could not be written raise a
    QueryDetError with the reason; the ones before it are still there.
    """

    def __init__(self, run: str | Path, keep: int = 3):
        self.folder = Path(run).resolve() / FOLDER
        self._manager: ocp.CheckpointManager | None = None
        self._writing: tuple[int, int] | None = None  # step and bytes
        self._failed = False
        self._open = contextlib.ExitStack()
        if is_first():
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            self._manager = _Manager(self.folder, options=_alone(max_to_keep=keep))

    def __enter__(self) -> Checkpoints:
        self._open.enter_context(_said_once())
        self._open.enter_context(finishing(self.wait))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None):
        try:
            self.wait()
        except QueryDetError as own:
            if error is None:
                raise
            _log.error("%s", own)  # what has ended the run is said last
        finally:
            if self._manager is not None:
                self._manager.close()
                if self._failed:  # else it may be another's who trains in this folder
                    self._remove_unfinished()
            self._open.close()

    def latest(self) -> int | None:
        """The newest that is complete; waits for the one that is being written."""

        def newest() -> int | None:
            self.wait()
            return self._first().latest_step()

        return from_first(newest)

    def save(self, model: DenseDetector, state: TrainState, *, wait: bool = False) -> None:
        """Write the state (of one replica), once the checkpoint before is written; ``wait`` until this one is.

        ``model`` receives its values, of the moving average where there is one.
        """
        merge_into(model, state)
        if self._manager is None:
            return
        train = {
            "opt_state": [np.asarray(x) for x in jax.tree.leaves(state.opt_state)],
            "normalizer": np.asarray(state.normalizer),
        }
        if state.ema is not None:  # which is what `model` then holds
            train["params"] = [np.asarray(x) for x in jax.tree.leaves(state.params)]
        step = int(state.step)
        self.wait()
        if step in self._manager.all_steps():
            return
        tensors = state_dict(model)
        items = ocp.args.Composite(model=ocp.args.StandardSave(tensors), train=ocp.args.StandardSave(train))
        self._writing = step, sum(x.nbytes for x in jax.tree.leaves((tensors, train)))
        with self._failing():
            self._manager.save(step, args=items)
        if wait:
            self.wait()

    def check(self) -> None:
        """Look whether what was being written has failed; does not wait for it."""
        if self._manager is not None and self._writing is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Until what is being written is complete."""
        if self._manager is not None and self._writing is not None:
            with self._failing():
                self._manager.wait_until_finished()
            self._writing = None

    def restore(self, model: DenseDetector, optimizer: Any, *, ema: bool = False) -> TrainState:
        """The newest state, to go on from exactly where it was saved.

        Raises:
          WeightsError: no checkpoint, or one of another model or optimiser, or with a moving average of the
            parameters where none is asked for, or the other way round.
        """
        step, tensors, saved = from_first(self._read)
        load_weights(model, tensors)
        blank = init_state(model, optimizer, ema=ema)
        if ema != ("params" in saved):
            raise WeightsError(
                f"{self.folder}/{step}: was trained {'with' if 'params' in saved else 'without'} a moving average of "
                f"the parameters; resume {'with its train.ema' if 'params' in saved else 'with train.ema 0'}, or start "
                "a new run with train.init"
            )

        def like(tree: Any, values: list[Any]) -> Any:
            leaves, structure = jax.tree.flatten(tree)
            arrays = [np.asarray(value) for value in values]
            if [x.shape for x in arrays] != [x.shape for x in leaves]:
                raise WeightsError(
                    f"{self.folder}/{step}: optimiser state of another configuration; "
                    "resume with the run's own config.json, or start a new run with train.init"
                )
            return jax.tree.unflatten(structure, [v.astype(x.dtype) for v, x in zip(arrays, leaves, strict=True)])

        return TrainState(
            like(blank.params, saved["params"]) if ema else blank.params,
            blank.rest,
            like(blank.opt_state, saved["opt_state"]),
            jnp.asarray(saved["normalizer"], jnp.float32),
            jnp.asarray(step, jnp.int32),
            blank.ema,
        )

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """The one line for a checkpoint that cannot be written."""
        assert self._writing is not None
        step, size = self._writing
        try:
            yield
        except Exception as error:  # of orbax, tensorstore or the system, in the background or here
            self._writing, self._failed = None, True
            self._first().reload()  # which had already left out what the failed one was to replace
            newest = self._first().latest_step()
            last = "none before it" if newest is None else f"the last good one is {newest}"
            raise QueryDetError(
                f"{self.folder}: checkpoint {step} could not be written ({reason(error)}), {last}: free space there "
                f"(a checkpoint takes {max(1, round(size / 1e6))} MB; train.keep_checkpoints says how many are kept), "
                f"then {'start again' if newest is None else 'add --resume to go on from it'}"
            ) from error

    def _remove_unfinished(self) -> None:
        """What there is of a checkpoint that could not be written, or of one of a run that was killed, takes room."""
        for path in self.folder.glob(f"*{_UNFINISHED}*"):
            deadline = time.monotonic() + 5
            while path.exists() and time.monotonic() < deadline:
                shutil.rmtree(path, ignore_errors=True)
                time.sleep(0.1)  # some of tensorstore's writes may still be under way

    def _first(self) -> ocp.CheckpointManager:
        assert self._manager is not None, "the first host's alone"
        return self._manager

    def _read(self) -> tuple[int, dict[str, np.ndarray], dict[str, Any]]:
        """Newest step and its two items."""
        self._remove_unfinished()
        step = self._first().latest_step()
        if step is None:
            raise WeightsError(f"{self.folder}: no checkpoint to resume from; start without --resume")
        model, train = (_restore(self._first(), step, item, self.folder) for item in ("model", "train"))
        return step, model, train


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """That is for the loop to ask: what jax is asked about last, it takes for the step that this host has reached,
        and orbax asks from the background."""
        return False


@contextlib.contextmanager
def _said_once() -> Iterator[None]:
    """Orbax logs a failure in every thread that meets it, with its traceback, before it raises it; and writes that
    end after the first has failed find nobody to tell."""

    def not_of_orbax(record: logging.LogRecord) -> bool:
        return not (record.exc_info and "orbax" in record.pathname)

    def unless_too_late(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    hook, sys.unraisablehook = sys.unraisablehook, unless_too_late
    logging.getLogger("absl").addFilter(not_of_orbax)
    try:
        yield
    finally:
        logging.getLogger("absl").removeFilter(not_of_orbax)
        sys.unraisablehook = hook


def _alone(**options: Any) -> ocp.CheckpointManagerOptions:
    """Options of a manager that waits for no other host."""
    mine = jax.process_index()
    processes = MultiprocessingOptions(primary_host=mine, active_processes={mine})
    return ocp.CheckpointManagerOptions(create=False, multiprocessing_options=processes, **options)


def restore_model_state(path: str | Path) -> dict[str, np.ndarray]:
    """The network's tensors by torch name from a run folder, its ``checkpoints`` folder or one step's.

    Raises:
      WeightsError: there is no checkpoint, or it cannot be read.
    """
    path = Path(path).resolve()
    step = None
    if re.fullmatch(r"\d+", path.name) and (path / "model").is_dir():
        path, step = path.parent, int(path.name)
    elif (path / FOLDER).is_dir():
        path = path / FOLDER
    if not path.is_dir():
        raise WeightsError(f"{path}: no such folder; give a run folder or a weight file")
    if step is None and not any(re.fullmatch(r"\d+", child.name) for child in path.iterdir()):
        raise WeightsError(f"{path}: holds no checkpoint; give a run folder that train.py has written")
    with ocp.CheckpointManager(path, options=_alone()) as manager:
        step = manager.latest_step() if step is None else step
        if step is None:
            raise WeightsError(f"{path}: holds no finished checkpoint; let train.py reach train.checkpoint_every")
        return _restore(manager, step, "model", path)


def _restore(manager: ocp.CheckpointManager, step: int, item: str, folder: Path) -> Any:
    # Orbax reports damage through whichever of its layers met it first; a user needs the folder's name.
    try:
        return manager.restore(step, args=ocp.args.Composite(**{item: ocp.args.StandardRestore()}))[item]
    except Exception as error:
        raise WeightsError(
            f"{folder}/{step}: checkpoint item {item!r} cannot be read ({str(error).splitlines()[0][:120]}); "
            "delete this step's folder to fall back to the one before"
        ) from error
