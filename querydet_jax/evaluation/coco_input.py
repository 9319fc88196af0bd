"""Check COCO ground truth and results and copy them into the form that pycocotools needs.

On invalid input pycocotools raises an assertion or KeyError, or returns wrong numbers. It also
modifies the dictionaries it receives.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from msgspec import Struct

from querydet_jax.data.coco_json import ClassName, Id, Result, Truth, boxes_of, check_ids, positions_of
from querydet_jax.runtime.errors import DataError, shown


class ImageId(Struct, gc=False):
    id: Id
    file_name: Any = None  # only pictures of errors need it


class NamedId(Struct, gc=False):
    id: Id
    name: ClassName = ""


class GroundTruth(Struct):
    """What evaluation reads of an annotation file."""

    images: list[ImageId]
    categories: list[NamedId]
    annotations: list[Truth] = []


def select_ids(known: Collection[int], ids: Iterable[int] | None, name: str) -> list[int]:
    """Return the ids of ``known`` that are among ``ids``, ascending; None selects all."""
    if ids is None:
        return sorted(known)
    try:
        wanted = set(ids)
    except TypeError:
        raise DataError(f"{name}: {shown(ids)} is not a list of ids; give ids from the annotation file") from None
    unknown = sorted(wanted - set(known), key=str)
    if unknown:
        raise DataError(f"{name}: {_listed(unknown)} not in the ground truth; give ids from the annotation file")
    return sorted(set(known) & wanted)


def annotations_of(truth: GroundTruth, where: str) -> list[dict[str, Any]]:
    """Return the annotations as dictionaries with ids from 1.

    pycocotools marks an unmatched detection with annotation id 0, so a match with an annotation
    whose id is 0 would count as a false positive.
    """
    items, at = truth.annotations, f"{where}: annotations"
    positions_of(items, "image_id", check_ids(truth.images, f"{where}: images"), at)
    positions_of(items, "category_id", check_ids(truth.categories, f"{where}: categories"), at)
    boxes_of(items, at)
    return [
        {
            "id": number,
            "image_id": item.image_id,
            "category_id": item.category_id,
            "bbox": list(item.bbox),
            "area": item.size,
            "iscrowd": int(item.iscrowd),
        }
        for number, item in enumerate(items, start=1)
    ]


def detections_of(results: Sequence[Result], truth: GroundTruth, where: str) -> list[dict[str, Any]]:
    for key, known in (("image", truth.images), ("category", truth.categories)):
        unknown = sorted({getattr(item, f"{key}_id") for item in results} - {entry.id for entry in known})
        if unknown:
            raise DataError(
                f"{where}: {key} id {_listed(unknown)} not in the ground truth; evaluate against the annotation "
                f"file of the data set that was detected on"
            )
    boxes_of(results, where)
    return [
        {
            "id": number,
            "image_id": item.image_id,
            "category_id": item.category_id,
            "bbox": list(item.bbox),
            "area": item.bbox[2] * item.bbox[3],
            "iscrowd": 0,
            "score": item.score,
        }
        for number, item in enumerate(results, start=1)
    ]


def _listed(ids: Sequence[Any]) -> str:
    return ", ".join(map(shown, ids[:5])) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
