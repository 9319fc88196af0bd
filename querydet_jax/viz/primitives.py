"""Drawing primitives: anti-aliased frames, labels, legend strips, colours.

Canvases are uint8 RGB [H,W,3] arrays; boxes are xyxy in canvas px.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Entry = tuple[Literal["solid", "dashed", "text"], Colour, str]  # legend entry: mark, colour of the mark, text

PAPER: Colour = (20, 22, 28)
INK: Colour = (232, 234, 238)
FAINT: Colour = (150, 154, 164)
WHITE: Colour = (255, 255, 255)
BLACK: Colour = (0, 0, 0)

# Okabe and Ito's palette, safe for all common kinds of colour blindness; the most visible on photographs come first.
_OKABE_ITO: tuple[Colour, ...] = (
    (86, 180, 233),
    (230, 159, 0),
    (0, 158, 115),
    (240, 228, 66),
    (213, 94, 0),
    (204, 121, 167),
    (0, 114, 178),
)
# Order of the paler second round: the first classes are usually the most frequent, so their hues return last.
_PALE_ORDER = (4, 2, 5, 3, 1, 0, 6)
# Dark violet to pale yellow with steadily rising lightness.
_HEAT = np.array(
    [
        (12, 8, 38),
        (66, 16, 104),
        (128, 32, 122),
        (190, 54, 102),
        (238, 92, 68),
        (252, 152, 52),
        (252, 208, 92),
        (252, 252, 190),
    ]
)


def class_colour(label: int) -> Colour:
    """Return the RGB colour of a class from a colour-blind-safe palette of 7 colours, then 7 paler ones, repeated."""
    turn, index = divmod(int(label), len(_OKABE_ITO))
    if turn % 2 == 0:
        return _OKABE_ITO[index]
    r, g, b = _OKABE_ITO[_PALE_ORDER[index]]
    return (r + 2 * 255) // 3, (g + 2 * 255) // 3, (b + 2 * 255) // 3


def heat_colours(values: ArrayLike) -> np.ndarray:
    """Return values in 0..1 as RGB, float32 [..., 3] in 0..255; lightness rises with the value."""
    values = np.asarray(values)
    anchors = np.linspace(0, 1, len(_HEAT))
    return np.stack([np.interp(values, anchors, _HEAT[:, c]) for c in range(3)], axis=-1).astype(np.float32)


def line_width(canvas: np.ndarray) -> float:
    return min(1.4 + max(canvas.shape[:2]) / 1500, 6.0)


def text_size(width: int) -> int:
    """Return the font size in px for a canvas of this width."""
    return round(8 + min(width, 6000) / 130)


def ascii_text(text: str) -> str:
    """Reduce ``text`` to ASCII for Pillow's built-in font: drop accents, replace other scripts by ``?``."""
    plain = unicodedata.normalize("NFKD", text)
    return "".join(c for c in plain if not unicodedata.combining(c)).encode("ascii", "replace").decode()


def fill(canvas: np.ndarray, box: Sequence[float], colour: Colour, alpha: float = 1.0) -> None:
    """Fill a rectangle in place, anti-aliased: pixels at its edges are blended by the fraction that lies inside."""
    x0, y0, x1, y1 = box
    columns, across = _coverage(x0, x1, canvas.shape[1])
    rows, down = _coverage(y0, y1, canvas.shape[0])
    weight = alpha * down[:, None, None] * across[None, :, None]
    under = canvas[rows, columns].astype(np.float32)
    canvas[rows, columns] = np.rint(under + (np.asarray(colour, np.float32) - under) * weight)


def _coverage(low: float, high: float, size: int) -> tuple[slice, np.ndarray]:
    low, high = max(low, 0.0), min(high, float(size))
    if high <= low:
        return slice(0, 0), np.zeros(0, np.float32)
    index = np.arange(math.floor(low), math.ceil(high))
    covered = np.minimum(index + 1, high) - np.maximum(index, low)
    return slice(int(index[0]), int(index[-1]) + 1), covered.astype(np.float32)


