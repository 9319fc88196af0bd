"""`querydet train`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from querydet_jax.cli.arguments import parse, results_folder
from querydet_jax.cli.main import SUMMARIES
from querydet_jax.cli.process import interrupts_end_the_process
from querydet_jax.config import Config
from querydet_jax.config.zoo import is_packaged
from querydet_jax.data import Dataset
from querydet_jax.evaluation.coco import ImageDetections
from querydet_jax.evaluation.runner import comparison_table, detectors_to_compare, evaluate_detectors, first_images
from querydet_jax.evaluation.scoring import score
from querydet_jax.inference.detector import Detector
from querydet_jax.models import DenseDetector
from querydet_jax.runtime import machine
from querydet_jax.runtime.errors import ConfigError
from querydet_jax.runtime.hosts import Hosts, is_first, join
from querydet_jax.runtime.stores import as_path
from querydet_jax.training import train as run_training


@dataclass(frozen=True)
class TrainArguments:
    run: str = ""
    """Folder of the run: configuration, metrics, checkpoints (default: runs/NAME, or the run folder given)."""
    resume: bool = False
    """Continue from the run's newest checkpoint; without one, start. So a job can be started again as it is."""
    profile: bool = False
    """Also write a trace of a few steps to RUN/profile, for TensorBoard's profiler and ui.perfetto.dev."""
    hosts: Hosts = field(default_factory=Hosts)


def train(words: Sequence[str], program: str) -> None:
    """Train a detector."""
    arguments, config, source = parse(TrainArguments, SUMMARIES["train"], words, program)
    if is_packaged(source):
        raise ConfigError(f"{source.name}: weights, not a card; start from them: train CARD --train.init {source.name}")
    config = length_as_given(config, words)
    join(arguments.hosts, preemptible=True)
    machine.prepare()
    run = as_path(arguments.run or results_folder(source, config))

    detectors: dict[str, Detector] = {}

    def prepare(model: DenseDetector, dataset: Dataset) -> list[str]:
        detectors.update(detectors_to_compare(model, config))
        if not config.train.best_metric:  # scoring loads the whole ground truth
            return []
        return [f"{name}/{key}" for name, detector in detectors.items() for key in metrics_of(dataset, detector)]

    def evaluate(model: DenseDetector, dataset: Dataset, between: Callable[[], None]) -> dict[str, float]:
        for detector in detectors.values():
            detector.update(model)
        runs = evaluate_detectors(
            detectors, dataset, config.data, batch_size=config.inference.batch_size,
            indices=first_images(dataset, config.train.eval_images), size_bins=(), between=between,
        )  # fmt: skip
        if is_first():
            print(comparison_table(runs), flush=True)
        return {
            f"{name}/{key}": value
            for name, result in runs.items()
            for key, value in {**result.scores.named(), "ms_per_image": result.ms_median}.items()
        }

    with interrupts_end_the_process():
        run_training(
            config,
            run,
            resume=arguments.resume,
            evaluate=evaluate,
            prepare=prepare,
            profile=arguments.profile,
            evaluate_with="python eval.py" if program == "train.py" else "querydet eval",
        )


def length_as_given(config: Config, words: Sequence[str]) -> Config:
    """Return the configuration without ``train.epochs`` where the command line gives ``train.steps``.

    Raises:
      ConfigError: it gives both.
    """
    given = {word.split("=")[0].replace("_", "-") for word in words}
    if "--train.steps" not in given or not config.train.epochs:
        return config
    if "--train.epochs" in given:
        raise ConfigError("--train.steps, --train.epochs: both say how long to train; give one of them")
    return dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=0))


def metrics_of(dataset: Dataset, detector: Detector) -> list[str]:
    """Return the names of the metrics of a detector's evaluation, as one of an image without detections gives them."""
    nothing = ImageDetections(dataset.image_id(0), np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int32))
    most = detector.config.max_detections
    return list(score(dataset, [nothing], indices=[0], size_bins=(), max_detections=most).named())
