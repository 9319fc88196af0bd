"""Paint the three classes of generated scenes: cars, boats and storage tanks.

Each painter draws one object with its shadow. ``body`` is the outline from ``outline``; the
object's box is its bounding box.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from querydet_jax.data.scenes.paint import Canvas, Points, circle, place, rectangle, shade

CLASSES = ("car", "boat", "tank")
CAR, BOAT, TANK = range(3)

# Colour and its relative frequency.
_CAR_PAINT = (
    ((232, 232, 230), 0.24), ((186, 190, 194), 0.16), ((128, 132, 138), 0.13), ((44, 45, 50), 0.17),
    ((168, 44, 40), 0.12), ((44, 74, 138), 0.11), ((206, 168, 60), 0.04), ((66, 104, 76), 0.03),
)  # fmt: skip
_HULL_PAINT = (
    ((240, 240, 236), 0.6),
    ((206, 212, 220), 0.12),
    ((52, 66, 104), 0.1),
    ((150, 52, 46), 0.1),
    ((158, 116, 74), 0.08),
)
_TANK_PAINT = (((222, 220, 212), 0.5), ((182, 180, 174), 0.2), ((168, 122, 92), 0.15), ((150, 164, 156), 0.15))

_HULL = np.array(
    [[-0.5, -0.36], [-0.46, -0.42], [0.0, -0.5], [0.26, -0.38], [0.42, -0.16], [0.5, 0.0],
     [0.42, 0.16], [0.26, 0.38], [0.0, 0.5], [-0.46, 0.42], [-0.5, 0.36]]
)  # fmt: skip


def outline(kind: int, center: tuple[float, float], length: float, angle: float, aspect: float) -> Points:
    """Return an object's outline [n, 2]: ``length`` along ``angle``, width ``aspect * length`` (tank: a circle)."""
    if kind == CAR:
        return place(_rounded(length, length * aspect), center, angle)
    if kind == BOAT:
        return place(_HULL * [length, length * aspect], center, angle)
    return circle(center, length / 2)


def _rounded(length: float, width: float) -> np.ndarray:
    x, y, r = length / 2, width / 2, 0.22 * width
    return np.array(
        [
            [x - r, -y],
            [x, -y + r],
            [x, y - r],
            [x - r, y],
            [-x + r / 2, y],
            [-x, y - r / 2],
            [-x, -y + r / 2],
            [-x + r / 2, -y],
        ]
    )


def car(canvas: Canvas, body: Points, center: tuple[float, float], length: float, angle: float, aspect: float, rng):
    width = length * aspect
    paint = _choose(rng, _CAR_PAINT)
    dark = (34, 40, 50)
    canvas.shadow(body, 0.2 * length, 150)
    canvas.fill(body, paint)

    def part(x: float, y: float, along: float, across: float) -> Points:
        return rectangle(
            place(np.array([[x * length, y * width]]), center, angle)[0], along * length, across * width, angle
        )

    canvas.fill(part(0.0, 0.0, 0.56, 0.84), dark)  # windows; the roof is painted over them
    canvas.fill(part(-0.04, 0.0, 0.33, 0.74), shade(paint, 1.08 if sum(paint) > 200 else 1.5))
    canvas.fill(part(0.49, 0.0, 0.03, 0.8), shade(paint, 0.7))
    if length > 18:
        for side in (-0.33, 0.33):
            canvas.fill(part(0.465, side, 0.05, 0.16), (250, 246, 220))
            canvas.fill(part(-0.475, side, 0.04, 0.18), (176, 34, 30))
        canvas.fill(part(0.37, 0.0, 0.015, 0.8), shade(paint, 0.82))


def boat(canvas: Canvas, body: Points, center: tuple[float, float], length: float, angle: float, aspect: float, rng):
    width = length * aspect
    paint = _choose(rng, _HULL_PAINT)
    middle = np.asarray(center)
    canvas.fill(body + canvas.sun * 0.1 * length, (8, 16, 26), 120)
    canvas.fill(body, paint)
    deck = _choose(rng, (((186, 150, 106), 0.6), ((150, 158, 166), 0.25), ((96, 112, 128), 0.15)))
    canvas.fill(middle + (body - middle) * 0.68, deck)
    cabin = place(np.array([[0.04 * length, 0.0]]), center, angle)[0]
    canvas.fill(rectangle(cabin, 0.3 * length, 0.52 * width, angle), shade(paint, 0.97))
    canvas.fill(
        rectangle(cabin + place(np.array([[0.13 * length, 0]]), (0, 0), angle)[0], 0.07 * length, 0.5 * width, angle),
        (36, 48, 66),
    )


def wake(center: tuple[float, float], length: float, angle: float, reach: float) -> list[Points]:
    """Return the outlines of the foam behind a moving boat, ``reach`` boat lengths long."""
    start, end = 0.12, 0.12 + 0.16 * reach
    arms = [np.array([[-0.55, side * start], [-reach, side * end], [-reach, side * (end - 0.12)]]) for side in (-1, 1)]
    trail = np.array([[-0.55, -0.1], [-0.8 * reach, -0.18], [-0.8 * reach, 0.18], [-0.55, 0.1]])
    return [place(part * length, center, angle) for part in (*arms, trail)]


def tank(canvas: Canvas, body: Points, center: tuple[float, float], length: float, angle: float, aspect: float, rng):
    paint = _choose(rng, _TANK_PAINT)
    middle, radius = np.asarray(center), length / 2
    canvas.shadow(body, 0.42 * length, 150)
    canvas.fill(body, shade(paint, 0.62))
    # The wall shows as a dark crescent on the side away from the sun.
    canvas.disc(middle - canvas.sun * 0.1 * radius, radius * 0.9, paint)
    canvas.disc(middle - canvas.sun * 0.22 * radius, radius * 0.62, shade(paint, 1.07))
    if length > 9:
        for k in range(6):
            spoke = angle + k * math.pi / 3
            tip = middle - canvas.sun * 0.1 * radius + np.array([math.cos(spoke), math.sin(spoke)]) * radius * 0.88
            canvas.line(np.stack([middle, tip]), shade(paint, 0.86), 0.03 * length, 170)
    canvas.disc(middle, radius * 0.13, shade(paint, 0.55))


PAINTERS: tuple[Callable[..., None], ...] = (car, boat, tank)  # indexed by class


def _choose(rng: np.random.Generator, palette) -> tuple[int, int, int]:
    weights = np.array([w for _, w in palette])
    color = palette[int(rng.choice(len(palette), p=weights / weights.sum()))][0]
    return shade(color, rng.normal(1, 0.06))
