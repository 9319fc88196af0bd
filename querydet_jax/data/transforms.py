"""Image and box transforms: pure functions of one example, in NumPy and PIL.

Boxes are float32 [n, 4] (x0, y0, x1, y1) in pixels of their image. Letters: H W image, n boxes, G
padded boxes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from querydet_jax.data.resampling import enlarged
from querydet_jax.runtime.errors import DataError

MIN_SIDE = 1e-5  # px; a box with a shorter or equal side is empty
# A crop keeps a box if at least this share of its area is inside the window. Less does not show
# the object's class and extent.
MIN_VISIBLE = 0.4


def resize_shape(h: int, w: int, short: int, maximum: int) -> tuple[int, int]:
    """Return (height, width) of an (h, w) image scaled to short side ``short``, its long side at most ``maximum``.

    Floating-point operations are in the order of detectron2's ``ResizeShortestEdge``, so the result
    rounds alike.
    """
    scale = short * 1.0 / min(h, w)
    nh, nw = (float(short), scale * w) if h < w else (scale * h, float(short))
    if max(nh, nw) > maximum:
        scale = maximum * 1.0 / max(nh, nw)
        nh, nw = nh * scale, nw * scale
    # At least 1 px, for images over a thousand times longer than wide.
    return max(int(nh + 0.5), 1), max(int(nw + 0.5), 1)


def resize(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Resize uint8 [H, W, 3] to ``shape`` (height, width) with PIL's bilinear filter, antialiased when shrinking.

    With numba (requirements-fast.txt), enlarging takes a fraction of PIL's time, and gives the same pixels.
    """
    if image.shape[:2] == shape:
        return image
    if shape[0] >= image.shape[0] and shape[1] >= image.shape[1]:
        larger = enlarged(image, shape)
        if larger is not None:
            return larger
    return np.array(Image.fromarray(image).resize((shape[1], shape[0]), Image.Resampling.BILINEAR))


def resize_boxes(boxes: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """Scale boxes from an image of size ``old`` (height, width) to size ``new``."""
    sy, sx = new[0] / old[0], new[1] / old[1]
    return (boxes * np.array([sx, sy, sx, sy])).astype(np.float32)


def flip(image: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mirror image and boxes left to right: x becomes W - x."""
    w = np.float32(image.shape[1])
    mirrored = np.stack([w - boxes[:, 2], boxes[:, 1], w - boxes[:, 0], boxes[:, 3]], axis=1)
    return np.ascontiguousarray(image[:, ::-1]), mirrored


def clip(boxes: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Clip boxes to an image of ``shape`` (height, width); also return bool [n], false where nothing is left."""
    h, w = shape
    cut = np.clip(boxes, 0, np.array([w, h, w, h], np.float32)).astype(np.float32)
    return cut, np.all((cut[:, 2:] - cut[:, :2]) > MIN_SIDE, axis=1)


def crop(
    image: np.ndarray, boxes: np.ndarray, window: tuple[int, int, int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut out ``window`` (y, x, height, width).

    Returns:
      The part of the image; all boxes, clipped to it and in its pixels; bool [n], true for boxes
      with at least ``MIN_VISIBLE`` of their area inside.
    """
    y, x, h, w = window
    moved = boxes - np.array([x, y, x, y], np.float32)
    cut, kept = clip(moved, (h, w))
    kept &= _areas(cut) >= MIN_VISIBLE * _areas(boxes)
    return image[y : y + h, x : x + w], cut, kept


def _areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def place(image: np.ndarray, canvas: tuple[int, int]) -> np.ndarray:
    """Place ``image`` in the top left corner of a canvas (height, width) of zeros.

    Raises:
      DataError: the image does not fit.
    """
    h, w = image.shape[:2]
    if h > canvas[0] or w > canvas[1]:
        raise DataError(f"an image of {h}x{w} (height x width) does not fit the canvas {canvas}; enlarge the canvas")
    out = np.zeros((*canvas, 3), np.uint8)
    out[:h, :w] = image
    return out


def pad_boxes(boxes: np.ndarray, classes: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first ``capacity`` (G) boxes, padded with 0 to [G, 4], and their classes, padded with -1 to [G]."""
    n = min(len(boxes), capacity)
    padded = np.zeros((capacity, 4), np.float32)
    labels = np.full((capacity,), -1, np.int32)
    padded[:n], labels[:n] = boxes[:n], classes[:n]
    return padded, labels


def rescale_to_original(
    boxes: ArrayLike,
    scores: ArrayLike,
    classes: ArrayLike,
    valid: ArrayLike,
    net_size: tuple[int, int],
    original_size: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Map the detections of one network input to the original image.

    Remove padding, scale boxes, clip them to the original image and drop empty ones.

    Args:
      boxes: [D,4] xyxy, px of the network input.
      scores, classes: [D].
      valid: bool [D], false for padding.
      net_size: (height, width) of the resized image before padding to a canvas.
      original_size: (height, width) of the image as stored.

    Returns:
      boxes float32 [n,4], scores float32 [n], classes int64 [n]: the arguments of
      ``ImageDetections`` after ``image_id``.

    Raises:
      DataError: a size is not positive, or ``valid`` is not boolean.
    """
    for name, size in (("net_size", net_size), ("original_size", original_size)):
        if min(size) <= 0:
            raise DataError(f"{name}: {tuple(size)}, expected (height, width), both above 0")
    keep = np.asarray(valid)
    if keep.dtype != np.bool_:
        raise DataError(f"valid: {keep.dtype}, expected bool; an integer would select entries by their index")
    out = np.asarray(boxes, np.float32)[keep]
    height, width = original_size
    scale = np.asarray([width / net_size[1], height / net_size[0]], np.float32)
    limit = np.asarray([width, height], np.float32)
    out = np.clip(out * np.tile(scale, 2), np.float32(0), np.tile(limit, 2))
    solid = (out[:, 2] > out[:, 0]) & (out[:, 3] > out[:, 1])
    return out[solid], np.asarray(scores, np.float32)[keep][solid], np.asarray(classes, np.int64)[keep][solid]
