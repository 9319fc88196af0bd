"""Pillow's bilinear enlargement, compiled by numba where it is installed: the same pixels in a fraction of the time.

Letters: H W picture, h w result, N samples along one side.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

_log = logging.getLogger("querydet_jax")

_BITS = 22  # Pillow's fixed point: 32 bits, less 8 of a pixel and 2 for the sum
_HALF = 1 << (_BITS - 1)
_compiling = threading.Lock()


class Taps(NamedTuple):
    """The two pixels that each of N samples lies between, int64 [N], and their weights, int32 [N]."""

    low: np.ndarray
    high: np.ndarray
    of_low: np.ndarray
    of_high: np.ndarray


@functools.lru_cache(256)
def taps(old: int, new: int) -> Taps:
    """Return what ``new`` >= ``old`` samples of ``old`` pixels are made of.

    Floating-point operations are in the order of Pillow's ``precompute_coeffs``, so that the weights are the same.
    """
    centre = (np.arange(new) + 0.5) * (old / new)
    low = np.maximum((centre - 0.5).astype(np.int64), 0)
    high = np.minimum(low + 1, old - 1)
    weights = [np.maximum(1 - np.abs(pixel - centre + 0.5), 0.0) for pixel in (low, low + 1)]
    weights[1][low + 1 == old] = 0
    total = weights[0] + weights[1]
    of_low, of_high = ((0.5 + weight / total * (1 << _BITS)).astype(np.int32) for weight in weights)
    return Taps(low, high, of_low, of_high)


def resample(image: np.ndarray, out: np.ndarray, across: Taps, down: Taps) -> None:
    """Enlarge ``image [H, W, 3]`` into ``out [h, w, 3]``, both uint8 and contiguous: along rows, then along columns.

    Plain loops, because numba compiles them.
    """
    height, length = image.shape[0], out.shape[1] * 3
    half = np.int32(_HALF)
    wide, flat = np.empty((height, length), np.uint8), out.reshape(out.shape[0], length)
    for y in range(height):
        row, source = wide[y], image[y].reshape(-1)
        for x in range(out.shape[1]):
            a, b, i, j = across.of_low[x], across.of_high[x], 3 * across.low[x], 3 * across.high[x]
            for c in range(3):
                row[3 * x + c] = (half + a * np.int32(source[i + c]) + b * np.int32(source[j + c])) >> _BITS
    for y in range(out.shape[0]):
        row, upper, lower = flat[y], wide[down.low[y]], wide[down.high[y]]
        a, b = down.of_low[y], down.of_high[y]
        for i in range(length):
            row[i] = (half + a * np.int32(upper[i]) + b * np.int32(lower[i])) >> _BITS


@functools.cache
def installed() -> bool:
    """Return whether numba is here (requirements-fast.txt)."""
    return importlib.util.find_spec("numba") is not None


def enlarged(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray | None:
    """Enlarge uint8 [H, W, 3] to ``shape`` (h, w), neither side smaller; None without numba, or where it differs."""
    if not installed():
        return None
    with _compiling:  # once, whatever the number of threads
        compiled = _compiled()
    if compiled is None:
        return None
    out = np.empty((*shape, 3), np.uint8)
    compiled(np.ascontiguousarray(image), out, taps(image.shape[1], shape[1]), taps(image.shape[0], shape[0]))
    return out


@functools.cache
def _compiled() -> Callable[[np.ndarray, np.ndarray, Taps, Taps], None] | None:
    """Compile ``resample``, and compare it once with this Pillow; None if their pixels differ."""
    import numba  # pyright: ignore[reportMissingImports]

    try:
        compiled = numba.njit(cache=True, nogil=True)(resample)
    except RuntimeError:  # no folder to keep the compiled code in
        compiled = numba.njit(nogil=True)(resample)
    image = np.random.default_rng(0).integers(0, 256, (31, 45, 3), np.uint8)
    ours = np.empty((53, 97, 3), np.uint8)
    compiled(image, ours, taps(45, 97), taps(31, 53))
    if np.array_equal(ours, np.array(Image.fromarray(image).resize((97, 53), Image.Resampling.BILINEAR))):
        return compiled
    _log.warning("numba %s and this Pillow resize to other pixels; Pillow alone is used, slower", numba.__version__)
    return None
