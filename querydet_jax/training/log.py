"""What a run says of itself while it trains: the line, metrics.jsonl, TensorBoard files."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from querydet_jax.config import Config
from querydet_jax.runtime.files import Lines
from querydet_jax.runtime.hosts import from_first, is_first
from querydet_jax.training.schedule import learning_rate
from querydet_jax.training.tensorboard import Board

# Of the loss, as the progress line shows those there are.
_TERMS = ("rpn_cls", "rpn_box", "cls", "box", "centerness", "query")


class Progress:
    """One line a few steps: losses, images/s, time left, share of the time spent waiting for data.

    The same numbers go to ``metrics.jsonl``, and to TensorBoard files where tensorboardX is installed. A host that
    is not the first says and writes nothing.
    """

    def __init__(self, config: Config, path: Path, start: int):
        self.config, self.first = config, start
        self.rate = learning_rate(config.train)
        self.file = Lines(path if is_first() else Path(os.devnull))
        self.board = Board(path.parent / "tensorboard") if is_first() else None
        self.begun = time.perf_counter()
        self.total_waited = 0.0
        self._reset(start)

    def _reset(self, step: int) -> None:
        self.last_step, self.last_time, self.waited = step, time.perf_counter(), 0.0

    def wait(self, seconds: float) -> None:
        self.waited += seconds
        self.total_waited += seconds

    def log(self, step: int, values: dict[str, float], waited: float) -> None:
        self.wait(waited)
        elapsed = time.perf_counter() - self.last_time
        steps = step - self.last_step
        speed = steps * self.config.train.batch_size / elapsed
        left = (self.config.train.steps - step) * elapsed / steps
        share = self.waited / elapsed
        values = {
            **values,
            "lr": float(np.asarray(self.rate(step - 1))),
            "images_per_s": speed,
            "data_wait_share": share,
            "seconds": time.perf_counter() - self.begun,
        }
        self.record(step, values)
        terms = " ".join(f"{name} {values[name]:.3f}" for name in _TERMS if name in values)
        self.say(
            f"step {step}/{self.config.train.steps}  loss {values['loss']:.3f} ({terms})  "
            f"fg {values['foreground']:.0f}  lr {values['lr']:.2g}  {speed:.1f} images/s  data wait {share:.1%}  "
            f"left {_duration(left) if step - self.first > 1 else '?'}"
        )
        self._reset(step)

    def say(self, line: str) -> None:
        if is_first():
            print(line, flush=True)

    def record(self, step: int, values: dict[str, float]) -> None:
        finite = {k: (v if math.isfinite(v) else None) for k, v in values.items()}
        self.file.write(json.dumps({"step": step, **finite}))
        if self.board is not None:
            self.board.add(step, values)

    def evaluated(self, step: int) -> bool:
        """Whether ``metrics.jsonl`` has an evaluation of this step, by this run or the one that it goes on from."""

        def found() -> bool:
            lines = map(json.loads, self.file.path.read_text().splitlines())
            return any(line["step"] == step and "loss" not in line for line in lines)

        return from_first(found)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves an evaluation out of the speed and the time left."""
        begun = time.perf_counter()
        yield
        self.last_time += time.perf_counter() - begun

    def summary(self, step: int) -> str:
        """Of the whole run since it was started or resumed, compilation and evaluations included."""
        elapsed = time.perf_counter() - self.begun
        images = (step - self.first) * self.config.train.batch_size
        return (
            f"{step - self.first} steps in {_duration(elapsed)}, {images / elapsed:.1f} images/s, "
            f"{self.total_waited / elapsed:.1%} of the time waiting for data"
        )

    def close(self, skipped: int) -> None:
        if skipped:
            print(f"{skipped} images could not be read and were skipped", file=sys.stderr)
        self.file.close()
        if self.board is not None:
            self.board.close()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(np.ceil(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
