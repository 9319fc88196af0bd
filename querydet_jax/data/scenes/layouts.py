"""Generate aerial images of small objects: a data set that needs no download.

``draw_scene`` is a pure function of its seed. A scene shows a road, car park, harbour, lake, tank
farm or field from above, with 0 to 25 cars, boats and tanks, alone, in rows or in groups. The square
root of a box's area is 6 to 48 px; three in five are below 16 px. Houses, trees, rocks, containers,
pools and foam have similar colours and sizes, as distractors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from querydet_jax.data.scenes import paint
from querydet_jax.data.scenes.objects import BOAT, CAR, CLASSES, PAINTERS, TANK, outline, wake

__all__ = ["CLASSES", "draw_scene"]

_MIN_SIZE, _MAX_SIZE = 6.0, 48.0  # px, square root of a box's area
_MAX_OBJECTS = 25
_MAX_OVERLAP = 0.3  # share of the smaller of two boxes
_MIN_INSIDE = 0.6  # share of an object's box inside the image
_GRASS, _DRY, _SOIL, _SAND, _CONCRETE = (
    (104, 122, 70), (152, 142, 96), (132, 108, 82), (196, 180, 142), (150, 148, 142),
)  # fmt: skip


def draw_scene(seed: int | Sequence[int], size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw one image.

    Args:
      seed: a non-negative integer, or several.
      size: (height, width) in pixels.

    Returns:
      uint8 RGB [H, W, 3]; boxes float32 [n, 4], (x0, y0, x1, y1) in pixels, tight around each object
      without its shadow and clipped to the image; classes int32 [n], indices into ``CLASSES``.
    """
    rng = np.random.default_rng(seed)
    scene = _Scene(rng, size)
    _THEMES[int(rng.choice(len(_THEMES), p=_WEIGHTS))](scene)
    boxes = np.array(scene.boxes, np.float32).reshape(-1, 4)
    return scene.canvas.finish(rng), boxes, np.array(scene.classes, np.int32)


