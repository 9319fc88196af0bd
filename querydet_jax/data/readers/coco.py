"""Read a folder of images with a COCO ``instances_*.json``; validate the annotations on opening."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections import Counter
from collections.abc import Collection
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import unquote

import numpy as np

from querydet_jax.data.classes import plain
from querydet_jax.data.coco_json import Annotation as Entry
from querydet_jax.data.coco_json import Instances, box_text, boxes_of, check_ids, positions_of, read_file
from querydet_jax.data.dataset import Annotation, Dataset
from querydet_jax.data.readers.folders import SUFFIXES, list_files, read_regular
from querydet_jax.data.readers.images import DEFAULT, Reading, check_header, read_image, try_headers
from querydet_jax.data.readers.orientation import decide, spread
from querydet_jax.data.readers.plausible import say_what_is_odd
from querydet_jax.data.transforms import MIN_SIDE
from querydet_jax.runtime.errors import DataError, shown
from querydet_jax.runtime.stores import as_path, is_url

_log = logging.getLogger("querydet_jax")

_SLACK = 2  # px that a box may reach beyond its image before that is said
_FRACTIONS = 8  # px; boxes of less than a pixel in larger images are fractions of their sides

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
      root: the folder that ``file_name`` may not lead out of, if that is above ``images``.
      outside_root: whether it may lead anywhere.

    Raises:
      DataError: the file or folder is missing, the JSON is damaged, or an entry is missing,
        contradictory or impossible.
    """

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path,
        *,
        reading: Reading = DEFAULT,
        root: str | Path | None = None,
        outside_root: bool = False,
    ):
        self._path, self._folder = as_path(annotations), as_path(images)
        if not self._path.exists():
            raise DataError(
                f"{self._path}: no such annotation file; correct data.root and data.train_annotations or "
                "val_annotations"
            )
        content = read_file(self._path, Instances)
        if not content.images:
            raise DataError(f"{self._path}: lists no images; check that this is the right annotation file")
        if not content.categories:
            raise DataError(f"{self._path}: lists no categories; add one per class")
        if not self._folder.is_dir():
            raise DataError(
                f"{self._folder}: no such image folder; correct data.root and data.train_images or val_images"
            )
        position = check_ids(content.images, f"{self._path}: images")
        self._ids = list(position)
        self._names = [image.file_name for image in content.images]
        self._say_listed_again()
        self._check_names(None if outside_root else {self._folder, as_path(root or self._folder)})
        self._sizes = [(image.height, image.width) for image in content.images]
        categories = sorted(content.categories, key=lambda category: category.id)
        self.category_ids = category_ids = tuple(check_ids(categories, f"{self._path}: categories"))
        self.classes = tuple(category.name for category in categories)
        self.origin = str(self._path)
        self._index(content.annotations, position, {identifier: k for k, identifier in enumerate(category_ids)})
        self._decide_orientation(reading, content.info)

    def _say_listed_again(self) -> None:
        counts = Counter(map(os.path.normpath, self._names))
        again = [name for name, count in counts.items() if count > 1]
        if again:
            _log.warning(
                "%s: %d files are listed more than once (first %s), each time as another image; list each once, with "
                "all its boxes", self._path, len(again), again[0],
            )  # fmt: skip

    def _check_names(self, folders: Collection[Path] | None) -> None:
        """Raise DataError for a name that no file can have, or that leads out of ``folders``; None allows any place."""
        above = {
            side
            for folder in folders or ()
            if not is_url(folder)
            for side in (os.path.abspath(folder), os.path.realpath(folder))
        }
        for n, name in enumerate(self._names):
            problem = ""
            if not _possible(name):
                problem = "which no file can have; give the file's name"
            elif folders is not None and (".." in name or os.path.isabs(name)):
                target = "" if is_url(self._folder) else self._place(name)
                if not any(Path(target).is_relative_to(folder) for folder in above):
                    problem = "outside the data set; move the picture below data.root, or set data.outside_root"
            if problem:
                raise DataError(f"{self._path}: images[{n}] has file_name {shown(name)}, {problem}")

    def _place(self, name: str) -> str:
        """Return the path of a name; its ``..`` lead upwards in the path as written, not where links point."""
        return os.path.normpath(os.path.join(os.path.abspath(self._folder), name))

    def _decide_orientation(self, reading: Reading, info: Any) -> None:
        looked_at = spread(len(self._ids))
        told = info.get(EXIF) if isinstance(info, dict) and info.get(EXIF) in ("apply", "ignore") else None
        rule = decide(
            str(self._path),
            reading.exif,
            try_headers([self._found(i) or self._folder / self._names[i] for i in looked_at], reading),
            convention=(told != "ignore", f"as info.{EXIF} says" if told else "most tools that read COCO apply it"),
            stated=[self._sizes[i] for i in looked_at],
            names=[self._names[i] for i in looked_at],
        )
        self.reading = dataclasses.replace(reading, decided=rule.upright)
        self.exif, self.exif_note = rule.name, rule.note

    def _index(self, entries: list[Entry], position: dict[int, int], k_of: dict[int, int]) -> None:
        """Collect the boxes of all images in one array, ordered by image, with each image's range."""
        where = f"{self._path}: annotations"
        check_ids(entries, where)
        owner = positions_of(entries, "image_id", position, where)
        classes = positions_of(entries, "category_id", k_of, where).astype(np.int32)
        boxes = boxes_of(entries, where)
        written = boxes.copy()
        boxes[:, 2:] += boxes[:, :2]
        sides = np.array(self._sizes, np.float64)[owner][:, ::-1]  # width, height
        if _with_area(boxes).any() and written.min() >= 0 and boxes.max() <= 1 and sides.min() > _FRACTIONS:
            raise DataError(f"{where}: every bbox lies within 0 and 1, as fractions do; give x, y, width, height in px")
        clipped = np.clip(boxes, 0, np.tile(sides, 2))
        kept = _with_area(boxes) & _with_area(clipped)
        outside = _with_area(boxes) & ((boxes[:, :2] >= sides) | (boxes[:, 2:] <= 0)).any(axis=1)
        if outside.any():
            n = int(np.argmax(outside))
            height, width = self._sizes[owner[n]]
            raise DataError(
                f"{where}[{n}] (id {entries[n].id}) has bbox {box_text(entries[n])} outside its image of "
                f"{width}x{height} (width x height); correct or remove it (boxes are x, y, width, height in pixels)"
            )
        say_what_is_odd(
            str(self._path), written, boxes, sides, np.stack([owner, classes], axis=1), _SLACK, "x, y, width, height"
        )
        if not kept.all():
            _log.warning(
                "%s: left out %d of %d boxes that have no width or no height",
                self._path, (~kept).sum(), len(kept),
            )  # fmt: skip
        self._entries = [entries[n] for n in np.flatnonzero(kept)]
        owner = owner[kept]
        self._order = order = np.argsort(owner, kind="stable")
        self._boxes, self._classes = clipped[kept][order].astype(np.float32), classes[kept][order]
        self._crowd = np.array([bool(entry.iscrowd) for entry in self._entries], bool)[order]
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

    def entries(self, i: int) -> list[Entry]:
        """Return the file's entries of the boxes of ``annotation(i)``; they are not clipped."""
        return [self._entries[n] for n in self._order[self._starts[i] : self._starts[i + 1]]]

    def image_path(self, i: int) -> Path:
        """Return the file of image i, also if its name differs in how accents are stored or in the suffix's case.

        Raises:
          DataError: there is none.
        """
        path, name = self._found(i), self._names[i]
        if path is not None:
            return path
        other = self._in_any_case.get(_key(name).casefold()) or self._by_last_part.get(_last_part(name))
        hint = f" (there is {other})" if other else ""
        if "\\" in name:
            hint = " (its name has backslashes; write / in their place)"
        raise DataError(
            f"{self._folder / name}: no such image file{hint}; restore it or remove its entry from {self._path}"
        )

    def _found(self, i: int) -> Path | None:
        name = self._names[i]
        if is_url(self._folder):  # one listing instead of a request a picture
            stored = name if name in self._stored else self._on_disk.get(_key(name))
            return None if stored is None else self._folder / stored
        path = Path(self._place(name)) if ".." in name else self._folder / name
        if os.path.exists(path):
            return path
        stored = self._on_disk.get(_key(name))
        return None if stored is None else self._folder / stored

    @functools.cached_property
    def _on_disk(self) -> dict[str, str]:
        return {_key(name): name for name in list_files(self._folder, SUFFIXES)}

    @functools.cached_property
    def _stored(self) -> frozenset[str]:
        return frozenset(self._on_disk.values())

    @functools.cached_property
    def _in_any_case(self) -> dict[str, str]:
        return {key.casefold(): name for key, name in self._on_disk.items()}

    @functools.cached_property
    def _by_last_part(self) -> dict[str, str]:
        counts = Counter(map(_last_part, self._on_disk.values()))
        return {part: name for name in self._on_disk.values() if counts[part := _last_part(name)] == 1}

    def load(self, i: int) -> np.ndarray:
        path = self.image_path(i)
        return read_image(path, str(path), self._sizes[i], self.reading)

    def encoded(self, i: int) -> bytes:
        return read_regular(self.image_path(i))

    def check_image(self, i: int) -> None:
        path = self.image_path(i)
        check_header(path, str(path), self._sizes[i], self.reading)

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
                "image_id": entry.image_id,
                "category_id": entry.category_id,
                "bbox": list(entry.bbox),
                "area": entry.size,
                "iscrowd": int(entry.iscrowd),
            }
            for number, entry in enumerate(self._entries, start=1)
        ]
        return {"images": images, "annotations": annotations, "categories": self._coco_categories()}


def _possible(name: str) -> bool:
    """Return whether a file can have this name: Linux takes 255 bytes per part and 4,095 in all."""
    try:
        parts = os.fsencode(name).split(b"/")
    except UnicodeEncodeError:
        return False
    return "\0" not in name and PurePath(name).name != "" and max(map(len, parts)) <= 255 and len(name) < 4000


def _key(name: str) -> str:
    """Return a file's name to compare: accents in one form, the suffix in lower case, no parts that change nothing."""
    path = PurePath(plain(name))
    return path.with_suffix(path.suffix.lower()).as_posix() if path.name else name


def _last_part(name: str) -> str:
    """Return the last part of a path or address in one case, for hints."""
    return plain(unquote(name).partition("?")[0].rpartition("/")[2]).casefold()


def _with_area(boxes: np.ndarray) -> np.ndarray:
    return np.all(boxes[:, 2:] - boxes[:, :2] > MIN_SIDE, axis=1)
