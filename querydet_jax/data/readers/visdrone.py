"""Read VisDrone2019-DET as distributed: one folder per split, with ``images/`` and ``annotations/``.

An annotation file has one line per object, eight integers: left, top, width, height in pixels, score,
category, truncation, occlusion. In ground truth, score 1 marks objects that evaluation counts and 0
those it ignores. Category 0 is an ignored region, 1..10 are ``CLASSES`` in order, 11 is other
objects. ``rows`` below hold these columns as int32 [n, 8].
"""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path

import numpy as np

from querydet_jax.data.dataset import Annotation, Dataset
from querydet_jax.data.readers.folders import SUFFIXES, by_stem, near, read_regular
from querydet_jax.data.readers.images import DEFAULT, Reading, read_headers, read_image
from querydet_jax.data.readers.orientation import decide
from querydet_jax.data.transforms import clip
from querydet_jax.runtime.errors import DataError
from querydet_jax.runtime.reading import read_text
from querydet_jax.runtime.stores import as_path

_log = logging.getLogger("querydet_jax")

CLASSES = (
    "pedestrian", "people", "bicycle", "car", "van", "truck", "tricycle", "awning-tricycle", "bus", "motor",
)  # fmt: skip
OTHERS = 11  # category of objects outside the ten classes
PATCHES = 4  # per image: top left, top right, bottom left, bottom right
PREPARED = "instances.json"  # file that marks a folder written by `querydet prepare visdrone`

_COLUMNS = "left,top,width,height,score,category,truncation,occlusion"
_INTEGER = r"\s*(-?[0-9]{1,9})\s*"
_LINE = re.compile(",".join([_INTEGER] * 8) + r",?\s*")  # 34 of the official lines end in a comma