class _Scene:
    """The canvas of an image and the objects painted on it so far."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]):
        self.rng, self.size = rng, size
        # Pixels per metre. Cars (4.5 m) fill the lower end of the size range.
        self.unit = (
            float(np.exp(rng.uniform(math.log(2.3), math.log(9.5)))) if rng.random() < 0.55 else rng.uniform(2.3, 3.6)
        )
        sun = rng.uniform(0, 2 * math.pi)
        self.sun = (math.cos(sun), math.sin(sun))
        self.limit = 0 if rng.random() < 0.07 else int(min(_MAX_OBJECTS, 1 + rng.exponential(13)))
        self.boxes: list[np.ndarray] = []
        self.classes: list[int] = []
        self.ground = _ground(rng, size, self.unit)

    def start(self) -> None:
        """Put the finished ground on the canvas; everything else is painted over it."""
        self.canvas = paint.Canvas(self.ground, self.sun, self.unit)

    @property
    def full(self) -> bool:
        return len(self.boxes) >= self.limit

    def metres(self, low: float, high: float) -> float:
        return self.rng.uniform(low, high) * self.unit

    def spot(self) -> tuple[float, float]:
        return self.rng.uniform(0, self.size[1]), self.rng.uniform(0, self.size[0])

    def add(self, kind: int, center: paint.Vector, angle: float, on: tuple[int, ...], moving: bool = False) -> bool:
        """Paint an object if it fits: only on covers in ``on``, inside the image, apart from others. Return whether."""
        if self.full:
            return False
        rng, at = self.rng, (float(center[0]), float(center[1]))
        low, high, aspects = _METRES[kind]
        length, aspect = self.metres(low, high), rng.uniform(*aspects)
        body = outline(kind, at, length, angle, aspect)
        box = paint.bounds(body)
        whole = (box[2] - box[0]) * (box[3] - box[1])
        h, w = self.size
        box = np.clip(box, 0, [w, h, w, h])
        area = max(box[2] - box[0], 0) * max(box[3] - box[1], 0)
        if area < _MIN_INSIDE * whole or not _MIN_SIZE <= math.sqrt(area) <= _MAX_SIZE:
            return False
        if not np.isin(self.canvas.covered_by(body), on).all():
            return False
        for other in self.boxes:
            sides = np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2])
            smaller = min(area, float(np.prod(other[2:] - other[:2])))
            if (sides > 0).all() and sides.prod() > _MAX_OVERLAP * smaller:
                return False
        if moving and kind == BOAT:
            foam = wake(at, length, angle, rng.uniform(1.5, 3.5))
            if all((self.canvas.covered_by(part) == paint.WATER).all() for part in foam):
                for part in foam:
                    self.canvas.fill(part, (226, 236, 240), 80)
        PAINTERS[kind](self.canvas, body, at, length, angle, aspect, rng)
        self.canvas.mark(body, paint.OBJECT)
        self.boxes.append(box)
        self.classes.append(kind)
        return True


# Range of length in metres, and range of width / length.
_METRES = {CAR: (4.0, 5.0, (0.42, 0.48)), BOAT: (4.5, 8.5, (0.34, 0.42)), TANK: (3.2, 7.0, (1.0, 1.0))}


def _ground(rng: np.random.Generator, size: tuple[int, int], unit: float) -> np.ndarray:
    """Return the ground, float32 [H, W, 3]: fields with furrows, overlaid with blotches and grain."""
    palette = [np.array(c, np.float32) for c in (_GRASS, _DRY, _SOIL, _GRASS)]
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
    angle, field = rng.uniform(0, math.pi), rng.uniform(18, 60) * unit
    bend = paint.noise(rng, size, max(field, 24)) * 0.05 * field
    u = x * math.cos(angle) + y * math.sin(angle) + bend
    v = -x * math.sin(angle) + y * math.cos(angle) + bend
    column = np.floor(u / field).astype(int)
    row = np.floor(v / (field * 1.6) + 0.37 * column).astype(int)
    kinds = np.unique((column * 1000 + row).ravel(), return_inverse=True)[1].reshape(size)
    n = int(kinds.max()) + 1
    base = palette[int(rng.integers(len(palette)))]
    mix = rng.uniform(0, 0.75) * rng.uniform(0.2, 1, (n, 1)).astype(np.float32)
    colors = base * (1 - mix) + np.stack([palette[i] for i in rng.integers(len(palette), size=n)]) * mix
    out = (colors * rng.normal(1, 0.06, (n, 1)).astype(np.float32))[kinds].astype(np.float32)
    furrows = np.sin(np.where((kinds % 2) == 0, u, v) * (2 * math.pi / (rng.uniform(1.6, 3.2) * unit)))
    out *= (1 + (rng.uniform(0, 0.07, n)[kinds] * furrows)[:, :, None]).astype(np.float32)
    blotches = 0.05 * paint.noise(rng, size, 14 * unit, 4) + 0.035 * paint.noise(rng, size, 2.2, 2)
    return out * (1 + blotches)[:, :, None]


def _water(scene: _Scene, depth: np.ndarray) -> np.ndarray:
    """Flood the ground where ``depth`` (float [H, W], metres from the shore) is positive; return that mask."""
    rng, size = scene.rng, scene.size
    deep = np.array(((44, 82, 96), (52, 92, 98), (38, 66, 92), (74, 98, 88))[int(rng.integers(4))], np.float32)
    ripple = 0.05 * paint.noise(rng, size, 9, 4) + 0.04 * paint.noise(rng, size, 1.8)
    sea = (deep + np.exp(-np.maximum(depth, 0) / 5)[:, :, None] * np.array([34, 38, 26], np.float32)) * (1 + ripple)[
        :, :, None
    ]
    beach = np.array(_SAND, np.float32) * (1 + 0.05 * paint.noise(rng, size, 4, 3))[:, :, None]
    wide = rng.uniform(1.5, 6)
    sand = np.clip(depth / wide + 1, 0, 1)[:, :, None] ** 0.7
    wet = np.clip(depth * scene.unit * 0.8 + 0.5, 0, 1)[:, :, None]
    scene.ground = (scene.ground * (1 - sand) + beach * sand) * (1 - wet) + sea * wet
    foam = np.exp(-((depth * scene.unit / 1.6) ** 2)) * np.clip(paint.noise(rng, size, 12, 2) * 0.5 + 0.4, 0, 1)
    scene.ground += (foam * 60)[:, :, None]
    return depth > 0


def _path(scene: _Scene, curved: bool) -> np.ndarray:
    """Return a path [n, 2] across the whole image."""
    rng, (h, w) = scene.rng, scene.size
    angle, reach = rng.uniform(0, 2 * math.pi), math.hypot(h, w)
    t = np.linspace(-0.75, 0.75, 160)
    bend = rng.uniform(0.05, 0.16) * reach * np.sin(t * rng.uniform(2, 5) + rng.uniform(0, 6)) if curved else 0 * t
    across = rng.uniform(-0.28, 0.28) * min(h, w)
    return paint.place(np.stack([t * reach, bend + across], axis=1), (w / 2, h / 2), angle)


def _road(scene: _Scene, curved: bool | None = None) -> tuple[np.ndarray, float]:
    """Paint a road without traffic; return its path and width."""
    rng = scene.rng
    path = _path(scene, bool(rng.random() < 0.5) if curved is None else curved)
    marked = bool(rng.random() < 0.8)
    width = scene.metres(6.5, 8.5) if marked else scene.metres(4.5, 6)
    paint.road(scene.canvas, path, width, rng, marked)
    return path, width


def _traffic(scene: _Scene, path: np.ndarray, width: float, share: float) -> None:
    """Add cars in both lanes of a road, in short queues, up to ``share`` of the image's limit."""
    rng = scene.rng
    lengths = paint.arc_length(path)
    target = len(scene.boxes) + math.ceil(share * scene.limit)
    for _ in range(60):
        lane = 1 if rng.random() < 0.5 else -1
        s = rng.uniform(0, lengths[-1])
        for _ in range(int(rng.integers(1, 4))):
            if len(scene.boxes) >= target:
                return
            here, ahead = paint.at_length(path, lengths, np.array([s, s + 1]))
            step = ahead - here
            side = np.array([-step[1], step[0]]) / max(float(np.hypot(*step)), 1e-6) * lane * 0.24 * width
            angle = math.atan2(step[1], step[0]) + (0 if lane > 0 else math.pi) + rng.normal(0, 0.03)
            scene.add(CAR, here + side, angle, (paint.ROAD,))
            s += scene.metres(6.5, 12)


