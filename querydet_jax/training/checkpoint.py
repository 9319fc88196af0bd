"""Checkpoints with orbax; the only file that names it.

A run's folder holds ``checkpoints/<step>/``. Each has the network under its torch names (``model``),
readable without this run's optimiser, and what resuming needs besides (``train``).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from querydet_jax.errors import WeightsError
from querydet_jax.models.skeleton import DenseDetector
from querydet_jax.training.step import TrainState, init_state, merge_into
from querydet_jax.weights import load_weights, state_dict

FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints of a run. Saving returns at once; ``close`` waits for what is being written."""

    def __init__(self, run: str | Path, keep: int = 3):
        self.folder = Path(run).resolve() / FOLDER
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, model: DenseDetector, state: TrainState) -> None:
        """Write the state (of one replica). ``model`` receives its values."""
        merge_into(model, state)
        train = {
            "opt_state": [np.asarray(x) for x in jax.tree.leaves(state.opt_state)],
            "normalizer": np.asarray(state.normalizer),
        }
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(model=ocp.args.StandardSave(state_dict(model)), train=ocp.args.StandardSave(train)),
        )

    def restore(self, model: DenseDetector, optimizer: Any) -> TrainState:
        """The newest state, to go on from exactly where it was saved.

        Raises:
          WeightsError: no checkpoint, or one of another model or optimiser.
        """
        step = self.latest()
        if step is None:
            raise WeightsError(f"{self.folder}: no checkpoint to resume from; start without --resume")
        load_weights(model, _restore(self._manager, step, "model", self.folder))
        blank = init_state(model, optimizer)
        saved = _restore(self._manager, step, "train", self.folder)
        leaves, structure = jax.tree.flatten(blank.opt_state)
        values = [np.asarray(x) for x in saved["opt_state"]]
        if [x.shape for x in values] != [x.shape for x in leaves]:
            raise WeightsError(
                f"{self.folder}/{step}: optimiser state of another configuration; "
                "resume with the run's own config.json, or start a new run with train.init"
            )
        opt_state = jax.tree.unflatten(structure, [v.astype(x.dtype) for v, x in zip(values, leaves, strict=True)])
        return TrainState(
            blank.params,
            blank.rest,
            opt_state,
            jnp.asarray(saved["normalizer"], jnp.float32),
            jnp.asarray(step, jnp.int32),
        )

    def close(self) -> None:
        self._manager.close()


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
    with ocp.CheckpointManager(path) as manager:
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
