"""Helpers for image folders with one text file per image: listing, image sizes."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath

from PIL import ExifTags, Image

from querydet_jax.runtime.errors import DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_READERS = 8  # threads; opening thousands of files is mostly waiting, above all on network disks


def by_stem(folder: Path, suffixes: Collection[str]) -> dict[str, str]:
    """List the files at any depth below ``folder`` as {name without suffix: name}, relative to it, sorted by name.

    Skip names that begin with a dot, because macOS adds such files to archives.

    Raises:
      DataError: two files differ only in their suffix.
    """
    found: dict[str, str] = {}
    names = []
    for above, _, files in os.walk(folder):
        inside = PurePath(above).relative_to(folder)
        names += [inside / f for f in files if not f.startswith(".") and PurePath(f).suffix.lower() in suffixes]
    for name in sorted(names):
        stem = name.with_suffix("").as_posix()
        if stem in found:
            raise DataError(
                f"{folder}: {found[stem]} and {name.as_posix()} differ only in their suffix; rename or remove one"
            )
        found[stem] = name.as_posix()
    return found


def image_sizes(paths: Sequence[Path], *, upright: bool) -> list[tuple[int, int]]:
    """Read (height, width) of image files in pixels from their headers, without decoding.

    Args:
      paths: the files.
      upright: whether to apply the EXIF orientation; otherwise return the stored size.

    Raises:
      DataError: a file is not a readable image.
    """

    def size(path: Path) -> tuple[int, int]:
        try:
            with Image.open(path) as image:
                sideways = upright and image.getexif().get(ExifTags.Base.Orientation) in _SIDEWAYS
                return (image.width, image.height) if sideways else (image.height, image.width)
        except Exception as error:  # PIL's readers raise many kinds of errors for damaged files
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(
                f"{path}: not readable as an image ({reason}); restore the file, or remove it and its annotation"
            ) from None

    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(size, paths))
