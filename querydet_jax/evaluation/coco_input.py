"""Check COCO ground truth and results and copy them into the form that pycocotools needs.

On invalid input pycocotools raises an assertion or KeyError, or returns wrong numbers. It also
modifies the dictionaries it receives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from querydet_jax.runtime.errors import DataError


def entries(ground_truth: dict[str, Any], key: str) -> dict[int, dict[str, Any]]:
    """Return {id: entry} of the list ``key``, in ascending order of id."""
    entries = ground_truth.get(key) if isinstance(ground_truth, dict) else None
    if not isinstance(entries, list) or any(not isinstance(e, dict) or "id" not in e for e in entries):
        raise DataError(f"ground truth: `{key}` is not a list of entries with an id; give a COCO annotation file")
    out = {entry["id"]: entry for entry in entries}
    if len(out) < len(entries):
        raise DataError(f"ground truth: `{key}` has an id twice; make the ids unique")
    return dict(sorted(out.items()))


def select_ids(known: dict[int, Any], ids: Sequence[int] | None, name: str) -> dict[int, Any]:
    if ids is None:
        return known
    unknown = sorted(set(ids) - set(known), key=str)
    if unknown:
        raise DataError(f"{name}: {_listed(unknown)} not in the ground truth; give ids from the annotation file")
    wanted = set(ids)
    return {key: entry for key, entry in known.items() if key in wanted}


def restrict(items: list[dict[str, Any]], images: dict[int, Any], categories: dict[int, Any]) -> list[dict[str, Any]]:
    return [item for item in items if item["image_id"] in images and item["category_id"] in categories]


def annotations_of(
    ground_truth: dict[str, Any], images: dict[int, Any], categories: dict[int, Any]
) -> list[dict[str, Any]]:
    """Return the annotations as new dictionaries with ids from 1.

    pycocotools marks an unmatched detection with annotation id 0, so a match with an annotation
    whose id is 0 would count as a false positive.
    """
    annotations = ground_truth.get("annotations", [])
    if not isinstance(annotations, list):
        raise DataError("ground truth: `annotations` is not a list; give a COCO annotation file")
    out = []
    for index, item in enumerate(annotations):
        where = f"ground truth: annotation {item.get('id', index) if isinstance(item, dict) else index}"
        box = _checked(item, images, categories, where, ("image_id", "category_id", "bbox"))
        area = item.get("area")
        out.append(
            {
                "id": index + 1,
                "image_id": item["image_id"],
                "category_id": item["category_id"],
                "bbox": box,
                "area": box[2] * box[3] if area is None else float(area),
                "iscrowd": int(item.get("iscrowd") or 0),
            }
        )
    return out


def detections_of(
    results: Sequence[dict[str, Any]], images: dict[int, Any], categories: dict[int, Any]
) -> list[dict[str, Any]]:
    for key, known, name in (("image_id", images, "image"), ("category_id", categories, "category")):
        unknown = sorted(
            {item[key] for item in results if isinstance(item, dict) and key in item} - set(known), key=str
        )
        if unknown:
            raise DataError(
                f"results: {name} id {_listed(unknown)} not in the ground truth; evaluate against the annotation "
                f"file of the data set that was detected on"
            )
    out = []
    for index, item in enumerate(results):
        where = f"results: entry {index}"
        box = _checked(item, images, categories, where, ("image_id", "category_id", "bbox", "score"))
        score = float(item["score"])
        if not np.isfinite(score):
            raise DataError(f"{where}: score {score} is not finite; fix the detector or remove the entry")
        out.append(
            {
                "id": index + 1,
                "image_id": item["image_id"],
                "category_id": item["category_id"],
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
                "score": score,
            }
        )
    return out


def _checked(
    item: Any, images: dict[int, Any], categories: dict[int, Any], where: str, keys: tuple[str, ...]
) -> list[float]:
    """Check the entry's fields and ids; return its box as four finite floats."""
    missing = [key for key in keys if key not in item] if isinstance(item, dict) else list(keys)
    if missing:
        raise DataError(f"{where}: lacks {', '.join(missing)}; every entry needs {', '.join(keys)}")
    for key, known in (("image_id", images), ("category_id", categories)):
        if item[key] not in known:
            raise DataError(f"{where}: {key} {item[key]} is not listed in the ground truth; add it or remove the entry")
    try:
        box = [float(value) for value in item["bbox"]]
    except (TypeError, ValueError):
        box = []
    if len(box) != 4 or not np.isfinite(box).all() or box[2] < 0 or box[3] < 0:
        raise DataError(f"{where}: bbox {item['bbox']}, expected four finite numbers x, y, w, h with w, h >= 0")
    return box


def _listed(ids: Sequence[Any]) -> str:
    return ", ".join(map(str, ids[:5])) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
