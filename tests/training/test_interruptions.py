"""Runs that are killed, told to stop, or go wrong: nothing is lost, and what goes on equals an uninterrupted run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from small_training import SCENES

from querydet_jax.config import Config, load_config, override, save_config
from querydet_jax.errors import Preempted, QueryDetError
from querydet_jax.models import build_model
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
    """SIGKILL while steps are computed and checkpoints written, one a step."""
    run = tmp_path / "run"
    save_config(config, tmp_path / "config.json")
    environment = {
        **os.environ,
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, str(ROOT / "train.py"), str(tmp_path / "config.json"), "--run", str(run)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 240
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= 3):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.002)
    process.kill()
    process.communicate()
    steps = sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
    assert steps and steps[-1] < 6  # it was in the middle, and has something to go on from
    train(config, run, resume=True)
    assert_equal_runs(run, whole)


def test_sigterm_saves_the_step_under_way(config, whole, tmp_path):
    """Between checkpoints; what the process did on SIGTERM before is put back."""
    seldom = override(config, {"train.checkpoint_every": 100, "train.eval_every": 2})

    def told_to_stop(model, dataset) -> dict[str, float]:
        signal.raise_signal(signal.SIGTERM)
        return {}

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="stopped by SIGTERM: step 3 is saved in .*; --resume goes on from there"):
        train(seldom, tmp_path / "run", evaluate=told_to_stop)
    assert signal.getsignal(signal.SIGTERM) is before
    train(config, tmp_path / "run", resume=True)
    assert_equal_runs(tmp_path / "run", whole)


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
    assert not [path for path in (run / "checkpoints").iterdir() if path.name.isdigit()]
