"""Predict on very many pictures with Ray Data: a ``Predictor`` per device, parts of the list as units of work.

A part's results are one file, or object of a store, that appears whole or not at all. A part that was under way when
its worker or machine was lost is computed again, and a later start computes only the parts whose files are missing. So
every picture has exactly one row, however often something was killed.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from querydet_jax.data.readers.images import Reading
from querydet_jax.data.readers.pictures import Pictures, find_pictures
from querydet_jax.inference.predictor import Predictor
from querydet_jax.inference.tiling import Tiles
from querydet_jax.runtime import machine
from querydet_jax.runtime.errors import ConfigError, QueryDetError
from querydet_jax.runtime.files import check_writable, reason, write_json, writing, written_aside
from querydet_jax.runtime.progress import counted
from querydet_jax.runtime.reading import read_json
from querydet_jax.runtime.stores import as_path, is_url, local_copies

_log = logging.getLogger("querydet_jax")

Results = Literal["jsonl", "parquet"]
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
    results: Results = "jsonl",
    workers: int = 0,
    part: int = PART,
) -> tuple[int, list[str]]:
    """Write ``out/part-00000.jsonl`` (or ``.parquet``) and so on: a row per picture, in the order given.

    A row has path, height, width, boxes (xyxy px), scores, classes and class_ids; of a picture that cannot be used,
    path and error.

    Args:
      make: makes a worker's predictor; can be pickled.
      names: files, folders and patterns, see ``find_pictures``.
      out: folder, on a disk that all machines have or in a store.
      facts: what was asked for besides; a second start must ask for the same.
      min_score: see ``Predictor.predict``.
      results: form of the files: a JSON object in each line, or Parquet with a column for each of the above.
      workers: number of predictors; 0: one per GPU or TPU chip of the Ray cluster, or one if it has none.
      part: pictures per file.

    Returns:
      the number of pictures, and a message for each that cannot be used.

    Raises:
      QueryDetError: Ray is not installed; the model, or ``min_score``, is wrong; ``out`` cannot be written; a store
        does not answer.
      ConfigError: ``out`` holds the results of other pictures or settings.
      DataError: there is no picture.
    """
    if importlib.util.find_spec("ray") is None:
        raise QueryDetError("--engine ray needs an extra; pip install -r requirements-ray.txt")
    files = [_absolute(path) for path in find_pictures(names)]
    check_writable(out)
    asked = {**facts, "min_score": min_score, "part": part, "results": results, "pictures": files}
    if (out / _LIST).exists():
        if read_json(out / _LIST) != json.loads(json.dumps(asked)):
            raise ConfigError(f"--out {out}: holds results of other pictures or settings; choose another folder")
    else:
        write_json(out / _LIST, asked)
    out = out.resolve()
    parts = {str(out / f"part-{n:05}.{results}"): files[n * part :][:part] for n in range(-(-len(files) // part))}
    there = {str(path) for path in out.iterdir()} & parts.keys()
    if there:
        _log.info("%d of %d parts are there already", len(there), len(parts))
    broken = {path: _broken(as_path(path)) for path in there}
    missing = [{"path": path, "files": inside} for path, inside in parts.items() if path not in there]
    if missing:
        broken |= _run(missing, workers, (make, min_score, tiles))
    return len(files), [message for path in parts for message in broken[path]]


def _absolute(path: Path) -> str:
    """Return a path that means the same in every folder of every machine that has it."""
    return str(path if is_url(path) else Path(os.path.realpath(path.parent)) / path.name)


def _run(parts: list[dict[str, Any]], workers: int, arguments: tuple[Any, ...]) -> dict[str, list[str]]:
    """Compute parts; return {path: a message for each picture that cannot be used}."""
    import ray  # pyright: ignore[reportMissingImports]
    import ray.data  # pyright: ignore[reportMissingImports]

    if not ray.is_initialized():
        try:
            ray.init(logging_level=logging.ERROR, log_to_driver=False)
        except ConnectionError as error:
            raise QueryDetError(
                f"RAY_ADDRESS {os.environ.get('RAY_ADDRESS')}: no cluster of Ray answers ({reason(error)}); check the "
                "address, and RAY_AUTH_TOKEN if the cluster asks for one"
            ) from None
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
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
    broken: dict[str, list[str]] = {}
    with counted(sum(len(part["files"]) for part in parts), "predicting", "picture") as bar:
        for row in done:
            if row["fault"]:
                raise QueryDetError(row["fault"])
            broken[row["path"]] = list(row["broken"])
            bar.update(row["pictures"])
    return broken


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
        files, fault, broken = list(row["files"]), self._fault, []
        if not fault:
            try:
                broken = write_part(self._predictor, self._scores, files, as_path(row["path"]), self._tiles)
            except QueryDetError as error:
                fault = str(error)
        return {"path": row["path"], "pictures": len(files), "broken": broken, "fault": fault}


def write_part(
    predictor: Predictor, scores: np.ndarray, files: Sequence[str], path: Path, tiles: Tiles | None = None
) -> list[str]:
    """Write a row per file to ``path``, a ``.jsonl`` or ``.parquet`` that appears when it is complete.

    Args:
      scores: ``[K]``, see ``Predictor.run``.

    Returns:
      a message for each file that cannot be used.

    Raises:
      QueryDetError: ``path`` cannot be written; a store does not answer, or refuses.
    """
    with tempfile.TemporaryDirectory(prefix="querydet-") as folder:
        places = local_copies([as_path(file) for file in files], Path(folder))
        file_of = dict(zip(map(str, places), files, strict=True))
        pictures = Pictures(places, predictor.classes, Reading.of(predictor.data))
        broken: list[str] = []
        rows = {}
        for found in predictor.run(pictures, scores, tiles=tiles, on_broken=broken.append):
            file = file_of[str(found.path)]
            rows[file] = {
                "path": file,
                "height": found.size[0],
                "width": found.size[1],
                "boxes": found.boxes.tolist(),
                "scores": found.scores.tolist(),
                "classes": found.names,
                "class_ids": found.classes.tolist(),
            }
    for place, file in file_of.items():
        if file not in rows:
            why = next(message for message in broken if message.startswith(f"{place}:"))
            rows[file] = {"path": file, "error": why.replace(place, file)}
    in_order = [rows[file] for file in files]
    with writing(path), written_aside(path) as aside:
        (_write_parquet if path.suffix == ".parquet" else _write_lines)(aside, in_order)
    return [row["error"] for row in in_order if "error" in row]


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w") as out:
        out.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa  # comes with Ray Data
    from pyarrow import parquet

    schema = {
        "path": pa.string(),
        "height": pa.int32(),
        "width": pa.int32(),
        "boxes": pa.list_(pa.list_(pa.float32())),
        "scores": pa.list_(pa.float32()),
        "classes": pa.list_(pa.string()),
        "class_ids": pa.list_(pa.int32()),
        "error": pa.string(),
    }
    parquet.write_table(pa.Table.from_pylist(rows, pa.schema(list(schema.items()))), path)


def _broken(path: Path) -> list[str]:
    """Return the messages of a part."""
    if path.suffix == ".parquet":
        from pyarrow import parquet

        with path.open("rb") as file:
            return parquet.read_table(file, columns=["error"])["error"].drop_null().to_pylist()
    with path.open() as lines:
        return [row["error"] for row in map(json.loads, lines) if "error" in row]
