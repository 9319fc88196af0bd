"""Augmentation of training images: pure functions of samples and a random generator, in NumPy.

Letters: H W image, n boxes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from querydet_jax.config import AugmentConfig
from querydet_jax.data.transforms import clip, crop, flip, pad_boxes, place, resize, resize_boxes

OFF = AugmentConfig()
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_TRIES = 8  # places tried per pasted object
_FEATHER = 0.25  # of a pasted object's side, on each side of its box


class Sample(NamedTuple):
    """An image uint8 ``[H, W, 3]`` with its boxes float32 ``[n, 4]`` xyxy px and classes int32 ``[n]``."""

    image: np.ndarray
    boxes: np.ndarray
    classes: np.ndarray


Another = Callable[[np.random.Generator], tuple[Sample, tuple[int, int]]]
"""Returns a random training sample, and the (height, width) to resize it to."""


def train_example(
    sample: Sample,
    *,
    shape: tuple[int, int],
    canvas: tuple[int, int],
    flip_probability: float,
    capacity: int,
    rng: np.random.Generator,
    augment: AugmentConfig = OFF,
    another: Another | None = None,
    class_odds: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Resize to ``shape``, crop at random if that exceeds the canvas, flip at random and pad; augment as configured.

    Args:
      sample: the image and its boxes, without crowd boxes.
      shape: (height, width) to resize to.
      canvas: (height, width) of the output.
      flip_probability: probability of a horizontal flip.
      capacity: G; boxes beyond the first G are dropped.
      rng: the source of every random choice.
      augment: further random changes.
      another: draws the other images of a mosaic; None makes none.
      class_odds: [K], factors on the odds of an object to be the one that a crop holds; None: all equal.

    Returns:
      image uint8 ``[*canvas, 3]``; size int32 [2], height and width of the valid pixels; boxes float32
      [G, 4]; classes int32 [G].
    """
    flipped = rng.random() < flip_probability
    whole = _turned_and_resized(sample, shape, augment, rng)
    if another is not None and augment.mosaic and rng.random() < augment.mosaic:
        others = [_turned_and_resized(*another(rng), augment, rng) for _ in range(3)]
        sample = mosaic([whole, *others], canvas, rng, augment.crop_to_objects, class_odds)
    else:
        sample = cropped(whole, canvas, rng, augment.crop_to_objects, class_odds)
    if augment.paste:
        sample = paste_small(sample, whole, augment.paste, augment.paste_below, rng)
    image, boxes, classes = sample
    if flipped:
        image, boxes = flip(image, boxes)
    if augment.photometric:
        image = photometric(image, augment.photometric, rng)
    padded, labels = pad_boxes(boxes, classes, capacity)
    return {
        "image": place(image, canvas),
        "size": np.array(image.shape[:2], np.int32),
        "boxes": padded,
        "classes": labels,
    }


def _turned_and_resized(
    sample: Sample, shape: tuple[int, int], augment: AugmentConfig, rng: np.random.Generator
) -> Sample:
    if augment.turn and rng.random() < augment.turn:
        turns = int(rng.integers(4))
        sample = quarter_turns(sample, turns, bool(rng.integers(2)))
        shape = (shape[1], shape[0]) if turns % 2 else shape
    if augment.scale != (1.0, 1.0):
        low, high = np.log(augment.scale)
        factor = float(np.exp(rng.uniform(low, high)))
        shape = max(1, round(shape[0] * factor)), max(1, round(shape[1] * factor))
    return resized(sample, shape)


def resized(sample: Sample, shape: tuple[int, int]) -> Sample:
    """Resize to ``shape`` (height, width); drop boxes without area in it."""
    boxes, kept = clip(resize_boxes(sample.boxes, sample.image.shape[:2], shape), shape)
    return Sample(resize(sample.image, shape), boxes[kept], sample.classes[kept])


