"""Compare whole and tiled inference on large pictures: `python -m benchmarks.large_pictures --help`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import tyro

import querydet_jax as qd
from querydet_jax.cli.process import run as run_process
from querydet_jax.config import Config, load_config
from querydet_jax.config.zoo import zoo_folder
from querydet_jax.data import Dataset, open_split
from querydet_jax.data.dataset import Annotation
from querydet_jax.evaluation.coco import ImageDetections
from querydet_jax.evaluation.overlap import iou, xywh
from querydet_jax.evaluation.scoring import score
from querydet_jax.inference.prediction import Prediction
from querydet_jax.inference.results import run_on_images
from querydet_jax.inference.tiling import Tiles, plan_windows, run_tiled
from querydet_jax.runtime import machine
from querydet_jax.runtime.errors import DataError
from querydet_jax.runtime.progress import progress
from querydet_jax.viz.text import text_table

_METRICS = ("AP", "AP50", "APs", "APm", "AR100")


@dataclass(frozen=True)
class LargePictures:
    """Put a data set's validation pictures side by side, detect in the large pictures whole and in windows, and score
    what is found on the validation pictures' own objects."""

    source: tyro.conf.Positional[str] = "hituav"
    """Run folder or packaged weights."""
    root: str = ""
    """Folder of the data set (default: the run's)."""
    rows: int = 4
    columns: int = 4
    overlaps: tuple[float, ...] = (0.0, 0.1, 0.2)
    pictures: int = 0
    """Use the first N large pictures only (0: all)."""


class Mosaic(Dataset):
    """Pictures of one size side by side, in their order; those left over are left out."""

    def __init__(self, parts: Dataset, rows: int, columns: int):
        self.parts, self.rows, self.columns = parts, rows, columns
        self.classes, self.category_ids = parts.classes, parts.category_ids
        self.cell = parts.size(0)
        for i in range(len(parts)):
            if parts.size(i) != self.cell:
                raise DataError(
                    f"{parts.file_name(i)}: {parts.size(i)}, the first picture is {self.cell}; give one size"
                )

    def __len__(self) -> int:
        return len(self.parts) // (self.rows * self.columns)

    def image_id(self, i: int) -> int:
        return i

    def file_name(self, i: int) -> str:
        return f"mosaic {i}"

    def size(self, i: int) -> tuple[int, int]:
        return self.cell[0] * self.rows, self.cell[1] * self.columns

    def cells(self, i: int) -> Iterator[tuple[int, int, int]]:
        """Yield each part's position, top and left."""
        for n in range(self.rows * self.columns):
            row, column = divmod(n, self.columns)
            yield i * self.rows * self.columns + n, row * self.cell[0], column * self.cell[1]

    def annotation(self, i: int) -> Annotation:
        found = [(self.parts.annotation(part), top, left) for part, top, left in self.cells(i)]
        return Annotation(
            np.concatenate([a.boxes + np.array([left, top, left, top], np.float32) for a, top, left in found]),
            np.concatenate([a.classes for a, _, _ in found]),
            np.concatenate([a.crowd for a, _, _ in found]),
        )

    def load(self, i: int) -> np.ndarray:
        out = np.zeros((*self.size(i), 3), np.uint8)
        for part, top, left in self.cells(i):
            out[top : top + self.cell[0], left : left + self.cell[1]] = self.parts.load(part)
        return out


@dataclass
class Counts:
    """Objects at the best scores: how many there are, are found, and found again; the same of those across a cut."""

    objects: int = 0
    found: int = 0
    again: int = 0
    cut: int = 0
    cut_found: int = 0
    wrong: int = 0
    parts: list[ImageDetections] = field(default_factory=list)


