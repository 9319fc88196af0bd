"""Decode picture files of any common kind to uint8 RGB."""

from __future__ import annotations

import io
import re
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, TypeVar

import numpy as np
from PIL import Image, ImageFile, TiffImagePlugin

from querydet_jax.config import DataConfig
from querydet_jax.config.bit_depth import parse_bit_depth
from querydet_jax.data.readers.agreement import check_filled, check_tiles, png_exif
from querydet_jax.data.readers.deep import deep_pixels, to_8_bits, wanted
from querydet_jax.data.readers.folders import FORMATS, open_regular
from querydet_jax.data.readers.orientation import TAG, TURNS, Header, parse_orientation, valid
from querydet_jax.runtime.errors import DataError

_READERS = 8  # threads; opening thousands of files is mostly waiting, above all on network disks
_quiet = threading.Lock()
Result = TypeVar("Result")


@dataclass(frozen=True)
class Reading:
    """How files become pixels: ``DataConfig.exif``, ``bit_depth`` and ``max_pixels``.

    Attributes:
      decided: what a data set's reader decided for ``exif`` auto (``orientation.decide``): whether the orientation is
        applied. A size that the annotations state still decides for its own picture where it can tell.

    Raises:
      ConfigError: ``bit_depth`` is malformed, see ``parse_bit_depth``.
    """

    exif: Literal["auto", "apply", "ignore"] = "auto"
    bit_depth: str = ""
    max_pixels: int = DataConfig.max_pixels
    decided: bool | None = None

    def __post_init__(self) -> None:
        parse_bit_depth(self.bit_depth)

    @classmethod
    def of(cls, data: DataConfig) -> Reading:
        return cls(data.exif, data.bit_depth, data.max_pixels)

    @property
    def upright(self) -> bool:
        """Whether the EXIF orientation is applied."""
        return self.exif != "ignore" if self.decided is None else self.decided


DEFAULT = Reading()


def read_image(
    source: Path | bytes, name: str, size: tuple[int, int] | None = None, reading: Reading = DEFAULT
) -> np.ndarray:
    """Decode a picture to RGB: grey, palette, CMYK and transparent ones too (transparency is dropped).

    Args:
      source: path, or the encoded bytes.
      name: the picture's name in messages.
      size: the (height, width) that the annotations state; None accepts any.
      reading: orientation, depth and largest size.

    Returns:
      uint8 [H, W, 3].

    Raises:
      DataError: the picture is missing, damaged, of a format that is not read, too large, not of ``size``, or of
        32-bit numbers without ``bit_depth``.
    """

    def read(file: IO[bytes]) -> np.ndarray:
        image = _open(file, name, reading)
        kind, stored = image.format, _stored_size(image)
        check_tiles(image, stored)
        deep = deep_pixels(image, lambda: _open(file, name, reading), wanted=wanted(reading.bit_depth))
        pixels = to_rgb(image) if deep is None else to_8_bits(deep, name, reading.bit_depth)
        if pixels.shape[:2] != stored:
            raise ValueError(f"header says {stored[1]}x{stored[0]}, data are {pixels.shape[1]}x{pixels.shape[0]}")
        header = Header(stored, _orientation(image))  # after decoding, because PNG may store it behind the pixels
        check_filled(kind, file, pixels, lambda data: to_rgb(_open(io.BytesIO(data), name, reading)))
        if _upright(header, size, name, reading) and header.orientation != 1:
            pixels = np.array(Image.fromarray(pixels).transpose(TURNS[header.orientation]))
        return pixels

    return _read(read, source, name)


def read_header(source: Path | bytes, name: str, reading: Reading = DEFAULT) -> Header:
    """Read a picture's size and orientation without decoding it; raise like ``read_image``."""

    def read(file: IO[bytes]) -> Header:
        image = _open(file, name, reading)
        late = image.format == "PNG" and "exif" not in image.info
        return Header(_stored_size(image), parse_orientation(png_exif(file)) if late else _orientation(image))

    return _read(read, source, name)


def check_header(source: Path | bytes, name: str, size: tuple[int, int], reading: Reading) -> Header:
    """Return the header; raise what ``read_image`` raises of a picture that is missing, of another size, or has a
    damaged header."""
    header = read_header(source, name, reading)
    _upright(header, size, name, reading)
    return header


def read_headers(paths: Sequence[Path], reading: Reading = DEFAULT) -> list[Header]:
    """Read the headers of many files in parallel; raise like ``read_header``."""
    headers = []
    for found in try_headers(paths, reading):
        if isinstance(found, DataError):
            raise found
        headers.append(found)
    return headers


def try_headers(paths: Sequence[Path], reading: Reading = DEFAULT) -> list[Header | DataError]:
    """As ``read_headers``; a file that cannot be read gives its error."""

    def read(path: Path) -> Header | DataError:
        try:
            return read_header(path, str(path), reading)
        except DataError as error:
            return error

    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(read, paths))