def _plants(scene: _Scene, trees: int, rocks: int) -> None:
    rng = scene.rng
    for _ in range(trees):
        group, spread = scene.spot(), scene.metres(4, 16)
        for _ in range(int(rng.integers(1, 7))):
            at, radius = rng.normal(group, spread), scene.metres(1.2, 3.6)
            if (scene.canvas.covered_by(paint.circle(at, radius * 1.15, 12)) == paint.GROUND).all():
                paint.tree(scene.canvas, at, radius, rng)
    for _ in range(rocks):
        at, radius = scene.spot(), scene.metres(0.5, 1.8)
        if (scene.canvas.covered_by(paint.circle(at, radius * 1.2, 12)) == paint.GROUND).all():
            paint.rock(scene.canvas, at, radius, rng)


def _block(scene: _Scene, kind: Callable[..., None], length: float, width: float, tries: int) -> None:
    """Place rectangular clutter on free ground, aligned like the houses of a settlement."""
    rng = scene.rng
    main = rng.uniform(0, math.pi)
    for _ in range(tries):
        at, angle = scene.spot(), main + rng.choice([0, math.pi / 2]) + rng.normal(0, 0.05)
        long, wide = scene.metres(0.7 * length, 1.3 * length), scene.metres(0.8 * width, 1.2 * width)
        room = paint.rectangle(at, long + scene.metres(2, 3), wide + scene.metres(2, 3), angle)
        if not (scene.canvas.covered_by(room) == paint.GROUND).all():
            continue
        if kind is paint.building:
            paint.building(scene.canvas, at, long, wide, angle, rng)
        else:
            kind(scene.canvas, at, angle, rng)


def _scatter(scene: _Scene, kind: int, count: int, on: tuple[int, ...], moving: float = 0.0) -> None:
    for _ in range(count * 6):
        if count <= 0 or scene.full:
            return
        count -= scene.add(kind, scene.spot(), scene.rng.uniform(0, 2 * math.pi), on, bool(scene.rng.random() < moving))


