"""VisDrone's text files of results, and what an evaluation by its protocol yields."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from querydet_jax.data.visdrone import CLASSES
from querydet_jax.errors import DataError
from querydet_jax.evaluation.metrics import DEFAULT_BINS, SizeBin, percent, text_table
from querydet_jax.files import written_aside

_HEADLINE = ("AP", "AP50", "AP75", "AR1", "AR10", "AR100", "AR500")
_COLUMNS = "x,y,w,h,score,category"
_PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff"}


@dataclass(frozen=True, eq=False)
class Curve:
    """Recall and precision of one class at one IoU threshold, at each hit from the highest score down.

    Attributes:
      recall: float64 [t], 0..1, rising.
      precision: float64 [t], 0..1, interpolated: the largest at this recall or a higher one, so never rising. With
        equal steps of recall its mean times the last recall is the AP.
      scores: float32 [t], score of the hit.
    """

    recall: np.ndarray
    precision: np.ndarray
    scores: np.ndarray

    def at(self, recall: ArrayLike) -> np.ndarray:
        """Precision at each recall, float64 of the same shape; 0 beyond the recall reached."""
        # 0.3 and 3/10 of a count may differ in the last bit.
        index = np.searchsorted(self.recall, np.asarray(recall) - 1e-9)
        return np.append(self.precision, 0.0)[index]


@dataclass(frozen=True, eq=False)
class VisDroneMetrics:
    """Average precision and recall in percent (0..100), nan where there is no object to find.

    Attributes:
      metrics: AP, AP50, AP75, AR1, AR10, AR100, AR500 as the toolkit prints them: classes weighted by the number of
        images that hold them. Then the same names with ``_mean``: plain means over the classes that have objects.
      per_class: class to AP, AP50, AP75, AR500 and the numbers of objects and of images that hold it.
      per_size: key of a size bin to AP, AP50, AR500 weighted by the images that hold an object of the class and
        bin, AP_mean over the classes that have one, and the number of objects.
      curves: class to IoU in percent (50, 75) to its curve; empty arrays where nothing was found.
      num_images: images evaluated.
      num_objects: objects of the classes outside ignored regions, those of score 0 included.
      num_detections: detections of the classes outside ignored regions, at most 500 an image.
      size_bins: the bins behind ``per_size``.
      notes: what a reader must know before trusting the numbers.
    """

    metrics: dict[str, float]
    per_class: dict[str, dict[str, float]]
    per_size: dict[str, dict[str, float]]
    curves: dict[str, dict[int, Curve]]
    num_images: int
    num_objects: int
    num_detections: int
    size_bins: tuple[SizeBin, ...] = DEFAULT_BINS
    notes: tuple[str, ...] = ()

    @property
    def classwise(self) -> np.ndarray:
        """AP of the ten classes as the toolkit prints it, float64 [10]: 0 for a class without objects."""
        return np.nan_to_num([row["AP"] for row in self.per_class.values()])

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, nan as None for JSON; curves as precision in percent at recall 0, 1 .. 100 %."""
        recall = np.arange(101) / 100
        return {
            "metrics": _without_nan(self.metrics),
            "per_class": {name: _without_nan(row) for name, row in self.per_class.items()},
            "per_size": {key: _without_nan(row) for key, row in self.per_size.items()},
            "curves": {
                name: {f"IoU{key}": np.round(100 * curve.at(recall), 4).tolist() for key, curve in of_class.items()}
                for name, of_class in self.curves.items()
            },
            "num_images": self.num_images,
            "num_objects": self.num_objects,
            "num_detections": self.num_detections,
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """``to_dict`` as strict JSON text."""
        return json.dumps(self.to_dict(), allow_nan=False)

    def table(self) -> str:
        """Plain text, at most 100 columns wide: headline, by class, by size, by recall. ``-`` stands for nan."""
        counts = f"{self.num_images:,} images, {self.num_objects:,} objects, {self.num_detections:,} detections"
        parts = [counts, *(f"warning: {note}" for note in self.notes)]
        rows = [
            [label, *(percent(self.metrics[name + suffix]) for name in _HEADLINE)]
            for label, suffix in (("by images (official)", ""), ("plain", "_mean"))
        ]
        parts += ["", text_table(["mean of classes", *_HEADLINE], rows)]
        columns = ("AP", "AP50", "AP75", "AR500")
        rows = [
            [name, f"{row['objects']:,}", f"{row['images']:,}", *(percent(row[key]) for key in columns)]
            for name, row in self.per_class.items()
        ]
        parts += ["", text_table(["class", "objects", "images", *columns], rows)]
        if self.size_bins:
            columns = ("AP", "AP50", "AR500", "AP_mean")
            rows = [
                [entry.label, f"{row['objects']:,}", *(percent(row[key]) for key in columns)]
                for entry, row in zip(self.size_bins, self.per_size.values(), strict=True)
            ]
            parts += ["", text_table(["sqrt(w*h)", "objects", *columns], rows)]
        recall = np.arange(1, 10) / 10
        for key in (50, 75):
            rows = [
                [name, *(percent(value) for value in self._precision(name, key, recall))] for name in self.per_class
            ]
            parts += ["", text_table([f"precision, IoU {key} %", *(f"R {100 * r:.0f} %" for r in recall)], rows)]
        return "\n".join(parts)

    def _precision(self, name: str, key: int, recall: np.ndarray) -> np.ndarray:
        known = self.per_class[name]["objects"] > 0
        return 100 * self.curves[name][key].at(recall) if known else np.full(recall.shape, np.nan)


def summarize(
    precision: np.ndarray,
    recall: np.ndarray,
    objects: np.ndarray,
    weights: np.ndarray,
    *,
    limits: Sequence[int],
    size_bins: tuple[SizeBin, ...],
    curves: dict[str, dict[int, Curve]],
    num_images: int,
    num_detections: int,
    notes: tuple[str, ...],
) -> VisDroneMetrics:
    """Means over classes and thresholds.

    Args:
      precision, recall: [10, L+B, 10], percent, of each class at each limit (L), then in each bin (B), by IoU; of
        the limits only the last has a precision.
      objects, weights: int [10, 1+B], objects of each class and images that hold one, of every size, then by bin.
    """
    whole, first_bin = len(limits) - 1, len(limits)
    by_iou, recall = precision[:, whole], recall.mean(axis=2)
    columns = {"AP": by_iou.mean(axis=1), "AP50": by_iou[:, 0], "AP75": by_iou[:, 5]}
    columns |= {f"AR{limit}": recall[:, i] for i, limit in enumerate(limits)}
    metrics = {name: _mean(values, weights[:, 0]) for name, values in columns.items()}
    metrics |= {f"{name}_mean": _mean(values, weights[:, 0] > 0) for name, values in columns.items()}
    per_class: dict[str, dict[str, float]] = {}
    for k, name in enumerate(CLASSES):
        known = objects[k, 0] > 0
        per_class[name] = {
            key: float(columns[key][k]) if known else math.nan for key in ("AP", "AP50", "AP75", "AR500")
        }
        per_class[name] |= {"objects": int(objects[k, 0]), "images": int(weights[k, 0])}
    per_size: dict[str, dict[str, float]] = {}
    for i, entry in enumerate(size_bins):
        by_iou, held = precision[:, first_bin + i], weights[:, 1 + i]
        per_size[entry.key] = {
            "AP": _mean(by_iou.mean(axis=1), held),
            "AP50": _mean(by_iou[:, 0], held),
            "AR500": _mean(recall[:, first_bin + i], held),
            "AP_mean": _mean(by_iou.mean(axis=1), held > 0),
            "objects": int(objects[:, 1 + i].sum()),
        }
    return VisDroneMetrics(
        metrics, per_class, per_size, curves, num_images, int(objects[:, 0].sum()), num_detections, size_bins, notes
    )


def _mean(values: np.ndarray, weights: np.ndarray) -> float:
    return float(np.average(values, weights=weights)) if weights.any() else math.nan


def read_result_file(path: str | Path) -> np.ndarray:
    """A text file of results or annotations: float64 [n,8], in the file's order; [0,8] of an empty file.

    Columns: x, y, w, h, score, category, truncation, occlusion; the last two may be missing and are then -1.

    Raises:
      DataError: a file that cannot be read, or a bad line, by its number.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise DataError(f"{path}: {reason}; give one text file an image, empty if it has no detections") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        # Some official annotation files end their lines with a comma.
        fields = line.strip().removesuffix(",").split(",")
        try:
            row = [float(field) for field in fields]
        except ValueError:
            row = []
        problem = _problem(row)
        if problem:
            raise DataError(f"{path}: line {number}: {problem}; expected {_COLUMNS},truncation,occlusion")
        rows.append((row + [-1.0, -1.0])[:8])
    return np.array(rows, np.float64).reshape(-1, 8)


def write_result_files(folder: str | Path, detections: Mapping[str, ArrayLike]) -> list[Path]:
    """Write one text file an image, as the toolkit reads them: ``x,y,w,h,score,category,-1,-1`` by descending score.

    Boxes have 2 decimals, scores 8. An image without detections gets an empty file. Nothing is written unless all is
    well; each file appears whole.

    Args:
      folder: made if missing.
      detections: image name, with or without the picture's suffix, to [m,6..8]: x, y, w, h, score, category.

    Returns:
      The files, in the order given.

    Raises:
      DataError: bad rows, a name with a folder in it, two names of one file.
    """
    texts: dict[str, str] = {}
    for name, rows in detections.items():
        stem = name.removesuffix(PurePath(name).suffix) if PurePath(name).suffix.lower() in _PICTURES else name
        if not stem or PurePath(stem).name != stem:
            raise DataError(f"{name!r}: not the name of an image; give it without its folder")
        if stem in texts:
            raise DataError(f"{name}: a second image of the file {stem}.txt; give every image a name of its own")
        values = checked_rows(rows, name)
        values = values[np.argsort(-values[:, 4], kind="stable")]
        texts[stem] = "".join(
            f"{x:.2f},{y:.2f},{w:.2f},{h:.2f},{score:.8f},{category:.0f},-1,-1\n"
            for x, y, w, h, score, category in values[:, :6].tolist()
        )
    Path(folder).mkdir(parents=True, exist_ok=True)
    paths = []
    for stem, text in texts.items():
        paths.append(Path(folder) / f"{stem}.txt")
        with written_aside(paths[-1]) as aside:
            aside.write_text(text, encoding="utf-8")
    return paths


def checked_rows(values: ArrayLike, name: str) -> np.ndarray:
    """float64 [n,6..8] of rows as in the text files; any empty array gives [0,8].

    Raises:
      DataError: a bad shape or row; the message begins with ``name``.
    """
    rows = np.asarray(values, np.float64)
    if rows.size == 0:
        return np.zeros((0, 8))
    if rows.ndim != 2 or not 6 <= rows.shape[1] <= 8:
        raise DataError(f"{name}: shape {list(rows.shape)}, expected [n,6..8], {_COLUMNS}")
    bad = ~np.isfinite(rows[:, :6]).all(axis=1) | (rows[:, 2:4] < 0).any(axis=1) | ~np.isin(rows[:, 5], np.arange(12))
    if bad.any():
        index = int(np.argmax(bad))
        raise DataError(f"{name}: row {index}: {_problem(rows[index].tolist())}; expected {_COLUMNS}")
    return rows


def _problem(row: list[float]) -> str:
    """What is wrong with a row, empty if nothing is."""
    if not 6 <= len(row) <= 8:
        return "not 6 to 8 numbers"
    if not all(map(math.isfinite, row[:6])):
        return "a number that is not finite"
    if min(row[2:4]) < 0:
        return f"negative width or height {row[2]:g}, {row[3]:g}"
    if row[5] not in range(12):
        return f"category {row[5]:g}, not one of 0..11"
    return ""


def _without_nan(values: dict[str, float]) -> dict[str, float | None]:
    return {key: None if math.isnan(value) else value for key, value in values.items()}
