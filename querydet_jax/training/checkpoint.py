"""Checkpoints of a run: a training state as arrays, and back.

A run's folder holds ``checkpoints/<step>/``. Item ``model`` has the network under its torch names, readable without
this run's optimiser, ``train`` what resuming needs besides. With several hosts the first one writes and reads;
the others need no access to the folder.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from optax import GradientTransformation

from querydet_jax.models.base import DenseDetector
from querydet_jax.runtime.checkpoint_store import FOLDER, CheckpointStore
from querydet_jax.runtime.errors import QueryDetError, WeightsError
from querydet_jax.runtime.hosts import from_first, is_first
from querydet_jax.runtime.run_lock import run_lock
from querydet_jax.runtime.stores import as_path
from querydet_jax.training.step import TrainState, init_state, merge_into
from querydet_jax.weights import load_weights, state_dict

_log = logging.getLogger("querydet_jax")


class Checkpoints:
    """The checkpoints of a run. Saving returns at once; leaving the context waits for what is being written.

    Every host calls the same methods. If a checkpoint cannot be written, the next call raises a QueryDetError with
    the reason; the checkpoints before it stay.

    Raises:
      ConfigError: another process trains in this folder (``run_lock``).
      QueryDetError: the folder cannot be written.
    """

    def __init__(self, run: str | Path, keep: int = 3):
        self.folder = as_path(run).resolve() / FOLDER
        self._store: CheckpointStore | None = None
        with contextlib.ExitStack() as held:
            from_first(lambda: held.enter_context(run_lock(as_path(run))))
            if is_first():
                self._store = CheckpointStore(self.folder, keep)
            self._held = held.pop_all()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None):
        with self._held:
            try:
                if self._store is not None:
                    self._store.close()
            except QueryDetError as own:
                if error is None:
                    raise
                _log.error("%s", own)  # the error that ended the run is printed last

    def latest(self) -> int | None:
        """Return the newest complete step, after waiting for the one being written."""
        return from_first(lambda: self._first().latest())

    def save(self, model: DenseDetector, state: TrainState, *, wait: bool = False) -> None:
        """Write the state (of one replica) once the checkpoint before is written; with ``wait`` return when it is.

        ``model`` receives the state's values, those of the moving average where there is one.
        """
        merge_into(model, state)
        if self._store is None:
            return
        train: dict[str, Any] = {
            "opt_state": [np.asarray(x) for x in jax.tree.leaves(state.opt_state)],
            "normalizer": np.asarray(state.normalizer),
        }
        if state.ema is not None:  # `model` holds the average, so the parameters themselves go here
            train["params"] = [np.asarray(x) for x in jax.tree.leaves(state.params)]
        self._store.save(int(state.step), {"model": state_dict(model), "train": train})
        if wait:
            self._store.wait()

    def check(self) -> None:
        """Raise QueryDetError if the checkpoint being written has failed; do not wait for it."""
        if self._store is not None:
            self._store.check()

    def restore(self, model: DenseDetector, optimizer: GradientTransformation, *, ema: bool = False) -> TrainState:
        """Return the newest state, to go on exactly where it was saved.

        Raises:
          WeightsError: there is no checkpoint, it belongs to another model or optimiser, or only one of the
            checkpoint and ``ema`` has a moving average of the parameters.
        """
        step, tensors, saved = from_first(self._read)
        try:
            load_weights(model, tensors)
        except WeightsError as error:
            raise WeightsError(f"{self.folder}/{step}: {str(error).removeprefix('weights: ')}") from None
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

    def _first(self) -> CheckpointStore:
        assert self._store is not None, "the first host's alone"
        return self._store

    def _read(self) -> tuple[int, dict[str, np.ndarray], dict[str, Any]]:
        """Return the newest step and its two items."""
        store = self._first()
        store.remove_unfinished()
        step = store.latest()
        if step is None:
            raise WeightsError(f"{self.folder}: no checkpoint to resume from")
        return step, store.read(step, "model"), store.read(step, "train")
