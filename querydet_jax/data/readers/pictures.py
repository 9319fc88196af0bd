"""Read plain image files, without annotations."""

from __future__ import annotations

import dataclasses
import functools
import glob
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from querydet_jax.data.dataset import Annotation, Dataset
from querydet_jax.data.readers.folders import SUFFIXES, list_files
from querydet_jax.data.readers.images import DEFAULT, Reading, read_image, try_headers
from querydet_jax.data.readers.orientation import decide
from querydet_jax.data.readers.video import is_address
from querydet_jax.runtime.errors import DataError
from querydet_jax.runtime.stores import as_path, is_folder, is_there, is_url, matching

_log = logging.getLogger("querydet_jax")


def open_pictures(
    names: Sequence[str | os.PathLike[str]], classes: tuple[str, ...], reading: Reading = DEFAULT
) -> Pictures:
    """Open the files that ``find_pictures`` finds.

    Raises:
      DataError: see ``find_pictures``; or no file can be read.
    """
    pictures = Pictures(find_pictures(names), classes, reading)
    if not len(pictures):
        several = f"none of {len(pictures.paths)} pictures can be read, the first: " if len(pictures.paths) > 1 else ""
        raise DataError(several + pictures.broken[0])
    return pictures


def find_pictures(names: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Return the image files that names stand for, in the order given.

    A folder stands for the images directly in it, sorted by name, a pattern for what it matches (``matched``). A file
    that is named again is left out, which is logged.

    Raises:
      DataError: no name; one that does not exist, a folder without images, a pattern that matches nothing.
    """
    files: list[Path] = []
    for path in map(as_path, matched(names)):
        if is_folder(path):
            inside = list_files(path, SUFFIXES, deep=False)
            if not inside:
                raise DataError(f"{path}: no pictures directly in this folder ({', '.join(sorted(SUFFIXES))})")
            files += [path / name for name in inside]
        elif is_there(path):
            files.append(path)
        else:
            raise DataError(f"{path}: no such picture or folder")
    if not files:
        raise DataError("no pictures given; name a picture or a folder")
    folder_of = functools.cache(lambda folder: str(folder) if is_url(folder) else os.path.realpath(folder))
    once: dict[tuple[str, str], Path] = {}
    for path in files:
        once.setdefault((folder_of(path.parent), path.name), path)
    if len(once) < len(files):
        _log.info("left out %d pictures that are named again", len(files) - len(once))
    return list(once.values())


def matched(names: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Replace patterns (``cam*/**/*.jpg``) by what they match, sorted; what exists under its name, or is the address of
    a stream, is no pattern.

    Raises:
      DataError: a pattern matches nothing.
    """
    found: list[str] = []
    for name in [os.fspath(name) for name in names]:
        if set("*?[").isdisjoint(name) or is_address(name) or _exists(name):
            found.append(name)
            continue
        inside = sorted(map(str, matching(name)) if is_url(name) else glob.glob(name, recursive=True))
        if not inside:
            raise DataError(f"{name}: the pattern matches no picture and no folder")
        found += inside
    return found


def _exists(name: str) -> bool:
    return is_there(as_path(name)) if is_url(name) else os.path.lexists(name)


class Pictures(Dataset):
    """Image files, in the order given.

    Args:
      paths: the files.
      classes: the class names.
      reading: how files become pixels; EXIF orientation is applied by default.

    Attributes:
      paths: the files given, with those that are left out.
      broken: a message for each file that is left out because its header cannot be read. Damage behind the header
        shows when ``load`` reads the file.
    """

    def __init__(self, paths: Sequence[Path], classes: tuple[str, ...], reading: Reading = DEFAULT):
        self.classes = classes
        self.category_ids = tuple(range(1, len(classes) + 1))
        self.paths = tuple(paths)
        found = try_headers(self.paths, reading)
        self.broken = [str(header) for header in found if isinstance(header, DataError)]
        self._files = [path for path, header in zip(paths, found, strict=True) if not isinstance(header, DataError)]
        headers = [header for header in found if not isinstance(header, DataError)]
        rule = decide("pictures", reading.exif, headers, convention=(True, "viewers show pictures turned"))
        self._reading = dataclasses.replace(reading, decided=rule.upright)
        self._sizes = [header.size(upright=rule.upright) for header in headers]

    def __len__(self) -> int:
        return len(self._files)

    def image_id(self, i: int) -> int:
        return i

    def file_name(self, i: int) -> str:
        return str(self._files[i])

    def size(self, i: int) -> tuple[int, int]:
        return self._sizes[i]

    def annotation(self, i: int) -> Annotation:
        return Annotation(np.zeros((0, 4), np.float32), np.zeros((0,), np.int32), np.zeros((0,), bool))

    def load(self, i: int) -> np.ndarray:
        return read_image(self._files[i], str(self._files[i]), reading=self._reading)
