"""Runs that are killed, told to stop or fail: little is lost, and a resumed run equals an uninterrupted one."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import quick
from full_disk import no_file_longer_than
from PIL import Image
from small_training import SCENES

from querydet_jax.config import Config, load_config, override, save_config
from querydet_jax.runtime.errors import ConfigError, DataError, Interrupted, Preempted, QueryDetError, WeightsError
from querydet_jax.runtime.run_lock import run_lock
from querydet_jax.training import train
from querydet_jax.training.guards import preemption
from querydet_jax.training.loop import Evaluate
from querydet_jax.weights import read_tensors

ROOT = Path(__file__).parents[2]
SMALL = {
    **SCENES,
    "model.min_level": 3,
    "model.max_level": 5,
    "model.loss.level_weighting": "linear",
    "train.steps": 6,
    "train.checkpoint_every": 1,
    "train.ema": 0.5,
    "train.schedule": "steps",  # so that runs of any length have the same program
}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    root = tmp_path_factory.mktemp("scenes")
    return override(load_config(ROOT / "configs" / "demo.py"), {**SMALL, "data.root": str(root)})


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    train(config, run)
    return run


def assert_equal_runs(run: Path, whole: Path) -> None:
    """Compare the last checkpoint bit for bit: averaged parameters, statistics, and by their effect the optimiser."""
    found, expected = read_tensors(run), read_tensors(whole)
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert last_line(run)["loss"] == last_line(whole)["loss"]


def steps(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def logged(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def last_line(run: Path) -> dict[str, float]:
    return logged(run)[-1]


def test_what_cannot_be_resumed_is_one_line(config, whole, tmp_path):
    with pytest.raises(ConfigError, match="already holds checkpoints; add --resume"):
        train(config, whole)
    with pytest.raises(WeightsError, match="was trained with a moving average .* resume with its train.ema"):
        train(override(config, {"train.ema": 0.0}), whole, resume=True)
    with pytest.raises(WeightsError, match="optimiser state of another configuration"):
        train(override(config, {"train.optimizer": "sgd"}), whole, resume=True)
    with pytest.raises(WeightsError, match=r"checkpoints/6: .* has shape .*set model\.head\.channels"):
        train(override(config, {"model.head.channels": 8}), whole, resume=True)
    with pytest.raises(QueryDetError, match="has 3 categories .* model.num_classes is 5: to train, set it to 3"):
        train(override(config, {"model.num_classes": 5}), tmp_path / "classes")
    with run_lock(tmp_path / "locked"), pytest.raises(ConfigError, match="locked: in use by another training"):
        train(config, tmp_path / "locked")
    assert steps(whole) == ["4", "5", "6"]


def test_without_a_checkpoint_resume_starts(config, whole, tmp_path, caplog):
    run = tmp_path / "run"
    (run / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir(parents=True)  # killed while it wrote the first one
    shutil.copy(whole / "config.json", run)
    train(config, run, resume=True)
    assert f"{run}: holds no checkpoint to resume from: the run starts at step 0" in caplog.text
    assert "goes on with other settings" not in caplog.text
    assert_equal_runs(run, whole)


def test_a_run_that_is_complete_is_not_called_trained(config, whole, tmp_path, capsys):
    run = shutil.copytree(whole, tmp_path / "run")
    # As an older version has saved it.
    saved = json.loads((run / "config.json").read_text())
    for name in ("epochs", "best_metric", "patience", "loggers"):
        del saved["train"][name]
    (run / "config.json").write_text(json.dumps(saved))
    assert load_config(run) == load_config(whole)
    # The weights that it was begun with are not needed any more.
    train(override(config, {"train.steps": 5, "train.init": str(tmp_path / "gone.pth")}), run, resume=True)
    assert capsys.readouterr().out.splitlines()[-1] == f"{run}: step 6 is saved and train.steps is 5: nothing to train"
    assert steps(run) == ["4", "5", "6"]
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.test_canvases": ((64, 64),)}, "96x96, which fits no test canvas; add one to data.test_canvases"),
        ({"data.test_short": 120, "data.test_max": 200}, "is resized to 120x120, which fits no test canvas"),
        ({}, "cannot be built"),
    ],
)
def test_what_an_evaluation_needs_is_checked_before_the_first_step(config, tmp_path, changes, message):
    def prepare(model, dataset) -> list[str]:
        raise ConfigError("cannot be built")

    seldom = override(config, {"train.eval_every": 3, **changes})
    with pytest.raises(QueryDetError, match=message):
        train(seldom, tmp_path, evaluate=lambda model, dataset, stop_if_told: {}, prepare=prepare)
    assert not steps(tmp_path) and not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: path.unlink(), "no such image file"),
        (lambda path: path.write_bytes(b"RIFF"), "not readable as an image"),
        (lambda path: Image.new("RGB", (50, 96)).save(path), "is 50x96 .* but the annotations say 96x96"),
    ],
)
def test_images_of_an_evaluation_are_looked_at_before_the_first_step(config, tmp_path, harm, message):
    """As far as headers tell; only those that an evaluation takes."""
    names = [f"{i}.png" for i in range(4)]
    truth = {
        "images": [{"id": i, "file_name": name, "width": 96, "height": 96} for i, name in enumerate(names)],
        "annotations": [{"id": 1, "image_id": 0, "category_id": 1, "bbox": [1, 1, 50, 50]}],
        "categories": [{"id": i, "name": name} for i, name in enumerate("abc")],
    }
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    for name in names:
        Image.new("RGB", (96, 96)).save(tmp_path / name)
    harm(tmp_path / names[2])
    folder = {
        "train_images": ".",
        "val_images": ".",
        "train_annotations": "truth.json",
        "val_annotations": "truth.json",
    }
    coco = {
        "data.source": "coco",
        "data.root": str(tmp_path),
        **{f"data.{key}": value for key, value in folder.items()},
    }

    def prepare(model, dataset) -> list[str]:
        raise ConfigError("only the first two")

    for images, expected in ((0, rf"2.png: .*{message}"), (2, "only the first two")):
        few = override(config, {**coco, "train.eval_every": 3, "train.eval_images": images})
        with pytest.raises(QueryDetError, match=expected):
            train(few, tmp_path / "run", evaluate=lambda model, dataset, stop_if_told: {}, prepare=prepare)


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, Preempted), (signal.SIGINT, Interrupted)])
def test_signals_stop_a_run_between_steps(number, error, capfd):
    """Ctrl-C as SIGTERM; the second one goes to the handler before, here Python's."""
    former = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    with preemption() as stop_if_told:
        stop_if_told()
        signal.raise_signal(number)
        with pytest.raises(error) as stopped:
            stop_if_told()
        assert type(stopped.value) is error
        if number == signal.SIGINT:
            assert "stopping after this step, which is saved; press it again to stop at once" in capfd.readouterr().err
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
    assert former == {n: signal.getsignal(n) for n in former}