def _paved(scene: _Scene, at: paint.Vector, length: float, width: float, angle: float, color: paint.Vector) -> None:
    """Paint an empty car park or yard."""
    area = paint.rectangle(at, length, width, angle)
    paint_color = paint.shade(color, scene.rng.normal(1, 0.06))
    scene.canvas.fill(
        paint.rectangle(at, length + 0.8 * scene.unit, width + 0.8 * scene.unit, angle), paint.shade(color, 1.25)
    )
    scene.canvas.fill(area, paint_color)
    for _ in range(14):  # stains and repairs
        spot = paint.place(scene.rng.uniform(-0.46, 0.46, (1, 2)) * [length, width], at, angle)[0]
        scene.canvas.disc(spot, scene.metres(0.4, 1.6), paint.shade(color, scene.rng.uniform(0.8, 1.1)), 70)
    scene.canvas.mark(area, paint.PAVED)


def _suburb(scene: _Scene) -> None:
    scene.start()
    roads = [_road(scene) for _ in range(int(scene.rng.integers(1, 3)))]
    for path, width in roads:
        _traffic(scene, path, width, 0.4)
    _block(scene, paint.building, 12, 8, 34)
    _block(scene, paint.pool, 6, 4, 3)
    _scatter(scene, CAR, int(scene.rng.integers(0, 6)), (paint.GROUND,))
    _plants(scene, 12, 3)
    _scatter(scene, TANK, int(scene.rng.integers(0, 5)), (paint.GROUND,))


def _car_park(scene: _Scene) -> None:
    rng = scene.rng
    scene.start()
    path, broad = _road(scene, curved=False)
    at, angle = (
        np.array(scene.size[::-1]) * rng.uniform(0.35, 0.65, 2),
        rng.choice([0, math.pi / 2]) + rng.normal(0, 0.3),
    )
    slot, deep = 2.9 * scene.unit, 5.4 * scene.unit
    rows = int(rng.integers(2, 5))
    columns = int(np.clip(0.8 * min(scene.size) / slot, 3, 22))
    length, width = (columns + 1) * slot, rows * deep + math.ceil(rows / 2) * 6.5 * scene.unit
    _paved(scene, at, length, width, angle, (96, 96, 100))
    _traffic(scene, path, broad, 0.25)
    busy, y = rng.uniform(0.25, 0.75), -width / 2
    stalls = []
    for row in range(rows):
        y += 6.5 * scene.unit if row % 2 else 0.3 * scene.unit
        for column in range(columns + 1):
            x = (column - columns / 2) * slot
            ends = paint.place(np.array([[x, y], [x, y + deep]]), at, angle)
            scene.canvas.line(ends, (214, 212, 204), max(0.13 * scene.unit, 0.3), 180)
            if column < columns and rng.random() < busy:
                stalls.append((paint.place(np.array([[x + slot / 2, y + deep / 2]]), at, angle)[0], row))
        y += deep
    for k in rng.permutation(len(stalls)):
        place, row = stalls[k]
        turn = math.pi / 2 + (math.pi if rng.random() < 0.35 else 0)
        scene.add(CAR, place + rng.normal(0, 0.15 * scene.unit, 2), angle + turn + rng.normal(0, 0.03), (paint.PAVED,))
    _block(scene, paint.building, 16, 10, 12)
    _block(scene, paint.container, 6, 2.5, 5)
    _plants(scene, 8, 2)


def _harbour(scene: _Scene) -> None:
    rng, (h, w) = scene.rng, scene.size
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[:h, :w]
    across = (x - w / 2) * math.cos(angle) + (y - h / 2) * math.sin(angle)
    quay = rng.uniform(-0.25, 0.05) * min(h, w)
    sea = _water(scene, ((across - quay) + paint.noise(rng, scene.size, 60) * 1.5) / scene.unit)
    scene.start()
    scene.canvas.mark_mask(sea, paint.WATER)
    along = angle + math.pi / 2
    start = rng.uniform(-0.3, 0.3) * max(h, w)
    for k in range(-2, 3):
        foot = paint.place(
            np.array([[quay - 4 * scene.unit, start + k * scene.metres(26, 34)]]), (w / 2, h / 2), angle
        )[0]
        reach = scene.metres(24, 60)
        tip = foot + np.array([math.cos(angle), math.sin(angle)]) * reach
        pier = paint.strip(np.stack([foot, tip]), 2.0 * scene.unit)
        scene.canvas.fill(pier + scene.canvas.sun * 0.8 * scene.unit, (10, 18, 26), 110)
        scene.canvas.fill(pier, paint.shade((164, 146, 120), rng.normal(1, 0.08)))
        scene.canvas.mark(pier, paint.BUILT)
        berth = 6 * scene.unit
        while berth < reach and rng.random() < 0.97:
            side = 1 if rng.random() < 0.5 else -1
            here = (
                foot
                + (tip - foot) * (berth / reach)
                + np.array([math.cos(along), math.sin(along)]) * side * 5.6 * scene.unit
            )
            if rng.random() < 0.6:
                scene.add(
                    BOAT, here, along + (0 if rng.random() < 0.5 else math.pi) + rng.normal(0, 0.05), (paint.WATER,)
                )
            berth += scene.metres(2.0, 4.0)
    _scatter(scene, BOAT, int(rng.integers(1, 7)), (paint.WATER,), moving=0.7)
    _block(scene, paint.building, 14, 9, 14)
    _scatter(scene, TANK, int(rng.integers(1, 7)), (paint.GROUND,))
    _scatter(scene, CAR, int(rng.integers(0, 7)), (paint.GROUND,))
    _plants(scene, 6, 6)


