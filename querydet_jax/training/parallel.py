"""The training step on all devices of all hosts. The only file that names pmap and shard_map.

The state is replicated, the batch is split along its first axis; the step itself averages gradients over the axis
``AXIS``. ``pmap`` and ``shard_map`` over a mesh give the same results. Every host passes the same state and its own
rows of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from querydet_jax.runtime.errors import ConfigError
from querydet_jax.training.step import Batch, Metrics, TrainState

AXIS = "devices"
PyTree = Any
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


class Replication(Protocol):
    """Places a state and batches on the devices and runs a step there."""

    def replicate_step(self, step: Step) -> Step:
        """Map ``step`` over the devices; it donates the state's buffers."""
        ...

    def replicate(self, tree: PyTree) -> PyTree:
        """Copy every array to each device."""
        ...

    def unreplicate(self, tree: PyTree) -> PyTree:
        """Return the copy of this host's first device as NumPy arrays, which the step cannot overwrite."""
        ...

    def split(self, batch: dict[str, np.ndarray]) -> Batch:
        """Place this host's rows ``[B, ...]``, an equal share on each of its devices."""
        ...


def replication(kind: Literal["pmap", "shard_map"]) -> Replication:
    """Return the replication that ``train.parallel`` names."""
    return Pmap() if kind == "pmap" else ShardMap()


class Pmap:
    """Replication by ``jax.pmap``: arrays have a leading axis of this host's devices."""

    def __init__(self):
        self._rows = NamedSharding(Mesh(np.array(jax.local_devices()), (AXIS,)), PartitionSpec(AXIS))

    def replicate_step(self, step: Step) -> Step:
        return jax.pmap(step, axis_name=AXIS, donate_argnums=0)

    def replicate(self, tree: PyTree) -> PyTree:
        # The same axis name as the step: arrays laid out over another axis would compile the step twice.
        spread = jax.pmap(lambda _, x: x, axis_name=AXIS, in_axes=(0, None))
        return spread(np.zeros((jax.local_device_count(),)), tree)

    def unreplicate(self, tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: np.array(x.addressable_data(0))[0], tree)

    def split(self, batch: dict[str, np.ndarray]) -> Batch:
        count = jax.local_device_count()
        rows = {name: value.reshape(count, -1, *value.shape[1:]) for name, value in batch.items()}
        return jax.device_put(rows, self._rows)


class ShardMap:
    """Replication by ``jax.shard_map``: a state's arrays are whole on each device, a batch's are split over all.

    Args:
      devices: those to run on or to compile for (default: all of ``jax.devices()``).
    """

    def __init__(self, devices: Sequence[Any] | None = None):
        mesh = Mesh(np.array(jax.devices() if devices is None else devices), (AXIS,))
        self.mesh = mesh
        self._whole, self._rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(AXIS))

    def replicate_step(self, step: Step) -> Step:
        whole, rows = PartitionSpec(), PartitionSpec(AXIS)
        # check_vma: the step averages by axis name, as under pmap; its types do not prove the result replicated.
        mapped = jax.shard_map(step, mesh=self.mesh, in_specs=(whole, rows), out_specs=(whole, whole), check_vma=False)
        return jax.jit(mapped, donate_argnums=0)

    def replicate(self, tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(self._whole, np.asarray(x)), tree)

    def unreplicate(self, tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: np.array(x.addressable_data(0)), tree)

    def split(self, batch: dict[str, np.ndarray]) -> Batch:
        return {name: jax.make_array_from_process_local_data(self._rows, value) for name, value in batch.items()}


def check_batch_size(batch_size: int, accumulate: int = 1) -> None:
    """Raise ConfigError unless the batch divides over the devices of all hosts and its ``accumulate`` parts."""
    count = jax.device_count() * accumulate
    if batch_size % count:
        parts = f" x train.accumulate {accumulate}" if accumulate > 1 else ""
        below, above = batch_size // count * count, (batch_size // count + 1) * count
        raise ConfigError(
            f"train.batch_size {batch_size} does not divide over {jax.device_count()} devices{parts}; "
            f"use {f'{below} or ' if below else ''}{above}"
        )