def test_ctrl_c_that_is_ignored_stays_ignored():
    """As in a job that a shell runs in the background."""
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with preemption() as stop_if_told:
            signal.raise_signal(signal.SIGINT)
            stop_if_told()
    finally:
        signal.signal(signal.SIGINT, former)


def test_killed_at_any_moment(config, whole, tmp_path):
    """SIGKILL while steps are computed and checkpoints written, one per step. The loader process, which shares the
    output, ends by itself."""
    run = tmp_path / "run"
    save_config(config, tmp_path / "config.json")
    environment = {
        **os.environ,
        **quick.environment(os.environ["XLA_FLAGS"]),
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, str(ROOT / "train.py"), str(tmp_path / "config.json"), "--run", str(run)]
    command += ["--data.processes", "1"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 240
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= 3):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.002)
    process.kill()
    process.communicate(timeout=60)
    saved = [int(name) for name in steps(run) if name.isdigit()]
    assert saved and max(saved) < 6  # it was in the middle and has saved something
    train(config, run, resume=True)
    assert_equal_runs(run, whole)


def test_sigterm_saves_the_step_under_way(config, whole, tmp_path):
    """Between checkpoints: in the evaluation after step 2, which is given up and rerun on resume, then in step 3. The
    former handler of SIGTERM is put back."""
    run, seldom = tmp_path / "run", override(config, {"train.checkpoint_every": 100, "train.eval_every": 2})

    def evaluation(result: float, stop: bool, in_evaluation: bool = True) -> Evaluate:
        def evaluate(model, dataset, stop_if_told) -> dict[str, float]:
            if stop:
                signal.raise_signal(signal.SIGTERM)
            if in_evaluation:
                stop_if_told()
            return {"AP": result}

        return evaluate

    before = signal.getsignal(signal.SIGTERM)
    message = "stopped by SIGTERM: step {} is saved in .*; --resume goes on from there"
    with pytest.raises(Preempted, match=message.format(2)):
        train(seldom, run, evaluate=evaluation(1.0, stop=True))
    assert signal.getsignal(signal.SIGTERM) is before and steps(run) == ["2"]
    with pytest.raises(Preempted, match=message.format(3)):
        train(seldom, run, resume=True, evaluate=evaluation(2.0, stop=True, in_evaluation=False))
    assert steps(run) == ["2", "3"]
    train(seldom, run, resume=True, evaluate=evaluation(3.0, stop=False))
    assert_equal_runs(run, whole)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["AP"]) for line in lines if "AP" in line] == [(2, 2.0), (4, 3.0), (6, 3.0)]


