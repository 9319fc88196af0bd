"""Pictures that are in memory already: arrays and Pillow's pictures. Letters: H W picture, N pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from querydet_jax.data.dataset import Annotation, Dataset
from querydet_jax.data.readers.deep import Deep, to_8_bits
from querydet_jax.data.readers.images import DEFAULT, Reading, to_rgb
from querydet_jax.data.readers.orientation import TURNS, parse_orientation
from querydet_jax.runtime.errors import DataError


class Frames(Dataset):
    """Pictures in memory, in the order given. They are copied, so that their memory may be filled anew.

    Args:
      pictures: NumPy arrays ``[H, W, 3]``, ``[H, W, 4]`` (transparency is dropped), ``[H, W]`` (grey) or
        ``[N, H, W, 3]`` (N pictures), and Pillow's pictures.
      classes: the class names.
      reading: EXIF orientation (of Pillow's pictures), depth and largest size, as for files. An array of another type
        than uint8 counts as a picture of more than 8 bits per channel.
      channels: order of the channels of arrays: rgb, or bgr as OpenCV reads them.

    Raises:
      DataError: a picture is none of these, too large, or of 32-bit numbers without ``reading.bit_depth``.
    """

    def __init__(
        self,
        pictures: Sequence[Any],
        classes: tuple[str, ...],
        reading: Reading = DEFAULT,
        channels: Literal["rgb", "bgr"] = "rgb",
    ):
        self.classes = classes
        self.category_ids = tuple(range(1, len(classes) + 1))
        self._pictures: list[np.ndarray] = []
        for i, picture in enumerate(pictures):
            name = f"picture {i}"
            if isinstance(picture, Image.Image):
                self._pictures.append(_of_pillow(picture, name, reading))
            else:
                stack = picture if picture.ndim == 4 else picture[None]
                self._pictures += [_of_array(array, name, reading, channels) for array in stack]
        if not self._pictures:
            raise DataError("no pictures given; give at least one")

    def __len__(self) -> int:
        return len(self._pictures)

    def image_id(self, i: int) -> int:
        return i

    def file_name(self, i: int) -> str:
        return f"picture {i}"

    def size(self, i: int) -> tuple[int, int]:
        height, width = self._pictures[i].shape[:2]
        return height, width

    def annotation(self, i: int) -> Annotation:
        return Annotation(np.zeros((0, 4), np.float32), np.zeros((0,), np.int32), np.zeros((0,), bool))

    def load(self, i: int) -> np.ndarray:
        return self._pictures[i]


def _of_pillow(picture: Image.Image, name: str, reading: Reading) -> np.ndarray:
    check_size(picture.height, picture.width, name, reading)
    try:
        picture.load()
    except Exception as error:  # as for files, Pillow's readers raise many kinds of errors
        raise DataError(f"{name}: cannot be decoded ({error}); give a picture that is whole") from None
    if picture.mode.startswith("I;16"):
        pixels = to_8_bits(Deep(np.asarray(picture).astype(np.uint16), 65535), name, reading.bit_depth)
    elif picture.mode in ("I", "F"):
        pixels = to_8_bits(Deep(np.asarray(picture), 0), name, reading.bit_depth)
    else:
        pixels = to_rgb(picture)
    orientation = parse_orientation(picture.info.get("exif", b"")) if reading.upright else 1
    return pixels if orientation == 1 else np.array(Image.fromarray(pixels).transpose(TURNS[orientation]))


def _of_array(array: np.ndarray, name: str, reading: Reading, channels: str) -> np.ndarray:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or not array.size or array.dtype.kind not in "uif":
        raise DataError(
            f"{name}: {array.dtype} {list(array.shape)} is no picture; give uint8 [H, W, 3], or [N, H, W, 3] for more"
        )
    check_size(array.shape[0], array.shape[1], name, reading)
    colours = array[..., :3] if channels == "rgb" else array[..., 2::-1]
    if array.dtype != np.uint8:
        deep = Deep(np.array(colours), 65535 if array.dtype == np.uint16 else 0)
        colours = to_8_bits(deep, name, reading.bit_depth)
    return np.repeat(colours, 3, axis=2) if colours.shape[2] == 1 else np.array(colours, order="C")


def check_size(height: int, width: int, name: str, reading: Reading) -> None:
    if reading.max_pixels and height * width > reading.max_pixels:
        raise DataError(
            f"{name}: too large, {height * width:,} pixels where {reading.max_pixels:,} are allowed; set "
            "data.max_pixels (0: any number), or make the picture smaller"
        )
