"""Painting tools for generated scenes: canvas, geometry, surfaces and clutter.

A ``Canvas`` is painted at ``SCALE`` times its size and averaged down, so that objects of a few
pixels are antialiased as in a photograph. It also records what covers each pixel, which tells the
layout where objects fit. Positions and lengths are in pixels of the finished image, angles in
radians, colours in RGB.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

SCALE = 4
GROUND, ROAD, PAVED, WATER, BUILT, PLANT, OBJECT = range(7)  # what covers a pixel

Color = tuple[int, int, int]
Points = np.ndarray  # [n, 2], x and y
Vector = Sequence[float] | np.ndarray  # a point, or a colour


def noise(rng: np.random.Generator, shape: tuple[int, int], cell: float, octaves: int = 1) -> np.ndarray:
    """Return smooth noise float32 [H, W], standard deviation about 1: features of ``cell`` px, and finer octaves."""
    h, w = shape
    out = np.zeros(shape, np.float32)
    for octave in range(octaves):
        size = max(cell / 2**octave, 1.0)
        grid = rng.standard_normal((int(h / size) + 3, int(w / size) + 3)).astype(np.float32)
        x, y = rng.uniform(0, 1, 2)  # random offset, so that the octaves' grids do not align
        box = (x, y, x + w / size, y + h / size)
        layer = Image.fromarray(grid).resize((w, h), Image.Resampling.BICUBIC, box=box)
        out += np.asarray(layer) * 0.6**octave
    return out / out.std() if octaves > 1 else out


def rectangle(center: Vector, length: float, width: float, angle: float) -> Points:
    """Return the corners of a rectangle whose long side points along ``angle``."""
    return place(np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]]) * [length, width], center, angle)


def place(points: np.ndarray, center: Vector, angle: float) -> Points:
    """Rotate ``points`` by ``angle`` and move them to ``center``."""
    c, s = math.cos(angle), math.sin(angle)
    return points @ np.array([[c, s], [-s, c]]) + np.asarray(center)


def circle(center: Vector, radius: float, n: int = 28) -> Points:
    a = np.arange(n) * (2 * math.pi / n)
    return np.stack([np.cos(a), np.sin(a)], axis=1) * radius + np.asarray(center)


def shade(color: Vector, factor: float) -> Color:
    r, g, b = (int(min(max(c * factor, 0), 255)) for c in color)
    return r, g, b


def bounds(points: Points) -> np.ndarray:
    """Return the bounding box float [4] of a shape."""
    return np.concatenate([points.min(axis=0), points.max(axis=0)])


class Canvas:
    """An image being painted.

    Args:
      ground: float [H, W, 3], the bare ground, 0..255.
      sun: unit vector (x, y) in which shadows fall.
      unit: pixels per metre.
    """

    def __init__(self, ground: np.ndarray, sun: tuple[float, float], unit: float):
        h, w = ground.shape[:2]
        self.shape, self.sun, self.unit = (h, w), np.array(sun), unit
        base = Image.fromarray(np.clip(ground, 0, 255).astype(np.uint8))
        self._image = base.resize((w * SCALE, h * SCALE), Image.Resampling.BILINEAR)
        self._draw = ImageDraw.Draw(self._image, "RGBA")  # blends by alpha
        self._cover = Image.new("L", (w, h), GROUND)
        self._cover_draw = ImageDraw.Draw(self._cover)

    def fill(self, points: Points, color: Vector, alpha: int = 255) -> None:
        self._draw.polygon([(x * SCALE, y * SCALE) for x, y in points.tolist()], fill=(*shade(color, 1), alpha))

    def disc(self, center: Vector, radius: float, color: Vector, alpha: int = 255) -> None:
        (x, y), r = (float(center[0]) * SCALE, float(center[1]) * SCALE), radius * SCALE
        self._draw.ellipse((x - r, y - r, x + r, y + r), fill=(*shade(color, 1), alpha))

    def line(self, ends: Points, color: Vector, width: float, alpha: int = 255) -> None:
        scaled = [(x * SCALE, y * SCALE) for x, y in ends.tolist()]
        self._draw.line(scaled, fill=(*shade(color, 1), alpha), width=max(round(width * SCALE), 1))

    def shadow(self, points: Points, height: float, alpha: int = 95) -> None:
        """Paint the shadow of a flat-topped body ``height`` pixels high: its outline swept along the sun."""
        for step in np.linspace(0, 1, 3)[1:]:
            self.fill(points + self.sun * height * step, (12, 14, 24), alpha // 2)

    def mark(self, points: Points, what: int) -> None:
        self._cover_draw.polygon([(x, y) for x, y in points.tolist()], fill=what)

    def mark_mask(self, mask: np.ndarray, what: int) -> None:
        """Record that ``what`` covers the pixels of ``mask``, bool [H, W]."""
        self._cover.paste(what, mask=Image.fromarray((mask * 255).astype(np.uint8)))

    def covered_by(self, points: Points) -> np.ndarray:
        """Return the covers uint8 [n] of the pixels under a shape, inside the image."""
        x0, y0, x1, y1 = bounds(points)
        left, top = max(math.floor(x0), 0), max(math.floor(y0), 0)
        right, bottom = min(math.ceil(x1) + 1, self.shape[1]), min(math.ceil(y1) + 1, self.shape[0])
        if right <= left or bottom <= top:
            return np.zeros(0, np.uint8)
        stencil = Image.new("1", (right - left, bottom - top))
        ImageDraw.Draw(stencil).polygon([(x - left, y - top) for x, y in points.tolist()], fill=1, outline=1)
        return np.asarray(self._cover.crop((left, top, right, bottom)))[np.asarray(stencil)]

    def finish(self, rng: np.random.Generator) -> np.ndarray:
        """Return the image, uint8 [H, W, 3], averaged down, with a camera's light, haze and grain."""
        h, w = self.shape
        picture = np.asarray(self._image.resize((w, h), Image.Resampling.BOX)).astype(np.float32)
        light = 1 + 0.05 * noise(rng, self.shape, max(self.shape) / 2)
        tint = np.array([1.0, 1.0, 1.0], np.float32) + rng.normal(0, 0.02, 3).astype(np.float32)
        haze, gain = rng.uniform(0, 0.14), rng.uniform(0.9, 1.12)
        picture = (picture * light[:, :, None] * tint * gain) * (1 - haze) + 175 * haze
        picture += rng.standard_normal((h, w, 1), np.float32) * rng.uniform(1.5, 4)
        return np.clip(picture + 0.5, 0, 255).astype(np.uint8)


