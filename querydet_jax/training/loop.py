"""The training loop, read top to bottom.

Every host runs it on its own images; the first one alone prints and writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable
from pathlib import Path

import jax

from querydet_jax.config import Config, save_config
from querydet_jax.data import open_dataset, train_batches
from querydet_jax.data.dataset import Dataset
from querydet_jax.data.sources import check_classes
from querydet_jax.models import DenseDetector, build_model
from querydet_jax.runtime.errors import ConfigError, Preempted
from querydet_jax.runtime.hosts import is_first, on_every
from querydet_jax.training.checkpoint import Checkpoints
from querydet_jax.training.compiled import CompileWatch, Programs
from querydet_jax.training.guards import LossGuard, preemption
from querydet_jax.training.log import Progress
from querydet_jax.training.parallel import AXIS, carrier, check_batch_size
from querydet_jax.training.profiler import StepTrace
from querydet_jax.training.schedule import make_optimizer
from querydet_jax.training.step import init_state, make_step, merge_into
from querydet_jax.weights import load_weights

_log = logging.getLogger("querydet_jax")

Evaluate = Callable[[DenseDetector, Dataset, Callable[[], None]], dict[str, float]]


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
      evaluate: called, on every host, with the model and the validation set every ``train.eval_every`` steps; what it
        returns is logged. It must call its third argument after every batch, on all hosts as often: from there it is
        left by an exception if the run is to stop. A resumed run makes up for an evaluation that was left so.
      profile: also write ``run/profile``, a trace of a few steps (``StepTrace``).

    Returns:
      The trained model, in inference mode; of a run with ``train.ema`` the moving average.

    Raises:
      QueryDetError: bad configuration, data or checkpoint, a loss that is not finite, or no room for a checkpoint.
      Preempted: SIGTERM has come, to this host or another; the step under way was finished and saved, an evaluation
        under way given up.
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
    stopped: Callable[[], bool],
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
    progress = Progress(config, run / "metrics.jsonl", start)
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

    def save(*, wait: bool = False) -> None:
        guard.check()
        with watch.during("saving"):
            checkpoints.save(model, devices.unreplicate(state), wait=wait)

    def stop_if_told() -> None:
        if stopped():
            save(wait=True)
            raise Preempted(f"stopped by SIGTERM: step {done} is saved in {run}; --resume goes on from there")

    def evaluate_if_due() -> None:
        if validation is not None and evaluate is not None and done % config.train.eval_every == 0:
            with progress.paused(), watch.during("evaluation"):
                merge_into(model, devices.unreplicate(state))
                progress.record(done, evaluate(model, validation, stop_if_told))

    done = start
    try:
        if 0 < start < config.train.steps and not progress.evaluated(start):
            evaluate_if_due()  # it was stopped before it was through
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
            if done % config.train.checkpoint_every == 0 or last:
                save(wait=last)
            if not last:
                stop_if_told()
                evaluate_if_due()
        if start < config.train.steps:
            progress.say(f"{progress.summary(config.train.steps)}; {watch.summary()}")
    finally:
        trace.close()
        batches.close()
        progress.close(batches.skipped)
    merge_into(model, devices.unreplicate(state))
    return model