def test_a_damaged_newest_checkpoint_costs_its_steps_only(config, whole, tmp_path):
    """One line names the folder to delete (the damage itself: ``tests/runtime``)."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "checkpoints" / "6" / "model" / "manifest.ocdbt").write_bytes(b"")
    with pytest.raises(QueryDetError, match=r"checkpoints/6: .* cannot be read .* delete this step's folder"):
        train(config, run, resume=True)
    shutil.rmtree(run / "checkpoints" / "6")
    train(config, run, resume=True)
    assert_equal_runs(run, whole)
    lines = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 4, 5, 6, 6]


def test_evaluations_that_fail_cost_nothing(config, whole, tmp_path, caplog):
    """Errors of ours, of others and of the machine. Each evaluation finds a checkpoint of its step; losses are
    those of a run without evaluations; what failed is said last. Before, damaged lines of the log go aside and settings
    that differ are named."""
    run, found = tmp_path / "run", []
    shutil.copytree(whole, run, ignore=lambda folder, names: {"5", "6"} & set(names))
    errors = [DataError("a.jpg: gone"), DataError("a.jpg: gone"), KeyError("x"), MemoryError(), DataError("last")]
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "AP"\n\x00\n[4]\n{"step": "4"}\n{"step": 3}')

    def evaluate(model, dataset, stop_if_told) -> dict[str, float]:
        found.append(max(steps(run), key=int))
        raise errors[len(found) - 1]

    changes = {"train.steps": 8, "train.checkpoint_every": 100, "train.eval_every": 1, "train.keep_checkpoints": 2}
    with pytest.raises(QueryDetError) as error:
        train(override(config, changes), run, resume=True, evaluate=evaluate, evaluate_with="score")
    assert found == ["4", "5", "6", "7", "8"] and steps(run) == ["7", "8"]
    assert re.match(
        rf"{run}: trained and saved, but evaluation failed at steps 4, 5 \(a.jpg: gone\), at step 6 \(KeyError: 'x'; "
        rf"test_inter.*\), at step 7 \(MemoryErr.*\), at step 8 \(last\); mend that, then evaluate with: score {run}$",
        str(error.value),
    )
    assert "step 4: the evaluation failed (a.jpg: gone); the training goes on" in caplog.text
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 3, 5, 6, 7, 8]
    assert [line["loss"] for line in lines[-4:-2]] == [line["loss"] for line in logged(whole)[-2:]]

    differ = r"run: goes on with other settings than before: train.steps 6 -> 8, .*train.checkpoint_every 1 -> 100"
    assert re.search(differ, caplog.text) and "seed" not in caplog.text
    assert "metrics.jsonl: 4 damaged line(s) moved to metrics.damaged.jsonl" in caplog.text
    assert (run / "metrics.damaged.jsonl").read_bytes() == b'{"step": 4, "AP"\n\0\n[4]\n{"step": "4"}\n'


def test_a_loss_that_is_not_finite_leaves_its_batch(config, tmp_path):
    """The step is found although only every hundredth is logged, and before anything is saved."""
    run = tmp_path / "run"
    wild = {"train.learning_rate": 1e30, "train.clip_norm": 0.0, "train.warmup_steps": 0, "train.log_every": 100}
    with pytest.raises(QueryDetError, match="the loss is .* at step") as error:
        train(override(config, {**wild, "train.steps": 50, "train.checkpoint_every": 100}), run)
    (path,) = run.glob("not_finite_step_*.npz")
    step = int(path.stem.rpartition("_")[2])
    assert f"at step {step} (images [" in str(error.value) and str(path) in str(error.value) and step < 50
    with np.load(path) as batch:
        assert batch["images"].shape == (4, 96, 96, 3) and batch["image_ids"].shape == (4,)
        assert str(batch["image_ids"].tolist()) in str(error.value)
        assert set(batch) == {"images", "sizes", "boxes", "classes", "image_ids"}
    assert not steps(run)


def test_a_checkpoint_that_cannot_be_written_ends_the_run_soon(config, tmp_path):
    """In the background, long before the next one is due; the one before stays, though only one is kept."""
    run, limit = tmp_path / "run", contextlib.ExitStack()
    changed = override(
        config, {"train.steps": 1000, "train.checkpoint_every": 4, "train.keep_checkpoints": 1, "train.eval_every": 2}
    )

    def fill(model, dataset, stop_if_told) -> dict[str, float]:
        if (run / "checkpoints" / "4").is_dir():
            limit.enter_context(no_file_longer_than(1 << 14))
        return {}

    with limit, pytest.raises(QueryDetError, match=r"checkpoint 6 could not .* \(File too large\), the last .* is 4: "):
        train(changed, run, evaluate=fill)
    assert steps(run) == ["4"]
    assert last_line(run)["step"] < 12


def test_a_loader_process_that_dies(config, whole, tmp_path):
    """SIGTERM, which a cluster may send to every process, is left to the first one; a loader process that the system
    kills ends the run within seconds."""
    run, signals, killed = tmp_path / "run", [signal.SIGTERM, signal.SIGKILL], 0.0
    changed = override(
        config, {"train.steps": 1000, "data.processes": 1, "train.eval_every": 2, "train.checkpoint_every": 100}
    )

    def kill(model, dataset, stop_if_told) -> dict[str, float]:
        nonlocal killed
        if signals:
            (child,) = [child for child in multiprocessing.active_children() if "grain" in child.name]
            os.kill(child.pid or 0, signals.pop(0))
            killed = time.monotonic()
        return {}

    with pytest.raises(QueryDetError, match="a loader process ended with SIGKILL .*: lower data.processes .* --resume"):
        train(changed, run, evaluate=kill)
    assert not signals and time.monotonic() - killed < 30
    found, expected = ([line["loss"] for line in logged(path)[:4]] for path in (run, whole))
    assert found == expected and len(found) == 4


def test_a_run_that_gets_no_better_stops_and_keeps_its_best_weights(config, whole, tmp_path, capsys, caplog):
    """Killed between the best weights and the line of its evaluation, the run evaluates again. Resumed, it says why it
    does not go on, and goes on with more patience: to the run that never stopped."""
    run, scores = tmp_path / "run", {1: 5.0, 2: 7.0, 3: 7.0, 4: float("nan"), 5: 6.0, 6: 8.0}
    evaluated: list[int] = []

    def evaluate(model, dataset, stop_if_told) -> dict[str, float]:
        evaluated.append(int(max(steps(run), key=int)))
        return {"AP": scores[evaluated[-1]]}

    changed = override(config, {"train.eval_every": 1, "train.best_metric": "AP", "train.patience": 2})
    train(changed, run, evaluate=evaluate, prepare=lambda model, dataset: ["AP"], evaluate_with="score")
    *_, why, how = capsys.readouterr().out.splitlines()
    assert f"{run}: stopped after step 4 of 6, which is saved: AP has not exceeded 7.00 (step 2) in 2 eval" in why
    assert "train.patience 2; raise it (0: no limit) and add --resume to go on" in why
    assert how.startswith(f"trained; evaluate with: score {run} --weights {run}/best.safetensors (AP 7.00 at step 2,")
    assert "step 4: AP is undefined" in caplog.text and steps(run) == ["2", "3", "4"]
    best, checkpoint = read_tensors(run / "best.safetensors"), run_of(run, "2", tmp_path / "second")
    assert best and all(np.array_equal(value, checkpoint[name]) for name, value in best.items())

    metrics = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(metrics[:-1]) + "\n")  # without the evaluation of step 4
    train(changed, run, evaluate=evaluate, resume=True)
    assert f"{run}: does not go on after step 4 of 6" in capsys.readouterr().out.splitlines()[-1]
    train(changed, run, evaluate=evaluate, resume=True)
    assert f"{run}: does not go on after step 4 of 6" in capsys.readouterr().out.splitlines()[-1]
    train(override(changed, {"train.patience": 4}), run, evaluate=evaluate, resume=True)
    assert evaluated == [1, 2, 3, 4, 4, 5, 6] and json.loads((run / "best.json").read_text())["step"] == 6
    assert_equal_runs(run, whole)


def run_of(run: Path, step: str, copy: Path) -> dict[str, np.ndarray]:
    """Return the model of a step that is not the newest."""
    shutil.copytree(run, copy, ignore=lambda folder, names: [n for n in names if n.isdigit() and n != step])
    return read_tensors(copy)


def test_epochs_become_steps_once(config, tmp_path, caplog):
    """Of the images that are trained on. A resumed run keeps its steps unless it is given other epochs."""
    run = tmp_path / "run"
    longer = {"train.epochs": 2, "train.steps": 1000, "train.decay_steps": (2, 10), "train.batch_size": 2}
    caplog.set_level("INFO", "querydet_jax")
    train(override(config, longer), run)
    (images,) = re.findall(r"2 epochs of (\d+) images: \d+ steps", caplog.text)
    number = load_config(run).train.steps
    left_out = re.search(r"(\d+) of 8 training images are left out", caplog.text)
    assert int(images) == number == 8 - (int(left_out[1]) if left_out else 0)
    assert last_line(run)["step"] == number and "train.decay_steps [10]: not before the last step" in caplog.text
    caplog.clear()
    train(override(config, {**longer, "train.batch_size": 4}), run, resume=True)
    assert load_config(run).train.steps == number and "epochs of" not in caplog.text
    with pytest.raises(ConfigError, match="train.epochs -1: must not be negative"):
        override(config, {"train.epochs": -1})
