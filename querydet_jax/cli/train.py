"""`querydet train`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from querydet_jax.cli.arguments import parse
from querydet_jax.cli.main import SUMMARIES
from querydet_jax.cli.process import interrupts_end_the_process
from querydet_jax.data import Dataset
from querydet_jax.evaluation.runner import comparison_table, detectors_to_compare, evaluate_detectors, first_images
from querydet_jax.inference.detector import Detector
from querydet_jax.models import DenseDetector
from querydet_jax.runtime import machine
from querydet_jax.runtime.hosts import Hosts, is_first, join
from querydet_jax.training import train as run_training


@dataclass(frozen=True)
class TrainArguments:
    run: str = ""
    """Folder of the run: configuration, metrics, checkpoints (default: runs/NAME, or the run folder given)."""
    resume: bool = False
    """Continue from the run's newest checkpoint."""
    profile: bool = False
    """Also write a trace of a few steps to RUN/profile, for TensorBoard's profiler and ui.perfetto.dev."""
    hosts: Hosts = field(default_factory=Hosts)


def train(words: Sequence[str], program: str) -> None:
    """Train a detector."""
    arguments, config, source = parse(TrainArguments, SUMMARIES["train"], words, program)
    join(arguments.hosts, preemptible=True)
    machine.prepare()
    run = Path(arguments.run or (source if source.is_dir() else f"runs/{config.name}"))

    detectors: dict[str, Detector] = {}

    def prepare(model: DenseDetector) -> None:
        detectors.update(detectors_to_compare(model, config))

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