def _lake(scene: _Scene) -> None:
    rng, (h, w) = scene.rng, scene.size
    y, x = np.mgrid[:h, :w]
    if rng.random() < 0.5:
        cy, cx = rng.uniform(0.2, 0.8) * h, rng.uniform(0.2, 0.8) * w
        depth = rng.uniform(0.3, 0.5) * min(h, w) - np.hypot(y - cy, (x - cx) * rng.uniform(0.6, 1))
    else:
        angle, bend = rng.uniform(0, math.pi), rng.uniform(0, 6)
        u = (x - w / 2) * math.cos(angle) + (y - h / 2) * math.sin(angle)
        v = -(x - w / 2) * math.sin(angle) + (y - h / 2) * math.cos(angle)
        depth = rng.uniform(0.12, 0.24) * min(h, w) - np.abs(v - 0.12 * h * np.sin(u / (0.25 * w) + bend))
    depth = depth + paint.noise(rng, scene.size, 0.22 * min(h, w), 3) * 0.05 * min(h, w)
    sea = _water(scene, depth / scene.unit)
    scene.start()
    scene.canvas.mark_mask(sea, paint.WATER)
    _scatter(scene, BOAT, int(rng.integers(2, 16)), (paint.WATER,), moving=0.45)
    _block(scene, paint.building, 11, 8, 8)
    _scatter(scene, CAR, int(rng.integers(0, 5)), (paint.GROUND,))
    _plants(scene, 16, 10)


def _industry(scene: _Scene) -> None:
    rng = scene.rng
    scene.start()
    path, width = _road(scene)
    at, angle = np.array(scene.size[::-1]) * rng.uniform(0.35, 0.65, 2), rng.uniform(0, math.pi)
    rows, columns, gap = int(rng.integers(2, 5)), int(rng.integers(2, 6)), scene.metres(9, 11)
    yard = ((columns + 0.6) * gap, (rows + 0.6) * gap)
    _paved(scene, at, *yard, angle, _CONCRETE if rng.random() < 0.6 else (158, 142, 116))
    _traffic(scene, path, width, 0.15)
    for row in range(rows):
        for column in range(columns):
            cell = paint.place(
                np.array([[(column - (columns - 1) / 2) * gap, (row - (rows - 1) / 2) * gap]]), at, angle
            )[0]
            if rng.random() < 0.85:
                scene.add(TANK, cell + rng.normal(0, 0.3 * scene.unit, 2), rng.uniform(0, math.pi), (paint.PAVED,))
    _block(scene, paint.building, 20, 12, 12)
    _block(scene, paint.container, 6, 2.5, 16)
    _scatter(scene, CAR, int(rng.integers(0, 7)), (paint.PAVED, paint.GROUND))
    _plants(scene, 6, 4)


def _fields(scene: _Scene) -> None:
    rng = scene.rng
    scene.start()
    if rng.random() < 0.8:
        _traffic(scene, *_road(scene), 0.4)
    _block(scene, paint.building, 14, 9, 4)
    _scatter(scene, TANK, int(rng.integers(1, 8)), (paint.GROUND,))
    _scatter(scene, CAR, int(rng.integers(0, 4)), (paint.GROUND,))
    _plants(scene, 14, 14)


_THEMES: tuple[Callable[[_Scene], None], ...] = (_suburb, _car_park, _harbour, _lake, _industry, _fields)
_WEIGHTS = (0.17, 0.16, 0.19, 0.13, 0.26, 0.09)
