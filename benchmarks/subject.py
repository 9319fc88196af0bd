"""What is measured: a trained run on its own images, or random weights with queries laid out by us."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from benchmarks.queries import at_level, density, script_queries
from benchmarks.report import Column, Row, decimals, ms, share, times
from benchmarks.timing import interleaved, percentiles
from querydet_jax.config import Config, InferenceConfig, ModelConfig, load_config, override
from querydet_jax.config.loading import config_path
from querydet_jax.config.rules import backbone_flavors
from querydet_jax.data import Dataset, open_dataset
from querydet_jax.data.sources import check_classes
from querydet_jax.evaluation.metrics import known
from querydet_jax.evaluation.runner import Evaluation, evaluate_detectors, first_images
from querydet_jax.inference.detector import Detector
from querydet_jax.inference.runs import open_model
from querydet_jax.models import DenseDetector, build_model
from querydet_jax.ops.anchors import level_shape
from querydet_jax.runtime.errors import ConfigError

Variants = dict[str, dict[str, Any]]
"""Name to the fields of ``InferenceConfig`` that make the variant; the first is what speed-ups are over."""

LAYOUT_LEVEL = 4  # queries are laid out on P4, where the paper's cascade starts


@dataclass(frozen=True)
class Untrained:
    """A model without a run, at one input size and density of queries."""

    backbone: str = "resnet50"
    """The backbone's name."""
    classes: int = 80
    """Number of classes."""
    channels: int = 256
    """Channels of the pyramid and the heads."""
    height: int = 800
    """Height of the image, a multiple of 32."""
    width: int = 1344
    """Width of the image, a multiple of 32."""
    active: float = 0.03
    """Share of P2's cells made active (context 2 included) by the cascade from P4."""
    out: str = "runs/benchmark"
    """Folder for the json, csv and plot."""


@dataclass(frozen=True)
class Source:
    """A trained run, or random weights; and how often they are timed."""

    run: str = ""
    """A run folder of train.py: its model on its validation images. Empty: random weights, speed only."""
    images: int = 100
    """With --run: the first so many images (0: all)."""
    backbone: str = "resnet50"
    """Without --run: the backbone's name."""
    classes: int = 80
    """Without --run: number of classes."""
    channels: int = 256
    """Without --run: channels of the pyramid and the heads."""
    rounds: int = 20
    """Without --run: timed rounds."""
    out: str = "runs/benchmark"
    """Folder for the json, csv and plot."""

    def about(self, batch: int = 1) -> str:
        if self.run:
            return f"{self.run}, {self.images or 'all'} validation images, methods in turn, medians"
        heads = "" if self.channels == 256 else f"{self.channels} channels, "
        return (
            f"random weights, {self.backbone}, {heads}{self.classes} classes, batch {batch}, "
            f"medians of {self.rounds} interleaved rounds"
        )


@dataclass(frozen=True)
class Subject(Source):
    """What is measured at one input size and density of queries."""

    height: int = 800
    """Without --run: height of the image."""
    width: int = 1344
    """Without --run: width of the image."""
    active: float = 0.03
    """Without --run: share of P2's cells made active (context 2 included) by the cascade from P4."""

    def about(self, batch: int = 1) -> str:
        size = "" if self.run else f"{self.height}x{self.width}, "
        return size + super().about(batch)


def open_run(run: str) -> tuple[Config, DenseDetector, Dataset]:
    """Configuration, trained model and validation data of a run folder."""
    config = load_config(config_path(run))
    model = open_model(config, run)
    dataset = open_dataset(config.data, "val")
    check_classes(config, dataset)
    return config, model, dataset


def random_model(backbone: str, classes: int, channels: int = 256, **changes: Any) -> DenseDetector:
    """QueryDet with random weights, in the backbone's usual flavour; ``changes`` by dotted field of ``ModelConfig``."""
    widths = {f"{part}.channels": channels for part in ("fpn", "head", "query")}
    network = {"backbone.name": backbone, "backbone.flavor": backbone_flavors(backbone)[0]}
    return build_model(override(ModelConfig(), {**network, "num_classes": classes, **widths, **changes}))


def random_image(height: int, width: int, batch: int = 1) -> jax.Array:
    return jax.device_put(np.random.default_rng(0).integers(0, 256, (batch, height, width, 3), dtype=np.uint8))


def laid_out_queries(height: int, width: int, active: float, context: int = 2) -> np.ndarray:
    """P4's queries bool ``[h, w]`` from which about ``active`` of P2's cells become active."""
    shapes = [level_shape(height, width, level) for level in (3, 2)]
    return density(level_shape(height, width, LAYOUT_LEVEL), shapes, context, active)


