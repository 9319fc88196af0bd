"""Draw detections, query heat maps, active sites and contact sheets.

Every function takes a uint8 RGB picture [H,W,3] and returns a new one. Pictures below about 900 px are
first enlarged by an integer factor (``display_scale``), so that lines and text are crisp around objects
of a few pixels. Titles and legends are added above or below the picture, never over it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from querydet_jax.runtime.errors import DataError
from querydet_jax.runtime.files import written_aside
from querydet_jax.runtime.stores import as_path
from querydet_jax.viz.primitives import (
    BLACK,
    FAINT,
    INK,
    PAPER,
    WHITE,
    Colour,
    Entry,
    ascii_text,
    class_colour,
    colour_bar_strip,
    frame,
    heat_colours,
    inner_edge,
    labels,
    legend_strip,
    line_width,
    text_size,
    title_strip,
)
from querydet_jax.viz.text import score_text

_KEY: Colour = (255, 176, 0)
_ACTIVE: Colour = (64, 156, 255)
_BAND = 2048  # rows copied at a time


def draw_detections(
    image: ArrayLike,
    boxes: ArrayLike,
    classes: ArrayLike,
    scores: ArrayLike | None = None,
    names: Sequence[str] = (),
    *,
    min_score: ArrayLike = 0.3,
    truth: ArrayLike | None = None,
) -> np.ndarray:
    """Draw frames around detections, labels where there is room, and a legend with the count of each class.

    Lines run outside the boxes, so that even a 6 px object stays visible. The highest scores get their
    labels first; a label that would cover a small object or another label is omitted.

    Args:
      image: uint8 RGB [H,W,3].
      boxes: [n,4] xyxy px of ``image``.
      classes: [n], 0..K-1; determines the colour, the same in every picture.
      scores: [n]; None draws all detections, with labels that hold only the name.
      names: class names [K]; a class without one is labelled ``class 3``.
      min_score: detections with lower scores are not drawn; one score, or one per class [K].
      truth: ground-truth boxes [m,4], drawn as white dashes.

    Returns:
      uint8 [H*s + legend, W*s, 3] with ``s = display_scale(H, W)``.

    Raises:
      DataError: picture, boxes, classes or scores have another shape, or boxes are not finite.
    """
    canvas, scale = _enlarged(image)
    boxes = _boxes(boxes, "boxes")
    classes = _vector(classes, "classes", len(boxes)).astype(np.int64)
    values = None if scores is None else _vector(scores, "scores", len(boxes)).astype(np.float64)
    if values is not None:
        # Lowest first, so that the frame of the highest score is on top.
        least = np.asarray(min_score, np.float32)
        order = np.argsort(values, kind="stable")
        order = order[values[order] >= (least[classes[order]] if least.ndim else least)]
        boxes, classes, values = boxes[order], classes[order], values[order]
    line = line_width(canvas)
    height, width = canvas.shape[:2]
    boxes = boxes * scale
    shown = (boxes[:, :2] < (width, height)).all(axis=1) & (boxes[:, 2:] > 0).all(axis=1)
    boxes, classes = boxes[shown], classes[shown]
    values = None if values is None else values[shown]

    _frames(canvas, boxes, classes)
    legend: list[Entry] = []
    present, counts = (column.tolist() for column in np.unique(classes, return_counts=True))
    for label, count in sorted(zip(present, counts, strict=True), key=lambda pair: -pair[1]):
        legend.append(("solid", class_colour(label), f"{_name(label, names)}: {count:,}"))
    if not len(boxes):
        legend.append(("text", INK, "no detections"))
    if truth is not None:
        truth = _boxes(truth, "truth") * scale
        for box in truth:
            # Outside a detection's line, so that both are visible if they agree.
            frame(canvas, box, 2 + line, max(1.0, 0.7 * line), WHITE, dashed=True)
        legend.append(("dashed", WHITE, f"ground truth: {len(truth):,}"))
    if values is not None:
        legend.append(("text", FAINT, f"score >= {score_text(min_score)}"))

    picture = _labelled(canvas, boxes, classes, values, names)
    return np.concatenate([picture, legend_strip(width, legend)])


def draw_on_frame(
    image: ArrayLike, boxes: ArrayLike, classes: ArrayLike, scores: ArrayLike, names: Sequence[str]
) -> np.ndarray:
    """Draw frames and labels as ``draw_detections`` does, at the size of the picture and without a legend: for a video.

    Args:
      image: uint8 RGB [H,W,3].
      boxes: [n,4] xyxy px of ``image``, best first.
      classes, scores: [n].
      names: class names [K].

    Returns:
      uint8 [H,W,3].

    Raises:
      DataError: as for ``draw_detections``.
    """
    canvas = _picture(image).copy()
    # Lowest score first, so that the frame of the highest is on top.
    boxes = _boxes(boxes, "boxes")[::-1]
    classes = _vector(classes, "classes", len(boxes)).astype(np.int64)[::-1]
    values = _vector(scores, "scores", len(boxes)).astype(np.float64)[::-1]
    _frames(canvas, boxes, classes)
    return _labelled(canvas, boxes, classes, values, names)


def draw_heatmap(
    image: ArrayLike, probability: ArrayLike, stride: float, *, title: str = "", threshold: float | None = None
) -> np.ndarray:
    """Draw the query probability of one level over the darkened picture, with a colour bar.

    Args:
      image: uint8 RGB [H,W,3].
      probability: [h,w] in 0..1. Cells are squares of ``stride`` px from the top left corner. The map must cover the
        picture and may extend beyond it (padding).
      stride: px of ``image`` per cell; a fraction if the picture is not at the network's scale.
      threshold: cells above it are queries; they are outlined and counted, and the colour bar marks the threshold.

    Returns:
      uint8 [title + H*s + bar, W*s, 3] with ``s = display_scale(H, W)``.

    Raises:
      DataError: picture or map have another shape or range, or the map does not cover the picture.
    """
    canvas, scale = _enlarged(image)
    heat = _map(probability, "probability", canvas, scale, stride).astype(np.float32)
    if not (np.isfinite(heat).all() and heat.min() >= 0 and heat.max() <= 1):
        raise DataError(f"probability: {heat.min()}..{heat.max()}, expected 0..1; apply the sigmoid to logits first")
    height, width = canvas.shape[:2]
    edge = max(1, round(0.75 * line_width(canvas)))
    step = stride * scale
    smooth = Image.fromarray(heat).resize(
        (width, height),
        Image.Resampling.BILINEAR,
        box=(0, 0, min(width / step, heat.shape[1]), min(height / step, heat.shape[0])),
    )
    level = np.clip(np.asarray(smooth), 0, 1)[..., None]
    # Low probabilities show the darkened picture; high ones keep the object visible through the colour.
    alpha = 0.75 * np.clip(level / 0.4, 0, 1) ** 0.7
    out = _darkened(canvas, 0.55) * (1 - alpha) + heat_colours(level[..., 0]) * alpha
    rows, columns = _cell_index(height, step, heat.shape[0]), _cell_index(width, step, heat.shape[1])
    if threshold is not None:
        above = (heat > threshold)[rows][:, columns]
        out[inner_edge(above, edge)] = WHITE
    note = "" if threshold is None else f"above {threshold:g}: {_share(heat > threshold)} of {heat.size:,} cells"
    return np.concatenate([title_strip(width, title), _bytes(out), colour_bar_strip(width, threshold, note)])


def draw_sites(image: ArrayLike, active: ArrayLike, keys: ArrayLike, stride: float, *, title: str = "") -> np.ndarray:
    """Draw the cells at which the sparse head gives outputs (keys) and all that it computes (active), the rest dark.

    Args:
      image: uint8 RGB [H,W,3].
      active: bool [h,w], the computed cells: keys and their context.
      keys: bool [h,w].
      stride: px of ``image`` per cell, as in ``draw_heatmap``.

    Returns:
      uint8 [title + H*s + caption, W*s, 3] with ``s = display_scale(H, W)``.

    Raises:
      DataError: shapes or types differ from these, or the maps do not cover the picture.
    """
    canvas, scale = _enlarged(image)
    active, keys = (_map(m, n, canvas, scale, stride) for m, n in ((active, "active"), (keys, "keys")))
    caption = sites_caption(active, keys)
    height, width = canvas.shape[:2]
    edge = max(1, round(0.75 * line_width(canvas)))
    step = stride * scale
    rows, columns = _cell_index(height, step, keys.shape[0]), _cell_index(width, step, keys.shape[1])
    bright = canvas.astype(np.float32)
    out = _darkened(canvas, 0.35)
    for cells, colour, tint in ((active & ~keys, _ACTIVE, 0.42), (keys, _KEY, 0.25)):
        where = cells[rows][:, columns]
        out[where] = bright[where] * (1 - tint) + np.asarray(colour, np.float32) * tint
    if step >= 8:  # a finer grid would only darken the cells
        lines = np.zeros((height, width), bool)
        lines[1:] |= (np.diff(rows) > 0)[:, None]
        lines[:, 1:] |= np.diff(columns) > 0
        lines &= (active | keys)[rows][:, columns]
        out[lines] *= 0.78
    out[inner_edge(keys[rows][:, columns], edge)] = _KEY
    legend: list[Entry] = [
        ("solid", _KEY, caption[0]),
        ("solid", _ACTIVE, caption[1]),
        ("text", FAINT, caption[2]),
    ]
    return np.concatenate([title_strip(width, title), _bytes(out), legend_strip(width, legend)])


def sites_caption(active: ArrayLike, keys: ArrayLike) -> tuple[str, str, str]:
    """Return the legend texts of ``draw_sites`` for bool maps [h,w]: keys, active cells (with keys), all cells."""
    active, keys = np.asarray(active), np.asarray(keys)
    if active.dtype != np.bool_ or keys.dtype != np.bool_ or active.shape != keys.shape:
        raise DataError(
            f"active {active.dtype} {list(active.shape)}, keys {keys.dtype} {list(keys.shape)}: "
            "expected two bool maps [h,w] of one level"
        )
    return f"keys: {_share(keys)}", f"active: {_share(active)}", f"of {active.size:,} cells"


def contact_sheet(panels: Sequence[tuple[str, ArrayLike]], columns: int = 2, *, max_width: int = 2400) -> np.ndarray:
    """Arrange pictures in rows, each under its title, all at the same width.

    Args:
      panels: (title, uint8 RGB picture) pairs; titles may be empty.
      columns: panels per row.
      max_width: largest width of the sheet, px; panels shrink to fit.

    Raises:
      DataError: there are no panels, columns is below 1, or a panel is not a picture.
    """
    if not panels or columns < 1:
        raise DataError(f"contact_sheet: {len(panels)} panels in {columns} columns, expected at least one of each")
    pictures = [(title, Image.fromarray(_picture(image, f"panel {title!r}"))) for title, image in panels]
    columns = min(columns, len(pictures))
    gap = 12
    width = max(picture.width for _, picture in pictures)
    width = max(1, min(width, (max_width - gap * (columns + 1)) // columns))
    cells = []
    for title, picture in pictures:
        height = max(1, round(picture.height * width / picture.width))
        panel = np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS))
        cells.append(np.concatenate([title_strip(width, title), panel]))
    rows = []
    for start in range(0, len(cells), columns):
        row = cells[start : start + columns]
        band = np.full((max(map(len, row)) + gap, columns * (width + gap) + gap, 3), PAPER, np.uint8)
        for i, cell in enumerate(row):
            x = gap + i * (width + gap)
            band[gap : gap + len(cell), x : x + width] = cell
        rows.append(band)
    rows.append(np.full((gap, rows[0].shape[1], 3), PAPER, np.uint8))
    return np.concatenate(rows)


def save_image(path: str | Path, image: ArrayLike) -> None:
    """Write a picture as PNG or JPEG by its suffix, atomically; create the folder if it is missing.

    Raises:
      DataError: the suffix is another, or the picture is not uint8 RGB.
    """
    path = as_path(path)
    formats = {
        ".png": ("PNG", {}),
        ".jpg": ("JPEG", {"quality": 92}),
        ".jpeg": ("JPEG", {"quality": 92}),
    }
    if path.suffix.lower() not in formats:
        raise DataError(f"{path}: pictures are saved as .png or .jpg; change the suffix {path.suffix!r}")
    kind, options = formats[path.suffix.lower()]
    picture = Image.fromarray(_picture(image, str(path)))
    with written_aside(path) as aside:
        picture.save(aside, format=kind, **options)


def display_scale(height: int, width: int) -> int:
    """Return the integer factor by which a picture is enlarged before drawing: 1 from 900 px on, at most 8."""
    return max(1, min(8, math.ceil(900 / max(height, width))))


def _frames(canvas: np.ndarray, boxes: np.ndarray, classes: np.ndarray) -> None:
    """Draw a frame around each box ``[n,4]``, in place, the last one on top."""
    line = line_width(canvas)
    for box, label in zip(boxes, classes, strict=True):
        frame(canvas, box, 1 + line, 1, BLACK, 0.45)
        frame(canvas, box, 1, line, class_colour(label))


def _labelled(
    canvas: np.ndarray, boxes: np.ndarray, classes: np.ndarray, values: np.ndarray | None, names: Sequence[str]
) -> np.ndarray:
    """Draw a label beside each box where there is room, the name and any score, on the canvas, and return it."""
    texts = [_name(label, names) + ("" if values is None else f" {values[i]:.2f}") for i, label in enumerate(classes)]
    picture, colours = Image.fromarray(canvas), [class_colour(label) for label in classes]
    labels(picture, boxes, colours, texts, 1 + line_width(canvas), round(0.8 * text_size(canvas.shape[1])))
    for top in range(0, len(canvas), _BAND):  # Pillow's copy of all of it would take twice its memory
        canvas[top : top + _BAND] = np.asarray(picture.crop((0, top, picture.width, min(top + _BAND, len(canvas)))))
    return canvas


def _name(label: int, names: Sequence[str]) -> str:
    return ascii_text(names[label]) if 0 <= label < len(names) else f"class {label}"


def _picture(image: ArrayLike, name: str = "image") -> np.ndarray:
    image = np.asarray(image)
    if image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size:
        return image
    remedy = "give uint8 RGB [H,W,3]"
    if image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 1):
        remedy += "; repeat a grey picture to three channels"
    raise DataError(f"{name}: {image.dtype} {list(image.shape)} is not an RGB picture; {remedy}")


def _enlarged(image: ArrayLike) -> tuple[np.ndarray, int]:
    """Return a copy at display scale, and that scale."""
    image = _picture(image)
    height, width = image.shape[:2]
    scale = display_scale(height, width)
    if scale == 1:
        return image.copy(), 1
    picture = Image.fromarray(image).resize((width * scale, height * scale), Image.Resampling.LANCZOS)
    return np.array(picture), scale


def _boxes(boxes: ArrayLike, name: str) -> np.ndarray:
    out = np.asarray(boxes, np.float64)
    if out.size == 0:
        return np.zeros((0, 4))
    if out.ndim != 2 or out.shape[1] != 4 or not np.isfinite(out).all():
        raise DataError(f"{name}: shape {list(out.shape)}, expected finite [n,4] xyxy in px of the picture")
    return out


def _vector(values: ArrayLike, name: str, length: int) -> np.ndarray:
    out = np.asarray(values)
    if out.shape != (length,):
        raise DataError(f"{name}: shape {list(out.shape)} for {length} boxes, expected [{length}]")
    return out


def _map(cells: ArrayLike, name: str, canvas: np.ndarray, scale: int, stride: float) -> np.ndarray:
    """Check that the map [h,w] covers the picture, and return it."""
    out = np.asarray(cells)
    if out.ndim != 2:
        raise DataError(f"{name}: shape {list(out.shape)}, expected [h,w] of one image and level")
    height, width = canvas.shape[0] // scale, canvas.shape[1] // scale
    # Tolerate half a px, for fractional strides.
    if not stride > 0 or out.shape[0] * stride < height - 0.5 or out.shape[1] * stride < width - 0.5:
        raise DataError(
            f"{name}: {out.shape[0]}x{out.shape[1]} cells of stride {stride:g} do not cover the picture of "
            f"{height}x{width} px; give the level's stride in px of this picture"
        )
    return out


def _cell_index(length: int, step: float, cells: int) -> np.ndarray:
    """Return the cell index, 0..cells-1, of each pixel of a row or column, int [length]."""
    return np.minimum(((np.arange(length) + 0.5) / step).astype(np.int64), cells - 1)


def _darkened(canvas: np.ndarray, brightness: float) -> np.ndarray:
    """Return a darker float32 picture with half of its saturation, so that tints stand out."""
    bright = canvas.astype(np.float32)
    return (0.5 * bright + 0.5 * bright.mean(axis=2, keepdims=True)) * brightness


def _bytes(picture: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _share(cells: np.ndarray) -> str:
    count = int(cells.sum())
    return f"{count:,} ({100 * count / max(1, cells.size):.1f} %)"
