"""Read, check and write VisDrone's result files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePath

import numpy as np
from numpy.typing import ArrayLike

from querydet_jax.data.readers.folders import SUFFIXES
from querydet_jax.evaluation.metrics import as_numbers
from querydet_jax.runtime.errors import DataError, shown
from querydet_jax.runtime.files import writing, written_aside
from querydet_jax.runtime.reading import numbers, read_text
from querydet_jax.runtime.stores import as_path

_COLUMNS = "x,y,w,h,score,category"
_LARGEST = 1e9  # areas of larger boxes would not fit float32, in which the protocol computes


def read_result_file(path: str | Path) -> np.ndarray:
    """Read a result or annotation file as float64 [n,8], in the file's order; an empty file gives [0,8].

    Columns: x, y, w, h, score, category, truncation, occlusion; the last two default to -1.

    Raises:
      DataError: the file cannot be read, or a line is malformed.
    """
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        # Some official annotation files end their lines with a comma.
        row = numbers(line.strip().removesuffix(",").split(","))
        problem = _problem(row)
        if problem:
            raise DataError(
                f"{path}: line {number}: {problem} in {shown(line.strip())}; expected {_COLUMNS},truncation,occlusion"
            )
        rows.append((row + [-1.0, -1.0])[:8])
    return np.array(rows, np.float64).reshape(-1, 8)


def write_result_files(folder: str | Path, detections: Mapping[str, ArrayLike]) -> list[Path]:
    """Write one text file per image for the toolkit: ``x,y,w,h,score,category,-1,-1`` by descending score.

    Boxes have 2 decimals, scores 8. An image without detections gets an empty file. All input is checked before the
    first file is written; each file is written atomically.

    Args:
      folder: created if missing.
      detections: {image name, with or without suffix: [m,6..8] x, y, w, h, score, category}. Subfolders in the name
        are kept.

    Returns:
      The paths of the files, in the order given.

    Raises:
      DataError: a row is malformed, a name leads out of the folder, or two names give the same file.
    """
    texts: dict[str, str] = {}
    for name, rows in detections.items():
        if not isinstance(name, str) or "\0" in name:
            raise DataError(f"{shown(name)}: not an image name; give a relative name")
        path = PurePath(name)
        stem = path.with_suffix("").as_posix() if path.suffix.lower() in SUFFIXES else name
        if not path.name or path.is_absolute() or ".." in path.parts:
            raise DataError(f"{name!r}: not an image name relative to the folder of images; give a relative name")
        if stem in texts:
            raise DataError(f"{name}: a second image for the file {stem}.txt; make the image names unique")
        texts[stem] = "".join(
            f"{x:.2f},{y:.2f},{w:.2f},{h:.2f},{score:.8f},{category:.0f},-1,-1\n"
            for x, y, w, h, score, category in as_written(rows, name).tolist()
        )
    with writing(folder):
        as_path(folder).mkdir(parents=True, exist_ok=True)
    paths = [as_path(folder) / f"{stem}.txt" for stem in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        with writing(path), written_aside(path) as aside:
            aside.write_text(text, encoding="utf-8")
    return paths


def as_written(values: ArrayLike, name: str) -> np.ndarray:
    """Return the rows as a result file stores them: float64 [m,6], sorted by score and rounded.

    Raises:
      DataError: see ``checked_rows``.
    """
    rows = checked_rows(values, name)[:, :6]
    rows = rows[np.argsort(-rows[:, 4], kind="stable")]
    return np.concatenate([np.round(rows[:, :4], 2), np.round(rows[:, 4:5], 8), rows[:, 5:]], axis=1)


def checked_rows(values: ArrayLike, name: str) -> np.ndarray:
    """Check rows of result files; return them as float64 [n,6..8]. Any empty array gives [0,8].

    Raises:
      DataError: the shape or a row is malformed; the message begins with ``name``.
    """
    rows = as_numbers(values, f"{name}: rows")
    if rows.size == 0:
        return np.zeros((0, 8))
    if rows.ndim != 2 or not 6 <= rows.shape[1] <= 8:
        raise DataError(f"{name}: shape {list(rows.shape)}, expected [n,6..8], {_COLUMNS}")
    fine = (np.abs(rows) <= _LARGEST).all(axis=1)  # false for nan, too
    bad = ~fine | (rows[:, 2:4] < 0).any(axis=1) | ~np.isin(rows[:, 5], np.arange(12))
    if bad.any():
        index = int(np.argmax(bad))
        raise DataError(f"{name}: row {index}: {_problem(rows[index].tolist())}; expected {_COLUMNS}")
    return rows


def _problem(row: list[float]) -> str:
    """Describe what is wrong with a row; return "" if it is valid."""
    if not 6 <= len(row) <= 8:
        return "not 6 to 8 numbers, all finite"
    if not all(abs(value) <= _LARGEST for value in row):
        return f"a number that is not finite or beyond {_LARGEST:g}"
    if min(row[2:4]) < 0:
        return f"negative width or height {row[2]:g}, {row[3]:g}"
    if row[5] not in range(12):
        return f"category {row[5]:g}, not one of 0..11"
    return ""