def scripted_detector(model: DenseDetector, config: InferenceConfig, queries: np.ndarray, shape: tuple[int, int]):
    """A detector whose queries on its start level are those that P4's ``queries [h, w]`` stem from, or make.

    Args:
      shape: height and width of the image.
    """
    if config.query != "dense":
        start = config.start_level
        script_queries(model, at_level(queries, LAYOUT_LEVEL, start, level_shape(*shape, start)))
    return Detector(model, config)


def measure(subject: Subject, variants: Variants) -> list[Row]:
    """One row a variant: accuracy (with a run), active shares, milliseconds, speed-up over the first."""
    return _measure_run(subject, variants) if subject.run else _measure_random(subject, variants)


def _measure_run(subject: Subject, variants: Variants) -> list[Row]:
    config, model, dataset = open_run(subject.run)
    detectors = {name: Detector(model, override(config.inference, changes)) for name, changes in variants.items()}
    return evaluation_rows(evaluate(detectors, dataset, config, subject.images))


def evaluate(detectors: dict[str, Detector], dataset: Dataset, config: Config, images: int) -> dict[str, Evaluation]:
    """Accuracy and times of detectors side by side on the first ``images`` (0: all) of a run's data."""
    return evaluate_detectors(
        detectors,
        dataset,
        config.data,
        batch_size=config.inference.batch_size,
        indices=first_images(dataset, images),
    )


def evaluation_rows(runs: dict[str, Evaluation]) -> list[Row]:
    base = next(iter(runs.values())).ms_median
    rows: list[Row] = []
    for name, run in runs.items():
        if not run.ms:
            raise ConfigError("--images: too few to time, the first of each shape only compiles; use more")
        values = run.scores.coco.metrics
        rows.append(
            {
                "method": name,
                **{key: known(values.get(key)) for key in ("AP", "AP50", "AP75", "APs", "AP_0_16", "AR100")},
                **{f"active_P{level}": value for level, value in sorted(run.active_share().items(), reverse=True)},
                **percentiles(np.asarray(run.ms)),
                "fps": run.fps,
                "speed_up": base / run.ms_median,
            }
        )
    return rows


def _measure_random(subject: Subject, variants: Variants) -> list[Row]:
    shape = (subject.height, subject.width)
    model = random_model(subject.backbone, subject.classes, subject.channels)
    image = random_image(*shape)
    queries = laid_out_queries(*shape, subject.active)
    # At a score threshold of 0 every level brings all its candidates to NMS, the worst case.
    base = InferenceConfig(score_threshold=0.0)
    detectors = {
        name: scripted_detector(model, dataclasses.replace(base, **changes), queries, shape)
        for name, changes in variants.items()
    }
    return timed_rows(detectors, image, subject.rounds)


def timed_rows(detectors: dict[str, Detector], image: jax.Array, rounds: int) -> list[Row]:
    """Rows of ``detectors`` on images ``[B, H, W, 3]``, timed in turn; milliseconds are an image's share."""
    batch, height, width, _ = image.shape
    shares = {}
    for name, detector in detectors.items():
        stats = jax.device_get(detector(image)).stats
        shares[name] = {
            f"active_P{level}": float(s.active) / (batch * np.prod(level_shape(height, width, level)))
            for level, s in sorted(stats.items(), reverse=True)
        }
    measured = interleaved({name: (lambda d=d: d(image)) for name, d in detectors.items()}, rounds)
    base = float(np.median(next(iter(measured.values()))))
    return [
        {
            "method": name,
            **shares[name],
            **percentiles(values / batch),
            "fps": float(np.mean(1e3 * batch / values)),
            "speed_up": base / float(np.median(values)),
        }
        for name, values in measured.items()
    ]


def accuracy_columns(with_accuracy: bool) -> list[Column]:
    if not with_accuracy:
        return []
    names = {"AP": "AP", "AP50": "AP50", "APs": "APs", "AP_0_16": "AP<16", "AR100": "AR100"}
    return [Column(key, header, decimals(2)) for key, header in names.items()]


def speed_columns(rows: list[Row]) -> list[Column]:
    """Active shares of the levels that any row has, milliseconds and speed-up."""
    levels = sorted({key for row in rows for key in row if key.startswith("active_P")}, reverse=True)
    return [
        *(Column(key, key.replace("active_", "active "), share) for key in levels),
        Column("ms_p50", "ms p50", ms),
        Column("ms_p90", "ms p90", ms),
        Column("speed_up", "speed-up", times),
    ]