def cropped(
    sample: Sample,
    limit: tuple[int, int],
    rng: np.random.Generator,
    focus: float = 0.0,
    class_odds: np.ndarray | None = None,
) -> Sample:
    """Cut out a random window of at most ``limit`` (height, width).

    Args:
      focus: probability that the window holds a certain object, drawn with odds of 1 / its side: a window drawn
        anywhere shows small objects as rarely as they are small.
      class_odds: [K], factors on these odds by class; None: all equal.
    """
    height, width = sample.image.shape[:2]
    h, w = min(height, limit[0]), min(width, limit[1])
    if (h, w) == (height, width):
        return sample
    y, x = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    if focus and len(sample.boxes) and rng.random() < focus:
        sides = np.sqrt(np.maximum(np.prod(sample.boxes[:, 2:] - sample.boxes[:, :2], axis=1), 1.0))
        odds = 1 / sides if class_odds is None else class_odds[sample.classes] / sides
        chosen = sample.boxes[rng.choice(len(sides), p=odds / odds.sum())]
        x = _around(float(chosen[0]), float(chosen[2]), w, width, rng)
        y = _around(float(chosen[1]), float(chosen[3]), h, height, rng)
    image, boxes, kept = crop(sample.image, sample.boxes, (y, x, h, w))
    return Sample(image, boxes[kept], sample.classes[kept])


def _around(low: float, high: float, length: int, total: int, rng: np.random.Generator) -> int:
    """Return a random start of a window of ``length`` in ``total`` that holds low..high, or lies in it."""
    first, last = sorted((int(np.ceil(high)) - length, int(low)))
    return int(np.clip(rng.integers(first, last + 1), 0, total - length))


def mosaic(
    samples: Sequence[Sample],
    canvas: tuple[int, int],
    rng: np.random.Generator,
    focus: float = 0.0,
    class_odds: np.ndarray | None = None,
) -> Sample:
    """Join parts of four samples around a random point of a canvas (height, width); gaps stay black.

    The point is drawn from the canvas's inner half. Each part lies against the point.
    """
    height, width = canvas
    y, x = int(rng.uniform(0.25, 0.75) * height), int(rng.uniform(0.25, 0.75) * width)
    image = np.zeros((height, width, 3), np.uint8)
    boxes, classes = [], []
    for quarter, sample in enumerate(samples):
        low, right = divmod(quarter, 2)
        room = (height - y if low else y, width - x if right else x)
        part = cropped(sample, room, rng, focus, class_odds)
        h, w = part.image.shape[:2]
        top, left = (y if low else y - h), (x if right else x - w)
        image[top : top + h, left : left + w] = part.image
        boxes.append(part.boxes + np.array([left, top, left, top], np.float32))
        classes.append(part.classes)
    return Sample(image, np.concatenate(boxes), np.concatenate(classes))


def paste_small(sample: Sample, donor: Sample, count: int, below: float, rng: np.random.Generator) -> Sample:
    """Copy up to ``count`` small objects of ``donor`` to free places of ``sample``, mirrored at random.

    An object is small if the longer side of its box is under ``below`` px. Its surroundings fade into the picture over
    a quarter of its side. A place is free if box and surroundings touch no other box; an object that finds none in
    eight tries is left out.
    """
    sides = donor.boxes[:, 2:] - donor.boxes[:, :2]
    small = np.flatnonzero((sides.max(axis=1, initial=0) < below) & (sides.min(axis=1, initial=np.inf) >= 2))
    if not len(small) or not count:
        return sample
    image, boxes, classes = sample.image.copy(), sample.boxes, sample.classes
    for i in rng.choice(small, count):
        patch, box, alpha = _cut_out(donor, donor.boxes[i], bool(rng.random() < 0.5))
        h, w = patch.shape[:2]
        if h > image.shape[0] or w > image.shape[1]:
            continue
        for _ in range(_TRIES):
            y, x = int(rng.integers(image.shape[0] - h + 1)), int(rng.integers(image.shape[1] - w + 1))
            if _free(boxes, (x, y, x + w, y + h)):
                part = image[y : y + h, x : x + w]
                part[:] = np.rint(part * (1 - alpha) + patch * alpha)
                boxes = np.concatenate([boxes, [box + np.array([x, y, x, y], np.float32)]])
                classes = np.append(classes, donor.classes[i])
                break
    return Sample(image, boxes.astype(np.float32), classes.astype(np.int32))