def frame(
    canvas: np.ndarray,
    box: Sequence[float],
    gap: float,
    line: float,
    colour: Colour,
    alpha: float = 1.0,
    dashed: bool = False,
) -> None:
    """Paint a line around the box in place, ``gap`` px outside it; at the picture's edge, shift it inward."""
    height, width = canvas.shape[:2]
    x0, y0, x1, y1 = np.clip(box, 0, [width, height, width, height]).tolist()
    if x1 <= x0 or y1 <= y0:
        return
    # Inner and outer rectangles of the line.
    ox0, oy0 = max(x0 - gap - line, 0.0), max(y0 - gap - line, 0.0)
    ox1, oy1 = min(x1 + gap + line, float(width)), min(y1 + gap + line, float(height))
    ix0, iy0, ix1, iy1 = ox0 + line, oy0 + line, ox1 - line, oy1 - line
    # Fill the gaps between dashes with black, so that white dashes show on white objects.
    solid = (BLACK, 0.45) if dashed else (colour, alpha)
    for bar in ((ox0, oy0, ox1, iy0), (ox0, iy1, ox1, oy1), (ox0, iy0, ix0, iy1), (ix1, iy0, ox1, iy1)):
        fill(canvas, bar, *solid)
    if not dashed:
        return
    for a, b in _dashes(ox0, ox1, line):
        fill(canvas, (a, oy0, b, iy0), colour, alpha)
        fill(canvas, (a, iy1, b, oy1), colour, alpha)
    for a, b in _dashes(oy0, oy1, line):
        fill(canvas, (ox0, a, ix0, b), colour, alpha)
        fill(canvas, (ix1, a, ox1, b), colour, alpha)


def _dashes(low: float, high: float, line: float) -> list[tuple[float, float]]:
    """Return dashes as long as the gaps, with the first and last at the corners and at least three parts per side."""
    parts = max(3, 2 * round((high - low) / (8 * line)) + 1)
    step = (high - low) / parts
    return [(low + i * step, low + (i + 1) * step) for i in range(0, parts, 2)]


def labels(
    picture: Image.Image,
    boxes: np.ndarray,
    colours: Sequence[Colour],
    texts: Sequence[str],
    margin: float,
    size: int,
) -> int:
    """Write a label beside each box, the last box first, unless it would hide a small box or another label.

    A box smaller than its label, with three or more neighbours, gets no label.

    Args:
      picture: modified in place.
      boxes: [n,4].
      colours, texts: of the boxes' labels.
      margin: width of line and gap around the boxes, px.
      size: font size, px.

    Returns:
      The number of labels written.
    """
    font = ImageFont.load_default(size=size)
    draw = ImageDraw.Draw(picture)
    height = round(1.25 * size)
    frames = boxes + np.array([-margin, -margin, margin, margin])
    areas = (frames[:, 2] - frames[:, 0]) * (frames[:, 3] - frames[:, 1])
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    placed = np.zeros((0, 4))
    for i in range(len(boxes) - 1, -1, -1):
        width = math.ceil(font.getlength(texts[i]) + 0.5 * size)
        neighbours = (np.abs(centres - centres[i]).max(axis=1) < 4 * height).sum() - 1
        if areas[i] < width * height and neighbours >= 3:
            continue
        # A label may overlap a box many times its size, such as a bus that fills the picture.
        taken = np.concatenate([frames[areas < 12 * width * height], placed])
        x0, y0, x1, y1 = frames[i]
        spots = [(x0, y0 - height), (x0, y1), (x1 - width, y0 - height), (x1, y0), (x0 - width, y0)]
        if areas[i] >= 12 * width * height:
            spots.append((x0 + margin, y0 + margin))
        for x, y in spots:
            x, y = round(x), round(y)
            if x < 0 or y < 0 or x + width > picture.width or y + height > picture.height:
                continue
            # Tolerate one px, for rounding.
            hidden = np.minimum(taken[:, 2:], (x + width, y + height)) - np.maximum(taken[:, :2], (x, y)) > 1
            if hidden.all(axis=1).any():
                continue
            draw.rectangle((x, y, x + width - 1, y + height - 1), fill=colours[i])
            draw.text((x + 0.25 * size, y + height / 2), texts[i], font=font, fill=_contrast(colours[i]), anchor="lm")
            placed = np.concatenate([placed, [(x, y, x + width, y + height)]])
            break
    return len(placed)


