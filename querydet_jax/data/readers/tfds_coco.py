"""Read COCO in the layout of tensorflow_datasets (``coco/2017``) from ArrayRecord, with random access.

Letters: n images, m boxes of all images. A record holds an image with its boxes, so listing sizes
and boxes means reading every image. They are read once and stored in an index beside the records.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any, Literal

import numpy as np
from tensorflow_datasets.core.constants import DATA_DIR

from querydet_jax.data.dataset import Annotation, Dataset
from querydet_jax.data.readers.images import DEFAULT, Reading, read_header, read_image
from querydet_jax.data.readers.orientation import Header, decide
from querydet_jax.data.readers.records import Records, builder_of
from querydet_jax.data.transforms import MIN_SIDE
from querydet_jax.runtime.errors import DataError, QueryDetError
from querydet_jax.runtime.files import written_aside
from querydet_jax.runtime.progress import progress
from querydet_jax.runtime.stores import StoreError, as_path, check_cache, sizes_of

_log = logging.getLogger("querydet_jax")

# COCO's 80 classes have ids from 1 to 90. Records number them from 0, without gaps.
_UNUSED_IDS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
COCO_IDS = tuple(i for i in range(1, 91) if i not in _UNUSED_IDS)
COCO_CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear",
    "hair drier", "toothbrush",
)  # fmt: skip

# Keys in metadata.json of copies written by prepare_coco: the ids, and {split: whether boxes are drawn on pictures
# turned by their EXIF orientation, "apply" or "ignore"}.
IDS_KEY, EXIF_KEY = "category_ids", "exif"
SPLITS: dict[Literal["train", "val"], str] = {"train": "train", "val": "validation"}  # our name: TFDS's name
_DECIMALS = 3  # of pixel coordinates, see pixel_boxes
_REMEDY = "prepare the copy again: querydet prepare coco --help"


class TfdsCocoDataset(Dataset):
    """A split of a prepared copy of ``coco/2017``, or of another data set in that layout.

    Images are in the order of the records. The copy must be in ArrayRecord (see ``prepare_coco``).
    Sizes and boxes come from ``querydet_index-SPLIT.npz`` in the copy's folder. That file is written
    if it is missing or belongs to other records; if the folder is read-only, every opening reads all
    records again. EXIF orientation is not applied by default, because boxes refer to the stored pixels, unless
    ``prepare_coco`` noted another rule in ``metadata.json``.

    Args:
      root: the TFDS data directory; "" is TFDS's default, ``~/tensorflow_datasets``.
      name: builder and configuration, ``coco/2017`` (newest version) or ``coco/2017:1.1.0``.
      split: "train" or "val" ("validation" in TFDS).
      reading: how files become pixels.

    Raises:
      ConfigError: the copy is in a store, and ``root`` is not read through a cache that it fits in.
      DataError: the copy is missing, not in ArrayRecord, not laid out like ``coco/2017``, or damaged.
    """

    def __init__(self, root: str | Path, name: str, split: Literal["train", "val"], *, reading: Reading = DEFAULT):
        self._folder = _version_folder(as_path(root or DATA_DIR), name)
        self._split, self._name, self.reading = SPLITS[split], name, reading
        try:
            with builder_of(self._folder) as builder:
                self._metadata = builder.info.metadata or {}  # read when it is asked for
        except QueryDetError:
            raise
        except Exception as error:  # several libraries, each with its own errors for damaged files
            raise self._damaged(error) from None
        self._check_layout(builder)
        self.classes, self.category_ids = self._categories(builder)
        self.origin = str(self._folder)
        self._records = Records(self._folder, self._split)
        index = self._open_index(builder)
        headers = [
            Header((h, w), k) for (h, w), k in zip(index.sizes.tolist(), index.orientations.tolist(), strict=True)
        ]
        told = (self._metadata.get(EXIF_KEY) or {}).get(self._split)
        why = "as metadata.json says" if told else "TFDS's tools do not apply it"
        rule = decide(str(self._folder), reading.exif, headers, convention=(told == "apply", why))
        self.reading = dataclasses.replace(reading, decided=rule.upright)
        self.exif, self.exif_note = rule.name, rule.note
        self._ids, self._names = index.ids, index.names
        self._sizes = np.array([header.size(upright=rule.upright) for header in headers], np.int32)
        owner = np.repeat(np.arange(len(index.counts)), index.counts)
        boxes = pixel_boxes(index.shares, self._sizes[owner])
        kept = np.all((boxes[:, 2:] - boxes[:, :2]) > MIN_SIDE, axis=1)
        if not kept.all():
            _log.warning(
                "%s: left out %d of %d boxes that have no width or no height",
                self._folder, (~kept).sum(), len(boxes),
            )  # fmt: skip
        self._boxes, self._areas = boxes[kept], index.areas[kept]
        self._labels, self._crowd = index.labels[kept].astype(np.int32), index.crowd[kept]
        self._starts = np.searchsorted(owner[kept], np.arange(len(index.ids) + 1))

    def _damaged(self, reason: object) -> DataError:
        first = (str(reason).splitlines() or [type(reason).__name__])[0]
        return DataError(f"{self._folder}: damaged copy of a data set ({first}); {_REMEDY}")

    def _check_layout(self, builder: Any) -> None:
        formats = {f.value for f in builder.info.available_file_formats()}
        if "array_record" not in formats:
            raise DataError(
                f"{self._folder}: stored as {', '.join(sorted(formats)) or 'nothing'}, which has no random access; "
                "convert it: querydet prepare coco --help"
            )
        if self._split not in builder.info.splits:
            raise DataError(
                f"{self._folder}: has the splits {', '.join(builder.info.splits) or 'none'}, not {self._split}; "
                "correct data.tfds_name"
            )
        features = builder.info.features
        needed = {"image", "image/filename", "image/id", "objects"}
        inside = {"area", "bbox", "is_crowd", "label"}
        lacking = needed - set(features) or inside - set(getattr(features["objects"], "feature", ()))
        if lacking:
            raise DataError(
                f"{self._folder}: not laid out like coco/2017 (no {', '.join(sorted(lacking))}); correct data.tfds_name"
            )

    def _categories(self, builder: Any) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Return the class names and their ids in annotation and result files."""
        names = tuple(builder.info.features["objects"].feature["label"].names)
        ids = self._metadata.get(IDS_KEY)
        if ids is not None:
            whole = isinstance(ids, (list, tuple)) and all(type(i) is int and abs(i) < 2**63 for i in ids)
            if not whole or len(ids) != len(names) or len(set(ids)) < len(ids):
                raise self._damaged(
                    f"metadata.json: {IDS_KEY} is not a list of {len(names)} integers, one per class, each once"
                )
            return names, tuple(ids)
        # Some copies lack the file of class names; TFDS then gives numbers.
        if names not in (COCO_CLASSES, tuple(map(str, range(len(COCO_CLASSES))))):
            raise DataError(
                f"{self._folder}: its {len(names)} classes are not COCO's, so their ids in result files are unknown; "
                f"correct data.tfds_name, or write the ids to metadata.json ({{{IDS_KEY!r}: [1, 2, ...]}})"
            )
        return COCO_CLASSES, COCO_IDS

    def _open_index(self, builder: Any) -> _Index:
        path = self._folder / f"querydet_index-{self._split}.npz"
        try:
            files = sorted(Path(f).name for f in builder.info.splits[self._split].filepaths)
            sizes = sizes_of(self._folder, files)
        except StoreError:
            raise
        except OSError as error:
            raise self._damaged(error) from None
        check_cache(self._folder, sum(sizes))
        of = [_FORM, *(f"{name} {size}" for name, size in zip(files, sizes, strict=True))]
        index = _read_index(path, of)
        if index is None:
            index = self._make_index()
            try:
                with written_aside(path) as aside:
                    np.savez(aside, of=np.array(of), **asdict(index))
            except OSError as error:
                _log.warning(
                    "%s: cannot be written (%s), so the next run reads sizes and boxes again; make the folder "
                    "writable once to store them", path, error.strerror or error,
                )  # fmt: skip
        self._check_index(index)
        return index

    def _make_index(self) -> _Index:
        headers, objects, ids, names = [], [], [], []

        def joined(key: str, kind: type, *shape: int) -> np.ndarray:
            parts = [np.asarray(o[key], kind).reshape(-1, *shape) for o in objects]
            return np.concatenate([np.zeros((0, *shape), kind), *parts])

        try:
            records = range(len(self._records))
            for i in progress(records, f"indexing {self._name} {self._split}", " images"):
                record = self._records[i]
                name = _decoded(record["image/filename"])
                headers.append(read_header(record["image"], f"{self._folder} {name}", self.reading))
                objects.append(record["objects"])
                ids.append(int(record["image/id"]))
                names.append(name)
            return _Index(
                ids=np.array(ids, np.int64),
                names=np.array(names, str),
                sizes=np.array([header.stored for header in headers], np.int32).reshape(-1, 2),
                orientations=np.array([header.orientation for header in headers], np.int8),
                counts=np.array([len(o["label"]) for o in objects], np.int64),
                shares=joined("bbox", np.float32, 4),
                labels=joined("label", np.int64),
                crowd=joined("is_crowd", np.bool_),
                areas=joined("area", np.int64),
            )
        except QueryDetError:
            raise
        except Exception as error:  # as above
            raise self._damaged(error) from None

    def _check_index(self, index: _Index) -> None:
        if not len(index.ids):
            raise self._damaged("no images")
        if len(np.unique(index.ids)) != len(index.ids):
            raise self._damaged("two images have the same id")
        if not ((index.shares >= 0) & (index.shares <= 1)).all():  # false for nan, too
            raise self._damaged("a box exceeds its image")
        if not ((index.labels >= 0) & (index.labels < len(self.classes))).all():
            raise self._damaged(f"a label outside 0 to {len(self.classes) - 1}")
        if not (index.areas >= 0).all():
            raise self._damaged("a negative area")
        if not all(PurePath(name).name for name in index.names.tolist()):
            raise self._damaged("an image without a file name")

    def __len__(self) -> int:
        return len(self._ids)

    def image_id(self, i: int) -> int:
        return int(self._ids[i])

    def file_name(self, i: int) -> str:
        return str(self._names[i])

    def size(self, i: int) -> tuple[int, int]:
        height, width = self._sizes[i].tolist()
        return height, width

    def annotation(self, i: int) -> Annotation:
        part = slice(self._starts[i], self._starts[i + 1])
        return Annotation(self._boxes[part].astype(np.float32), self._labels[part], self._crowd[part])

    def encoded(self, i: int) -> bytes:
        try:
            return self._records[i]["image"]
        except QueryDetError as error:  # of the store or the cache
            raise DataError(str(error)) from None
        except Exception as error:  # as above
            raise self._damaged(error) from None

    def load(self, i: int) -> np.ndarray:
        return read_image(self.encoded(i), f"{self._folder} {self.file_name(i)}", self.size(i), self.reading)

    def _truth_boxes(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(self._starts[i], self._starts[i + 1])
        boxes = self._boxes[part]
        sides = np.round(boxes[:, 2:] - boxes[:, :2], _DECIMALS)
        return np.concatenate([boxes[:, :2], sides], axis=1), whole_areas(self._areas[part], sides)


@dataclass(frozen=True)
class _Index:
    """The content of the records except the pixels, in their order."""

    ids: np.ndarray  # int64 [n]
    names: np.ndarray  # str [n]
    sizes: np.ndarray  # int32 [n, 2], (height, width) in stored pixels
    orientations: np.ndarray  # int8 [n], EXIF's
    counts: np.ndarray  # int64 [n], boxes per image
    shares: np.ndarray  # float32 [m, 4], y0 x0 y1 x1 as fractions of the image's sides
    labels: np.ndarray  # int64 [m]
    crowd: np.ndarray  # bool [m]
    areas: np.ndarray  # int64 [m], px^2

    def __post_init__(self) -> None:
        """Raise ValueError if the arrays do not belong together."""
        n, m = len(self.ids), int(self.counts.sum())
        forms = {
            **dict.fromkeys(("ids", "orientations", "counts"), ((n,), "i")),
            **dict.fromkeys(("labels", "areas"), ((m,), "i")),
            "names": ((n,), "U"), "sizes": ((n, 2), "i"), "shares": ((m, 4), "f"), "crowd": ((m,), "b"),
        }  # fmt: skip
        for name, form in forms.items():
            array = getattr(self, name)
            if (array.shape, array.dtype.kind) != form:
                raise ValueError(f"{name} is {array.dtype} {list(array.shape)}")
        if min(self.counts.min(initial=0), self.sizes.min(initial=1) - 1) < 0:
            raise ValueError("a negative count or size")


_FORM = "2"  # version of the index; raise it whenever _Index changes


def pixel_boxes(shares: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Convert boxes from fractions of the image's sides to pixels.

    The float32 fractions are off by up to 3e-8 of the side, 2e-5 px of 640. Rounding to a thousandth
    of a pixel recovers the annotation file's values, which have two decimals in COCO.

    Args:
      shares: float32 [m, 4], (y0, x0, y1, x1), each as a fraction of the image's side.
      sizes: [m, 2], (height, width) of each box's image.

    Returns:
      float64 [m, 4], (x0, y0, x1, y1).
    """
    sides = np.tile(sizes[:, ::-1], 2).astype(np.float64)
    return np.round(shares[:, [1, 0, 3, 2]].astype(np.float64) * sides, _DECIMALS)


def whole_areas(areas: np.ndarray, sides: np.ndarray) -> np.ndarray:
    """Restore a likely fraction to truncated areas, float64 [m] px^2.

    Areas only serve to bin boxes by size. Bin edges are whole numbers, so a truncated area could fall
    on an edge that the true area exceeds. If the box's own area truncates to the stored one, return
    the box's; otherwise the area is a segment's, hardly ever whole, so add half a pixel.

    Args:
      areas: int64 [m].
      sides: float64 [m, 2], width and height of the boxes.
    """
    boxes = np.prod(sides, axis=1)
    return np.where(np.floor(boxes) == areas, boxes, areas + 0.5)


def _read_index(path: Path, of: list[str]) -> _Index | None:
    """Return the index stored in the file, or None if it is unreadable or not made from the records ``of``."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file, np.load(file) as stored:
            if stored["of"].tolist() == of:
                return _Index(**{key: stored[key] for key in stored.files if key != "of"})
    except Exception as error:  # zip and NumPy raise many kinds of errors for damaged files
        _log.warning("%s: not readable (%s); rebuilding it", path, (str(error).splitlines() or [""])[0])
    return None


def _version_folder(root: Path, name: str) -> Path:
    """Return the folder of the named version, or of the newest one."""
    base, _, wanted = name.partition(":")
    found = {}
    for info in (root / base).glob("*/dataset_info.json"):
        version = info.parent.name
        if all(part.isdecimal() for part in version.split(".")) and wanted in ("", version):
            found[tuple(map(int, version.split(".")))] = info.parent
    if not base or not found:
        raise DataError(
            f"{root / base}: no prepared copy{f' of version {wanted}' if wanted else ''} of this data set; correct "
            "data.root (the TFDS data directory) or data.tfds_name, or prepare one: querydet prepare coco "
            "--help"
        )
    return found[max(found)]


def _decoded(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
