"""Figure 4 of the paper: accuracy against speed over the query threshold, at several input sizes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from benchmarks import charts
from benchmarks.measuring import accuracy_columns, evaluate, evaluation_rows, speed_columns
from benchmarks.options import Run
from benchmarks.report import Column, Report, Row, decimals
from benchmarks.subjects import open_run
from querydet_jax.config import DataConfig, override
from querydet_jax.inference.detector import Detector
from querydet_jax.runtime.errors import ConfigError


@dataclass(frozen=True)
class Figure4(Run):
    """Figure 4: AP and AR against speed over the query threshold, of a trained run."""

    thresholds: tuple[float, ...] = (0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.35, 0.40, 0.45, 0.50)
    """Query thresholds sigma."""
    scales: tuple[float, ...] = (0.75, 1.0, 1.25)
    """Input sizes, as multiples of the run's test size."""


def figure4(arguments: Figure4) -> None:
    if not arguments.run:
        raise ConfigError("--run: figure4 needs a trained model; name a run folder of train.py")
    config, model, dataset = open_run(arguments.run)
    detectors = {
        "dense": Detector(model, override(config.inference, {"query": "dense"})),
        **{
            f"{threshold:.2f}": Detector(model, override(config.inference, {"query": "csq", "threshold": threshold}))
            for threshold in arguments.thresholds
        },
    }
    rows: list[Row] = []
    for scale in arguments.scales:
        scaled = dataclasses.replace(config, data=at_scale(config.data, scale))
        for row in evaluation_rows(evaluate(detectors, dataset, scaled, arguments.images)):
            rows.append({"short side": scaled.data.test_short, "threshold": row.pop("method"), **row})
    series = {}
    for key in ("AP", "AR100"):
        for size in dict.fromkeys(row["short side"] for row in rows):
            mine = [row for row in rows if row["short side"] == size and row["threshold"] != "dense"]
            series[f"{key}, {size} px"] = ([row["fps"] for row in mine], [row[key] for row in mine])
    Report(
        "figure4",
        f"Figure 4, query threshold: {arguments.run}, {arguments.images or 'all'} validation images, methods in turn",
        [
            Column("short side", "short side"),
            Column("threshold", "threshold"),
            *accuracy_columns(True),
            *speed_columns(rows),
            Column("fps", "FPS", decimals(2)),
        ],
        rows,
        notes=["speed-up: over dense heads at the same size; further right, the threshold is higher"],
        draw=lambda figure: charts.lines(
            figure,
            series,
            x="images per second",
            y="AP, AR",
            title=f"Query threshold {arguments.thresholds[0]} to {arguments.thresholds[-1]}",
        ),
    ).publish(arguments.out, arguments)


def at_scale(data: DataConfig, scale: float) -> DataConfig:
    """Scale the test images, and the canvases that hold them."""

    def canvas(side: int) -> int:
        return -(-round(side * scale) // 32) * 32

    return dataclasses.replace(
        data,
        test_short=round(data.test_short * scale),
        test_max=round(data.test_max * scale),
        test_canvases=tuple((canvas(height), canvas(width)) for height, width in data.test_canvases),
    )
