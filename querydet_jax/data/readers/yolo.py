"""Read YOLO text labels in the layout of ultralytics: ``images/train/NAME.jpg`` and ``labels/train/NAME.txt``."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from querydet_jax.data.coco_json import CLASS_NAME
from querydet_jax.data.dataset import Annotation, Dataset
from querydet_jax.data.readers.folders import SUFFIXES, by_stem, near, read_regular
from querydet_jax.data.readers.images import DEFAULT, Reading, read_headers, read_image
from querydet_jax.data.readers.orientation import decide
from querydet_jax.data.readers.plausible import say_what_is_odd
from querydet_jax.data.transforms import clip
from querydet_jax.runtime.errors import DataError, shown
from querydet_jax.runtime.files import reason
from querydet_jax.runtime.reading import numbers, read_text
from querydet_jax.runtime.stores import as_path, same_parts

_log = logging.getLogger("querydet_jax")

_NAMES = "classes.txt"  # LabelImg writes it, also among the labels
_SLACK = 1e-3  # how far rounding may push a coordinate outside 0..1
_BEYOND = 0.01  # fraction of a side that a box may reach beyond its image before that is said
_ALIASES, _DEPTH = 10, 20  # most in data.yaml
_TYPED = ("bool", "null", "merge")


class YoloDataset(Dataset):
    """Images at any depth of a folder, and label files at the same relative paths of another.

    Each line of a label file is an object: class number from 0, then centre x, centre y, width and
    height as fractions of the upright image (EXIF orientation applied by default). An image without label file has
    no objects. Boxes are clipped to the image; those without area are dropped (one warning gives
    their number). Category ids are the class numbers; image ids count from 1, sorted by name.

    Args:
      images: folder of the images.
      labels: folder of the label files.
      classes: the class names, see ``read_names``.
      reading: how files become pixels.

    Raises:
      DataError: a folder is missing; there are no images; two images differ only in suffix; a label
        file has no image; a line is malformed; a file is not an image.
    """

    def __init__(self, images: str | Path, labels: str | Path, classes: tuple[str, ...], *, reading: Reading = DEFAULT):
        self._folder, labels = as_path(images), as_path(labels)
        self.classes, self.category_ids, self.origin = classes, tuple(range(len(classes))), str(labels)
        if not self._folder.is_dir():
            raise DataError(
                f"{self._folder}: no such image folder; correct data.root and data.train_images or val_images"
            )
        if not labels.is_dir():
            raise DataError(
                f"{labels}: no such folder of labels; correct data.root, or set data.train_annotations or "
                "val_annotations"
            )
        pictures, texts = by_stem(self._folder, SUFFIXES), by_stem(labels, (".txt",))
        if not pictures:
            raise DataError(f"{self._folder}: no images in this folder ({', '.join(sorted(SUFFIXES))})")
        for stem, name in texts.items():
            if stem not in pictures and Path(name).name != _NAMES:
                raise DataError(
                    f"{labels / name}: there is no image {self._folder / stem}.* for these labels"
                    f"{near(stem, pictures)}; restore the image or remove the file"
                )
        self._names = list(pictures.values())
        headers = read_headers([self._folder / name for name in self._names], reading)
        rule = decide(str(self._folder), reading.exif, headers, convention=(True, "YOLO tools apply it"))
        self.reading = dataclasses.replace(reading, decided=rule.upright)
        self.exif, self.exif_note = rule.name, rule.note
        self._sizes = [header.size(upright=rule.upright) for header in headers]
        unlabelled = len(pictures.keys() - texts.keys())
        if unlabelled:
            _log.info("%s: %d of %d images have no label file, and so no objects", labels, unlabelled, len(pictures))
        self._annotations, empty, total = [], 0, 0
        written = []
        for i, (stem, size) in enumerate(zip(pictures, self._sizes, strict=True)):
            rows = np.zeros((0, 5))
            if stem in texts:
                path = labels / texts[stem]
                rows = parse_labels(read_text(path), str(path), classes)
            written.append(np.concatenate([np.full((len(rows), 1), i), rows], axis=1))
            annotation = _annotation(rows, size)
            self._annotations.append(annotation)
            empty, total = empty + len(rows) - len(annotation.boxes), total + len(rows)
        rows = np.concatenate(written)
        half, ones = rows[:, 4:] / 2, np.ones((len(rows), 2))
        corners = np.concatenate([rows[:, 2:4] - half, rows[:, 2:4] + half], axis=1)
        form = "centre x, centre y, width, height"
        say_what_is_odd(str(labels), rows[:, 2:], corners, ones, rows[:, :2], _BEYOND, form)
        if empty:
            _log.warning("%s: left out %d of %d boxes that have no area in their image", labels, empty, total)

    def __len__(self) -> int:
        return len(self._names)

    def image_id(self, i: int) -> int:
        return i + 1

    def file_name(self, i: int) -> str:
        return self._names[i]

    def size(self, i: int) -> tuple[int, int]:
        return self._sizes[i]

    def annotation(self, i: int) -> Annotation:
        return self._annotations[i]

    def encoded(self, i: int) -> bytes:
        return read_regular(self._folder / self._names[i])

    def load(self, i: int) -> np.ndarray:
        path = self._folder / self._names[i]
        return read_image(path, str(path), self._sizes[i], self.reading)


def labels_beside(images: Path) -> Path:
    """Return the label folder of an image folder: the path with its last ``images`` replaced by ``labels``.

    Raises:
      DataError: no part of the path is named ``images``.
    """
    parts = list(images.parts)
    if "images" not in parts:
        raise DataError(
            f"{images}: no part of this path is named images, so the folder of labels is unknown; set "
            "data.train_annotations or val_annotations"
        )
    parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return same_parts(images, parts)


def read_names(root: str | Path) -> tuple[str, ...]:
    """Read the class names of a YOLO folder from ``names`` of ``data.yaml``, or from the lines of ``classes.txt``.

    Raises:
      DataError: neither file exists, or the names of classes 0, 1, ... are incomplete.
    """
    path, plain = as_path(root) / "data.yaml", as_path(root) / _NAMES
    if path.is_file():
        return _yaml_names(path)
    if not plain.is_file():
        raise DataError(f"{path}: no such file, nor {_NAMES}; write one with the class names (names: [car, boat])")
    names = tuple(line.strip() for line in read_text(plain).rstrip().splitlines())
    if not names or not all(names):
        raise DataError(f"{plain}: has {'a blank line' if names else 'no lines'}; give one class name per line")
    for k, name in enumerate(names):
        if not re.search(CLASS_NAME, name):
            raise DataError(f"{plain}: the name of class {k} is {shown(name)}; give a name without control characters")
    return names


class _Loader(yaml.SafeLoader):
    """Leaves numbers and dates as the text that the file has: as names of classes they are meant so.

    A key given twice, of which PyYAML takes the last, is an error.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, _ in reversed(node.value):
            if isinstance(key, yaml.ScalarNode) and counts[key.value] > 1:
                problem = f"the key {shown(key.value)} is there twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        return super().construct_mapping(node, deep)

    yaml_implicit_resolvers = {
        first: [pair for pair in pairs if pair[0].rpartition(":")[2] in _TYPED]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _check_events(text: str) -> None:
    """Raise ValueError for text whose loading could take all memory (nested aliases) or hours (nested brackets)."""
    depth = aliases = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        aliases += isinstance(event, yaml.AliasEvent)
        if depth > _DEPTH or aliases > _ALIASES:
            raise ValueError(f"nested deeper than {_DEPTH}" if depth > _DEPTH else f"more than {_ALIASES} aliases")


def _yaml_names(path: Path) -> tuple[str, ...]:
    text = read_text(path)
    try:
        _check_events(text)
        content = yaml.load(text, _Loader)
    except Exception as error:  # besides its own, PyYAML lets through those of the conversions behind a tag
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1} is" if mark else "is"
        problem = getattr(error, "problem", None) or reason(error)
        raise DataError(f"{path}: {where} not readable as YAML ({problem}); correct the file") from None
    names: Any = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, dict):
        if set(names) != {str(k) for k in range(len(names))}:
            keys = ", ".join(map(str, list(names)[:20]))
            raise DataError(f"{path}: names has the keys [{keys}]; number the classes 0, 1, ... without gaps")
        names = [names[str(k)] for k in range(len(names))]
    if not isinstance(names, list) or not names:
        raise DataError(f"{path}: has no list `names`; give the class names (names: [car, boat])")
    for k, name in enumerate(names):
        if not isinstance(name, str) or not re.search(CLASS_NAME, name):  # YAML reads a bare `no` as false
            raise DataError(
                f"{path}: the name of class {k} is {shown(name)}; write it in quotes, without control characters"
            )
    count = content.get("nc")
    if count is not None and count != str(len(names)):
        raise DataError(f"{path}: nc is {shown(count)}, but names has {len(names)} classes; correct one of them")
    return tuple(names)


