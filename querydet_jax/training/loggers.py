"""Where metrics go besides ``metrics.jsonl``: TensorBoard, Weights & Biases, MLflow.

Each package is imported only when it is asked for. To add one: a class with ``add`` and ``close``, an entry in
``_open``, its name in ``TrainConfig.loggers`` and a requirements file.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from querydet_jax.config import Config
from querydet_jax.runtime.errors import ConfigError, QueryDetError
from querydet_jax.runtime.files import reason, writing, written_aside
from querydet_jax.runtime.stores import is_url
from querydet_jax.training.tensorboard import TensorBoardFile

_log = logging.getLogger("querydet_jax")

_PARAMETERS = 100  # MLflow's most per call
_LONGEST = 500  # characters of a parameter, of which every version of MLflow takes as many


class Logger(Protocol):
    """Takes the metrics of a run."""

    def add(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class Loggers:
    """The loggers that ``train.loggers`` names, as one. A logger that fails gets a warning and no more metrics.

    Args:
      run: the run's folder; loggers that keep runs of their own keep their number there, to go on with it.
      go_on: continue these runs instead of beginning others.

    Raises:
      ConfigError: a package is missing.
      QueryDetError: a logger cannot be started.
    """

    def __init__(self, config: Config, run: Path, *, go_on: bool):
        self._open: dict[str, Logger] = {}
        for name in config.train.loggers:
            kind = "tensorboard" if name == "auto" else name
            if kind == "tensorboard" and is_url(run):
                if name != "auto":
                    raise ConfigError(
                        f"train.loggers tensorboard: its files grow, which {run} does not allow; leave it out, or take "
                        "a --run on this machine"
                    )
                continue
            if kind in self._open:
                continue
            try:
                self._open[kind] = _open(kind, config, run, go_on)
            except ImportError as error:
                if name != "auto":
                    raise ConfigError(
                        f"train.loggers {name}: cannot be imported ({reason(error)}); "
                        f"pip install -r requirements-{name}.txt"
                    ) from None
            except QueryDetError:
                raise
            except Exception as error:  # of the package or its server
                raise QueryDetError(
                    f"train.loggers {name}: cannot be started ({reason(error)}); see to that, or leave it out"
                ) from error

    def add(self, step: int, values: dict[str, float]) -> None:
        self._each("add", step, values)

    def close(self) -> None:
        self._each("close")

    def _each(self, method: str, *arguments: Any) -> None:
        for name, logger in list(self._open.items()):
            try:
                getattr(logger, method)(*arguments)
            except Exception as error:  # of the package or its server
                _log.warning("train.loggers %s: fails (%s) and gets no more metrics of this run", name, reason(error))
                del self._open[name]


class WandbRun:
    """A run of Weights & Biases. Its environment variables hold: WANDB_PROJECT, WANDB_MODE=offline and so on."""

    def __init__(self, config: Config, run: Path, go_on: bool):
        import wandb  # pyright: ignore[reportMissingImports]

        number = _number(run / "wandb.id") if go_on else ""
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "querydet"),
            name=run.resolve().name,
            dir=tempfile.mkdtemp(prefix="querydet-") if is_url(run) else str(run),
            id=number or _remember(run / "wandb.id", uuid.uuid4().hex),
            resume="allow",
            config=dataclasses.asdict(config),
        )
        # Its own steps only grow, and a resumed run may repeat some.
        self._run.define_metric("*", step_metric="step")

    def add(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


class MlflowRun:
    """A run of MLflow, at MLFLOW_TRACKING_URI, in MLFLOW_EXPERIMENT_NAME."""

    def __init__(self, config: Config, run: Path, go_on: bool):
        import mlflow  # pyright: ignore[reportMissingImports]

        self._mlflow: Any = mlflow
        number = _number(run / "mlflow.id") if go_on else ""
        begun = mlflow.start_run(run_id=number or None, run_name=None if number else run.resolve().name)
        if not number:
            _remember(run / "mlflow.id", begun.info.run_id)
            fields = list(_flat(dataclasses.asdict(config)))
            for first in range(0, len(fields), _PARAMETERS):
                mlflow.log_params(dict(fields[first : first + _PARAMETERS]))

    def add(self, step: int, values: dict[str, float]) -> None:
        self._mlflow.log_metrics({name: x for name, x in values.items() if math.isfinite(x)}, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


def _open(kind: str, config: Config, run: Path, go_on: bool) -> Logger:
    if kind == "wandb":
        return WandbRun(config, run, go_on)
    if kind == "mlflow":
        return MlflowRun(config, run, go_on)
    return TensorBoardFile(run / "tensorboard")


def _number(path: Path) -> str:
    return path.read_text().strip() if path.is_file() else ""


def _remember(path: Path, number: str) -> str:
    with writing(path), written_aside(path) as aside:
        aside.write_text(number + "\n")
    return number


def _flat(fields: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, str(value)[:_LONGEST]
