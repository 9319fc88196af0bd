"""The training loop, to be read top to bottom.

Every host runs it on its own images; only the first one prints and writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from querydet_jax.config import Config, TrainConfig, load_config, save_config
from querydet_jax.config.fields import differences
from querydet_jax.data import open_split, train_batches
from querydet_jax.data.dataset import Dataset
from querydet_jax.data.plan import eval_plan, images_per_epoch
from querydet_jax.models import DenseDetector, build_model
from querydet_jax.runtime.errors import ConfigError, DataError, Preempted, QueryDetError
from querydet_jax.runtime.hosts import from_first, is_first, on_every
from querydet_jax.runtime.stores import as_path, is_url
from querydet_jax.training.best import Best
from querydet_jax.training.checkpoint import Checkpoints
from querydet_jax.training.compiled import CompileWatch, Programs
from querydet_jax.training.guards import FailedEvaluations, FiniteLoss, preemption
from querydet_jax.training.log import RunLog
from querydet_jax.training.parallel import AXIS, check_batch_size, replication
from querydet_jax.training.profiler import StepTrace
from querydet_jax.training.schedule import make_optimizer, steps_of_epochs
from querydet_jax.training.step import TrainState, init_state, make_step, merge_into
from querydet_jax.weights import load_weights

_log = logging.getLogger("querydet_jax")

Evaluate = Callable[[DenseDetector, Dataset, Callable[[], None]], dict[str, float]]


def train(
    config: Config,
    run: str | Path,
    *,
    resume: bool = False,
    evaluate: Evaluate | None = None,
    prepare: Callable[[DenseDetector, Dataset], Collection[str]] | None = None,
    profile: bool = False,
    evaluate_with: str = "",
) -> DenseDetector:
    """Train a detector and leave its checkpoints, ``config.json``, ``metrics.jsonl`` and ``curves.png`` in ``run``.

    Args:
      config: everything about the run.
      run: folder of the run; must not hold checkpoints unless ``resume``.
      resume: go on from the newest checkpoint; where there is none yet, start.
      evaluate: called on every host with the model and the validation set every ``train.eval_every`` steps and after
        the last one; what it returns is logged, and ``train.best_metric`` is one of its names, whose values are better
        if larger. It must call its third argument after every batch, equally often on all hosts: that call
        raises an exception to stop the run. An evaluation stopped so is rerun on resume. Where there is one host,
        any other exception ends the evaluation, not the run.
      prepare: called before the first step with the model and the validation set if there will be evaluations; returns
        the names that ``train.best_metric`` may have, and may raise QueryDetError.
      profile: also write ``run/profile``, a trace of a few steps (``StepTrace``).
      evaluate_with: the command that evaluates a run, to be named at the end.

    Returns:
      The trained model, in inference mode; with ``train.ema`` the moving average.

    Raises:
      QueryDetError: bad configuration, data or checkpoint, another training in ``run``, a loss that is not finite, or
        no room for a checkpoint; after the last step and its checkpoint, if evaluations have failed.
      Preempted: SIGTERM has come, to this host or another (Interrupted: Ctrl-C); the step under way was finished and
        saved, an evaluation under way was given up.
    """
    run, settings = as_path(run), config.train
    if profile and is_url(run):
        raise ConfigError(
            f"{run}: a trace is written on this machine alone; leave out --profile, or give a folder here"
        )
    check_batch_size(settings.batch_size, settings.accumulate)
    with (
        Checkpoints(run, keep=settings.keep_checkpoints) as checkpoints,
        contextlib.closing(CompileWatch()) as watch,
        contextlib.ExitStack() as signals,
    ):
        newest = checkpoints.latest()
        if newest is not None and not resume:
            raise ConfigError(f"{run}: already holds checkpoints; add --resume to go on, or choose another --run")
        if newest is None and resume:  # so that a job can be started again by the same command from the first time on
            _log.warning("%s: holds no checkpoint to resume from: the run starts at step 0", run)
            resume = False

        # Data.
        if resume and not config.classes:
            config = dataclasses.replace(config, classes=from_first(lambda: _classes_of(run)))
        named_by = str(run / "config.json") if resume else "the configuration"
        dataset = on_every(lambda: open_split(config, "train", named_by))
        config = dataclasses.replace(config, classes=dataset.classes)  # the model can then be used without the data
        if settings.epochs:
            config = _settle_steps(config, dataset, run, resume)
            settings = config.train
        validation = None
        if evaluate is not None and settings.eval_every:
            validation = on_every(lambda: _open_validation(config, dataset.origin))

        # Model, optimiser and state, from scratch or from the newest checkpoint.
        model = build_model(config.model, settings.seed)
        best = Best(run, settings, resume=resume)
        if validation is not None and prepare is not None:
            best.check(prepare(model, validation))
        elif validation is None and settings.best_metric:
            _log.warning("train.best_metric %s: no evaluations, so none is kept", settings.best_metric)
        if settings.init and not resume:
            report = on_every(lambda: load_weights(model, settings.init, classes=config.classes))
            for line in str(report).splitlines():
                _log.info("%s: %s", settings.init, line)
        optimizer, ema = make_optimizer(settings), settings.ema > 0
        state = checkpoints.restore(model, optimizer, ema=ema) if resume else init_state(model, optimizer, ema=ema)
        start = int(state.step)
        if is_first():
            if resume:
                _say_what_differs(run, config)
            save_config(config, run / "config.json")
        _log.info(
            "%s: %d images, %d parameters, %d device(s) of %d host(s), steps %d to %d",
            config.name,
            len(dataset),
            sum(x.size for x in jax.tree.leaves(state.params)),
            jax.device_count(),
            jax.process_count(),
            start,
            settings.steps,
        )

        # The step, on all devices.
        devices = replication(settings.parallel)
        step_fn = make_step(
            model,
            optimizer,
            AXIS,
            seed=settings.seed,
            accumulate=settings.accumulate,
            remat=settings.remat,
            ema_decay=settings.ema,
        )
        programs = Programs(devices.replicate_step(step_fn), watch)
        state = devices.replicate(state)

        batches = train_batches(
            dataset,
            config.data,
            batch_size=settings.batch_size,
            seed=settings.seed,
            start_step=start,
            shard=jax.process_index(),
            num_shards=jax.process_count(),
        )
        log = RunLog(config, run / "metrics.jsonl", start)
        loss = FiniteLoss(run, devices, checkpoints)
        trace = StepTrace(run / "profile" if profile and is_first() else None, start, settings.steps)

        def save(state: TrainState, *, wait: bool) -> None:
            loss.check()
            log.upload()
            with watch.during("saving"):
                checkpoints.save(model, devices.unreplicate(state), wait=wait)

        def to_evaluate(done: int) -> bool:
            due = done == settings.steps or (done < settings.steps and done % settings.eval_every == 0)
            # On resume only if the evaluation of this step was given up.
            return due and done > 0 and (done > start or not log.has_evaluation(done))

        stop_if_told = signals.enter_context(preemption())
        done, failures, stopped = start, FailedEvaluations(), best.exhausted(start, log.evaluated)
        try:
            while not stopped:
                if start < done < settings.steps:
                    stop_if_told()
                if evaluate is not None and validation is not None and to_evaluate(done):
                    save(state, wait=True)
                    with log.paused():
                        with failures.caught(done), watch.during("evaluation"):
                            merge_into(model, devices.unreplicate(state))
                            scores = evaluate(model, validation, stop_if_told)
                            best.offer(done, scores, model)  # killed between these two, the evaluation is rerun
                            log.write_evaluation(done, scores)
                        log.draw_curves()
                    stopped = best.exhausted(done, log.evaluated)
                if stopped or done >= settings.steps:
                    break

                with trace.begin(done):
                    waiting = time.perf_counter()
                    batch = next(batches)
                    log.waited(time.perf_counter() - waiting)
                    image_ids = batch.pop("image_ids")
                    state, metrics = programs(state, devices.split(batch))
                done += 1
                loss.started(done, metrics, batch, image_ids)
                checkpoints.check()
                if trace.end(done - 1, loss.check):
                    log.say(f"wrote a trace of steps {trace.first + 1} to {done} to {run}/profile")

                last = done == settings.steps
                if done % settings.log_every == 0 or done == start + 1 or last:
                    loss.check()
                    values = {name: float(value) for name, value in devices.unreplicate(metrics).items()}
                    log.log_step(done, {**values, "recompilations": watch.recompilations})
                if done % settings.checkpoint_every == 0 or last:
                    save(state, wait=last)
            if done > start:
                log.draw_curves()
                log.say(f"{log.summary(done)}; {watch.summary()}")
        except Preempted as told:
            save(state, wait=True)
            raise type(told)(f"{told}: step {done} is saved in {run}; --resume goes on from there") from None
        finally:
            trace.close()
            batches.close()
            log.close(batches.skipped)
        merge_into(model, devices.unreplicate(state))
        if failures:
            raise QueryDetError(
                f"{run}: trained and saved, but {failures}; mend that, then evaluate with: "
                f"{evaluate_with or 'querydet eval'} {run}"
            )
        if stopped and done < settings.steps:
            ended = "stopped after" if done > start else "does not go on after"
            log.say(
                f"{run}: {ended} step {done} of {settings.steps}, which is saved: {stopped}; raise it (0: no limit) "
                "and add --resume to go on"
            )
        elif done == start:
            log.say(f"{run}: step {start} is saved and train.steps is {settings.steps}: nothing to train")
        if done > start and evaluate_with:
            log.say(f"trained; evaluate with: {evaluate_with} {run}{best.advice()}")
        return model


def _settle_steps(config: Config, dataset: Dataset, run: Path, resume: bool) -> Config:
    """Return the configuration with ``train.steps`` for its ``train.epochs``.

    A run that is resumed with the epochs that it had keeps its steps, and so its schedule.
    """
    train, so_far = config.train, from_first(lambda: _train_config_of(run)) if resume else None
    if so_far is not None and so_far.epochs == train.epochs:
        return dataclasses.replace(config, train=dataclasses.replace(train, steps=so_far.steps))
    images = from_first(lambda: images_per_epoch(dataset, config.data))
    steps = steps_of_epochs(train.epochs, images, train.batch_size)
    if is_first():
        _log.info("%d epochs of %d images: %d steps", train.epochs, images, steps)
        late = [step for step in train.decay_steps if step >= steps]
        if train.schedule == "steps" and late:
            _log.warning(
                "train.decay_steps %s: not before the last step, so the learning rate does not fall there", late
            )
    return dataclasses.replace(config, train=dataclasses.replace(train, steps=steps))


def _train_config_of(run: Path) -> TrainConfig | None:
    """Return the training settings of a run so far, None if they cannot be read."""
    try:
        return load_config(run).train
    except ConfigError:
        return None


def _open_validation(config: Config, named_by: str) -> Dataset:
    """Open the validation set, and check what an evaluation would find only when it comes to it.

    Raises:
      DataError: it holds no image; one fits no canvas, is missing or has a damaged header.
    """
    dataset = open_split(config, "val", named_by)
    chosen = list(range(len(dataset)))[: config.train.eval_images or None]
    if not chosen:
        raise DataError(f"{dataset.origin}: no validation image; add some, or set train.eval_every 0")
    eval_plan(dataset, config.data, 1, chosen)
    with ThreadPoolExecutor(8) as pool:  # mostly waiting, above all on network disks
        list(pool.map(dataset.check_image, chosen))
    return dataset


def _say_what_differs(run: Path, config: Config) -> None:
    """Say in a line in what a resumed run's configuration differs from that of the run so far."""
    try:
        changed = differences(load_config(run), config)
    except ConfigError as error:
        _log.warning("%s: goes on; whether settings differ is not known (%s)", run, error)
        return
    if changed:
        _log.warning("%s: goes on with other settings than before: %s", run, ", ".join(changed))


def _classes_of(run: Path) -> tuple[str, ...]:
    """Return the class names that a run was trained with so far."""
    return load_config(run).classes if (run / "config.json").is_file() else ()
