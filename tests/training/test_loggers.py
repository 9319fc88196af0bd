"""Loggers: started when asked for, the same run again on resume, dropped when they fail."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from querydet_jax.config import Config, override
from querydet_jax.runtime.errors import ConfigError, QueryDetError
from querydet_jax.training.loggers import Loggers


class FakeWandb:
    """The part of wandb that is used, with a record of what it was told."""

    def __init__(self):
        self.begun, self.told, self.wrong = [], [], Exception("")

    def init(self, **arguments):
        if str(self.wrong):
            raise self.wrong
        self.begun.append(arguments)
        return self

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, values):
        self.told.append(values)

    def finish(self):
        self.told.append("finished")


class FakeMlflow:
    def __init__(self):
        self.begun, self.parameters, self.told = [], {}, []

    def start_run(self, run_id, run_name):
        self.begun.append((run_id, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id or "7f"))

    def log_params(self, values):
        assert len(values) <= 100 and not set(values) & set(self.parameters)
        self.parameters |= values

    def log_metrics(self, values, step):
        self.told.append((step, values))

    def end_run(self):
        self.told.append("ended")


def asking_for(*names: str) -> Config:
    return override(Config(name="mine"), {"train.loggers": names})


def test_wandb_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake, run = FakeWandb(), tmp_path / "first"
    run.mkdir()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    for go_on in (False, True, False):
        loggers = Loggers(asking_for("wandb", "wandb"), run, go_on=go_on)
        loggers.add(5, {"loss": 2.0, "lr": 0.1})
        loggers.close()
        assert (run / "wandb.id").read_text().strip() == fake.begun[-1]["id"]
    first, second, third = fake.begun
    assert first["id"] == second["id"] != third["id"]
    assert (first["name"], first["project"], first["resume"]) == ("first", "querydet", "allow")
    assert first["config"]["train"]["loggers"] == ("wandb", "wandb") and first["config"]["name"] == "mine"
    assert fake.told == [{"step": 5, "loss": 2.0, "lr": 0.1}, "finished"] * 3


def test_mlflow_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parameters cannot change, so only the first part of a run gives them."""
    fake = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    for go_on in (False, True):
        loggers = Loggers(asking_for("mlflow"), tmp_path, go_on=go_on)
        loggers.add(5, {"loss": 2.0, "csq/APl": float("nan")})
        loggers.close()
    assert fake.begun == [(None, tmp_path.name), ("7f", None)]
    assert fake.parameters["model.backbone.name"] == "resnet50" and fake.parameters["train.loggers"] == "('mlflow',)"
    assert fake.told == [(5, {"loss": 2.0}), "ended"] * 2


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for module in ("tensorboardX.event_file_writer", "wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(ConfigError, match=rf"train.loggers {name}: .*; pip install -r requirements-{name}.txt$"):
        Loggers(asking_for("auto", name), tmp_path, go_on=False)
    assert (Path(__file__).parents[2] / f"requirements-{name}.txt").is_file()
    for loggers in (Loggers(asking_for("auto"), tmp_path, go_on=False), Loggers(asking_for(), tmp_path, go_on=False)):
        loggers.add(1, {"loss": 1.0})
        loggers.close()
    assert not list(tmp_path.iterdir())


def test_a_logger_that_fails_costs_its_own_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wandb, mlflow = FakeWandb(), FakeMlflow()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    loggers = Loggers(asking_for("wandb", "mlflow"), tmp_path, go_on=False)
    monkeypatch.setattr(wandb, "log", lambda values: 1 / 0)
    for step in (1, 2):
        loggers.add(step, {"loss": 1.0})
    loggers.close()
    assert mlflow.told == [(1, {"loss": 1.0}), (2, {"loss": 1.0}), "ended"] and not wandb.told
    assert caplog.text.count("train.loggers wandb: fails (division by zero) and gets no more metrics") == 1
    wandb.wrong = RuntimeError("no API key\nand more")
    with pytest.raises(
        QueryDetError, match=r"train.loggers wandb: cannot be started \(no API key\); see to that"
    ) as bad:
        Loggers(asking_for("wandb"), tmp_path, go_on=False)
    assert "\n" not in str(bad.value)
