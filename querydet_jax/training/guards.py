"""What stops a run early, so that nothing is lost: a loss that is not finite, and SIGTERM."""

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

from querydet_jax.runtime.errors import QueryDetError
from querydet_jax.runtime.files import writing, written_aside
from querydet_jax.training.checkpoint import Checkpoints
from querydet_jax.training.parallel import Carrier
from querydet_jax.training.step import Metrics


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[], bool]]:
    """Tells whether this is the place to save and stop at, because SIGTERM has come (what a preempted machine gets),
    which does not end the process meanwhile.

    All hosts must ask at the same places of the run: jax, which listens to SIGTERM for several, lets them agree on one
    that none has passed by counting. Of one host, outside the main thread, Python lets nobody listen: then the answer
    is always no.
    """
    if jax.process_count() > 1:
        asked = itertools.count(1)
        yield lambda: multihost_utils.reached_preemption_sync_point(next(asked))
        return
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.set())
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


class LossGuard:
    """Stops a run at the step whose loss is not finite, with its images on disk.

    A step is looked at when the next one is under way, so that the devices never wait for this.
    """

    def __init__(self, run: Path, devices: Carrier, checkpoints: Checkpoints):
        self.run, self.devices, self.checkpoints = run, devices, checkpoints
        self._last: tuple[int, Any, dict[str, np.ndarray], np.ndarray] | None = None

    def watch(self, step: int, metrics: Metrics, batch: dict[str, np.ndarray], image_ids: np.ndarray) -> None:
        """A step has been started: look at the one before."""
        self.check()
        self._last = step, metrics["loss"], batch, image_ids

    def check(self) -> None:
        """Look at the newest step, waiting for it.

        Raises:
          QueryDetError: its loss is not finite. The batch is then in ``RUN/not_finite_step_N.npz``: images, sizes,
            boxes, classes and image_ids, as this host's devices had them.
        """
        if self._last is None:
            return
        step, loss, batch, image_ids = self._last
        self._last = None
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
