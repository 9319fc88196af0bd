"""VisDrone2019-DET as it is distributed: a folder a split, in it ``images/`` and ``annotations/``.

An annotation file has a line an object, eight integers: left, top, width, height in pixels, score,
category, truncation, occlusion. The score of ground truth is 1 for what evaluation counts, 0 for
what it passes over. Categories are 0 for an ignored region, 1..10 for ``CLASSES`` in order, 11 for
other objects. Rows below are these columns as int32 [n, 8].
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np

from querydet_jax.data.dataset import Annotation, Dataset
from querydet_jax.data.readers.folders import SUFFIXES, by_stem, image_sizes, read_text
from querydet_jax.data.readers.images import read_image
from querydet_jax.data.transforms import clip
from querydet_jax.runtime.errors import DataError

_log = logging.getLogger("querydet_jax")

CLASSES = (
    "pedestrian", "people", "bicycle", "car", "van", "truck", "tricycle", "awning-tricycle", "bus", "motor",
)  # fmt: skip
OTHERS = 11  # category of objects of no class; 0 is that of ignored regions
PATCHES = 4  # an image: top left, top right, bottom left, bottom right
PREPARED = "instances.json"  # what a folder that prepare-visdrone wrote has beside images/ and annotations/

_COLUMNS = "left,top,width,height,score,category,truncation,occlusion"
_INTEGER = r"\s*(-?[0-9]{1,9})\s*"
_LINE = re.compile(",".join([_INTEGER] * 8) + r",?\s*")  # 34 of the official lines end in a comma


class VisDroneDataset(Dataset):
    """A split folder of VisDrone, or the quarters of its images.

    Boxes are those of ``training_rows``, clipped to the image; boxes without area are left out
    (counted and logged once). Nothing is marked crowd, so ignored regions are in no COCO ground
    truth: there a detection in one counts as false, and only the official evaluation, which reads
    ``official_truth``, passes over it. Pixels and sizes are those stored, whatever the EXIF
    orientation, as the official tools have them. Images are in order of their names, and image
    ids count from 1 in this order, over patches where these are the images.

    With ``patches`` each image is four (specification 5.3): entries 4 i .. 4 i + 3 are the patches of
    image i, cut out of the whole image whenever one is loaded. An epoch so decodes every image four
    times; ``python -m querydet_jax.data prepare-visdrone`` writes the patches once instead.

    Args:
      folder: the split's folder, with ``images/`` and ``annotations/``.
      patches: whether the quarters are the images.

    Raises:
      DataError: a folder missing or empty; an image without annotation file or the reverse; two
        images of one name; a malformed line; a file that is no image; patches of a folder that
        ``prepare-visdrone`` filled with patches.
    """

    classes = CLASSES
    category_ids = tuple(range(1, len(CLASSES) + 1))

    def __init__(self, folder: str | Path, *, patches: bool = False):
        self.folder, self.patches = Path(folder), patches
        for name in ("images", "annotations"):
            if not (self.folder / name).is_dir():
                raise DataError(
                    f"{self.folder / name}: no such folder; give a split folder of VisDrone, which holds images and "
                    "annotations (data.root, data.train_images or val_images)"
                )
        self._names, self._texts = self._paired()
        if patches and self._are_patches():
            raise DataError(
                f"{self.folder}: its images are patches already, which prepare-visdrone cut; do not cut them again: "
                "leave out --patches, or set --data.no-patches"
            )
        # Training asks for the boxes of all images before the first step, and patches need the sizes.
        self._sizes = image_sizes([self.folder / "images" / name for name in self._names], upright=False)
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
            _log.warning("%s: left out %d of %d boxes, which have no area in their image", self.folder, empty, total)

    def _paired(self) -> tuple[list[str], list[str]]:
        """Names of the images and of their annotation files; refuses one that is without the other."""
        images = by_stem(self.folder / "images", SUFFIXES)
        texts = by_stem(self.folder / "annotations", (".txt",))
        if not images and not texts:
            raise DataError(f"{self.folder}: no images in images/; unpack the VisDrone archive there")
        for stem in texts:
            if stem not in images:
                raise DataError(
                    f"{self.folder / 'annotations' / texts[stem]}: there is no image images/{stem}.jpg for this "
                    "annotation file; restore the image or remove the file"
                )
        for stem in images:
            if stem not in texts:
                raise DataError(
                    f"{self.folder / 'images' / images[stem]}: there is no annotation file annotations/{stem}.txt for "
                    "this image; restore it (an empty file says that nothing is there) or remove the image"
                )
        return list(images.values()), [texts[stem] for stem in images]

    def _are_patches(self) -> bool:
        """Whether ``prepare-visdrone --patches`` wrote the folder: every image is one of four with ``_0`` to ``_3``."""
        stems = {Path(name).with_suffix("").as_posix() for name in self._names}
        fours = {f"{stem[:-2]}_{patch}" for stem in stems for patch in range(PATCHES)}
        return stems == fours and (self.folder / PREPARED).is_file()

    def image_path(self, i: int) -> Path:
        """The file that holds image i, or the image that patch i is cut from."""
        return self.folder / "images" / self._names[self._whole(i)]

    def annotation_path(self, i: int) -> Path:
        """The annotation file of ``image_path(i)``."""
        return self.folder / "annotations" / self._texts[self._whole(i)]

    def _whole(self, i: int) -> int:
        return i // PATCHES if self.patches else i

    def __len__(self) -> int:
        return len(self._rows)

    def image_id(self, i: int) -> int:
        return i + 1

    def file_name(self, i: int) -> str:
        """See ``Dataset``. A patch is called after its image, with ``_0`` to ``_3`` at the end."""
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
        """int32 [n, 8]: all rows of image i as its file has them, ignored regions and others included.

        Of a patch, the rows that ``split_rows`` gives it, which are those of objects alone.
        """
        return self._rows[i]

    def load(self, i: int) -> np.ndarray:
        return self.cut(self.load_whole(i), i) if self.patches else self.load_whole(i)

    def load_whole(self, i: int) -> np.ndarray:
        """The image of ``image_path(i)``, uint8 RGB [H, W, 3]; raises as ``load`` does."""
        path = self.image_path(i)
        return read_image(path, str(path), self._sizes[self._whole(i)])

    def cut(self, whole: np.ndarray, i: int) -> np.ndarray:
        """Patch i of ``load_whole(i)``."""
        y, x, h, w = patch_window(self._sizes[self._whole(i)], i % PATCHES)
        return whole[y : y + h, x : x + w].copy()  # a view would hold on to the whole


def parse_annotations(text: str, name: str) -> np.ndarray:
    """Rows int32 [n, 8] of the text of an annotation file; a comma at the end of a line and blank lines do not count.

    Args:
      text: the content.
      name: what messages call the file.

    Raises:
      DataError: a malformed line: not eight integers, a negative width or height, a score other than
        0 and 1, a category other than 0..11.
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
                f"{name}: line {number} is {line.strip()[:80]!r}; a line of a VisDrone annotation file is eight whole "
                f"numbers {_COLUMNS}: correct or remove it"
            )
    return np.array(rows, np.int32).reshape(-1, 8)


