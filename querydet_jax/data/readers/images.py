"""Decode image files of any common kind to uint8 RGB."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from querydet_jax.runtime.errors import DataError

_ORIENTATION = 0x0112  # EXIF tag
_SIDEWAYS = (5, 6, 7, 8)  # its values that swap width and height
# PIL's errors for truncated or damaged files; they vary with the format and the place of the damage.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def read_image(source: Path | bytes, name: str, size: tuple[int, int] | None = None) -> np.ndarray:
    """Decode an image file to RGB.

    Convert grey, palette, CMYK and transparent images (transparency is dropped); keep the upper 8
    bits of 16-bit grey. Apply the EXIF orientation, unless ``size`` is the size of the stored,
    unrotated pixels: the annotations, boxes included, then refer to the unrotated pixels.

    Args:
      source: path, or the encoded bytes.
      name: the image's name in messages.
      size: the (height, width) that the annotations state; None accepts any.

    Returns:
      uint8 [H, W, 3].

    Raises:
      DataError: the image is missing or damaged, has 32-bit pixels, or is not of ``size``.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            stored = (image.height, image.width)
            sideways = image.getexif().get(_ORIENTATION) in _SIDEWAYS
            shown = stored[::-1] if sideways else stored
            if size is not None and size not in (stored, shown):
                raise DataError(
                    f"{name}: the image is {shown[1]}x{shown[0]} (width x height) but the annotations say "
                    f"{size[1]}x{size[0]}; correct width and height there, or restore the image they were made for"
                )
            image.load()
            upright = image if size is not None and size != shown else ImageOps.exif_transpose(image)
            return _to_rgb(upright, name)
    except FileNotFoundError:
        raise DataError(f"{name}: no such image file; restore it or remove its entry from the annotations") from None
    except DataError:
        raise
    except _BROKEN as error:
        raise _unreadable(name, error) from None


def stored_size(encoded: bytes, name: str) -> tuple[int, int]:
    """Return the stored (height, width) of an encoded image, before any EXIF rotation, without decoding it.

    Raises:
      DataError: the bytes are not a readable image.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return image.height, image.width
    except _BROKEN as error:
        raise _unreadable(name, error) from None


def _unreadable(name: str, error: BaseException) -> DataError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DataError(
        f"{name}: not readable as an image ({reason}); restore the file or remove its entry from the annotations"
    )


def _to_rgb(image: Image.Image, name: str) -> np.ndarray:
    if image.mode.startswith("I;16"):
        grey = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise DataError(f"{name}: pixels are 32-bit numbers (mode {image.mode}); convert to 8 bits per channel")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))
