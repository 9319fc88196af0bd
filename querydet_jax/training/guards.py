"""What ends a run early without losing anything (SIGTERM, Ctrl-C, a loss that is not finite), and what must not."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from querydet_jax.runtime.errors import Interrupted, Preempted, QueryDetError
from querydet_jax.runtime.files import reason, writing, written_aside
from querydet_jax.training.checkpoint import Checkpoints
from querydet_jax.training.parallel import Replication
from querydet_jax.training.step import Metrics

_log = logging.getLogger("querydet_jax")


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[], None]]:
    """Yield a function that raises Preempted if SIGTERM has come, and Interrupted if Ctrl-C has.

    Meanwhile neither ends the process in another way, except that a second Ctrl-C goes to the handler before this one.
    (An exception raised at any moment, as Python does for Ctrl-C, can come to nothing inside a callback of jax.)

    With several hosts, all must call the function at the same places of the run: jax listens to SIGTERM there, and has
    the hosts agree on a call that none of them has passed. With one host outside the main thread, where Python cannot
    listen, the function does nothing.
    """
    several, came, interrupted = jax.process_count() > 1, threading.Event(), threading.Event()
    calls = itertools.count(1)

    def stop_if_told() -> None:
        if multihost_utils.reached_preemption_sync_point(next(calls)) if several else came.is_set():
            raise Interrupted("stopped by Ctrl-C") if interrupted.is_set() else Preempted("stopped by SIGTERM")

    def terminated(number: int, frame: FrameType | None) -> None:
        came.set()

    def ctrl_c(number: int, frame: FrameType | None) -> None:
        if interrupted.is_set() and callable(before):
            before(number, frame)
        interrupted.set()
        with contextlib.suppress(OSError):  # print() may be what this handler interrupts
            os.write(2, b"\nCtrl-C: stopping after this step, which is saved; press it again to stop at once\n")
        if several:
            signal.raise_signal(signal.SIGTERM)
        came.set()

    before = signal.getsignal(signal.SIGINT)
    with contextlib.ExitStack() as handlers:
        if threading.current_thread() is threading.main_thread():
            if not several:
                handlers.enter_context(_handling(signal.SIGTERM, terminated))
            if callable(before):  # else it is ignored, as in the background of a shell
                handlers.enter_context(_handling(signal.SIGINT, ctrl_c))
        yield stop_if_told


@contextlib.contextmanager
def _handling(number: signal.Signals, handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        if before is not None:  # of another language
            signal.signal(number, before)


class FailedEvaluations:
    """Evaluations that failed, while the training of a single host went on; false while there is none.

    With several hosts an error ends the training: the others wait in the evaluation for the host that failed.
    """

    def __init__(self):
        self._steps: dict[str, list[int]] = {}  # by what was wrong

    @contextlib.contextmanager
    def caught(self, step: int) -> Iterator[None]:
        """Log and remember the exception of a block, the evaluation after ``step``; let what stops the run pass."""
        try:
            yield
        except Preempted:
            raise
        except Exception as error:  # of whatever evaluates
            if jax.process_count() > 1:
                raise
            wrong = str(error)
            if not isinstance(error, QueryDetError):
                at = traceback.extract_tb(error.__traceback__)[-1]
                wrong = f"{type(error).__name__}: {reason(error)}; {Path(at.filename).name}:{at.lineno}"
            _log.error("step %d: the evaluation failed (%s); the training goes on", step, wrong)
            self._steps.setdefault(wrong, []).append(step)

    def __bool__(self) -> bool:
        return bool(self._steps)

    def __str__(self) -> str:
        def said(wrong: str, steps: list[int]) -> str:
            listed = ", ".join(map(str, steps[:5])) + (f" and {len(steps) - 5} more" if len(steps) > 5 else "")
            return f"at step{'s' * (len(steps) > 1)} {listed} ({wrong})"

        return f"evaluation failed {', '.join(said(*failed) for failed in self._steps.items())}"


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
