"""Predict on very many pictures with Ray Data: a ``Predictor`` per device, parts of the list as units of work.

A part's results are one file that appears whole or not at all. A part that was under way when its worker or machine
was lost is computed again, and a later start computes only the parts whose files are missing. So every picture has
exactly one line, however often something was killed.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from querydet_jax.data.readers.folders import SUFFIXES, list_files
from querydet_jax.inference.predictor import Predictor
from querydet_jax.inference.tiling import Tiles
from querydet_jax.runtime import machine
from querydet_jax.runtime.errors import ConfigError, DataError, QueryDetError
from querydet_jax.runtime.files import check_writable, write_json, writing, written_aside
from querydet_jax.runtime.progress import progress
from querydet_jax.runtime.reading import read_json
from querydet_jax.runtime.stores import is_folder, is_there, local_path

_log = logging.getLogger("querydet_jax")

PART = 64  # pictures: what a lost worker computes again
_LIST = "pictures.json"


def predict_many(
    make: Callable[[], Predictor],
    names: Sequence[str],
    out: Path,
    *,
    facts: dict[str, Any],
    min_score: str = "",
    tiles: Tiles | None = None,
    workers: int = 0,
    part: int = PART,
) -> tuple[int, list[str]]:
    """Write ``out/part-00000.jsonl`` and so on: a line per picture, in the order given.

    A line has path, height, width, boxes (xyxy px), scores, classes and class_ids; of a picture that cannot be used,
    path and error.

    Args:
      make: makes a worker's predictor; can be pickled.
      names: files and folders of pictures.
      facts: what was asked for besides; a second start must ask for the same.
      min_score: see ``Predictor.predict``.
      workers: number of predictors; 0: one per GPU or TPU chip of the Ray cluster, or one if it has none.
      part: pictures per file.

    Returns:
      the number of pictures, and a message for each that cannot be used.

    Raises:
      QueryDetError: Ray is not installed; the model, or ``min_score``, is wrong; ``out`` cannot be written.
      ConfigError: ``out`` holds the results of other pictures or settings.
      DataError: there is no picture.
    """
    if importlib.util.find_spec("ray") is None:
        raise QueryDetError("--engine ray needs an extra; pip install -r requirements-ray.txt")
    files = _files(names)
    check_writable(out)
    asked = {**facts, "min_score": min_score, "part": part, "pictures": files}
    if (out / _LIST).exists():
        if read_json(out / _LIST) != json.loads(json.dumps(asked)):
            raise ConfigError(f"--out {out}: holds results of other pictures or settings; choose another folder")
    else:
        write_json(out / _LIST, asked)
    paths = [out.resolve() / f"part-{n:05}.jsonl" for n in range(-(-len(files) // part))]
    parts = [
        {"path": str(path), "files": files[n * part : (n + 1) * part]}
        for n, path in enumerate(paths)
        if not path.exists()
    ]
    if len(parts) < len(paths):
        _log.info("%d of %d parts are there already", len(paths) - len(parts), len(paths))
    if parts:
        _run(parts, workers, (make, min_score, tiles))
    broken = []
    for path in paths:
        with path.open() as lines:
            broken += [entry["error"] for entry in map(json.loads, lines) if "error" in entry]
    return len(files), broken


def _files(names: Sequence[str]) -> list[str]:
    files: list[str] = []
    for path in map(local_path, names):
        if is_folder(path):
            files += [str(path.resolve() / name) for name in list_files(path, SUFFIXES, deep=False)]
        elif is_there(path):
            files.append(str(path.resolve()))
        else:
            raise DataError(f"{path}: no such picture or folder")
    if not files:
        raise DataError(f"{names[0]}: no pictures directly in this folder; name a picture or a folder of some")
    return list(dict.fromkeys(files))


def _run(parts: list[dict[str, Any]], workers: int, arguments: tuple[Any, ...]) -> None:
    import ray  # pyright: ignore[reportMissingImports]
    import ray.data  # pyright: ignore[reportMissingImports]

    if not ray.is_initialized():
        ray.init(logging_level=logging.ERROR, log_to_driver=False)  # RAY_ADDRESS names a cluster
    ray.data.DataContext.get_current().enable_progress_bars = False
    there = ray.cluster_resources()
    gpus, chips = int(there.get("GPU", 0)), int(there.get("TPU", 0))
    needs: dict[str, Any] = {"num_gpus": 1} if gpus else {"resources": {"TPU": 1}} if chips else {}
    number = min(workers or gpus or chips or 1, len(parts))
    done = (
        ray.data.from_items(parts, override_num_blocks=len(parts))
        .map(
            _Worker, fn_constructor_args=arguments, compute=ray.data.ActorPoolStrategy(size=number), num_cpus=1, **needs
        )
        .iter_rows()
    )
    with_bar = progress(range(sum(len(part["files"]) for part in parts)), "predicting", "picture")
    bar = iter(with_bar)
    for row in done:
        if row["fault"]:
            raise QueryDetError(row["fault"])
        for _ in range(row["pictures"]):
            next(bar)
    next(bar, None)  # ends the bar


class _Worker:
    """An actor of Ray: computes parts."""

    def __init__(self, make: Callable[[], Predictor], min_score: str, tiles: Tiles | None):
        self._fault, self._tiles = "", tiles
        machine.prepare()
        try:
            self._predictor = make()
            self._scores = self._predictor.min_scores(min_score, "--min-score")
        except QueryDetError as error:  # raised here, Ray would start the actor again and again
            self._fault = str(error)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        files, fault = list(row["files"]), self._fault
        if not fault:
            try:
                write_part(self._predictor, self._scores, files, Path(row["path"]), self._tiles)
            except QueryDetError as error:
                fault = str(error)
        return {"pictures": len(files), "fault": fault}


def write_part(
    predictor: Predictor, scores: np.ndarray, files: Sequence[str], path: Path, tiles: Tiles | None = None
) -> None:
    """Write a line per file to ``path``, which appears when it is complete; ``scores [K]`` see ``Predictor.run``."""
    broken: list[str] = []
    lines: dict[str, dict[str, Any]] = {}
    try:
        for found in predictor.run(predictor.open_files(files), scores, tiles=tiles, on_broken=broken.append):
            lines[str(found.path)] = {
                "path": str(found.path),
                "height": found.size[0],
                "width": found.size[1],
                "boxes": found.boxes.tolist(),
                "scores": found.scores.tolist(),
                "classes": found.names,
                "class_ids": found.classes.tolist(),
            }
    except DataError as error:  # none of them can be read
        if lines:
            raise
        broken.append(str(error))
    for file in files:
        if file not in lines:
            why = next((message for message in broken if message.startswith(f"{file}:")), broken[-1])
            lines[file] = {"path": file, "error": why}
    with writing(path), written_aside(path) as aside, aside.open("w") as out:
        out.writelines(json.dumps(lines[file], allow_nan=False) + "\n" for file in files)