# Surfaces and clutter


def road(canvas: Canvas, path: Points, width: float, rng: np.random.Generator, marked: bool) -> None:
    """Paint a road with verges along ``path``: asphalt with lane markings if ``marked``, else a dirt track."""
    tone = rng.uniform(78, 112)
    color = shade((1, 1, 1.03), tone) if marked else shade((1.0, 0.86, 0.68), tone * 1.5)
    verge = shade((color[0] * 0.6 + 52, color[1] * 0.6 + 46, color[2] * 0.6 + 30), 1.05)
    canvas.fill(strip(path, width * 1.14), verge)
    canvas.fill(strip(path, width), color)
    canvas.mark(strip(path, width), ROAD)
    if not marked:
        for side in (-0.22, 0.22):
            canvas.fill(strip(offset(path, side * width), width * 0.12), shade(color, 0.86), 150)
        return
    for side in (-0.45, 0.45):
        canvas.fill(strip(offset(path, side * width), max(0.14 * canvas.unit, 0.3)), (205, 205, 198), 190)
    dash = 3.0 * canvas.unit
    s = arc_length(path)
    starts = np.arange(0, s[-1] - dash, 2.2 * dash)
    for start, end in zip(at_length(path, s, starts), at_length(path, s, starts + dash), strict=True):
        canvas.line(np.stack([start, end]), (222, 220, 205), max(0.16 * canvas.unit, 0.35), 220)


def strip(path: Points, width: float) -> Points:
    """Return the outline of a band along ``path``, whose bends must be wider than the band."""
    return np.concatenate([offset(path, width / 2), offset(path, -width / 2)[::-1]])


def offset(path: Points, distance: float) -> Points:
    """Move ``path`` sideways by ``distance``."""
    step = np.gradient(path, axis=0)
    normal = np.stack([-step[:, 1], step[:, 0]], axis=1) / np.maximum(np.hypot(*step.T), 1e-6)[:, None]
    return path + normal * distance


def arc_length(path: Points) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.hypot(*np.diff(path, axis=0).T))])


def at_length(path: Points, lengths: np.ndarray, s: np.ndarray) -> Points:
    """Return the points of ``path`` at the distances ``s`` from its start."""
    return np.stack([np.interp(s, lengths, path[:, 0]), np.interp(s, lengths, path[:, 1])], axis=1)


