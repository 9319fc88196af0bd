"""Read plain image files, without annotations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from querydet_jax.data.dataset import Annotation, Dataset
from querydet_jax.data.readers.folders import SUFFIXES
from querydet_jax.data.readers.images import read_image
from querydet_jax.runtime.errors import DataError


class Pictures(Dataset):
    """Image files, in the order given; a folder stands for the images directly in it, sorted by name.

    Raises:
      DataError: a path does not exist, a folder holds no images, or a file cannot be read.
    """

    def __init__(self, paths: Sequence[str | Path], classes: tuple[str, ...]):
        self.classes = classes
        self.category_ids = tuple(range(1, len(classes) + 1))
        self._files: list[Path] = []
        for path in map(Path, paths):
            if path.is_dir():
                inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
                if not inside:
                    raise DataError(f"{path}: no pictures in this folder ({', '.join(sorted(SUFFIXES))})")
                self._files += inside
            elif path.is_file():
                self._files.append(path)
            else:
                raise DataError(f"{path}: no such picture or folder")
        if not self._files:
            raise DataError("no pictures given; name a picture or a folder")
        # Decoding gives the size after EXIF rotation; images to predict on are few.
        self._sizes = [read_image(path, str(path)).shape[:2] for path in self._files]

    def __len__(self) -> int:
        return len(self._files)

    def image_id(self, i: int) -> int:
        return i

    def file_name(self, i: int) -> str:
        return str(self._files[i])

    def size(self, i: int) -> tuple[int, int]:
        height, width = self._sizes[i]
        return height, width

    def annotation(self, i: int) -> Annotation:
        return Annotation(np.zeros((0, 4), np.float32), np.zeros((0,), np.int32), np.zeros((0,), bool))

    def load(self, i: int) -> np.ndarray:
        return read_image(self._files[i], str(self._files[i]))