def _contrast(colour: Colour) -> Colour:
    return BLACK if 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 120 else WHITE


def title_strip(width: int, text: str) -> np.ndarray:
    """Return a line of text, uint8 [t,width,3]; t is 0 if the text is empty."""
    return legend_strip(width, [("text", INK, text)]) if text else np.zeros((0, width, 3), np.uint8)


def legend_strip(width: int, entries: Sequence[Entry], size: int = 0) -> np.ndarray:
    """Return legend entries in a row, wrapped to the width, uint8 [t,width,3]; font ``size``, by the width if 0."""
    size = size or text_size(width)
    font = ImageFont.load_default(size=size)
    row, mark, pad = round(1.7 * size), round(0.8 * size), round(0.6 * size)
    x, y, spots = pad, 0, []
    for kind, _, text in entries:
        lead = 0 if kind == "text" else mark + round(0.4 * size)
        needed = lead + math.ceil(font.getlength(ascii_text(text)))
        if x > pad and x + needed > width - pad:
            x, y = pad, y + row
        spots.append((x, y, lead))
        x += needed + round(1.2 * size)
    paper = np.full((y + row + round(0.2 * size), width, 3), PAPER, np.uint8)
    for (kind, colour, _), (x, y, _) in zip(entries, spots, strict=True):
        top = y + 0.1 * size + (row - mark) / 2
        if kind == "solid":
            fill(paper, (x, top, x + mark, top + mark), colour)
        elif kind == "dashed":
            line = max(1.0, size / 10)
            frame(paper, (x + line, top + line, x + mark - line, top + mark - line), 0, line, colour, dashed=True)
    picture = Image.fromarray(paper)
    draw = ImageDraw.Draw(picture)
    for (kind, colour, text), (x, y, lead) in zip(entries, spots, strict=True):
        ink = colour if kind == "text" else INK
        draw.text((x + lead, y + 0.1 * size + row / 2), ascii_text(text), font=font, fill=ink, anchor="lm")
    return np.array(picture)


def colour_bar_strip(width: int, threshold: float | None, note: str) -> np.ndarray:
    """Return a colour bar from 0 to 1 with the threshold marked and a note beside it, uint8 [t,width,3]."""
    size = text_size(width)
    font = ImageFont.load_default(size=size)
    pad, mark = round(0.6 * size), round(0.8 * size)
    left = pad + math.ceil(font.getlength("0")) + pad
    length = round(width * 0.35)
    top = round(0.55 * size)
    paper = np.full((round(1.9 * size), width, 3), PAPER, np.uint8)
    bar = paper[top : top + mark, left : left + length]  # which a picture of a few px cuts off
    bar[:] = np.rint(heat_colours((np.arange(bar.shape[1]) + 0.5) / length))
    if threshold is not None:
        x = left + threshold * length
        half = max(1.0, size / 14)
        fill(paper, (x - half - 1, top - 0.3 * size, x + half + 1, top + mark + 0.3 * size), BLACK)
        fill(paper, (x - half, top - 0.3 * size, x + half, top + mark + 0.3 * size), WHITE)
    picture = Image.fromarray(paper)
    draw = ImageDraw.Draw(picture)
    middle = top + mark / 2
    draw.text((pad, middle), "0", font=font, fill=INK, anchor="lm")
    draw.text((left + length + pad, middle), "1", font=font, fill=INK, anchor="lm")
    after = left + length + 2 * pad + math.ceil(font.getlength("1")) + pad
    draw.text((after, middle), ascii_text(note), font=font, fill=FAINT, anchor="lm")
    return np.array(picture)


def inner_edge(mask: np.ndarray, width: int) -> np.ndarray:
    """Return the pixels of a bool mask [H,W] within ``width`` px of its outside; the picture's border is no edge."""
    kept = np.pad(mask, width, mode="edge")
    height, across = mask.shape
    core = mask.copy()
    for shift in range(1, width + 1):
        for dy, dx in ((shift, 0), (-shift, 0), (0, shift), (0, -shift)):
            core &= kept[width + dy : width + dy + height, width + dx : width + dx + across]
    return mask & ~core
