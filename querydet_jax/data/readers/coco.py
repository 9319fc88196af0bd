"""Read a folder of images with a COCO ``instances_*.json``; validate the annotations on opening."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import os
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from querydet_jax.data.classes import plain
from querydet_jax.data.dataset import Annotation, Dataset
from querydet_jax.data.readers.folders import SUFFIXES, list_files, near
from querydet_jax.data.readers.images import DEFAULT, Reading, headers_if_readable, read_image
from querydet_jax.data.readers.orientation import decide, spread
from querydet_jax.data.transforms import MIN_SIDE
from querydet_jax.runtime.errors import DataError
from querydet_jax.runtime.reading import read_json

_log = logging.getLogger("querydet_jax")

# Key in info of files that this package writes: whether boxes are drawn on turned pictures ("apply" or "ignore").
EXIF = "exif"


class CocoDataset(Dataset):
    """Images and boxes of a COCO annotation file.

    Classes are the categories in the order of their ids, which need not be contiguous. Boxes are
    clipped to the image, boxes without area are dropped (one warning gives their number), crowd
    boxes are kept and marked. Segmentations and key points are not read. Opening only checks that
    the image folder exists; ``load`` checks each file.

    Args:
      annotations: the JSON file.
      images: the folder that its ``file_name`` entries are relative to.
      reading: how files become pixels.

    Raises:
      DataError: the file or folder is missing, the JSON is damaged, or an entry is missing,
        contradictory or impossible.
    """

    def __init__(self, annotations: str | Path, images: str | Path, *, reading: Reading = DEFAULT):
        self._path, self._folder = Path(annotations), Path(images)
        content = _read(self._path)
        if not self._folder.is_dir():
            raise DataError(
                f"{self._folder}: no such image folder; correct data.root and data.train_images or val_images"
            )
        self._ids, self._names, self._sizes = _images(content["images"], self._path)
        self._categories = _categories(content["categories"], self._path)
        self.category_ids = category_ids = tuple(c["id"] for c in self._categories)
        self.classes = tuple(c["name"] for c in self._categories)
        self.origin = str(self._path)
        self._entries = _annotations(content["annotations"], self._path, self._ids, self._sizes, category_ids)
        self._index()
        self._decide_orientation(reading, content.get("info"))

    def _decide_orientation(self, reading: Reading, info: Any) -> None:
        looked_at = spread(len(self._ids))
        told = info.get(EXIF) if isinstance(info, dict) and info.get(EXIF) in ("apply", "ignore") else None
        rule = decide(
            str(self._path),
            reading.exif,
            headers_if_readable([self._found(i) for i in looked_at], reading),
            convention=(told != "ignore", f"as info.{EXIF} says" if told else "most tools that read COCO apply it"),
            stated=[self._sizes[i] for i in looked_at],
            names=[self._names[i] for i in looked_at],
        )
        self.reading, self.exif_note = dataclasses.replace(reading, upright=rule.upright), rule.note

    def _index(self) -> None:
        """Collect the boxes of all images in one array, ordered by image, with each image's range."""
        position = {identifier: i for i, identifier in enumerate(self._ids)}
        k_of = {identifier: k for k, identifier in enumerate(self.category_ids)}
        owner = np.array([position[e["image_id"]] for e in self._entries], np.int64)
        self._order = order = np.argsort(owner, kind="stable")
        boxes = np.array([e["bbox"] for e in self._entries], np.float64).reshape(-1, 4)[order]
        boxes[:, 2:] += boxes[:, :2]
        h, w = np.array(self._sizes, np.float64)[owner[order]].T
        limits = np.stack([w, h, w, h], axis=1)
        self._boxes = np.clip(boxes, 0, limits).astype(np.float32)
        self._classes = np.array([k_of[e["category_id"]] for e in self._entries], np.int32)[order]
        self._crowd = np.array([bool(e.get("iscrowd", 0)) for e in self._entries], bool)[order]
        self._starts = np.searchsorted(owner[order], np.arange(len(self._ids) + 1))

    def __len__(self) -> int:
        return len(self._ids)

    def image_id(self, i: int) -> int:
        return self._ids[i]

    def file_name(self, i: int) -> str:
        return self._names[i]

    def size(self, i: int) -> tuple[int, int]:
        return self._sizes[i]

    def annotation(self, i: int) -> Annotation:
        part = slice(self._starts[i], self._starts[i + 1])
        return Annotation(self._boxes[part], self._classes[part], self._crowd[part])

    def entries(self, i: int) -> list[dict[str, Any]]:
        """Return the file's entries of the boxes of ``annotation(i)``: id, image_id, category_id, bbox, area, iscrowd.

        Boxes are not clipped; area and iscrowd are present only if the file has them.
        """
        return [self._entries[n] for n in self._order[self._starts[i] : self._starts[i + 1]]]

    def image_path(self, i: int) -> Path:
        """Return the file of image i, also if its name differs in how accents are stored or in the suffix's case.

        Raises:
          DataError: there is none.
        """
        path, name = self._found(i), self._names[i]
        if path is not None:
            return path
        hint = near(plain(name), self._on_disk.values())
        if "\\" in name:
            hint = " (its name has backslashes; write / in their place)"
        raise DataError(
            f"{self._folder / name}: no such image file{hint}; restore it or remove its entry from {self._path}"
        )

    def _found(self, i: int) -> Path | None:
        path = self._folder / self._names[i]
        if os.path.exists(path):
            return path
        name = self._on_disk.get(_key(self._names[i]))
        return None if name is None else self._folder / name

    @functools.cached_property
    def _on_disk(self) -> dict[str, str]:
        return {_key(name): name for name in list_files(self._folder, SUFFIXES)}

    def load(self, i: int) -> np.ndarray:
        path = self.image_path(i)
        return read_image(path, str(path), self._sizes[i], self.reading)

    def coco_ground_truth(self) -> dict[str, Any]:
        """Return the ground truth with the file's own boxes, not clipped, and areas (of segmentations, if present).

        Scores then equal those computed from the file itself.
        """
        images = [
            {"id": identifier, "file_name": name, "height": h, "width": w}
            for identifier, name, (h, w) in zip(self._ids, self._names, self._sizes, strict=True)
        ]
        annotations = [
            {
                "id": number,
                "image_id": e["image_id"],
                "category_id": e["category_id"],
                "bbox": list(e["bbox"]),
                "area": e.get("area", e["bbox"][2] * e["bbox"][3]),
                "iscrowd": int(e.get("iscrowd", 0)),
            }
            for number, e in enumerate(self._entries, start=1)
        ]
        return {"images": images, "annotations": annotations, "categories": list(self._categories)}


