"""Detectors side by side: accuracy on a run's images, active shares, times; rows of a report."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from benchmarks.options import RunOrRandomImage
from benchmarks.report import Column, Row, decimals, ms, share, times
from benchmarks.subjects import laid_out_queries, open_run, random_image, random_model, scripted_detector
from benchmarks.timing import interleaved, percentiles
from querydet_jax.config import Config, InferenceConfig, override
from querydet_jax.data import Dataset
from querydet_jax.evaluation.metrics import nan_to_none
from querydet_jax.evaluation.runner import Evaluation, evaluate_detectors, first_images
from querydet_jax.inference.detector import Detector
from querydet_jax.models import DenseDetector
from querydet_jax.ops.anchors import level_shape
from querydet_jax.runtime.errors import ConfigError

Variants = dict[str, dict[str, Any]]
"""Fields of ``InferenceConfig`` by name of the variant; speed-ups are over the first."""


def measure(options: RunOrRandomImage, variants: Variants) -> list[Row]:
    """Return one row per variant: accuracy (of a run only), active shares, milliseconds, speed-up over the first."""
    return _measure_run(options, variants) if options.run else _measure_random(options, variants)


def _measure_run(options: RunOrRandomImage, variants: Variants) -> list[Row]:
    config, model, dataset = open_run(options.run)
    detectors = {name: Detector(model, override(config.inference, changes)) for name, changes in variants.items()}
    return evaluation_rows(evaluate(detectors, dataset, config, options.images))


def evaluate(detectors: dict[str, Detector], dataset: Dataset, config: Config, images: int) -> dict[str, Evaluation]:
    """Evaluate and time detectors in turn on the first ``images`` (0: all) of a run's validation data."""
    return evaluate_detectors(
        detectors,
        dataset,
        config.data,
        batch_size=config.inference.batch_size,
        indices=first_images(dataset, images),
    )


def evaluation_rows(runs: dict[str, Evaluation]) -> list[Row]:
    """Return one row per detector; the first is the base of the speed-ups.

    Raises:
      ConfigError: there were too few images to time.
    """
    base = next(iter(runs.values())).ms_median
    rows: list[Row] = []
    for name, run in runs.items():
        if not run.ms:
            raise ConfigError("--images: too few to time, since the first of each shape only compiles; use more")
        values = run.scores.coco.metrics
        rows.append(
            {
                "method": name,
                **{key: nan_to_none(values.get(key)) for key in ("AP", "AP50", "AP75", "APs", "AP_0_16", "AR100")},
                **{f"active_P{level}": value for level, value in sorted(run.active_share().items(), reverse=True)},
                **percentiles(np.asarray(run.ms)),
                "fps": run.fps,
                "speed_up": base / run.ms_median,
            }
        )
    return rows


def _measure_random(options: RunOrRandomImage, variants: Variants) -> list[Row]:
    _, detectors, image = random_detectors(options, variants)
    return timed_rows(detectors, image, options.rounds)


def random_detectors(
    options: RunOrRandomImage, variants: Variants
) -> tuple[DenseDetector, dict[str, Detector], jax.Array]:
    """Return a network with random weights, its detectors at laid-out queries, and an image for them."""
    shape = (options.height, options.width)
    model = random_model(options.backbone, options.classes, options.channels)
    queries = laid_out_queries(*shape, options.active)
    base = InferenceConfig(score_threshold=0.0)  # the worst case of NMS: every level passes on all its candidates
    detectors = {
        name: scripted_detector(model, dataclasses.replace(base, **changes), queries, shape)
        for name, changes in variants.items()
    }
    return model, detectors, random_image(*shape)


def timed_rows(detectors: dict[str, Detector], image: jax.Array, rounds: int) -> list[Row]:
    """Time detectors in turn on images ``[B, H, W, 3]`` and return a row each; milliseconds are per image."""
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
    """Return the columns of active shares, for the levels that any row has, of milliseconds and of the speed-up."""
    levels = sorted({key for row in rows for key in row if key.startswith("active_P")}, reverse=True)
    return [
        *(Column(key, key.replace("active_", "active "), share) for key in levels),
        Column("ms_p50", "ms p50", ms),
        Column("ms_p90", "ms p90", ms),
        Column("speed_up", "speed-up", times),
    ]