class VisDroneDataset(Dataset):
    """A split folder of VisDrone, or the quarters of its images.

    Boxes are those of ``training_rows``, clipped to the image; boxes without area are dropped (one
    warning gives their number). The COCO ground truth has no crowd boxes and no ignored regions, so
    there a detection inside an ignored region counts as false. Only the official evaluation, which
    reads ``official_truth``, ignores it. As in the official tools, EXIF orientation is not applied by default.
    Images, or patches, are sorted by name, and image ids count from 1 in this order.

    With ``patches``, entries 4 i .. 4 i + 3 are the four patches of image i, cut as in
    ``visdrone/data_prepare.py`` of the published code. Each load decodes the whole image, so an epoch
    decodes it four times; ``querydet prepare visdrone`` writes the patches once.

    Args:
      folder: the split's folder, with ``images/`` and ``annotations/``.
      patches: whether to serve the quarters as the images.
      reading: how files become pixels.

    Raises:
      DataError: a folder is missing or empty; an image has no annotation file or the reverse; two
        images differ only in suffix; a line is malformed; a file is not an image; ``patches`` is set
        for a folder that already holds patches.
    """

    classes = CLASSES
    category_ids = tuple(range(1, len(CLASSES) + 1))

    def __init__(self, folder: str | Path, *, patches: bool = False, reading: Reading = DEFAULT):
        self.folder, self.patches, self.origin = as_path(folder), patches, str(folder)
        for name in ("images", "annotations"):
            if not (self.folder / name).is_dir():
                raise DataError(
                    f"{self.folder / name}: no such folder; give a split folder of VisDrone with images/ and "
                    "annotations/ (data.root, data.train_images or val_images)"
                )
        self._names, self._texts = self._paired()
        if patches and self._are_patches():
            raise DataError(
                f"{self.folder}: its images are patches already; leave out --patches, or set --data.no-patches"
            )
        # Read all sizes and boxes now: training needs all boxes before its first step.
        headers = read_headers([self.folder / "images" / name for name in self._names], reading)
        rule = decide(str(self.folder), reading.exif, headers, convention=(False, "VisDrone's tools do not apply it"))
        self.reading = dataclasses.replace(reading, decided=rule.upright)
        self.exif, self.exif_note = rule.name, rule.note
        self._sizes = [header.size(upright=rule.upright) for header in headers]
        if patches and min(map(min, self._sizes)) < 2:
            tiny = next(name for name, size in zip(self._names, self._sizes, strict=True) if min(size) < 2)
            raise DataError(f"{self.folder / 'images' / tiny}: is too small for four patches; remove it")
        self._rows: list[np.ndarray] = []
        self._annotations: list[Annotation] = []
        for text, size in zip(self._texts, self._sizes, strict=True):
            path = self.folder / "annotations" / text
            rows = parse_annotations(read_text(path), str(path))
            self._rows += split_rows(rows, size) if patches else [rows]
        empty = total = 0
        for i, rows in enumerate(self._rows):
            annotation, left_out = _annotation(training_rows(rows), self.size(i))
            self._annotations.append(annotation)
            empty, total = empty + left_out, total + left_out + len(annotation.boxes)
        if empty:
            _log.warning("%s: left out %d of %d boxes that have no area in their image", self.folder, empty, total)

    def _paired(self) -> tuple[list[str], list[str]]:
        """Return the names of the images and of their annotation files; raise if one lacks the other."""
        images = by_stem(self.folder / "images", SUFFIXES)
        texts = by_stem(self.folder / "annotations", (".txt",))
        if not images and not texts:
            raise DataError(f"{self.folder}: no images in images/; unpack the VisDrone archive there")
        for stem in texts:
            if stem not in images:
                raise DataError(
                    f"{self.folder / 'annotations' / texts[stem]}: there is no image images/{stem}.jpg for this "
                    f"annotation file{near(stem, images)}; restore the image or remove the file"
                )
        for stem in images:
            if stem not in texts:
                raise DataError(
                    f"{self.folder / 'images' / images[stem]}: there is no annotation file annotations/{stem}.txt for "
                    f"this image{near(stem, texts)}; restore it (empty if the image has no objects) or remove the image"
                )
        return list(images.values()), [texts[stem] for stem in images]

    def _are_patches(self) -> bool:
        """Return whether ``prepare visdrone --patches`` wrote the folder: images come in fours, ``_0`` to ``_3``."""
        stems = {Path(name).with_suffix("").as_posix() for name in self._names}
        fours = {f"{stem[:-2]}_{patch}" for stem in stems for patch in range(PATCHES)}
        return stems == fours and (self.folder / PREPARED).is_file()

    def image_path(self, i: int) -> Path:
        """Return the file of image i, or of the image that patch i is cut from."""
        return self.folder / "images" / self._names[self._whole(i)]

    def annotation_path(self, i: int) -> Path:
        """Return the annotation file of ``image_path(i)``."""
        return self.folder / "annotations" / self._texts[self._whole(i)]

    def _whole(self, i: int) -> int:
        return i // PATCHES if self.patches else i

    def __len__(self) -> int:
        return len(self._rows)

    def image_id(self, i: int) -> int:
        return i + 1

    def file_name(self, i: int) -> str:
        """Return the name of image i; a patch has its image's name with ``_0`` to ``_3`` appended."""
        if not self.patches:
            return self._names[i]
        name = Path(self._names[self._whole(i)])
        return name.with_name(f"{name.stem}_{i % PATCHES}.jpg").as_posix()

    def size(self, i: int) -> tuple[int, int]:
        if not self.patches:
            return self._sizes[i]
        return patch_window(self._sizes[self._whole(i)], i % PATCHES)[2:]

    def annotation(self, i: int) -> Annotation:
        return self._annotations[i]

    def official_truth(self, i: int) -> np.ndarray:
        """Return all rows int32 [n, 8] of image i, with ignored regions and other objects.

        A patch has only the rows of objects that ``split_rows`` assigns to it.
        """
        return self._rows[i]

    def encoded(self, i: int) -> bytes:
        if self.patches:
            raise DataError(
                f"{self.folder}: patches are cut while they are loaded; write them first: querydet prepare visdrone "
                "--patches, then leave out data.patches"
            )
        return read_regular(self.image_path(i))

    def load(self, i: int) -> np.ndarray:
        return self.cut(self.load_whole(i), i) if self.patches else self.load_whole(i)

    def load_whole(self, i: int) -> np.ndarray:
        """Return the image of ``image_path(i)``, uint8 RGB [H, W, 3]; raise like ``load``."""
        path = self.image_path(i)
        return read_image(path, str(path), self._sizes[self._whole(i)], self.reading)

    def cut(self, whole: np.ndarray, i: int) -> np.ndarray:
        """Return patch i, cut out of ``whole``, the result of ``load_whole(i)``."""
        y, x, h, w = patch_window(self._sizes[self._whole(i)], i % PATCHES)
        return whole[y : y + h, x : x + w].copy()  # a view would keep the whole image in memory


