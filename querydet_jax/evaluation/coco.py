"""COCO evaluation of boxes: convert detections to COCO results, and results to metrics.

pycocotools does the matching. Its summary is not used, because it looks up the headline AP at 100
detections per image even if other limits are set. The metrics are computed from its precision and
recall arrays; with the default limits they equal its summary.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from querydet_jax.evaluation.coco_input import annotations_of, detections_of, entries, restrict, select_ids
from querydet_jax.evaluation.curves import IOUS, Curves, Line, mean_lines
from querydet_jax.evaluation.metrics import DEFAULT_BINS, CocoMetrics, SizeBin, as_bins
from querydet_jax.runtime.errors import DataError
from querydet_jax.runtime.files import write_json

# COCO's area ranges include both ends: an object of exactly 32x32 is small and medium.
_COCO_AREAS = {"all": (0.0, 1e10), "s": (0.0, 32.0**2), "m": (32.0**2, 96.0**2), "l": (96.0**2, 1e10)}


@dataclass(frozen=True, eq=False)
class ImageDetections:
    """Detections of one image.

    Attributes:
      image_id: the image's id in the ground truth.
      boxes: float32 [n,4] xyxy, px of the original image.
      scores: float32 [n].
      classes: int [n], 0..K-1.

    Raises:
      DataError: the lengths differ, or boxes are not [n,4].
    """

    image_id: int
    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray

    def __post_init__(self) -> None:
        n = len(self.boxes)
        shapes = [np.shape(self.boxes), np.shape(self.scores), np.shape(self.classes)]
        if shapes != [(n, 4), (n,), (n,)]:
            raise DataError(
                f"image {self.image_id}: boxes, scores, classes of shapes {shapes}, expected [n,4], [n], [n]; "
                "remove the padding from all three"
            )


def to_coco_results(detections: Iterable[ImageDetections], category_ids: Sequence[int | None]) -> list[dict[str, Any]]:
    """Convert to COCO's list of results: ``image_id``, ``category_id``, ``bbox`` [x, y, w, h], ``score``.

    Args:
      detections: one entry per image.
      category_ids: the data set's category id of each class, [K]; detections of a class without one are left out.

    Raises:
      DataError: a class is outside 0..K-1.
    """
    results = []
    for image in detections:
        boxes = np.asarray(image.boxes, np.float64)
        classes = np.asarray(image.classes, np.int64)
        if classes.size and not (0 <= classes.min() and classes.max() < len(category_ids)):
            raise DataError(
                f"image {image.image_id}: classes {classes.min()}..{classes.max()}, but category_ids has "
                f"{len(category_ids)} entries; give one id per class of the model"
            )
        xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).tolist()
        for box, score, label in zip(xywh, np.asarray(image.scores).tolist(), classes.tolist(), strict=True):
            identifier = category_ids[label]
            if identifier is not None:
                results.append({"image_id": image.image_id, "category_id": identifier, "bbox": box, "score": score})
    return results


def save_results(path: str | Path, results: Sequence[dict[str, Any]]) -> None:
    """Write COCO results as JSON, atomically; create the folder if it is missing.

    Raises:
      DataError: a value cannot be stored as JSON, such as nan or an array.
    """
    try:
        write_json(path, results, default=_plain)
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: results not writable as JSON ({error}); see to_coco_results for the form") from None


def evaluate(
    ground_truth: dict[str, Any],
    results: Sequence[dict[str, Any]],
    *,
    max_detections: Sequence[int] = (1, 10, 100),
    size_bins: Iterable[tuple[float, float]] = DEFAULT_BINS,
    category_ids: Sequence[int] | None = None,
    image_ids: Sequence[int] | None = None,
) -> CocoMetrics:
    """Compute average precision and recall of boxes over IoU 0.50, 0.55 .. 0.95, averaged over categories.

    Neither input is modified.

    Args:
      ground_truth: content of a COCO file: ``images``, ``annotations``, ``categories``. A missing ``area``
        defaults to w*h of the box, a missing ``iscrowd`` to 0.
      results: COCO results, as from ``to_coco_results``.
      max_detections: limits on detections per image and category. AR is computed at each limit, all other
        metrics at the largest.
      size_bins: further ranges of sqrt(area) in px, ``low <= size < high``, for AP and AR; they may overlap.
        The size is the annotation's ``area``, which is that of the segment if the data set has segments.
      category_ids: evaluate these categories only.
      image_ids: evaluate these images only.

    Raises:
      DataError: ground truth or results are malformed, or an image or category id is not in the ground truth.
    """
    limits = sorted({int(limit) for limit in max_detections})
    if not limits or limits[0] < 1:
        raise DataError(f"max_detections: {tuple(max_detections)}, expected at least one number, each 1 or more")
    bins = as_bins(size_bins)
    images = entries(ground_truth, "images")
    categories = entries(ground_truth, "categories")
    truth = annotations_of(ground_truth, images, categories)
    found = detections_of(results, images, categories)

    chosen_images = select_ids(images, image_ids, "image_ids")
    chosen_categories = select_ids(categories, category_ids, "category_ids")
    truth = restrict(truth, chosen_images, chosen_categories)
    found = restrict(found, chosen_images, chosen_categories)

    areas = dict(_COCO_AREAS)
    for entry in bins:
        # pycocotools includes both ends; half-open bins count an object of exactly 16x16 once.
        areas[entry.key] = (entry.low**2, float(np.nextafter(entry.high**2, 0)) if entry.high < np.inf else np.inf)
    precision, recall = _run(chosen_images, chosen_categories, truth, found, areas, limits)

    objects = [item for item in truth if not item["iscrowd"]]
    notes = []
    if not chosen_images:
        notes.append("no images to evaluate, so every metric is undefined; check `images` of the ground truth")
    elif not objects:
        notes.append(
            f"no ground-truth objects in the {len(chosen_images)} images evaluated, so every metric is undefined; "
            "check `annotations`, image_ids and category_ids"
        )
    elif not found:
        notes.append("no detections in the images evaluated; check the score threshold")
    per_class = _by_class(chosen_categories, objects, precision, recall, list(areas))
    return CocoMetrics(
        metrics=_summary(precision, recall, areas, limits, bins),
        per_class=per_class,
        objects={key: sum(low <= item["area"] <= high for item in objects) for key, (low, high) in areas.items()},
        num_images=len(chosen_images),
        num_detections=len(found),
        curves=_curves(precision[:, :, :, 0, -1], per_class),
        size_bins=bins,
        notes=tuple(notes),
    )


def _run(
    images: dict[int, Any],
    categories: dict[int, Any],
    truth: list[dict[str, Any]],
    found: list[dict[str, Any]],
    areas: dict[str, tuple[float, float]],
    limits: list[int],
) -> tuple[np.ndarray, np.ndarray]:
    """Return pycocotools' precision [IoU, recall, category, area, limit] and recall [IoU, category, area, limit].

    Entries are -1 where there are no objects.
    """
    # pycocotools prints its progress.
    with contextlib.redirect_stdout(io.StringIO()):
        sets = []
        for annotations in (truth, found):
            coco = COCO()
            dataset: Any = {
                "images": list(images.values()),
                "categories": list(categories.values()),
                "annotations": annotations,
            }
            coco.dataset = dataset
            coco.createIndex()
            sets.append(coco)
        run = COCOeval(*sets, iouType="bbox")
        run.params.maxDets = limits
        run.params.areaRng = [list(pair) for pair in areas.values()]
        run.params.areaRngLbl = list(areas)
        # Sort as pycocotools does, so that axis 2 follows the order of `categories`.
        run.params.imgIds, run.params.catIds = sorted(images), sorted(categories)
        run.evaluate()
        run.accumulate()
    return run.eval["precision"], run.eval["recall"]


def _summary(
    precision: np.ndarray,
    recall: np.ndarray,
    areas: dict[str, tuple[float, float]],
    limits: list[int],
    bins: tuple[SizeBin, ...],
) -> dict[str, float]:
    index = {name: i for i, name in enumerate(areas)}
    out = {
        "AP": _mean(precision[:, :, :, 0, -1]),
        "AP50": _mean(precision[0, :, :, 0, -1]),
        "AP75": _mean(precision[5, :, :, 0, -1]),
    }
    out |= {f"AP{size}": _mean(precision[:, :, :, index[size], -1]) for size in "sml"}
    out |= {f"AR{limit}": _mean(recall[:, :, 0, i]) for i, limit in enumerate(limits)}
    out |= {f"AR{size}": _mean(recall[:, :, index[size], -1]) for size in "sml"}
    out |= {f"AP_{entry.key}": _mean(precision[:, :, :, index[entry.key], -1]) for entry in bins}
    out |= {f"AR_{entry.key}": _mean(recall[:, :, index[entry.key], -1]) for entry in bins}
    return out


def _by_class(
    categories: dict[int, Any],
    objects: list[dict[str, Any]],
    precision: np.ndarray,
    recall: np.ndarray,
    areas: list[str],
) -> dict[str, dict[str, float]]:
    counts = dict.fromkeys(categories, 0)
    for item in objects:
        counts[item["category_id"]] += 1
    names = [str(category.get("name", key)) for key, category in categories.items()]
    small = areas.index("s")
    out = {}
    for k, key in enumerate(categories):
        name = names[k] if names.count(names[k]) == 1 else f"{names[k]} ({key})"
        out[name] = {
            "AP": _mean(precision[:, :, k, 0, -1]),
            "AP50": _mean(precision[0, :, k, 0, -1]),
            "APs": _mean(precision[:, :, k, small, -1]),
            "AR": _mean(recall[:, k, 0, -1]),
            "objects": counts[key],
        }
    return out


def _curves(precision: np.ndarray, per_class: dict[str, dict[str, float]]) -> Curves:
    """Build the curves from precision [IoU, recall, category], which is -1 where a category has no object."""
    percent = np.where(precision > -1, 100.0 * precision, np.nan)
    known = [k for k, row in enumerate(per_class.values()) if row["objects"] > 0]
    means = percent[:, :, known].mean(axis=2) if known else np.full(percent.shape[:2], np.nan)
    return Curves(
        mean_lines({iou: (float(of_iou.mean()), of_iou) for iou, of_iou in zip(IOUS, means, strict=True)}),
        tuple(Line(name, "0.50", row["AP50"], percent[0, :, k]) for k, (name, row) in enumerate(per_class.items())),
    )


def _mean(values: np.ndarray) -> float:
    known = values[values > -1]
    return 100.0 * float(np.mean(known)) if known.size else float("nan")


def _plain(value: Any) -> Any:
    """Convert a NumPy scalar to a Python one, for json."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"contains a {type(value).__name__}")
