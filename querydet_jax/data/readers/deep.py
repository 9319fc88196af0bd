"""Pictures of more than 8 bits per channel: their numbers, and how these become 8 bits."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import ImageFile, TiffImagePlugin

from querydet_jax.config.bit_depth import BitDepth, parse_bit_depth
from querydet_jax.runtime.errors import DataError

_log = logging.getLogger("querydet_jax")

_PHOTOMETRIC = TiffImagePlugin.PHOTOMETRIC_INTERPRETATION
_UNSIGNED = ("I;32N", "I;32", "I;32B")
_said = threading.Event()  # once in a process, because a data set has thousands of such pictures


class Deep(NamedTuple):
    """A picture's numbers.

    Attributes:
      values: [H, W] or [H, W, 3].
      full: the largest number that the file can store; 0 for signed, 32-bit and real numbers, which have no such end.
    """

    values: np.ndarray
    full: int


def deep_pixels(image: ImageFile.ImageFile, reopen: Callable[[], ImageFile.ImageFile], *, wanted: bool) -> Deep | None:
    """Decode a picture of more than 8 bits per channel; return None, without decoding, if it has 8 or fewer.

    Pillow decodes 16-bit colour to the upper 8 bits. The file is then decoded a second time with the bytes of each
    number exchanged, which gives the lower ones.

    Args:
      image: the picture, opened but not decoded.
      reopen: opens it again.
      wanted: whether the lower bits of 16-bit colour are needed; if not, such a picture counts as 8-bit.
    """
    tile = image.tile[0] if image.tile else None
    args = tile.args if tile is not None else None
    raw = str(args[0] if isinstance(args, tuple) and args else args)
    if image.mode.startswith("I;16"):
        values, full = np.asarray(image).astype(np.uint16), 4095 if raw.startswith("I;12") else 65535
        # Of TIFF's two kinds of grey, 0 is white in one, which Pillow heeds for 8 bits alone.
        inverted = isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(_PHOTOMETRIC) == 0
        return Deep(full - values if inverted else values, full)
    if image.mode == "I" and image.format == "PPM":  # Pillow has scaled the numbers up from the file's largest
        full = int(args[-1]) if isinstance(args, tuple) else 65535
        return Deep(np.rint(np.asarray(image) * (full / 65535)).astype(np.uint16), full)
    if image.mode in ("I", "F"):
        values = np.asarray(image)
        return Deep(values.view(np.uint32) if raw in _UNSIGNED else values, 0)  # Pillow takes them for signed
    if tile and tile.codec_name == "ppm" and image.mode == "RGB" and isinstance(args, tuple) and int(args[-1]) > 255:
        return _deep_ppm(image, tile.offset, int(args[-1]))
    if not wanted or not raw.startswith(("RGB;16", "RGBA;16", "RGBX;16", "LA;16B")):
        return None
    if raw == "LA;16B":  # a pixel has four bytes: grey, upper and lower, and transparency
        both = _decoded(image, "RGBA").astype(np.uint16)
        return Deep(both[..., 0] << 8 | both[..., 1], 65535)
    other = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}
    upper, lower = _decoded(image, raw), _decoded(reopen(), raw[:-1] + other[raw[-1]])
    return Deep((upper.astype(np.uint16) << 8 | lower)[..., :3], 65535)


def _deep_ppm(image: ImageFile.ImageFile, offset: int, full: int) -> Deep:
    """Decode 16-bit colour in PPM, which Pillow scales down to 8 bits."""
    assert image.fp is not None
    image.fp.seek(offset)
    size = image.height * image.width * 6
    data = image.fp.read(size)
    if len(data) < size:
        raise ValueError("image file is truncated")
    values = np.frombuffer(data, ">u2").reshape(image.height, image.width, 3)
    return Deep(np.minimum(values, full).astype(np.uint16), full)


def _decoded(image: ImageFile.ImageFile, raw: str) -> np.ndarray:
    """Decode a picture whose file is taken to store its pixels as Pillow's raw mode ``raw``."""
    image.tile = [
        tile._replace(args=(raw, *tile.args[1:]) if isinstance(tile.args, tuple) else raw) for tile in image.tile
    ]
    return np.asarray(image)


def wanted(bit_depth: str) -> bool:
    """Return whether the lower bits of 16-bit colour are needed: to scale, or to say once what is lost without it."""
    return bool(bit_depth) or not _said.is_set()


def to_8_bits(deep: Deep, name: str, bit_depth: str) -> np.ndarray:
    """Scale a picture's numbers to uint8 [H, W, 3] as ``data.bit_depth`` says; without it, keep the upper 8 bits.

    Raises:
      DataError: the numbers have no upper 8 bits, and ``bit_depth`` is empty.
    """
    rule = parse_bit_depth(bit_depth)
    pixels = _upper(deep, name) if rule is None else _scaled(deep, rule)
    return np.repeat(pixels[:, :, None], 3, axis=2) if pixels.ndim == 2 else pixels


def _upper(deep: Deep, name: str) -> np.ndarray:
    low, high = _limits(deep.values)
    if not deep.full:
        if not np.isfinite(deep.values).any():
            raise DataError(f"{name}: no pixel is a finite number; give a picture, such as uint8 from 0 to 255")
        raise DataError(
            f"{name}: pixels are 32-bit numbers from {low:g} to {high:g}; set data.bit_depth to LOW:HIGH, "
            "1%:99% or file, to scale them to 8 bits"
        )
    pixels = (deep.values.astype(np.uint32) * 256 // (deep.full + 1)).astype(np.uint8)
    if not _said.is_set():
        _said.set()
        ends = int(low), int(high)
        _log.warning(
            "%s: pixels from %s to %s of %s become %d to %d of 255; set data.bit_depth to %d:%d, 1%%:99%% or file to "
            "scale them (other such pictures are not reported)",
            name, *(f"{v:,}" for v in (*ends, deep.full)), pixels.min(), pixels.max(), *ends,
        )  # fmt: skip
    return pixels


def _scaled(deep: Deep, rule: BitDepth) -> np.ndarray:
    values = deep.values.astype(np.float32 if deep.full else np.float64)
    low, high = rule.low, rule.high
    if rule.percent:
        low, high = _limits(values, low, high)
    if low >= high:  # a picture of one value
        return np.zeros(values.shape, np.uint8)
    scaled = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) * (255 / (high - low))
    return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)


def _limits(values: np.ndarray, low: float = 0, high: float = 100) -> tuple[float, float]:
    """Return two percentiles of the finite values; 0 and 0 if there are none."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 0.0
    if (low, high) == (0, 100):
        return float(finite.min()), float(finite.max())
    below, above = np.percentile(finite, (low, high))
    return float(below), float(above)
