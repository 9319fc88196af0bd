"""The best weights of a run, by a metric of its evaluations, and when to stop waiting for better ones.

``RUN/best.safetensors`` holds the weights that the evaluation used and, in its metadata, what is known of them.
``RUN/best.json`` repeats that for people and scripts. It is deleted before the weights are replaced and written after,
so that the two never disagree, whenever a run is killed; ``--resume`` writes a missing one.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from querydet_jax.config import TrainConfig
from querydet_jax.models.base import DenseDetector
from querydet_jax.runtime.errors import ConfigError, DataError
from querydet_jax.runtime.files import reason, write_json, writing, written_aside
from querydet_jax.runtime.hosts import from_first
from querydet_jax.runtime.stores import local_copy
from querydet_jax.weights import state_dict
from querydet_jax.weights.writers import AUTHOR

_log = logging.getLogger("querydet_jax")

_KEY = "best"  # of the metadata


@dataclass(frozen=True)
class Kept:
    """The evaluation whose weights are kept: its step, and the metric's value."""

    step: int
    value: float


class Best:
    """Keeps the weights with the largest ``train.best_metric``; does nothing without one.

    Every host calls the same methods; the first one compares and writes.

    Attributes:
      path: the weights.
      kept: what is known of them; None while there are none.
    """

    def __init__(self, run: Path, config: TrainConfig, *, resume: bool):
        self.path, self._about = run / "best.safetensors", run / "best.json"
        self.metric, self.patience = config.best_metric, config.patience
        self.kept = from_first(self._restored) if resume and self.metric else None

    def check(self, names: Collection[str]) -> None:
        """Raise ConfigError unless the metric is among the ``names`` that evaluations will give."""
        if self.metric and self.metric not in names:
            near = difflib.get_close_matches(self.metric, names, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(f"train.best_metric {self.metric}: {hint}Evaluations give {', '.join(names)}")

    def offer(self, step: int, scores: Mapping[str, float], model: DenseDetector) -> None:
        """Keep the weights of ``model``, which an evaluation gave ``scores``, if they are better than those kept.

        A score that is not a number is not better.

        Raises:
          DataError: the scores lack the metric.
          QueryDetError: the files cannot be written.
        """
        if self.metric:
            self.kept = from_first(lambda: self._better(step, scores, model))

    def exhausted(self, step: int, evaluated: Collection[int]) -> str:
        """Return why the training stops after ``step``, in words; nothing if it goes on.

        Args:
          evaluated: the steps of the run's evaluations, which the first host knows.
        """

        def why() -> str:
            best = self.kept.step if self.kept is not None else 0
            passed = sum(best < other <= step for other in set(evaluated))
            if passed < self.patience:
                return ""
            found = "been a number" if self.kept is None else f"exceeded {self.kept.value:.2f} (step {best})"
            number = f"{passed} evaluation{'s' * (passed != 1)}"
            return f"{self.metric} has not {found} in {number}, train.patience {self.patience}"

        return from_first(why) if self.patience else ""

    def advice(self) -> str:
        """Return how the command that evaluates a run goes on for the weights kept, if there are any."""
        if self.kept is None:
            return ""
        return f" --weights {self.path} ({self.metric} {self.kept.value:.2f} at step {self.kept.step}, the best)"

    def _better(self, step: int, scores: Mapping[str, float], model: DenseDetector) -> Kept | None:
        if self.metric not in scores:
            raise DataError(f"train.best_metric {self.metric}: the evaluation gave {', '.join(scores)}")
        value = scores[self.metric]
        if math.isnan(value):
            _log.warning("step %d: %s is undefined, so these weights cannot be the best", step, self.metric)
        if math.isnan(value) or (self.kept is not None and value <= self.kept.value):
            return self.kept
        finite = {name: x if math.isfinite(x) else None for name, x in scores.items()}
        self._write({"step": step, "metric": self.metric, "value": value, "scores": finite}, state_dict(model))
        return Kept(step, value)

    def _write(self, about: dict[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
        metadata = {"format": "pt", "author": AUTHOR, _KEY: json.dumps(about)}
        data = save({name: np.asarray(x, np.float32, order="C") for name, x in tensors.items()}, metadata=metadata)
        with writing(self.path), written_aside(self.path) as aside:
            aside.write_bytes(data)
            self._about.unlink(missing_ok=True)
        write_json(self._about, about, indent=2)

    def _restored(self) -> Kept | None:
        """Return what is known of the run's best weights so far, by the metric as it is now."""
        if not self.path.is_file():
            return None
        try:
            with local_copy(self.path) as here, safe_open(here, framework="np") as file:
                about = json.loads(file.metadata()[_KEY])
            step, value = int(about["step"]), about["scores"].get(self.metric)
        except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
            _log.warning("%s: cannot be read (%s); the next evaluation's weights replace it", self.path, reason(error))
            return None
        write_json(self._about, about, indent=2)
        if not isinstance(value, int | float):
            _log.warning("%s: of step %d, has no %s; the next that has replaces it", self.path, step, self.metric)
            return None
        return Kept(step, float(value))
