"""Best weights: kept when they are better, and the two files never disagree."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from small_detector import model as small_model

from querydet_jax.config import TrainConfig
from querydet_jax.runtime.errors import ConfigError, DataError, QueryDetError
from querydet_jax.training.best import Best, Kept
from querydet_jax.weights import read_tensors, state_dict

NAN = float("nan")


class Killed(BaseException):
    pass


def keeping(run: Path, *, resume: bool = False, metric: str = "AP", patience: int = 0) -> Best:
    return Best(run, TrainConfig(eval_every=1, best_metric=metric, patience=patience), resume=resume)


def about(run: Path) -> dict:
    """Return what the weights' own metadata says."""
    with safe_open(run / "best.safetensors", framework="np") as file:
        return json.loads(file.metadata()["best"])


def test_only_a_larger_number_is_better(tmp_path, caplog):
    best, model = keeping(tmp_path), small_model()
    kept = []
    for step, value in enumerate([NAN, 3.0, 3.0, 2.0, NAN, 4.0], start=1):
        best.offer(step, {"AP": value, "APs": NAN}, model)
        kept.append(best.kept and best.kept.step)
        assert (tmp_path / "best.safetensors").exists() == (step > 1)
    assert kept == [None, 2, 2, 2, 2, 6] and caplog.text.count("AP is undefined") == 2
    expected = {"step": 6, "metric": "AP", "value": 4.0, "scores": {"AP": 4.0, "APs": None}}
    assert about(tmp_path) == json.loads((tmp_path / "best.json").read_text()) == expected
    found = read_tensors(tmp_path / "best.safetensors")
    assert all(np.array_equal(found[name], value) for name, value in state_dict(model).items())


@pytest.mark.parametrize("moment", ["before best.safetensors", "after best.safetensors", "before best.json"])
def test_killed_while_it_writes(tmp_path, monkeypatch, moment):
    """The record is that of the weights, or missing; resuming writes it."""
    model, replace, renamed = small_model(), os.replace, []
    best = keeping(tmp_path)
    best.offer(1, {"AP": 3.0}, model)

    def killed(source, target):
        renamed.append(Path(target).name)
        if moment == f"before {renamed[-1]}":
            raise Killed
        replace(source, target)
        if moment == f"after {renamed[-1]}":
            raise Killed

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(Killed):
        best.offer(2, {"AP": 4.0}, model)
    monkeypatch.undo()
    step = 1 if moment == "before best.safetensors" else 2
    assert about(tmp_path)["step"] == step and not (tmp_path / "best.json").exists()
    assert keeping(tmp_path, resume=True).kept == Kept(step, 2.0 + step)
    assert json.loads((tmp_path / "best.json").read_text()) == about(tmp_path)


def test_what_is_kept_is_compared_on(tmp_path, caplog):
    """By another metric, too, if that evaluation had it; a run begun anew does not look at the weights of another."""
    keeping(tmp_path).offer(7, {"AP": 3.0, "AP50": 8.0, "APs": NAN}, small_model())
    assert keeping(tmp_path, resume=True).kept == Kept(7, 3.0)
    assert keeping(tmp_path, resume=True, metric="AP50").kept == Kept(7, 8.0)
    assert keeping(tmp_path).kept is None and keeping(tmp_path, resume=True, metric="").kept is None
    assert not caplog.text
    assert keeping(tmp_path, resume=True, metric="APs").kept is None
    assert "best.safetensors: of step 7, has no APs" in caplog.text


@pytest.mark.parametrize("harm", [b"", b"not weights", None])
def test_damaged_best_weights_are_replaced(tmp_path, caplog, harm):
    path = tmp_path / "best.safetensors"
    keeping(tmp_path).offer(1, {"AP": 3.0}, small_model())
    path.write_bytes(path.read_bytes()[:-4] if harm is None else harm)
    best = keeping(tmp_path, resume=True)
    assert best.kept is None and "best.safetensors: cannot be read" in caplog.text
    best.offer(2, {"AP": 1.0}, small_model())
    assert about(tmp_path)["step"] == json.loads((tmp_path / "best.json").read_text())["step"] == 2


def test_patience_counts_evaluations_since_the_best(tmp_path):
    best = keeping(tmp_path, patience=2)
    assert best.exhausted(10, {10}) == ""
    assert best.exhausted(20, {10, 20}) == "AP has not been a number in 2 evaluations, train.patience 2"
    best.kept = Kept(20, 5.0)
    # Those of steps to come are of a run that lost its last checkpoints.
    assert best.exhausted(30, {10, 20, 30, 40, 50}) == ""
    assert best.exhausted(40, [10, 20, 30, 30, 40]).startswith("AP has not exceeded 5.00 (step 20) in 2 evaluations")
    assert keeping(tmp_path).exhausted(40, {10, 20, 30, 40}) == ""


def test_metrics_that_do_not_exist(tmp_path):
    best = keeping(tmp_path, metric="csq/APx")
    with pytest.raises(
        ConfigError, match=r"train.best_metric csq/APx: did you mean csq/AP\? Evaluations give dense/AP, "
    ):
        best.check(["dense/AP", "csq/AP"])
    with pytest.raises(DataError, match="train.best_metric csq/APx: the evaluation gave dense/AP"):
        best.offer(1, {"dense/AP": 1.0}, small_model())
    (tmp_path / "file").write_text("")
    with pytest.raises(QueryDetError, match="best.safetensors: cannot be written"):
        keeping(tmp_path / "file").offer(1, {"AP": 1.0}, small_model())
