"""What ends a run early without losing anything: SIGTERM, and a loss that is not finite."""

from __future__ import annotations

import contextlib
import itertools
import math
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from querydet_jax.runtime.errors import Preempted, QueryDetError
from querydet_jax.runtime.files import writing, written_aside
from querydet_jax.training.checkpoint import Checkpoints
from querydet_jax.training.parallel import Replication
from querydet_jax.training.step import Metrics


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[], None]]:
    """Yield a function that raises Preempted if SIGTERM has come, which ends the process in no other way meanwhile.

    With several hosts, all must call it at the same places of the run: jax listens to SIGTERM there, and has the
    hosts agree on a call that none of them has passed. With one host outside the main thread, where Python cannot
    listen, the function does nothing.
    """
    before = None
    if jax.process_count() > 1:
        calls = itertools.count(1)

        def stopped() -> bool:
            return multihost_utils.reached_preemption_sync_point(next(calls))

    else:
        came = threading.Event()
        stopped = came.is_set
        if threading.current_thread() is threading.main_thread():
            before = signal.signal(signal.SIGTERM, lambda number, frame: came.set())

    def stop_if_told() -> None:
        if stopped():
            raise Preempted("stopped by SIGTERM")

    try:
        yield stop_if_told
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


class FiniteLoss:
    """Ends a run at the step whose loss is not finite, and writes the step's images to disk.

    A step is checked when the next one has been started, so that the devices never wait for the check.
    """

    def __init__(self, run: Path, devices: Replication, checkpoints: Checkpoints):
        self.run, self.devices, self.checkpoints = run, devices, checkpoints
        self._newest: tuple[int, Any, dict[str, np.ndarray], np.ndarray] | None = None

    def started(self, step: int, metrics: Metrics, batch: dict[str, np.ndarray], image_ids: np.ndarray) -> None:
        """Check the step before this one, which has been started."""
        self.check()
        self._newest = step, metrics["loss"], batch, image_ids

    def check(self) -> None:
        """Wait for the newest step and check it.

        Raises:
          QueryDetError: its loss is not finite. ``RUN/not_finite_step_N.npz`` then holds the batch: images, sizes,
            boxes, classes and image_ids of this host.
        """
        if self._newest is None:
            return
        step, loss, batch, image_ids = self._newest
        self._newest = None
        value = float(self.devices.unreplicate({"loss": loss})["loss"])
        if math.isfinite(value):
            return
        host = "" if jax.process_count() == 1 else f"_host_{jax.process_index()}"
        path = self.run / f"not_finite_step_{step}{host}.npz"
        arrays: dict[str, Any] = {**batch, "image_ids": image_ids}
        kept = f"the batch is in {path}"
        try:
            with writing(path), written_aside(path) as aside:
                np.savez_compressed(aside, **arrays)
        except QueryDetError as error:
            kept = str(error)
        raise QueryDetError(
            f"the loss is {value} at step {step} (images {image_ids.tolist()}; {kept}): lower "
            "train.learning_rate, lengthen train.warmup_steps or set train.clip_norm; "
            f"the last checkpoint is {self.checkpoints.latest() or 'none'}"
        )
