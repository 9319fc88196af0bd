"""The training step on all local devices. The only file that names pmap.

The state is replicated, the batch is split along its first axis; the step itself averages
gradients over the axis ``AXIS``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from querydet_jax.errors import ConfigError
from querydet_jax.training.step import Batch, Metrics, TrainState

AXIS = "devices"
PyTree = Any


def parallel_step(
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """``step`` mapped over the devices; the state's buffers are donated."""
    return jax.pmap(step, axis_name=AXIS, donate_argnums=0)


def check_batch_size(batch_size: int) -> None:
    count = jax.local_device_count()
    if batch_size % count:
        raise ConfigError(
            f"train.batch_size {batch_size} does not divide over {count} devices; "
            f"use {batch_size // count * count or count} or {(batch_size // count + 1) * count}"
        )


def replicate(tree: PyTree) -> PyTree:
    """A copy of every array on each local device, stacked on a new first axis."""
    count = jax.local_device_count()
    # The same axis name as the step: arrays laid out over another axis would compile the step twice.
    return jax.pmap(lambda _, x: x, axis_name=AXIS, in_axes=(0, None))(np.zeros((count,)), tree)


def unreplicate(tree: PyTree) -> PyTree:
    """The first device's copy."""
    return jax.tree.map(lambda x: x[0], tree)


def split_batch(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """``[B, ...]`` to ``[devices, B / devices, ...]``."""
    count = jax.local_device_count()
    return {name: value.reshape(count, -1, *value.shape[1:]) for name, value in batch.items()}
