"""Read a data set that ``prepare_shards`` has written as ArrayRecord files, "shards".

Letters: n images, m boxes of all images, q rows of VisDrone's ground truth. A folder holds for each split:

- ``SPLIT-00000.array_record`` and so on: the pictures as they were stored, one a record, in the data set's order;
- ``SPLIT.npz``: an ``Index``, all but the pictures;
- ``SPLIT.json``: a ``Description``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta, Struct

from querydet_jax.data.coco_json import ClassName, Id
from querydet_jax.data.dataset import Annotation, Dataset
from querydet_jax.data.readers.images import DEFAULT, Reading, read_image
from querydet_jax.data.readers.record_files import RecordFiles
from querydet_jax.runtime.errors import DataError, QueryDetError
from querydet_jax.runtime.files import reason
from querydet_jax.runtime.reading import read_text
from querydet_jax.runtime.stores import as_path, check_cache, sizes_of

_log = logging.getLogger("querydet_jax")

FORM = 1  # of folders; raise it whenever Description or Index changes
_REMEDY = "copy the folder again, or write it again: querydet prepare shards --help"

Count = Annotated[int, Meta(ge=0)]


class Shard(Struct):
    """A file of pictures."""

    images: Count
    bytes: Count


class Description(Struct, kw_only=True):
    """What ``SPLIT.json`` holds.

    Attributes:
      classes: names of the classes.
      category_ids: their ids in result files, of one length with ``classes``.
      exif: whether boxes are drawn on pictures turned by their EXIF orientation.
      exif_note: what was found of orientations, for the report.
      turned: number of pictures that have one.
      shards: the files of pictures, in order.
      index: SHA-256 of ``SPLIT.npz``.
    """

    form: int
    classes: list[ClassName]
    category_ids: list[Id]
    exif: Literal["apply", "ignore"]
    exif_note: str
    turned: Count
    shards: list[Shard]
    index: str


@dataclass(frozen=True)
class Index:
    """The content of a split except the pictures. Boxes are in the order of their images.

    ``order`` is a permutation: box j is entry ``order[j]`` of the ground truth for evaluation.
    """

    ids: np.ndarray  # int64 [n]
    names: np.ndarray  # str [n]
    sizes: np.ndarray  # int32 [n, 2], (height, width)
    counts: np.ndarray  # int64 [n], boxes per image
    boxes: np.ndarray  # float32 [m, 4], (x0, y0, x1, y1) px: Annotation.boxes
    labels: np.ndarray  # int32 [m]
    crowd: np.ndarray  # bool [m]
    order: np.ndarray  # int64 [m]
    truth: np.ndarray  # float64 [m, 4], (x, y, width, height) px of the ground truth
    areas: np.ndarray  # float64 [m], px^2
    official: np.ndarray  # int32 [q, 8], VisDrone's rows; q = 0 for other data sets
    official_counts: np.ndarray  # int64 [n], rows per image; [0] for other data sets

    def __post_init__(self) -> None:
        """Raise ValueError if the arrays do not belong together."""
        n, m, q = len(self.ids), int(self.counts.sum()), int(self.official_counts.sum())
        forms = {
            **dict.fromkeys(("ids", "counts"), ((n,), "i")),
            "names": ((n,), "U"), "sizes": ((n, 2), "i"), "official": ((q, 8), "i"),
            **dict.fromkeys(("labels", "order"), ((m,), "i")),
            "boxes": ((m, 4), "f"), "crowd": ((m,), "b"), "truth": ((m, 4), "f"), "areas": ((m,), "f"),
            "official_counts": ((n if len(self.official_counts) else 0,), "i"),
        }  # fmt: skip
        for name, form in forms.items():
            array = getattr(self, name)
            if (array.shape, array.dtype.kind) != form:
                raise ValueError(f"{name} is {array.dtype} {list(array.shape)}")
        if min(self.counts.min(initial=0), self.official_counts.min(initial=0), self.sizes.min(initial=1) - 1) < 0:
            raise ValueError("a negative count or size")
        if not np.array_equal(np.sort(self.order), np.arange(m)):
            raise ValueError("order is no permutation")


class ShardsDataset(Dataset):
    """A split of a folder of shards: what the data set that it was made from is, boxes and ground truth bit for bit.

    Args:
      folder: the folder.
      split: "train" or "val".
      reading: how files become pixels. The rule on EXIF orientation is that of the data set.

    Raises:
      ConfigError: the folder is in a store, and not read through a cache that the split fits in.
      DataError: the folder or a file in it is missing, damaged or of another preparation.
    """

    def __init__(self, folder: str | Path, split: str, *, reading: Reading = DEFAULT):
        self._folder = as_path(folder)
        path = self._folder / f"{split}.json"
        self.origin = str(path)
        about = self._describe(path)
        names = [shard_name(split, k) for k in range(len(about.shards))]
        try:
            found = sizes_of(self._folder, names)
        except FileNotFoundError as error:
            raise DataError(f"{error.filename}: no such file, but {path.name} lists it; {_REMEDY}") from None
        for name, shard, size in zip(names, about.shards, found, strict=True):
            if size != shard.bytes:
                raise DataError(f"{self._folder / name}: has {size} bytes, {path.name} says {shard.bytes}; {_REMEDY}")
        check_cache(self._folder, sum(found))
        self._index = self._read_index(self._folder / f"{split}.npz", about)
        self._records = RecordFiles([self._folder / name for name in names], [s.images for s in about.shards])
        self.classes, self.category_ids = tuple(about.classes), tuple(about.category_ids)
        self.exif, self.exif_note = about.exif, about.exif_note
        if about.turned and reading.exif not in ("auto", about.exif):
            raise DataError(
                f"{path}: its boxes are drawn on pictures with the EXIF orientation "
                f"{'applied' if about.exif == 'apply' else 'ignored'}, but data.exif is {reading.exif}; set it to auto"
            )
        self._reading = dataclasses.replace(reading, decided=about.exif == "apply")
        if about.exif_note:
            _log.info("%s: %s", path, about.exif_note)
        self._starts = np.concatenate([[0], np.cumsum(self._index.counts)])
        self._official_starts = np.concatenate([[0], np.cumsum(self._index.official_counts)])

    def _describe(self, path: Path) -> Description:
        if not path.is_file():
            raise DataError(f"{path}: no such file; correct data.root, or write it: querydet prepare shards --help")
        try:
            about = msgspec.json.decode(read_text(path), type=Description)
        except msgspec.DecodeError as error:
            raise DataError(f"{path}: not readable as a description of shards ({error}); {_REMEDY}") from None
        if about.form != FORM:
            raise DataError(f"{path}: has form {about.form}, this version reads {FORM}; write the shards again")
        if len(about.classes) != len(about.category_ids) or len(set(about.category_ids)) < len(about.category_ids):
            raise DataError(f"{path}: category_ids are not one for each of {len(about.classes)} classes; {_REMEDY}")
        return about

    def _read_index(self, path: Path, about: Description) -> Index:
        try:
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() != about.index:
                raise ValueError("its checksum is another")
            with np.load(io.BytesIO(data)) as stored:
                index = Index(**stored)
            if len(index.ids) != sum(shard.images for shard in about.shards):
                raise ValueError("it has another number of images")
            if not ((index.labels >= 0) & (index.labels < len(about.classes))).all():
                raise ValueError("it has labels without a class")
        except QueryDetError:
            raise
        except Exception as error:  # zip and NumPy raise many kinds of errors for damaged files
            raise DataError(f"{path}: not the index of {self.origin} ({reason(error)}); {_REMEDY}") from None
        return index

    def __len__(self) -> int:
        return len(self._index.ids)

    def image_id(self, i: int) -> int:
        return int(self._index.ids[i])

    def file_name(self, i: int) -> str:
        return str(self._index.names[i])

    def size(self, i: int) -> tuple[int, int]:
        height, width = self._index.sizes[i].tolist()
        return height, width

    def annotation(self, i: int) -> Annotation:
        part = slice(self._starts[i], self._starts[i + 1])
        return Annotation(self._index.boxes[part], self._index.labels[part], self._index.crowd[part])

    def encoded(self, i: int) -> bytes:
        try:
            return self._records[i]
        except QueryDetError as error:  # of the store or the cache
            raise DataError(str(error)) from None
        except Exception as error:  # ArrayRecord's own, of several kinds
            raise DataError(
                f"{self._folder}: the record of {self.file_name(i)} is damaged ({reason(error)}); {_REMEDY}"
            ) from None

    def load(self, i: int) -> np.ndarray:
        return read_image(self.encoded(i), f"{self._folder} {self.file_name(i)}", self.size(i), self._reading)

    def official_truth(self, i: int) -> np.ndarray | None:
        if not len(self._index.official_counts):
            return None
        return self._index.official[self._official_starts[i] : self._official_starts[i + 1]]

    def coco_ground_truth(self) -> dict[str, Any]:
        index = self._index
        images = [
            {"id": number, "file_name": name, "height": height, "width": width}
            for number, name, (height, width) in zip(
                index.ids.tolist(), index.names.tolist(), index.sizes.tolist(), strict=True
            )
        ]
        at = np.argsort(index.order)  # position of each entry among the boxes
        columns = (np.repeat(index.ids, index.counts)[at], index.labels[at], index.truth[at], index.areas[at])
        annotations = [
            {
                "id": number,
                "image_id": image_id,
                "category_id": self.category_ids[k],
                "bbox": box,
                "area": area,
                "iscrowd": int(crowd),
            }
            for number, (image_id, k, box, area, crowd) in enumerate(
                zip(*(column.tolist() for column in (*columns, index.crowd[at])), strict=True), start=1
            )
        ]
        return {"images": images, "annotations": annotations, "categories": self._coco_categories()}


def shard_name(split: str, k: int) -> str:
    """Return the name of a split's k-th file of pictures."""
    return f"{split}-{k:05d}.array_record"