def _read(read: Callable[[IO[bytes]], Result], source: Path | bytes, name: str) -> Result:
    """Call ``read`` on the opened file, and turn whatever goes wrong into a DataError."""
    try:
        if isinstance(source, bytes):
            return _without_warnings(read, io.BytesIO(source))
        with open_regular(source) as file:
            return _without_warnings(read, file)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{name}: no such image file; restore it, or leave it out") from None
    except Exception as error:  # Pillow's readers raise many kinds of errors for damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{name}: not readable as an image ({reason}); restore the file, or leave it out") from None


def _without_warnings(read: Callable[[IO[bytes]], Result], file: IO[bytes]) -> Result:
    """Call ``read``; where warnings are errors, Pillow's (about odd tags of good pictures) still are none."""
    try:
        return read(file)
    except Warning:
        with _quiet, warnings.catch_warnings():  # which is not for several threads at once
            warnings.simplefilter("ignore")
            return read(file)


class _StoredTiff(TiffImagePlugin.TiffImageFile):
    """A TIFF as stored. Pillow's own turns it while decoding, and then reads tags that may be damaged."""

    def load_end(self) -> None:
        self._size = self.tag_v2[TiffImagePlugin.IMAGEWIDTH], self.tag_v2[TiffImagePlugin.IMAGELENGTH]


def _open(file: IO[bytes], name: str, reading: Reading) -> ImageFile.ImageFile:
    """Open a picture of one of ``FORMATS``, and check its size, without decoding it."""
    limit = reading.max_pixels
    if Image.MAX_IMAGE_PIXELS is not None and (not limit or limit > 2 * Image.MAX_IMAGE_PIXELS):
        Image.MAX_IMAGE_PIXELS = limit or None  # as asked for; some of Pillow's readers check it themselves
    file.seek(0)
    start = file.read(16)
    for kind in FORMATS:
        factory, accepts = Image.OPEN[kind]
        accepted = accepts is None or accepts(start)
        if isinstance(accepted, str):  # Pillow was built without this format
            raise ValueError(accepted)
        if accepted:
            file.seek(0)
            try:
                # Not Image.open, which would warn of 89 megapixels, and try every other format.
                image = _StoredTiff(file, None) if kind == "TIFF" else factory(file, b"")
            except Image.DecompressionBombError as error:
                found = re.search(r"\((\d+) pixels\)", str(error))
                raise _too_large(name, int(found[1]) if found else 0, limit) from None
            if limit and image.width * image.height > limit:
                raise _too_large(name, image.width * image.height, limit)
            return image
    raise ValueError(_other(start))


def _other(start: bytes) -> str:
    """Return what a file of no known format is, by its first 16 bytes."""
    if not start:
        return "the file is empty"
    if start[4:8] == b"ftyp":
        return "HEIC or a video; convert it to JPEG"
    if start == b"version https://":
        return "a pointer of Git LFS; git lfs pull fetches the file"
    return f"none of {', '.join(FORMATS)}"


def _too_large(name: str, pixels: int, limit: int) -> DataError:
    return DataError(
        f"{name}: too large, {pixels:,} pixels where {limit:,} are allowed; set data.max_pixels to {pixels} (0: any "
        "number), or make the picture smaller"
    )


def _stored_size(image: ImageFile.ImageFile) -> tuple[int, int]:
    """Return (height, width) as stored."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):  # whose size Pillow states as turned
        return image.tag_v2[TiffImagePlugin.IMAGELENGTH], image.tag_v2[TiffImagePlugin.IMAGEWIDTH]
    return image.height, image.width


def _orientation(image: ImageFile.ImageFile) -> int:
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return valid(image.tag_v2.get(TAG))
    return parse_orientation(image.info.get("exif", b""))


def _upright(header: Header, size: tuple[int, int] | None, name: str, reading: Reading) -> bool:
    """Return whether to apply a picture's orientation; raise DataError if the size stated is not the picture's."""
    upright = reading.upright
    if size is None or size == header.size(upright=upright):
        return upright
    if size == header.size(upright=not upright):
        if reading.exif == "auto":
            return not upright
        raise DataError(
            f"{name}: the annotations say {size[1]}x{size[0]} (width x height), the size of the picture "
            f"{'before' if upright else 'after'} its EXIF orientation is applied, but data.exif is {reading.exif}; "
            f"set it to auto or {'ignore' if upright else 'apply'}"
        )
    h, w = header.size(upright=upright)
    raise DataError(
        f"{name}: the image is {w}x{h} (width x height) but the annotations say {size[1]}x{size[0]}; correct width and "
        "height there, or restore the image they were made for"
    )


def to_rgb(image: Image.Image) -> np.ndarray:
    """Return a picture of at most 8 bits per channel as uint8 [H, W, 3]."""
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))
