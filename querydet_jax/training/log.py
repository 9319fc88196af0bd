"""What a run reports while it trains: the progress line, metrics.jsonl and its curves, other loggers."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from querydet_jax.config import Config
from querydet_jax.runtime.files import LineFile, reason, writing, written_aside
from querydet_jax.runtime.hosts import from_first, is_first
from querydet_jax.training.loggers import Loggers
from querydet_jax.training.schedule import learning_rate
from querydet_jax.viz.plots import NEEDS
from querydet_jax.viz.training_curves import LOSS_TERMS, save_curves

_log = logging.getLogger("querydet_jax")


class RunLog:
    """Prints a line every few steps: losses, images/s, time left, share of the time spent waiting for data.

    The same numbers go to ``metrics.jsonl`` and to ``train.loggers``. Only the first host prints and writes.

    Lines of an existing file that cannot be read go to ``metrics.damaged.jsonl``, with a warning of how many.

    Attributes:
      evaluated: the steps whose evaluation is in ``metrics.jsonl``, by this run or the one it resumes; on the first
        host.

    Raises:
      QueryDetError: the file cannot be read or written, or a logger not be started.
    """

    def __init__(self, config: Config, path: Path, start: int):
        self.config, self.first = config, start
        self.rate = learning_rate(config.train)
        if is_first():
            _set_damaged_lines_aside(path)
        self.file = LineFile(path if is_first() else Path(os.devnull))
        self.evaluated = _evaluated(self.file.local) if is_first() else set[int]()
        self.loggers: Loggers | None = None
        from_first(lambda: self._open_loggers(path.parent))
        self._curves, self._undrawn = True, False
        self.begun = time.perf_counter()
        self.total_waited = 0.0
        self._begin_interval(start)

    def waited(self, seconds: float) -> None:
        """Count seconds spent waiting for a batch."""
        self.interval_waited += seconds
        self.total_waited += seconds

    def log_step(self, step: int, values: dict[str, float]) -> None:
        """Print and write a step's metrics, with the speed since the last call."""
        elapsed = time.perf_counter() - self.interval_begun
        steps = step - self.interval_start
        speed = steps * self.config.train.batch_size / elapsed
        left = (self.config.train.steps - step) * elapsed / steps
        share = self.interval_waited / elapsed
        values = {
            **values,
            "lr": float(np.asarray(self.rate(step - 1))),
            "images_per_s": speed,
            "data_wait_share": share,
            "seconds": time.perf_counter() - self.begun,
        }
        self.write(step, values)
        terms = " ".join(f"{name} {values[name]:.3f}" for name in LOSS_TERMS if name in values)
        self.say(
            f"step {step}/{self.config.train.steps}  loss {values['loss']:.3f} ({terms})  "
            f"fg {values['foreground']:.0f}  lr {values['lr']:.2g}  {speed:.1f} images/s  data wait {share:.1%}  "
            f"left {_duration(left) if step - self.first > 1 else '?'}"
        )
        self._begin_interval(step)

    def say(self, line: str) -> None:
        """Print a line, on the first host."""
        if is_first():
            print(line, flush=True)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write values of a step to the files; a value that is not finite becomes null."""
        finite = {k: (v if math.isfinite(v) else None) for k, v in values.items()}
        self.file.write(json.dumps({"step": step, **finite}))
        self._undrawn = True
        if self.loggers is not None:
            self.loggers.add(step, values)

    def write_evaluation(self, step: int, scores: dict[str, float]) -> None:
        """Write the scores of the evaluation after a step."""
        self.write(step, scores)
        self.file.upload()  # on resume it decides whether to evaluate again
        self.evaluated.add(step)

    def has_evaluation(self, step: int) -> bool:
        """Return, on every host, whether the evaluation after this step is written."""
        return from_first(lambda: step in self.evaluated)

    def draw_curves(self) -> None:
        """Draw ``curves.png`` beside ``metrics.jsonl`` as it is now. What goes wrong is said once and ends nothing."""
        if not is_first() or not self._curves or not self._undrawn:
            return
        self._undrawn = False
        path = self.file.path.with_name("curves.png")
        try:
            self._curves = save_curves(self.file.local, path, self.config.train.best_metric)
            if not self._curves:
                _log.info("no %s, which %s", path, NEEDS)
        except Exception as error:  # of matplotlib or the disk
            _log.warning("%s: cannot be drawn (%s); the training goes on without", path, reason(error))
            self._curves = False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the block, an evaluation, out of the speed and the time left."""
        begun = time.perf_counter()
        yield
        self.interval_begun += time.perf_counter() - begun

    def summary(self, step: int) -> str:
        """Summarise the run since it was started or resumed, compilation and evaluations included."""
        elapsed = time.perf_counter() - self.begun
        images = (step - self.first) * self.config.train.batch_size
        return (
            f"{step - self.first} steps in {_duration(elapsed)}, {images / elapsed:.1f} images/s, "
            f"{self.total_waited / elapsed:.1%} of the time waiting for data"
        )

    def upload(self) -> None:
        """Begin to bring a store's ``metrics.jsonl`` up to date, before a checkpoint."""
        self.file.upload(wait=False)

    def close(self, skipped: int) -> None:
        """Close the files, and report how many images were ``skipped``."""
        if skipped:
            print(f"{skipped} images could not be read and were skipped", file=sys.stderr)
        self.file.close()
        if self.loggers is not None:
            self.loggers.close()

    def _open_loggers(self, run: Path) -> None:
        self.loggers = Loggers(self.config, run, go_on=self.first > 0)

    def _begin_interval(self, step: int) -> None:
        self.interval_start, self.interval_begun, self.interval_waited = step, time.perf_counter(), 0.0


def _set_damaged_lines_aside(path: Path) -> None:
    if not path.is_file():
        return
    with writing(path):
        before = path.read_bytes()
    good, bad = [], []
    for line in before.splitlines():
        (good if _is_whole(line) else bad if line.strip() else []).append(line + b"\n")
    if bad:
        aside = path.with_name(f"{path.stem}.damaged{path.suffix}")
        with writing(aside), written_aside(aside) as new:
            new.write_bytes(b"".join([aside.read_bytes() if aside.is_file() else b"", *bad]))
        _log.warning("%s: %d damaged line(s) moved to %s", path, len(bad), aside.name)
    if b"".join(good) != before:
        with writing(path), written_aside(path) as new:
            new.write_bytes(b"".join(good))


def _evaluated(path: Path) -> set[int]:
    lines = map(json.loads, path.read_bytes().splitlines())  # of text, U+2028 ends a line, too
    return {line["step"] for line in lines if "loss" not in line}


def _is_whole(line: bytes) -> bool:
    try:
        values = json.loads(line.decode())
    except (ValueError, RecursionError):
        return False
    return isinstance(values, dict) and type(values.get("step")) is int


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(np.ceil(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