def _key(name: str) -> str:
    """Return a file's name to compare: accents in one form, the suffix in lower case, no parts that change nothing."""
    path = PurePath(plain(name))
    return path.with_suffix(path.suffix.lower()).as_posix() if path.name else name


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise DataError(
            f"{path}: no such annotation file; correct data.root and data.train_annotations or val_annotations"
        )
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a COCO annotation file (the top level is not an object); export it as COCO json")
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list):
            raise DataError(
                f"{path}: has no list {key!r}; a COCO annotation file needs images, annotations, categories"
            )
    return content


def _entries(items: list[Any], path: Path, kind: str, keys: tuple[str, ...]) -> None:
    """Check that every entry is an object with ``keys`` and a unique integer ``id``."""
    seen: dict[int, int] = {}
    for n, item in enumerate(items):
        if not isinstance(item, dict):
            raise DataError(f"{path}: {kind}[{n}] is not an object; remove or correct the entry")
        for key in keys:
            if key not in item:
                raise DataError(f"{path}: {kind}[{n}] has no {key!r}; add it or remove the entry")
        identifier = item["id"]
        if not isinstance(identifier, int) or isinstance(identifier, bool):
            raise DataError(f"{path}: {kind}[{n}] has id {identifier!r}; give every entry an integer id")
        if identifier in seen:
            raise DataError(
                f"{path}: {kind}[{n}] has the same id {identifier} as {kind}[{seen[identifier]}]; make the ids unique"
            )
        seen[identifier] = n


