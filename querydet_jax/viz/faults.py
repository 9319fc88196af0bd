"""Draw what a detector gets wrong in a picture: all of it beside the worst places, enlarged. Boxes are xyxy px."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from querydet_jax.viz.primitives import (
    FAINT,
    INK,
    PAPER,
    WHITE,
    Colour,
    Entry,
    ascii_text,
    frame,
    labels,
    legend_strip,
)

FAULT: Colour = (255, 122, 26)
OTHER: Colour = (86, 180, 233)
Region = tuple[float, float, float, float]  # x0, y0, x1, y1

_HEIGHT, _GAP = 640, 10  # px of the sheet's pictures
_PLACES = 4  # enlarged at most
_SMALLEST = 40  # px of a picture that an enlargement shows at least
_AROUND = 2.5  # times the fault's size that it shows
_TEXT = 14  # font size, px


class Fault(NamedTuple):
    """One fault.

    Attributes:
      box: of the detection, or of the object that was missed, ``[4]``.
      missed: whether it is an object.
      label: at the box.
      text: what is wrong, in a few words.
      near: box and label of the object or detection that explains it; None if there is none.
    """

    box: np.ndarray
    missed: bool
    label: str
    text: str
    near: tuple[np.ndarray, str] | None = None


def draw_faults(image: np.ndarray, faults: Sequence[Fault], truth: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Draw faults: the whole picture on the left, up to four places enlarged on the right, a legend below.

    Args:
      image: uint8 RGB ``[H, W, 3]``.
      faults: at least one, the gravest first.
      truth: boxes of the objects ``[m, 4]``, drawn as dashes.
      others: boxes of the other detections ``[n, 4]``.

    Returns:
      uint8 RGB, about 1,400 px wide.
    """
    height, width = image.shape[:2]
    numbers = [str(n) if len(faults) > 1 else "" for n in range(1, len(faults) + 1)]
    everything = (0.0, 0.0, float(width), float(height))
    shape = _HEIGHT, min(max(round(_HEIGHT * width / height), _HEIGHT // 2), 2 * _HEIGHT)
    left = _drawn(image, everything, shape, faults, numbers, truth, others)
    places = _apart(faults)
    columns, rows = 1 if len(places) < 3 else 2, min(len(places), 2)
    side = (_HEIGHT - (rows - 1) * _GAP) // rows
    right = np.full((_HEIGHT, columns * side + (columns - 1) * _GAP, 3), PAPER, np.uint8)
    for n, k in enumerate(places):
        fault = faults[k]
        title = legend_strip(side, [("text", INK, f"{numbers[k]}  {fault.text}".strip())], _TEXT)[:side]
        shape = max(side - len(title), 1), side
        texts = [fault.label if other is fault else "" for other in faults]
        crop = _drawn(image, _place(fault, image, shape), shape, faults, texts, truth, others, fault)
        y, x = (n // columns) * (side + _GAP), (n % columns) * (side + _GAP)
        right[y : y + side, x : x + side] = np.concatenate([title, crop])[:side]
    sheet = np.concatenate([left, np.full((_HEIGHT, _GAP, 3), PAPER, np.uint8), right], axis=1)
    entries: list[Entry] = [
        ("dashed" if faults[0].missed else "solid", FAULT, f"{len(faults)} at fault"),
        ("dashed", WHITE, f"ground truth: {len(truth):,}"),
        ("solid", OTHER, f"other detections: {len(others):,}"),
    ]
    if len(faults) > len(places):
        entries.append(("text", FAINT, f"{len(places)} place{'s' * (len(places) > 1)} enlarged"))
    return np.concatenate([sheet, legend_strip(sheet.shape[1], entries, _TEXT)])


def _apart(faults: Sequence[Fault]) -> list[int]:
    """Return the positions of the first few faults whose boxes do not overlap: the rest shows beside them."""
    out: list[int] = []
    for k, fault in enumerate(faults):
        gaps = [
            np.concatenate([f.box[:2] - fault.box[2:], fault.box[:2] - f.box[2:]]) for f in map(faults.__getitem__, out)
        ]
        if all(gap.max() >= 0 for gap in gaps):
            out.append(k)
    return out[:_PLACES]


def _place(fault: Fault, image: np.ndarray, shape: tuple[int, int]) -> Region:
    """Return a region around a fault with the aspect of ``shape``, in the picture where that is large enough."""
    height, width = image.shape[:2]
    boxes = np.array([fault.box, *([] if fault.near is None else [fault.near[0]])])
    low, high = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
    size = float((boxes[:, 2:] - boxes[:, :2]).max())
    tall = min(max(_AROUND * size, 1.4 * float((high - low).max()), _SMALLEST), height)
    wide = min(tall * shape[1] / shape[0], width)
    x, y = ((low + high) / 2 - (wide / 2, tall / 2)).tolist()
    x, y = min(max(x, 0.0), width - wide), min(max(y, 0.0), height - tall)
    return x, y, x + wide, y + tall


def _drawn(
    image: np.ndarray,
    region: Region,
    shape: tuple[int, int],
    faults: Sequence[Fault],
    texts: Sequence[str],
    truth: np.ndarray,
    others: np.ndarray,
    chosen: Fault | None = None,
) -> np.ndarray:
    """Draw a region at ``shape``, its aspect kept, with texts at the faults; all but the chosen one are faint."""
    x0, y0, x1, y1 = region
    scale = min(shape[1] / (x1 - x0), shape[0] / (y1 - y0))
    size = max(1, round((x1 - x0) * scale)), max(1, round((y1 - y0) * scale))
    canvas = np.array(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC, box=region))

    def moved(boxes: np.ndarray) -> np.ndarray:
        return (np.reshape(boxes, (-1, 4)) - (x0, y0, x0, y0)) * scale

    faint = 1.0 if chosen is None else 0.5
    for box in moved(others):
        frame(canvas, box, 1, 1, OTHER, faint)
    for box in moved(truth):
        frame(canvas, box, 3, 1.2, WHITE, faint, dashed=True)
    marked: list[tuple[np.ndarray, Colour, str]] = []
    if chosen is not None and chosen.near is not None:
        box, text = chosen.near
        frame(canvas, moved(box)[0], 3, 1.6, WHITE, dashed=True)
        marked.append((box, WHITE, text))
    for fault, text in list(zip(faults, texts, strict=True))[::-1]:
        line, alpha = (1.0, 0.6) if chosen is not None and fault is not chosen else (2.0, 1.0)
        frame(canvas, moved(fault.box)[0], 3 if fault.missed else 1, line, FAULT, alpha, dashed=fault.missed)
        marked.append((fault.box, FAULT, text))
    marked = [entry for entry in marked if entry[2]]
    picture = Image.fromarray(canvas)
    boxes = moved(np.array([box for box, _, _ in marked]))
    labels(picture, boxes, [colour for _, colour, _ in marked], [ascii_text(text) for *_, text in marked], 5, _TEXT)
    out = np.full((*shape, 3), PAPER, np.uint8)
    out[: size[1], : size[0]] = np.asarray(picture)[: shape[0], : shape[1]]
    return out
