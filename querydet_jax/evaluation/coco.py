"""COCO evaluation of boxes: convert detections to COCO results, and results to metrics.

pycocotools does the matching (``judges``). Its summary is not used, because it looks up the headline
AP at 100 detections per image even if other limits are set. The metrics are computed from its precision
and recall arrays; with the default limits they equal its summary.
"""

from __future__ import annotations

import collections
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from querydet_jax.data.coco_json import Result, check_content, check_entries
from querydet_jax.evaluation.coco_input import GroundTruth, annotations_of, detections_of, select_ids
from querydet_jax.evaluation.curves import IOUS, Curves, Line, mean_lines
from querydet_jax.evaluation.judges import Judge, run_judge
from querydet_jax.evaluation.metrics import DEFAULT_BINS, CocoMetrics, SizeBin, as_bins, as_numbers
from querydet_jax.evaluation.thresholds import best_threshold
from querydet_jax.runtime.errors import DataError, QueryDetError, shown
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
      DataError: the lengths differ, boxes are not [n,4], or a value is impossible: not finite, an end before its
        begin, a class that is no whole number.
    """

    image_id: int
    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray

    def __post_init__(self) -> None:
        who = f"image {shown(self.image_id)}"
        if not isinstance(self.image_id, (int, np.integer)) or isinstance(self.image_id, bool):
            raise DataError(f"{who}: is not an integer id; give the image's id in the ground truth")
        boxes, scores, classes = (
            as_numbers(getattr(self, name), f"{who}: {name}") for name in ("boxes", "scores", "classes")
        )
        n, shapes = boxes.shape[:1], [boxes.shape, scores.shape, classes.shape]
        if shapes != [(*n, 4), n, n]:
            raise DataError(
                f"{who}: boxes, scores, classes of shapes {shapes}, expected [n,4], [n], [n]; "
                "remove the padding from all three"
            )
        for name, fine, problem in (
            ("boxes", np.isfinite(boxes), "not finite; give x0, y0, x1, y1 in px"),
            ("boxes", boxes[:, 2:] >= boxes[:, :2], "that end before they begin; give x0, y0, x1, y1 in px"),
            ("scores", np.isfinite(scores), "not finite; remove these detections"),
            ("classes", np.isfinite(classes) & (classes == np.rint(classes)), "not whole numbers; give 0..K-1"),
        ):
            if not fine.all():
                raise DataError(f"{who}: {name} hold values {problem}")


def to_coco_results(detections: Iterable[ImageDetections], category_ids: Sequence[int | None]) -> list[dict[str, Any]]:
    """Convert to COCO's list of results: ``image_id``, ``category_id``, ``bbox`` [x, y, w, h], ``score``.

    Args:
      detections: one entry per image.
      category_ids: the data set's category id of each class, [K]; detections of a class without one are left out.

    Raises:
      DataError: a class is outside 0..K-1.
    """
    if not all(i is None or (isinstance(i, (int, np.integer)) and not isinstance(i, bool)) for i in category_ids):
        raise DataError(f"category_ids: {shown(category_ids)}, expected an integer id, or None, per class")
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
                results.append(
                    {"image_id": int(image.image_id), "category_id": int(identifier), "bbox": box, "score": score}
                )
    return results


def save_results(path: str | Path, results: Sequence[dict[str, Any]]) -> None:
    """Write COCO results as JSON, atomically; create the folder if it is missing.

    Raises:
      DataError: an entry is malformed, or holds a value that cannot be stored as JSON, such as nan or an array.
    """
    check_entries(results, Result, f"{path}: results")
    try:
        write_json(path, results, default=_plain)
    except QueryDetError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: results not writable as JSON ({error}); see to_coco_results for the form") from None


def evaluate(
    ground_truth: Mapping[str, Any] | GroundTruth,
    results: Sequence[Mapping[str, Any] | Result],
    *,
    max_detections: Sequence[int] = (1, 10, 100),
    size_bins: Iterable[tuple[float, float]] = DEFAULT_BINS,
    recall_at: Sequence[int] = (),
    category_ids: Sequence[int] | None = None,
    image_ids: Sequence[int] | None = None,
    names: tuple[str, str] = ("ground truth", "results"),
    judge: Judge = "pycocotools",
) -> CocoMetrics:
    """Compute average precision and recall of boxes over IoU 0.50, 0.55 .. 0.95, averaged over categories.

    Neither input is modified.

    Args:
      ground_truth: content of a COCO file: ``images``, ``annotations``, ``categories``. A missing ``area``
        defaults to w*h of the box, a missing ``iscrowd`` to 0.
      results: COCO results, as from ``to_coco_results``.
      max_detections: limits on detections per image and category. AR is computed at each limit, all other
        metrics at the largest.
      recall_at: further limits, at which only AR is computed.
      size_bins: further ranges of sqrt(area) in px, ``low <= size < high``, for AP and AR; they may overlap.
        The size is the annotation's ``area``, which is that of the segment if the data set has segments.
      category_ids: evaluate these categories only.
      image_ids: evaluate these images only.
      names: what messages call ground truth and results, such as their files.
      judge: pycocotools, which published figures come from; or hotcoco, which is faster and gives the same.

    Raises:
      ConfigError: see ``check_judge``.
      DataError: ground truth or results are malformed, or an image or category id is not in the ground truth.
    """
    content = check_content(ground_truth, GroundTruth, names[0])
    entries = check_entries(results, Result, names[1])
    headline = _limits(max_detections, "max_detections")
    if not headline:
        raise DataError("max_detections: (), expected at least one number, each 1 or more")
    limits = sorted({*headline, *_limits(recall_at, "recall_at")})
    at = limits.index(headline[-1])
    bins = as_bins(size_bins)
    truth, found = annotations_of(content, names[0]), detections_of(entries, content, names[1])
    images = select_ids({image.id for image in content.images}, image_ids, "image_ids")
    labels = {category.id: category.name or str(category.id) for category in content.categories}
    categories = {i: labels[i] for i in select_ids(labels, category_ids, "category_ids")}
    truth, found = (_restricted(items, images, categories) for items in (truth, found))

    areas = dict(_COCO_AREAS)
    for entry in bins:
        # pycocotools includes both ends; half-open bins count an object of exactly 16x16 once.
        areas[entry.key] = (entry.low**2, float(np.nextafter(entry.high**2, 0)) if entry.high < np.inf else np.inf)
    judged = run_judge(judge, images, list(categories), truth, found, areas, limits)
    all_recall = judged.recall[:, :, 0]
    precision, recall = judged.precision[..., at], judged.recall[..., at]

    objects = [item for item in truth if not item["iscrowd"]]
    notes = []
    if not images:
        notes.append("no images to evaluate, so every metric is undefined; check `images` of the ground truth")
    elif not objects:
        notes.append(
            f"no ground-truth objects in the {len(images)} images evaluated, so every metric is undefined; "
            "check `annotations`, image_ids and category_ids"
        )
    elif not found:
        notes.append("no detections in the images evaluated; check the score threshold")
    per_class = _by_class(categories, objects, precision, recall, list(areas))
    best = [best_threshold(*judged.counted(k, headline[-1])) for k in range(len(categories))]
    return CocoMetrics(
        metrics=_summary(precision, recall, {limit: all_recall[..., i] for i, limit in enumerate(limits)}, areas, bins),
        per_class=per_class,
        objects={key: sum(low <= item["area"] <= high for item in objects) for key, (low, high) in areas.items()},
        num_images=len(images),
        num_detections=len(found),
        curves=_curves(precision[..., 0], per_class),
        best=dict(zip(per_class, best, strict=True)),
        size_bins=bins,
        notes=tuple(notes),
    )


def _limits(values: Sequence[int], name: str) -> list[int]:
    try:
        limits = sorted(set(map(operator.index, values)))
    except TypeError:
        limits = [0]
    if limits and limits[0] < 1:
        raise DataError(f"{name}: {shown(values)}, expected whole numbers, each 1 or more")
    return limits


def _restricted(
    items: list[dict[str, Any]], images: Sequence[int], categories: Mapping[int, str]
) -> list[dict[str, Any]]:
    kept = set(images)
    return [item for item in items if item["image_id"] in kept and item["category_id"] in categories]


def _summary(
    precision: np.ndarray,
    recall: np.ndarray,
    recall_at: dict[int, np.ndarray],
    areas: dict[str, tuple[float, float]],
    bins: tuple[SizeBin, ...],
) -> dict[str, float]:
    """Average precision [IoU, recall, class, area], recall [IoU, class, area] and {limit: recall [IoU, class]}."""
    index = {name: i for i, name in enumerate(areas)}
    out = {
        "AP": _mean(precision[:, :, :, 0]),
        "AP50": _mean(precision[0, :, :, 0]),
        "AP75": _mean(precision[5, :, :, 0]),
    }
    out |= {f"AP{size}": _mean(precision[:, :, :, index[size]]) for size in "sml"}
    out |= {f"AR{limit}": _mean(values) for limit, values in recall_at.items()}
    out |= {f"AR{size}": _mean(recall[:, :, index[size]]) for size in "sml"}
    out |= {f"AP_{entry.key}": _mean(precision[:, :, :, index[entry.key]]) for entry in bins}
    out |= {f"AR_{entry.key}": _mean(recall[:, :, index[entry.key]]) for entry in bins}
    return out


def _by_class(
    categories: Mapping[int, str],
    objects: list[dict[str, Any]],
    precision: np.ndarray,
    recall: np.ndarray,
    areas: list[str],
) -> dict[str, dict[str, float]]:
    counts = collections.Counter(item["category_id"] for item in objects)
    names = collections.Counter(categories.values())
    small = areas.index("s")
    return {
        name if names[name] == 1 else f"{name} ({key})": {
            "AP": _mean(precision[:, :, k, 0]),
            "AP50": _mean(precision[0, :, k, 0]),
            "APs": _mean(precision[:, :, k, small]),
            "AR": _mean(recall[:, k, 0]),
            "objects": counts[key],
        }
        for k, (key, name) in enumerate(categories.items())
    }


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
