"""`predict --engine ray` by number of workers, beside the plain loop, on the same pictures."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import querydet_jax as qd
from benchmarks import charts
from benchmarks.options import Options
from benchmarks.report import Column, Report, Row, decimals, times
from querydet_jax.data.readers.pictures import find_pictures
from querydet_jax.inference.many import predict_many
from querydet_jax.runtime.errors import ConfigError, QueryDetError
from querydet_jax.runtime.progress import progress


@dataclass(frozen=True)
class Many(Options):
    """Pictures per second of `predict --engine ray` with some numbers of workers, and of the plain loop."""

    source: str = "hituav"
    """Run folder, exported file or packaged weights."""
    pictures: str = ""
    """Folder of pictures (required)."""
    number: int = 400
    """Pictures, the first of the folder."""
    workers: tuple[int, ...] = (1, 2)
    """Numbers of workers."""
    part: int = 16
    """Pictures per part; each worker needs several."""


def many(arguments: Many) -> None:
    if not arguments.pictures:
        raise ConfigError("--pictures: name a folder of pictures")
    if not arguments.workers or min(*arguments.workers, arguments.part) < 1:
        raise ConfigError("--workers, --part: give numbers from 1 on")
    files = [str(path) for path in find_pictures([arguments.pictures])[: arguments.number]]
    if len(files) < 2 * arguments.part * max(arguments.workers):
        raise ConfigError(
            f"--number {len(files)}: gives {max(arguments.workers)} workers less than two parts each; lower --part"
        )
    make = partial(qd.load, arguments.source)
    rows, found = [], []
    for workers in arguments.workers:
        row, results = _by_workers(make, files, workers, arguments.part)
        rows.append(row)
        found.append(results)
    plain, expected = _plain(make(), files)
    if any(results != expected for results in found):
        raise QueryDetError("the workers' results differ from the plain loop's; report this with pip freeze")
    for row in (plain, *rows):
        row["speed_up"] = row["per_second"] / plain["per_second"]
    Report(
        "many",
        f"{arguments.source}, {len(files)} pictures of {arguments.pictures}, one run each",
        [
            Column("engine", "engine"),
            Column("per_second", "pictures/s", decimals(2)),
            Column("speed_up", "over the plain loop", times),
            Column("seconds", "s in all", decimals(1)),
        ],
        [plain, *rows],
        notes=[
            "pictures/s: from the first result on, or from the first part of as many as there are workers; s in all: "
            "with start and compilation",
            "boxes, scores and classes of every picture are the plain loop's, bit for bit",
        ],
        draw=lambda figure: charts.bars(
            figure,
            [row["engine"] for row in (plain, *rows)],
            {"pictures/s": [row["per_second"] for row in (plain, *rows)]},
            x="pictures per second",
            title="Workers of Ray on one machine",
        ),
    ).publish(arguments.out, arguments)


def _plain(predictor: qd.Predictor, files: Sequence[str]) -> tuple[Row, list[Any]]:
    ended, results, begun = [], [], time.time()
    for found in progress(predictor.predict(files), "plain loop", "picture", total=len(files)):
        ended.append(time.time())
        results.append([found.boxes.tolist(), found.scores.tolist(), found.names])
    return _row("plain loop", begun, ended, np.arange(1, len(files) + 1), 1), results


def _by_workers(make: Any, files: Sequence[str], workers: int, part: int) -> tuple[Row, list[Any]]:
    with tempfile.TemporaryDirectory(prefix="querydet-") as folder:
        begun = time.time()
        _, broken = predict_many(make, files, Path(folder), facts={}, workers=workers, part=part)
        if broken:
            raise ConfigError(f"{broken[0]}; remove it from --pictures")
        parts = sorted(Path(folder).glob("part-*.jsonl"))
        lines = [[json.loads(line) for line in path.open()] for path in parts]
        ended = [path.stat().st_mtime for path in parts]
    order = np.argsort(ended)
    done = np.cumsum([len(lines[n]) for n in order])
    row = _row(f"ray, {workers} worker{'s' * (workers > 1)}", begun, sorted(ended), done, workers)
    return row, [[line["boxes"], line["scores"], line["classes"]] for inside in lines for line in inside]


def _row(engine: str, begun: float, ended: Sequence[float], done: np.ndarray, skipped: int) -> Row:
    """Count from the end of the first ``skipped`` of the steps that end at times ``ended`` with ``done`` pictures."""
    rate = (done[-1] - done[skipped - 1]) / (ended[-1] - ended[skipped - 1])
    return {"engine": engine, "per_second": float(rate), "seconds": float(ended[-1] - begun)}