def _images(items: list[Any], path: Path) -> tuple[list[int], list[str], list[tuple[int, int]]]:
    if not items:
        raise DataError(f"{path}: lists no images; check that this is the right annotation file")
    _entries(items, path, "images", ("id", "file_name", "width", "height"))
    sizes = []
    for n, item in enumerate(items):
        if not isinstance(item["file_name"], str) or not item["file_name"]:
            raise DataError(f"{path}: images[{n}] has file_name {item['file_name']!r}; give the file's name as text")
        for key in ("width", "height"):
            value = item[key]
            if not _is_finite(value) or value < 1 or int(value) != value:
                raise DataError(f"{path}: images[{n}] has {key} {value!r}; give the image's {key} in whole pixels")
        sizes.append((int(item["height"]), int(item["width"])))
    return [item["id"] for item in items], [item["file_name"] for item in items], sizes


def _categories(items: list[Any], path: Path) -> list[dict[str, Any]]:
    if not items:
        raise DataError(f"{path}: lists no categories; add one per class")
    _entries(items, path, "categories", ("id", "name"))
    for n, item in enumerate(items):
        if not isinstance(item["name"], str):
            raise DataError(f"{path}: categories[{n}] has name {item['name']!r}; give the class name as text")
    return sorted(({"id": c["id"], "name": c["name"]} for c in items), key=lambda c: c["id"])


def _annotations(
    items: list[Any],
    path: Path,
    image_ids: list[int],
    sizes: list[tuple[int, int]],
    category_ids: tuple[int, ...],
) -> list[dict[str, Any]]:
    """Validate the annotations; return those whose boxes have an area, reduced to the fields that are read."""
    _entries(items, path, "annotations", ("id", "image_id", "category_id", "bbox"))
    size_of = dict(zip(image_ids, sizes, strict=True))
    categories = set(category_ids)
    kept, empty = [], 0
    for n, item in enumerate(items):
        where = f"{path}: annotations[{n}] (id {item['id']})"
        if not isinstance(item["image_id"], int) or item["image_id"] not in size_of:
            raise DataError(f"{where} has image_id {item['image_id']!r}, which no image has; correct or remove it")
        if not isinstance(item["category_id"], int) or item["category_id"] not in categories:
            raise DataError(f"{where} has category_id {item['category_id']!r}, which no category has; correct it")
        bbox = item["bbox"]
        if not isinstance(bbox, list) or len(bbox) != 4 or not all(_is_finite(v) for v in bbox):
            raise DataError(f"{where} has bbox {bbox!r}; give four finite numbers x, y, width, height")
        x, y, w, h = bbox
        if w < 0 or h < 0:
            raise DataError(f"{where} has bbox {bbox!r} of negative width or height; give x, y, width, height")
        if w <= MIN_SIDE or h <= MIN_SIDE:
            empty += 1
            continue
        height, width = size_of[item["image_id"]]
        if x >= width or y >= height or x + w <= 0 or y + h <= 0:
            raise DataError(
                f"{where} has bbox {bbox!r} outside its image of {width}x{height} (width x height); "
                "correct or remove it (boxes are x, y, width, height in pixels)"
            )
        if min(x + w, width) - max(x, 0) <= MIN_SIDE or min(y + h, height) - max(y, 0) <= MIN_SIDE:
            empty += 1
            continue
        if item.get("iscrowd", 0) not in (0, 1):
            raise DataError(f"{where} has iscrowd {item['iscrowd']!r}; give 0 or 1")
        if "area" in item and not _is_finite(item["area"]):
            raise DataError(f"{where} has area {item['area']!r}; give a finite number or leave it out")
        kept.append({k: item[k] for k in ("id", "image_id", "category_id", "bbox", "area", "iscrowd") if k in item})
    if empty:
        _log.warning("%s: left out %d of %d boxes that have no width or no height", path, empty, len(items))
    return kept


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
