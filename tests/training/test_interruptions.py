"""Runs that are killed, told to stop, or go wrong: nothing is lost, and what goes on equals an uninterrupted run."""

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
from little_room import disk, no_file_longer_than
from small_training import SCENES

from querydet_jax.config import Config, load_config, override, save_config
from querydet_jax.models import build_model
from querydet_jax.runtime.errors import Preempted, QueryDetError
from querydet_jax.training import train
from querydet_jax.training.checkpoint import restore_model_state
from querydet_jax.weights import load_weights, state_dict

ROOT = Path(__file__).parents[2]
SMALL = {
    **SCENES,
    "model.min_level": 3,
    "model.max_level": 5,
    "model.loss.level_weighting": "linear",
    "train.steps": 6,
    "train.checkpoint_every": 1,
    "train.ema": 0.5,
    "train.schedule": "steps",  # so that runs of other lengths have the same program
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
    """The last checkpoint bit for bit: averaged parameters, statistics, and by their effect all that resuming reads."""
    found, expected = restore_model_state(run), restore_model_state(whole)
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert last_line(run)["loss"] == last_line(whole)["loss"]


def steps(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def last_line(run: Path) -> dict[str, float]:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def test_a_checkpoint_is_a_weight_source(config, whole):
    """By run folder and by step."""
    for source in (whole, whole / "checkpoints" / "6"):
        model = build_model(config.model)
        assert not load_weights(model, source).missing
        for name, value in restore_model_state(whole).items():
            np.testing.assert_array_equal(state_dict(model)[name], value, err_msg=name)


def test_killed_at_any_moment(config, whole, tmp_path):
    """SIGKILL while steps are computed and checkpoints written, one a step. Its loader process, which has the same
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
    assert saved and max(saved) < 6  # it was in the middle, and has something to go on from
    train(config, run, resume=True)
    assert_equal_runs(run, whole)


@pytest.mark.parametrize("in_evaluation", [False, True], ids=["in a step", "in an evaluation"])
def test_sigterm_saves_the_step_under_way(config, whole, tmp_path, in_evaluation):
    """Between checkpoints. An evaluation under way is given up and made up for; what the process did on SIGTERM before
    is put back."""
    run, seldom = tmp_path / "run", override(config, {"train.checkpoint_every": 100, "train.eval_every": 2})

    def told_to_stop(model, dataset, between) -> dict[str, float]:
        signal.raise_signal(signal.SIGTERM)
        if in_evaluation:
            between()
        return {"AP": 1.0}

    def evaluated(model, dataset, between) -> dict[str, float]:
        between()
        return {"AP": 2.0}

    before, step = signal.getsignal(signal.SIGTERM), 2 if in_evaluation else 3
    with pytest.raises(Preempted, match=f"stopped by SIGTERM: step {step} is saved in .*; --resume goes on from there"):
        train(seldom, run, evaluate=told_to_stop)
    assert signal.getsignal(signal.SIGTERM) is before and steps(run) == [str(step)]
    train(seldom, run, resume=True, evaluate=evaluated)
    assert_equal_runs(run, whole)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line["AP"] for line in lines if "AP" in line}
    assert found == {2: 2.0 if in_evaluation else 1.0, 4: 2.0}


def test_a_deleted_newest_checkpoint_costs_its_steps_only(config, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "6")
    train(config, run, resume=True)
    assert_equal_runs(run, whole)
    lines = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 4, 5, 6, 6]


def test_a_half_written_newest_checkpoint_names_the_remedy(config, whole, tmp_path):
    """What a full disk or a crash of the machine can leave, and a kill cannot: orbax renames a finished folder."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for file in (run / "checkpoints" / "6").rglob("*"):
        if file.is_file() and "ocdbt" in file.name:
            file.write_bytes(b"")
    with pytest.raises(QueryDetError, match=r"checkpoints/6: .* cannot be read .* delete this step's folder"):
        train(config, run, resume=True)
    shutil.rmtree(run / "checkpoints" / "6")
    train(config, run, resume=True)
    assert_equal_runs(run, whole)


def test_a_loss_that_is_not_finite_leaves_its_batch(config, tmp_path):
    """Found at its own step, though only every hundredth is logged, and before anything is saved."""
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


def test_no_room_for_a_checkpoint(config, whole, tmp_path, caplog):
    """A real one, with room for two checkpoints and a half."""
    run = tmp_path / "run"
    size = sum(path.stat().st_size for path in (whole / "checkpoints" / "6").rglob("*"))
    with disk(run, int(2.5 * size)):
        with pytest.raises(QueryDetError) as error:
            train(config, run)
        assert steps(run) == ["1", "2"]
        start, megabytes, end = re.split(r"(\d+) MB", str(error.value))
        assert start == (
            f"{run}/checkpoints: checkpoint 3 could not be written (No space left on device), the last good one is 2: "
            "free space there (a checkpoint takes "
        )
        assert int(megabytes) * 1e6 == pytest.approx(size, rel=0.2)
        assert end == "; train.keep_checkpoints says how many are kept), then add --resume to go on from it"
        assert not [record for record in caplog.records if record.exc_info]
        assert not list(run.glob(".*"))
        assert set(restore_model_state(run)) == set(restore_model_state(whole))


def test_a_checkpoint_that_cannot_be_written_ends_the_run_soon(config, whole, tmp_path):
    """In the background, long before the next one is due. The one before is still there, though one only is kept, and
    the run goes on from it when there is room again."""
    run, limit = tmp_path / "run", contextlib.ExitStack()
    changed = override(
        config, {"train.steps": 1000, "train.checkpoint_every": 4, "train.keep_checkpoints": 1, "train.eval_every": 2}
    )

    def fill(model, dataset, between) -> dict[str, float]:
        if (run / "checkpoints" / "4").is_dir():
            limit.enter_context(no_file_longer_than(1 << 14))
        return {}

    with limit, pytest.raises(QueryDetError, match=r"checkpoint 8 could not .* \(File too large\), the last .* is 4: "):
        train(changed, run, evaluate=fill)
    assert steps(run) == ["4"]
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] < 12
    (run / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir()  # as a run leaves it that is killed
    train(config, run, resume=True)
    assert_equal_runs(run, whole)
    assert not [name for name in steps(run) if not name.isdigit()]


def test_a_loader_process_that_dies(config, whole, tmp_path):
    """SIGTERM, which a cluster may send to all processes, is for the first one; one that the system kills is missed
    within seconds."""
    run, signals, killed = tmp_path / "run", [signal.SIGTERM, signal.SIGKILL], 0.0
    changed = override(
        config, {"train.steps": 1000, "data.processes": 1, "train.eval_every": 2, "train.keep_checkpoints": 99}
    )

    def kill(model, dataset, between) -> dict[str, float]:
        nonlocal killed
        if signals:
            (child,) = [child for child in multiprocessing.active_children() if "grain" in child.name]
            os.kill(child.pid or 0, signals.pop(0))
            killed = time.monotonic()
        return {}

    with pytest.raises(QueryDetError, match="a loader process ended with SIGKILL .*: lower data.processes .* --resume"):
        train(changed, run, evaluate=kill)
    assert not signals and time.monotonic() - killed < 30
    for path in (run / "checkpoints").iterdir():
        if int(path.name) > 4:  # what was read ahead was still trained on
            shutil.rmtree(path)
    train(config, run, resume=True)
    assert_equal_runs(run, whole)