def _impossible(row: tuple[int, ...]) -> str:
    if row[2] < 0 or row[3] < 0:
        return f"has width {row[2]}, height {row[3]}, neither of which can be negative"
    if row[4] not in (0, 1):
        return f"has score {row[4]}, which is 1 for objects that count and 0 for all else"
    return f"has category {row[5]}, which is 0 (ignored region), 1 to 10 (a class) or {OTHERS} (others)"


def training_rows(rows: np.ndarray) -> np.ndarray:
    """The rows of objects to learn: score 1 and one of the ten classes.

    The published code looks at the score alone for category 11, which it would take for an
    eleventh class; in the official files that score is always 0 (specification 5.3).
    """
    return rows[(rows[:, 4] != 0) & (rows[:, 5] > 0) & (rows[:, 5] < OTHERS)]


def patch_window(size: tuple[int, int], patch: int) -> tuple[int, int, int, int]:
    """(y, x, height, width) of patch 0..3 in an image of ``size`` (height, width), cut at height // 2, width // 2."""
    (h, w), (row, column) = size, divmod(patch, 2)
    cy, cx = h // 2, w // 2
    return row * cy, column * cx, h - cy if row else cy, w - cx if column else cx


def split_rows(rows: np.ndarray, size: tuple[int, int]) -> list[np.ndarray]:
    """``training_rows`` of an image of ``size`` (height, width), for its four patches, in their pixels.

    A box belongs to the one patch that has its top left corner and ends where the image is cut,
    however little of it that leaves; the patch beyond the cut knows nothing of the rest. What
    reaches over the edge of the image itself stays (specification 5.3).
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
    """The boxes of training rows that have an area in the image, and how many have none."""
    boxes = rows[:, :4].astype(np.float32)
    boxes[:, 2:] += boxes[:, :2]
    boxes, kept = clip(boxes, size)
    classes = (rows[kept, 5] - 1).astype(np.int32)
    return Annotation(boxes[kept], classes, np.zeros(len(classes), bool)), int((~kept).sum())