def _cut_out(donor: Sample, box: np.ndarray, mirrored: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return an object with its surroundings ``[h, w, 3]``, its box in them, and how much of each pixel to paste."""
    height, width = donor.image.shape[:2]
    margin = np.ceil(_FEATHER * (box[2:] - box[:2]))
    x0, y0 = np.maximum(np.floor(box[:2] - margin), 0).astype(int).tolist()
    x1, y1 = np.minimum(np.ceil(box[2:] + margin), (width, height)).astype(int).tolist()
    patch = donor.image[y0:y1, x0:x1]
    inside = (box - np.array([x0, y0, x0, y0])).astype(np.float32)
    across = _ramp(x1 - x0, inside[0], inside[2], margin[0])
    down = _ramp(y1 - y0, inside[1], inside[3], margin[1])
    alpha = (down[:, None] * across[None, :])[..., None]
    if mirrored:
        w = np.float32(x1 - x0)
        patch, alpha = patch[:, ::-1], alpha[:, ::-1]
        inside = np.array([w - inside[2], inside[1], w - inside[0], inside[3]], np.float32)
    return patch, inside, alpha


def _ramp(length: int, low: float, high: float, margin: float) -> np.ndarray:
    """Return 1 from ``low`` to ``high``, falling to 0 over ``margin`` on both sides, at the pixels of ``length``."""
    at = np.arange(length) + 0.5
    outside = np.maximum(np.maximum(low - at, at - high), 0)
    return np.clip(1 - outside / (margin + 0.5), 0, 1).astype(np.float32)


def _free(boxes: np.ndarray, window: tuple[int, int, int, int]) -> bool:
    return not (
        (boxes[:, 0] < window[2]) & (boxes[:, 2] > window[0]) & (boxes[:, 1] < window[3]) & (boxes[:, 3] > window[1])
    ).any()


def photometric(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Change brightness, contrast, saturation, hue and gamma at random, in this order.

    At strength 1: brightness by up to 48 of 255; contrast and saturation by factors of 0.5 to 1.5; hue by up to 18
    degrees; gamma by factors of 0.67 to 1.5.
    """
    brightness, contrast, saturation, turn, gamma = rng.uniform(-strength, strength, 5)
    out = image.astype(np.float32) + 48 * brightness
    mean = out.mean()
    out = mean + (out - mean) * (1 + 0.5 * contrast)
    grey = (out @ _LUMA)[..., None]
    out = grey + (out - grey) @ _hue_rotation(0.1 * np.pi * turn) * (1 + 0.5 * saturation)
    out = 255 * (np.clip(out, 0, 255) / 255) ** (1.5**gamma)
    return np.rint(out).astype(np.uint8)


def _hue_rotation(angle: float) -> np.ndarray:
    """Return the matrix [3, 3] that turns colours (rows) by ``angle`` around the grey axis."""
    cos, sin = np.cos(angle), np.sin(angle)
    axis = np.full((3, 3), 1 / 3)
    cross = np.array([[0, 1, -1], [-1, 0, 1], [1, -1, 0]]) / np.sqrt(3)
    return (cos * np.eye(3) + (1 - cos) * axis + sin * cross).astype(np.float32)


def quarter_turns(sample: Sample, turns: int, upside_down: bool) -> Sample:
    """Turn by ``turns`` times 90 degrees anticlockwise, then mirror top to bottom if ``upside_down``.

    For pictures taken from above, where every direction is as likely.
    """
    image, boxes = sample.image, sample.boxes
    for _ in range(turns % 4):
        width = np.float32(image.shape[1])
        image = np.rot90(image)
        boxes = np.stack([boxes[:, 1], width - boxes[:, 2], boxes[:, 3], width - boxes[:, 0]], axis=1)
    if upside_down:
        height = np.float32(image.shape[0])
        image = image[::-1]
        boxes = np.stack([boxes[:, 0], height - boxes[:, 3], boxes[:, 2], height - boxes[:, 1]], axis=1)
    return Sample(np.ascontiguousarray(image), boxes.astype(np.float32), sample.classes)