def building(canvas: Canvas, center: Vector, length: float, width: float, angle: float, rng: np.random.Generator):
    """Paint a gabled or flat roof with its shadow, skylights or rooftop units."""
    outline = rectangle(center, length, width, angle)
    canvas.shadow(outline, rng.uniform(1.5, 3.5) * canvas.unit, 150)
    canvas.mark(outline, BUILT)
    across = place(np.array([[0, 1.0]]), (0, 0), angle)[0]
    if rng.random() < 0.6:
        color = _pick(rng, ((158, 92, 70), (128, 76, 64), (112, 106, 104), (92, 94, 104), (150, 122, 98)), 0.12)
        lit = 0.16 if across @ canvas.sun < 0 else -0.16
        for side, tone in ((-1, 1 - lit), (1, 1 + lit)):
            half = rectangle(np.asarray(center) + across * side * width / 4, length, width / 2, angle)
            canvas.fill(half, shade(color, tone))
        for row in np.linspace(-0.5, 0.5, max(int(width / (0.9 * canvas.unit)), 3))[1:-1]:
            ends = place(np.array([[-0.5 * length, row * width], [0.5 * length, row * width]]), center, angle)
            canvas.line(ends, shade(color, 0.8), 0.25, 70)
        ridge = place(np.array([[-0.5, 0], [0.5, 0]]) * length, center, angle)
        canvas.line(ridge, shade(color, 1.35), 0.2 * canvas.unit)
        if rng.random() < 0.6:
            spot = place(np.array([[rng.uniform(-0.3, 0.3) * length, 0.18 * width]]), center, angle)[0]
            canvas.fill(rectangle(spot, 1.0 * canvas.unit, 0.8 * canvas.unit, angle), (84, 60, 54))
    else:
        color = _pick(rng, ((176, 174, 168), (142, 142, 140), (198, 194, 184), (120, 124, 128)), 0.08)
        canvas.fill(outline, shade(color, 1.12))
        canvas.fill(rectangle(center, length - 0.8 * canvas.unit, width - 0.8 * canvas.unit, angle), color)
        for _ in range(int(rng.integers(1, 6))):
            spot = place(rng.uniform(-0.36, 0.36, (1, 2)) * [length, width], center, angle)[0]
            unit = rectangle(spot, rng.uniform(1, 2.2) * canvas.unit, rng.uniform(0.9, 1.4) * canvas.unit, angle)
            canvas.shadow(unit, 0.6 * canvas.unit, 110)
            canvas.fill(unit, shade(color, rng.uniform(0.8, 1.12)))


def tree(canvas: Canvas, center: Vector, radius: float, rng: np.random.Generator) -> None:
    """Paint a tree crown of many small tufts, lit from the sun's side."""
    crown = np.asarray(center)
    canvas.disc(crown + canvas.sun * radius * 0.75, radius * 0.95, (14, 20, 18), 110)
    base = np.array(_pick(rng, ((58, 84, 44), (70, 92, 50), (48, 74, 46), (88, 100, 56)), 0.14))
    canvas.disc(crown, radius * 0.85, shade(base, 0.72))
    for _ in range(int(8 + 2.2 * radius)):
        a, d = rng.uniform(0, 2 * math.pi), radius * 0.82 * math.sqrt(rng.uniform())
        spot = np.array([math.cos(a), math.sin(a)]) * d
        lit = 1 - 0.32 * float(spot @ canvas.sun) / radius + rng.normal(0, 0.09)
        canvas.disc(crown + spot, radius * rng.uniform(0.2, 0.36), shade(base, lit))
    canvas.mark(circle(crown, radius, 12), PLANT)


def rock(canvas: Canvas, center: Vector, radius: float, rng: np.random.Generator) -> None:
    outline = circle(center, 1, 9)
    outline = np.asarray(center) + (outline - center) * (radius * rng.uniform(0.65, 1.1, (9, 1)))
    tone = rng.uniform(0.8, 1.15)
    canvas.shadow(outline, radius * 0.5, 100)
    canvas.fill(outline, shade((134, 128, 118), tone))
    canvas.fill(
        np.asarray(center) + (outline - center) * 0.55 - canvas.sun * radius * 0.2, shade((162, 156, 144), tone)
    )
    canvas.mark(outline, PLANT)


def container(canvas: Canvas, center: Vector, angle: float, rng: np.random.Generator) -> None:
    """Paint a freight container or shed: like a car in outline and colour, but without windows."""
    length, width = rng.uniform(4.5, 7) * canvas.unit, rng.uniform(2.2, 2.6) * canvas.unit
    outline = rectangle(center, length, width, angle)
    color = _pick(rng, ((122, 66, 52), (70, 92, 112), (92, 106, 82), (150, 142, 128), (104, 100, 98)), 0.1)
    canvas.shadow(outline, 1.6 * canvas.unit, 140)
    canvas.fill(outline, color)
    for x in np.arange(-0.5 * length, 0.5 * length, max(0.6 * canvas.unit, 0.8))[1:]:
        rib = place(np.array([[x, -0.5 * width], [x, 0.5 * width]]), center, angle)
        canvas.line(rib, shade(color, 0.8), 0.3, 140)
    canvas.mark(outline, BUILT)


def pool(canvas: Canvas, center: Vector, angle: float, rng: np.random.Generator) -> None:
    outline = rectangle(center, rng.uniform(5, 8) * canvas.unit, rng.uniform(3, 4) * canvas.unit, angle)
    canvas.fill(np.asarray(center) + (outline - center) * 1.22, (188, 182, 170))
    canvas.fill(outline, _pick(rng, ((74, 158, 182), (88, 172, 190)), 0.08))
    canvas.mark(outline, BUILT)


def _pick(rng: np.random.Generator, palette: Sequence[Color], spread: float) -> Color:
    color = np.array(palette[int(rng.integers(len(palette)))], float)
    return shade(color * rng.normal(1, spread / 5, 3), rng.normal(1, spread))
