"""Whether a file's pixels fill the size that its header states. Decoders leave the rest at one colour, silently."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from typing import IO

import numpy as np
from PIL import ImageFile

_SOS, _EOI = 0xDA, b"\xff\xd9"
_ARITHMETIC = (0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)  # frames whose decoder reads beyond its last pixel
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of PNG's colour types
_PASSES = ((8, 8, 0, 0), (8, 8, 0, 4), (8, 4, 4, 0), (4, 4, 0, 2), (4, 2, 2, 0), (2, 2, 0, 1), (2, 1, 1, 0))  # Adam7


def check_tiles(image: ImageFile.ImageFile, size: tuple[int, int]) -> None:
    """Raise ValueError if the strips or tiles of a TIFF do not reach its lower right corner (height, width)."""
    if image.format == "TIFF" and image.tile:
        reached = tuple(max((tile.extents or (0, 0, 0, 0))[end] for tile in image.tile) for end in (3, 2))
        if reached[0] < size[0] or reached[1] < size[1]:
            raise ValueError(f"header says {size[1]}x{size[0]}, data end at {reached[1]}x{reached[0]}")


def check_filled(kind: str | None, file: IO[bytes], pixels: np.ndarray, decode: Callable[[bytes], np.ndarray]) -> None:
    """Raise ValueError if the pixels of a JPEG or PNG end before the last row.

    Only pictures whose last rows have one colour are looked at, because missing rows do.

    Args:
      kind: Pillow's name of the format.
      file: the file.
      pixels: the decoded picture, [H, W, 3].
      decode: decodes the bytes of a file as ``pixels`` was decoded.
    """
    if not any((row == row[0]).all() for row in pixels[-2:]):
        return
    file.seek(0)
    if kind == "PNG":
        early = _png_ends_early(file)
    elif kind in ("JPEG", "MPO"):
        early = _jpeg_ends_early(file.read(), pixels, decode)
    else:
        return
    if early:
        raise ValueError(f"header says {pixels.shape[1]}x{pixels.shape[0]}, data end before the last row")


def png_chunks(file: IO[bytes]) -> Iterator[tuple[bytes, int]]:
    """Yield the kind and length of each chunk of a PNG; the file then stands at its content."""
    at = 8
    while True:
        file.seek(at)
        head = file.read(8)
        if len(head) < 8:
            return
        length, kind = struct.unpack(">I4s", head)
        yield kind, length
        at += length + 12


def _png_ends_early(file: IO[bytes]) -> bool:
    needed, unpack = 0, zlib.decompressobj()
    for kind, length in png_chunks(file):
        if kind == b"IHDR":
            w, h, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", file.read(13))
            parts = [(-(-(h - y) // dy), -(-(w - x) // dx)) for dy, dx, y, x in _PASSES] if interlaced else [(h, w)]
            bits = depth * _CHANNELS[colour]
            needed = sum(rows * (1 + -(-columns * bits // 8)) for rows, columns in parts if rows > 0 and columns > 0)
        elif kind == b"IDAT":
            rest = file.read(length)
            while rest and needed > 0:
                needed -= len(unpack.decompress(rest, 1 << 20))
                rest = unpack.unconsumed_tail
            if needed <= 0:
                return False
    return needed > len(unpack.flush())


def _jpeg_ends_early(data: bytes, pixels: np.ndarray, decode: Callable[[bytes], np.ndarray]) -> bool:
    """Return whether bytes added at the end of the picture's data change the picture: then it wanted more."""
    at = 2
    while at + 4 <= len(data) and data[at + 1] != _SOS:
        if data[at + 1] in _ARITHMETIC:
            return False
        at += 2 + struct.unpack_from(">H", data, at + 2)[0]
    end = data.find(_EOI, at)
    return end > 0 and not np.array_equal(decode(data[:end] + b"\x55" * 64 + data[end:]), pixels)


def png_exif(file: IO[bytes]) -> bytes:
    """Return the EXIF block of a PNG, which may follow its pixels; empty if there is none."""
    return next((file.read(length) for kind, length in png_chunks(file) if kind == b"eXIf"), b"")
