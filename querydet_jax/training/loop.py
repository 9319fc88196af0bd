"""The training loop, read top to bottom.

Every host runs it on its own images; the first one alone prints and writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from querydet_jax.config import Config, save_config
from querydet_jax.data import open_dataset, train_batches
from querydet_jax.data.dataset import Dataset
from querydet_jax.errors import ConfigError, Preempted
from querydet_jax.files import Lines
from querydet_jax.hosts import is_first, on_every
from querydet_jax.models import DenseDetector, build_model
from querydet_jax.runs import check_classes
from querydet_jax.training.board import Board
from querydet_jax.training.checkpoint import Checkpoints
from querydet_jax.training.compiled import CompileWatch, Programs
from querydet_jax.training.guards import LossGuard, preemption
from querydet_jax.training.parallel import AXIS, carrier, check_batch_size
from querydet_jax.training.profiler import StepTrace
from querydet_jax.training.schedule import learning_rate, make_optimizer
from querydet_jax.training.step import init_state, make_step, merge_into
from querydet_jax.weights import load_weights

_log = logging.getLogger("querydet_jax")

# Of the loss, as the progress line shows those there are.
_TERMS = ("rpn_cls", "rpn_box", "cls", "box", "centerness", "query")

Evaluate = Callable[[DenseDetector, Dataset], dict[str, float]]


def train(
    config: Config,
    run: str | Path,
    *,
    resume: bool = False,
    evaluate: Evaluate | None = None,
    profile: bool = False,
) -> DenseDetector:
    """Train a detector and leave its checkpoints, ``config.json`` and ``metrics.jsonl`` in ``run``.

    Args:
      config: everything about the run.
      run: folder of the run; must not hold checkpoints unless ``resume``.
      resume: go on from the newest checkpoint.
      evaluate: called, on every host, with the model and the validation set every ``train.eval_every``
        steps; what it returns is logged.
      profile: also write ``run/profile``, a trace of a few steps (``StepTrace``).

    Returns:
      The trained model, in inference mode; of a run with ``train.ema`` the moving average.

    Raises:
      QueryDetError: bad configuration, data or checkpoint, a loss that is not finite, or no room for a checkpoint.
      Preempted: SIGTERM has come, to this host or another; the step under way was finished and saved.
    """
    check_batch_size(config.train.batch_size, config.train.accumulate)
    with (
        Checkpoints(run, keep=config.train.keep_checkpoints) as checkpoints,
        contextlib.closing(CompileWatch()) as watch,
        preemption() as stopped,
    ):
        return _train(config, Path(run), checkpoints, watch, resume, evaluate, profile, stopped)


def _train(
    config: Config,
    run: Path,
    checkpoints: Checkpoints,
    watch: CompileWatch,
    resume: bool,
    evaluate: Evaluate | None,
    profile: bool,
    stopped: Callable[[int], bool],
) -> DenseDetector:
    if checkpoints.latest() is not None and not resume:
        raise ConfigError(f"{run}: already holds checkpoints; add --resume to go on, or choose another --run")
    dataset = on_every(lambda: open_dataset(config.data, "train"))
    check_classes(config, dataset)
    config = dataclasses.replace(config, classes=dataset.classes)  # for who uses the model without the data
    validation = None
    if evaluate is not None and config.train.eval_every:
        validation = on_every(lambda: open_dataset(config.data, "val"))

    model = build_model(config.model, config.train.seed)
    if config.train.init:
        _log.info("%s: %s", config.train.init, on_every(lambda: load_weights(model, config.train.init)))
    optimizer = make_optimizer(config.train)
    ema = config.train.ema > 0
    state = checkpoints.restore(model, optimizer, ema=ema) if resume else init_state(model, optimizer, ema=ema)
    start = int(state.step)
    if is_first():
        save_config(config, run / "config.json")

    batches = train_batches(
        dataset,
        config.data,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        start_step=start,
        shard=jax.process_index(),
        num_shards=jax.process_count(),
    )
    progress = _Progress(config, run / "metrics.jsonl", start)
    _log.info(
        "%s: %d images, %d parameters, %d device(s) of %d host(s), steps %d to %d",
        config.name,
        len(dataset),
        sum(x.size for x in jax.tree.leaves(state.params)),
        jax.device_count(),
        jax.process_count(),
        start,
        config.train.steps,
    )
    devices = carrier(config.train.parallel)
    step_fn = devices.compiled(
        make_step(
            model,
            optimizer,
            AXIS,
            seed=config.train.seed,
            accumulate=config.train.accumulate,
            remat=config.train.remat,
            ema_decay=config.train.ema,
        )
    )
    programs = Programs(step_fn, watch)
    state = devices.replicate(state)
    guard = LossGuard(run, devices, checkpoints)
    trace = StepTrace(run / "profile" if profile and is_first() else None, start, config.train.steps)
    try:
        for step in range(start, config.train.steps):
            with trace.begin(step):
                waited = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - waited
                image_ids = batch.pop("image_ids")
                state, metrics = programs(state, devices.split(batch))
            done = step + 1
            guard.watch(done, metrics, batch, image_ids)
            checkpoints.check()
            if trace.end(step, guard.check):
                progress.say(f"wrote a trace of steps {trace.first + 1} to {done} to {run}/profile")
            last = done == config.train.steps
            if done % config.train.log_every == 0 or done == start + 1 or last:
                guard.check()
                values = {name: float(value) for name, value in devices.unreplicate(metrics).items()}
                progress.log(done, {**values, "recompilations": watch.recompilations}, waited)
            else:
                progress.wait(waited)
            stop = stopped(done)  # asked once: what comes after is for the next step
            if done % config.train.checkpoint_every == 0 or last or stop:
                guard.check()
                with watch.during("saving"):
                    checkpoints.save(model, devices.unreplicate(state), wait=last or stop)
            if stop and not last:
                raise Preempted(f"stopped by SIGTERM: step {done} is saved in {run}; --resume goes on from there")
            if validation is not None and evaluate is not None and done % config.train.eval_every == 0 and not last:
                with progress.paused(), watch.during("evaluation"):
                    merge_into(model, devices.unreplicate(state))
                    progress.record(done, evaluate(model, validation))
        if start < config.train.steps:
            progress.say(f"{progress.summary(config.train.steps)}; {watch.summary()}")
    finally:
        trace.close()
        batches.close()
        progress.close(batches.skipped)
    merge_into(model, devices.unreplicate(state))
    return model


class _Progress:
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