def parse_labels(text: str, name: str, classes: tuple[str, ...]) -> np.ndarray:
    """Parse the text of a label file to float64 [n, 5]: class, centre x, centre y, width, height (fractions).

    Args:
      text: the content.
      name: the file's name in messages.
      classes: the class names.

    Raises:
      DataError: a line is not five numbers, or has an unknown class or a coordinate outside 0..1.
    """
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        where = f"{name}: line {number}"
        row = numbers(words)
        if len(row) != 5:
            raise DataError(
                f"{where} is {line.strip()[:80]!r}; a line has five numbers, class x y width height: correct it, or "
                "export boxes instead of outlines or key points"
            )
        if row[0] not in range(len(classes)):
            raise DataError(
                f"{where} has class {words[0][:80]}, but only 0 to {len(classes) - 1} have names; correct it, or name "
                "the class in data.yaml"
            )
        if min(row[1:]) < -_SLACK or max(row[1:]) > 1 + _SLACK:
            raise DataError(
                f"{where} has {' '.join(words[1:])[:80]}, not all between 0 and 1; give centre x and width as "
                "fractions of the image's width, centre y and height as fractions of its height"
            )
        rows.append(row)
    return np.array(rows, np.float64).reshape(-1, 5)


def _annotation(rows: np.ndarray, size: tuple[int, int]) -> Annotation:
    """Return the boxes in pixels of an image of ``size`` (height, width), without those that have no area in it."""
    h, w = size
    centre, extent = rows[:, 1:3] * (w, h), rows[:, 3:5] * (w, h)
    boxes, kept = clip(np.concatenate([centre - extent / 2, centre + extent / 2], axis=1), size)
    return Annotation(boxes[kept], rows[kept, 0].astype(np.int32), np.zeros(int(kept.sum()), bool))
