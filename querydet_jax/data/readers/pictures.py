"""Read plain image files, without annotations."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from querydet_jax.data.dataset import Annotation, Dataset
from querydet_jax.data.readers.folders import SUFFIXES, list_files
from querydet_jax.data.readers.images import DEFAULT, Reading, read_image, try_headers
from querydet_jax.data.readers.orientation import decide
from querydet_jax.runtime.errors import DataError
from querydet_jax.runtime.stores import as_path, is_folder, is_there, is_url

_log = logging.getLogger("querydet_jax")


class Pictures(Dataset):
    """Image files, in the order given; a folder stands for the images directly in it, sorted by name.

    A file that is named again is left out, which is logged.

    Args:
      paths: files and folders.
      classes: the class names.
      reading: how files become pixels; EXIF orientation is applied by default.

    Attributes:
      paths: all files, with those that are left out.
      broken: a message for each file that is left out because its header cannot be read. Damage behind the header
        shows when ``load`` reads the file.

    Raises:
      DataError: a path does not exist, a folder holds no images, or no file can be read.
    """

    def __init__(self, paths: Sequence[str | Path], classes: tuple[str, ...], reading: Reading = DEFAULT):
        self.classes = classes
        self.category_ids = tuple(range(1, len(classes) + 1))
        files: list[Path] = []
        folder_of = functools.cache(lambda folder: str(folder) if is_url(folder) else os.path.realpath(folder))
        for path in map(as_path, paths):
            if is_folder(path):
                inside = list_files(path, SUFFIXES, deep=False)
                if not inside:
                    raise DataError(f"{path}: no pictures directly in this folder ({', '.join(sorted(SUFFIXES))})")
                files += [path / name for name in inside]
            elif is_there(path):
                files.append(path)
            else:
                hint = "; leave its pattern to the shell, without quotes" if set("*?[") & set(path.name) else ""
                raise DataError(f"{path}: no such picture or folder{hint}")
        if not files:
            raise DataError("no pictures given; name a picture or a folder")
        self.paths = tuple(files)
        files = list({(folder_of(path.parent), path.name): path for path in reversed(files)}.values())[::-1]
        if len(files) < len(self.paths):
            _log.info("left out %d pictures that are named again", len(self.paths) - len(files))
        found = try_headers(files, reading)
        self.broken = [str(header) for header in found if isinstance(header, DataError)]
        self._files = [path for path, header in zip(files, found, strict=True) if not isinstance(header, DataError)]
        headers = [header for header in found if not isinstance(header, DataError)]
        if not headers:
            several = f"none of {len(files)} pictures can be read, the first: " if len(files) > 1 else ""
            raise DataError(several + self.broken[0])
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