def large_pictures(arguments: LargePictures) -> None:
    """Print a table, a row for each way to look at the pictures."""
    path = str(zoo_folder(arguments.source) or arguments.source)
    changes = {"data.root": arguments.root} if arguments.root else {}
    config = load_config(path, changes)
    parts = open_split(config, "val", path)
    predictor = qd.load(arguments.source, changes)
    mosaic = Mosaic(parts, arguments.rows, arguments.columns)
    chosen = list(range(min(arguments.pictures or len(mosaic), len(mosaic))))
    cells = [part for i in chosen for part, _, _ in mosaic.cells(i)]
    print(
        f"{len(chosen)} pictures of {mosaic.size(0)[1]}x{mosaic.size(0)[0]} px from {len(cells)} of "
        f"{mosaic.cell[1]}x{mosaic.cell[0]}; {predictor.query}; {machine.one_line()}",
        flush=True,
    )
    scores = predictor.min_scores("best")
    alone = [
        ImageDetections(parts.image_id(x.index), x.boxes, x.scores, x.classes)
        for x in run_on_images(predictor.detector, parts, predictor.data, cells, maps=False)
    ]
    rows = [["each alone", "", *_accuracy(parts, alone, cells), *[""] * 5]]
    for name, tiles in [("whole", None), *((f"overlap {o:g}", Tiles(0, o)) for o in arguments.overlaps)]:
        if tiles is None:
            results = run_on_images(predictor.detector, mosaic, predictor.data, chosen, maps=False)
        else:
            results = run_tiled(
                predictor.detector, mosaic, predictor.data, tiles, min_scores=0.0, nms_iou=config.inference.nms_iou
            )
        counts = Counts()
        for _, result in zip(chosen, progress(results, name, "picture", total=len(chosen)), strict=False):
            _count(counts, mosaic, result, result.at_least(scores), tiles or Tiles(0, arguments.overlaps[-1]), config)
        windows = 1 if tiles is None else len(plan_windows(tiles, mosaic, 0, predictor.data))
        at_best = [counts.found, counts.objects, counts.again, counts.wrong]
        cut = f"{counts.cut_found} of {counts.cut}" if tiles else ""
        rows.append([name, str(windows), *_accuracy(parts, counts.parts, cells), *map(str, at_best), cut])
        header = ["picture", "windows", *_METRICS, "found", "objects", "again", "wrong", "across a cut"]
        print(f"\n{text_table(header, rows)}", flush=True)


def _accuracy(parts: Dataset, found: Sequence[ImageDetections], cells: list[int]) -> list[str]:
    metrics = score(parts, found, indices=cells, size_bins=()).coco.metrics
    return [f"{metrics[name]:.1f}" for name in _METRICS]


def _count(
    counts: Counts, mosaic: Mosaic, result: Prediction, certain: Prediction, tiles: Tiles, config: Config
) -> None:
    centres = (result.boxes[:, :2] + result.boxes[:, 2:]) / 2
    for part, top, left in mosaic.cells(result.index):
        inside = ((centres >= (left, top)) & (centres < (left + mosaic.cell[1], top + mosaic.cell[0]))).all(axis=1)
        limit = np.array([mosaic.cell[1], mosaic.cell[0]] * 2, np.float32)
        boxes = np.clip(result.boxes[inside] - np.array([left, top, left, top], np.float32), 0, limit)
        counts.parts.append(
            ImageDetections(mosaic.parts.image_id(part), boxes, result.scores[inside], result.classes[inside])
        )
    truth = mosaic.annotation(result.index)
    objects, classes = truth.boxes[~truth.crowd], truth.classes[~truth.crowd]
    overlap = iou(xywh(certain.boxes), xywh(objects))
    overlap = np.where(certain.classes[:, None] == classes, overlap, 0.0)
    taken = np.zeros(len(objects), bool)
    for row in overlap:  # the best first
        free = np.where(taken, 0.0, row)
        if len(row) and free.max() >= 0.5:
            taken[free.argmax()] = True
        elif len(row) and row.max() >= 0.5:
            counts.again += 1
        else:
            counts.wrong += 1
    grid = plan_windows(tiles, mosaic, result.index, config.data)
    cut = np.zeros(len(objects), bool)
    for axis in (0, 1):
        starts = grid.starts[axis]
        borders = np.concatenate([starts[1:], starts[:-1] + grid.window[axis]])
        low, high = objects[:, 1 - axis, None], objects[:, 3 - axis, None]
        cut |= ((low < borders) & (high > borders)).any(axis=1)
    counts.objects += len(objects)
    counts.found += int(taken.sum())
    counts.cut += int(cut.sum())
    counts.cut_found += int((cut & taken).sum())


if __name__ == "__main__":
    run_process(lambda: large_pictures(tyro.cli(LargePictures, description=LargePictures.__doc__)))