def parse_annotations(text: str, name: str) -> np.ndarray:
    """Parse the text of an annotation file to rows int32 [n, 8]; skip trailing commas and blank lines.

    Args:
      text: the content.
      name: the file's name in messages.

    Raises:
      DataError: a line is not eight integers, or has a negative width or height, a score other than 0
        and 1, or a category outside 0..11.
    """
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        match = _LINE.fullmatch(line)
        if match:
            row = tuple(map(int, match.groups()))
            if row[2] < 0 or row[3] < 0 or row[4] not in (0, 1) or not 0 <= row[5] <= OTHERS:
                raise DataError(f"{name}: line {number} {_impossible(row)}; correct or remove the line")
            rows.append(row)
        elif line.strip():
            raise DataError(
                f"{name}: line {number} is {line.strip()[:80]!r}; a VisDrone annotation line has eight whole numbers, "
                f"{_COLUMNS}: correct or remove it"
            )
    return np.array(rows, np.int32).reshape(-1, 8)


def _impossible(row: tuple[int, ...]) -> str:
    if row[2] < 0 or row[3] < 0:
        return f"has width {row[2]}, height {row[3]}, but neither can be negative"
    if row[4] not in (0, 1):
        return f"has score {row[4]}, not 1 (evaluated) or 0 (ignored)"
    return f"has category {row[5]}, not 0 (ignored region), 1 to 10 (a class) or {OTHERS} (others)"


def training_rows(rows: np.ndarray) -> np.ndarray:
    """Return the rows of objects to train on: score 1 and one of the ten classes.

    The published code (``visdrone/data_prepare.py``) drops category 11 only by its score. In the
    official files that score is always 0, so the result is the same.
    """
    return rows[(rows[:, 4] != 0) & (rows[:, 5] > 0) & (rows[:, 5] < OTHERS)]


def patch_window(size: tuple[int, int], patch: int) -> tuple[int, int, int, int]:
    """Return (y, x, height, width) of patch 0..3 in an image of ``size`` (height, width), cut at half of each side."""
    (h, w), (row, column) = size, divmod(patch, 2)
    cy, cx = h // 2, w // 2
    return row * cy, column * cx, h - cy if row else cy, w - cx if column else cx


def split_rows(rows: np.ndarray, size: tuple[int, int]) -> list[np.ndarray]:
    """Split ``training_rows`` of an image of ``size`` (height, width) over its four patches, in patch pixels.

    As in ``visdrone/data_prepare.py`` of the published code, a box belongs only to the patch that
    contains its top left corner and is clipped at the cut, however little remains; the neighbouring
    patch has no label for the rest. Boxes are not clipped at the edges of the image itself.
    """
    objects = training_rows(rows)
    cy, cx = size[0] // 2, size[1] // 2
    right, low = objects[:, 0] >= cx, objects[:, 1] >= cy
    cut = objects.copy()
    cut[:, 2] = np.where(right, cut[:, 2], np.minimum(cut[:, 2], cx - cut[:, 0]))
    cut[:, 3] = np.where(low, cut[:, 3], np.minimum(cut[:, 3], cy - cut[:, 1]))
    cut[:, 0] -= cx * right
    cut[:, 1] -= cy * low
    return [cut[2 * low + right == patch] for patch in range(PATCHES)]


def _annotation(rows: np.ndarray, size: tuple[int, int]) -> tuple[Annotation, int]:
    """Return the boxes of training rows that have an area in the image, and the number of those that have none."""
    boxes = rows[:, :4].astype(np.float32)
    boxes[:, 2:] += boxes[:, :2]
    boxes, kept = clip(boxes, size)
    classes = (rows[kept, 5] - 1).astype(np.int32)
    return Annotation(boxes[kept], classes, np.zeros(len(classes), bool)), int((~kept).sum())
