"""Match the classes of a data set to those of a model by name.

Two files about the same objects may number their categories differently, or lack some.
"""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

from querydet_jax.data.dataset import Annotation, Dataset
from querydet_jax.runtime.errors import DataError

_log = logging.getLogger("querydet_jax")


class MatchedDataset(Dataset):
    """A data set under other class numbers.

    Args:
      dataset: the data set.
      classes: the new class names, each one of ``dataset.classes`` or a class that ``dataset`` lacks. Boxes of
        other categories are left out, of the ground truth as well.
    """

    def __init__(self, dataset: Dataset, classes: Sequence[str]):
        position = {plain(name): k for k, name in enumerate(classes)}
        self._dataset = dataset
        self._number = np.array([position.get(plain(name), -1) for name in dataset.classes], np.int32)
        self.classes, self.origin = tuple(classes), dataset.origin
        self.exif, self.exif_note = dataset.exif, dataset.exif_note
        ids: list[int | None] = [None] * len(classes)
        for k, identifier in zip(self._number.tolist(), dataset.category_ids, strict=True):
            if k >= 0:
                ids[k] = identifier
        self.category_ids = tuple(ids)
        self._left_out = [i for k, i in zip(self._number, dataset.category_ids, strict=True) if k < 0 and i is not None]

    def __len__(self) -> int:
        return len(self._dataset)

    def image_id(self, i: int) -> int:
        return self._dataset.image_id(i)

    def file_name(self, i: int) -> str:
        return self._dataset.file_name(i)

    def size(self, i: int) -> tuple[int, int]:
        return self._dataset.size(i)

    def annotation(self, i: int) -> Annotation:
        truth = self._dataset.annotation(i)
        classes = self._number[truth.classes]
        kept = classes >= 0
        return Annotation(truth.boxes[kept], classes[kept], truth.crowd[kept])

    def load(self, i: int) -> np.ndarray:
        return self._dataset.load(i)

    def encoded(self, i: int) -> bytes:
        return self._dataset.encoded(i)

    def check_image(self, i: int) -> None:
        self._dataset.check_image(i)

    def official_truth(self, i: int) -> np.ndarray | None:
        rows = self._dataset.official_truth(i)
        return None if rows is None else rows[~np.isin(rows[:, 5], self._left_out)]

    def coco_ground_truth(self) -> dict[str, Any]:
        truth = self._dataset.coco_ground_truth()
        kept = {i for i in self.category_ids if i is not None}
        return {
            **truth,
            "annotations": [e for e in truth["annotations"] if e["category_id"] in kept],
            "categories": [c for c in truth["categories"] if c["id"] in kept],
        }


def plain(name: str) -> str:
    """Return a name to compare: accents are stored in one or two characters, and look the same."""
    return unicodedata.normalize("NFC", name)


def without(dataset: Dataset, names: Sequence[str]) -> Dataset:
    """Leave out categories, with their boxes; a name that the data set lacks changes nothing, which is logged."""
    left_out = set(map(plain, names))
    absent = [name for name in names if plain(name) not in set(map(plain, dataset.classes))]
    if absent:
        _log.info(
            "%s: has no %s to leave out (data.ignore_classes); it has %s",
            dataset.origin, ", ".join(absent), ", ".join(dataset.classes),
        )  # fmt: skip
    kept = tuple(name for name in dataset.classes if plain(name) not in left_out)
    if len(kept) == len(dataset.classes):
        return dataset
    if not kept:
        raise DataError(f"{dataset.origin}: data.ignore_classes leaves no class of {', '.join(dataset.classes)}")
    _log.info(
        "%s: left out %s (data.ignore_classes)", dataset.origin,
        ", ".join(name for name in dataset.classes if plain(name) in left_out),
    )  # fmt: skip
    return MatchedDataset(dataset, kept)


def match_classes(dataset: Dataset, classes: Sequence[str], named_by: str) -> Dataset:
    """Number the classes of a data set as ``classes`` does; a class that the data set lacks is empty there.

    Args:
      classes: the class names, in order.
      named_by: the file that names them, for messages.

    Raises:
      DataError: the data set has a category that is none of ``classes``.
    """
    check_distinct(dataset)
    theirs, ours = set(map(plain, dataset.classes)), set(map(plain, classes))
    unknown = [name for name in dataset.classes if plain(name) not in ours]
    if unknown:
        raise DataError(
            f"{dataset.origin}: {_counted(unknown)} unknown to {named_by}: {', '.join(unknown)}"
            f"{_near(unknown, classes)}; the file has {', '.join(dataset.classes)}, {named_by} has "
            f"{', '.join(classes)}: correct the names, or leave categories out with --data.ignore-classes "
            f"{' '.join(map(_quoted, unknown))}"
        )
    absent = [name for name in classes if plain(name) not in theirs]
    if absent:
        _log.info("%s: has no %s, which stay empty (%s has them)", dataset.origin, ", ".join(absent), named_by)
    if tuple(map(plain, dataset.classes)) == tuple(map(plain, classes)):
        return dataset
    if not absent:
        _log.info("%s: categories are in another order than in %s, matched by name", dataset.origin, named_by)
    return MatchedDataset(dataset, classes)


def check_distinct(dataset: Dataset) -> None:
    """Raise DataError if two categories share a name."""
    seen: dict[str, int | None] = {}
    for name, identifier in zip(dataset.classes, dataset.category_ids, strict=True):
        if plain(name) in seen:
            raise DataError(
                f"{dataset.origin}: the categories {seen[plain(name)]} and {identifier} are both named {name!r}; "
                "rename one, or give their boxes one category"
            )
        seen[plain(name)] = identifier


def report_unused(dataset: Dataset) -> None:
    """Log the categories that have no box in a training set, such as a root category."""
    counts = np.zeros(len(dataset.classes), np.int64)
    for i in range(len(dataset)):
        counts += np.bincount(dataset.annotation(i).classes, minlength=len(counts))
    unused = [
        (name, i) for name, i, n in zip(dataset.classes, dataset.category_ids, counts, strict=True)
        if not n and i is not None
    ]  # fmt: skip
    if unused and counts.any():
        _log.warning(
            "%s: no boxes of %s; if this is no class to detect, leave it out with --data.ignore-classes %s",
            dataset.origin,
            ", ".join(f"{name} (id {i})" for name, i in unused),
            " ".join(_quoted(name) for name, _ in unused),
        )


def _counted(names: Sequence[str]) -> str:
    return "a category" if len(names) == 1 else f"{len(names)} categories"


def _near(unknown: Sequence[str], classes: Sequence[str]) -> str:
    """Point out names that differ in case or spaces alone."""
    simple = {"".join(name.split()).casefold(): name for name in classes}
    pairs = [(name, simple.get("".join(name.split()).casefold())) for name in unknown]
    found = [f"{name!r} is {other!r} there" for name, other in pairs if other]
    return f" ({', '.join(found)})" if found else ""


def _quoted(name: str) -> str:
    return f"'{name}'" if " " in name else name
