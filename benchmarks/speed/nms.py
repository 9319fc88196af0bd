"""Class-wise NMS of one image's candidates: ours against the usual tiled and the quadratic one.

Shape letters: M candidates, K classes, D detections, T candidates a tile, n tiles, I images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from benchmarks import plots
from benchmarks.report import Column, Report, Row, ms
from benchmarks.timing import interleaved, percentiles
from querydet_jax.ops.nms import class_wise_nms, settle, soft_nms, suppressed_by

OURS = "class_wise_nms"
SOFT = "soft_nms gaussian"

Method = Callable[[Array, Array, Array], tuple[Array, ...]]
"""Boxes ``[M, 4]``, scores ``[M]`` and classes ``[M]`` to keep ``[D]``, valid ``[D]``, ..."""


@dataclass(frozen=True)
class Nms:
    """Time non-maximum suppression on candidates that lie like a detector's."""

    candidates: int = 6000
    """Candidates an image (1000 each of six levels)."""
    alive: tuple[int, ...] = (50, 1000, 6000)
    """How many of them pass the score threshold; a case each."""
    objects: int = 150
    """Objects around which the candidates lie."""
    classes: int = 80
    """Number of classes."""
    max_detections: tuple[int, ...] = (100, 200)
    """Detections at which NMS stops; every case is timed with each."""
    images: int = 8
    """Images of the batched case, the first with the most alive, the others with the fewest; 0 leaves it out."""
    tiles: tuple[int, ...] = (128, 256, 512)
    """Candidates a tile of the tiled NMS; a method each."""
    iou_threshold: float = 0.5
    """IoU above which a candidate is suppressed."""
    sigma: float = 0.7
    """Width of soft-NMS's gaussian."""
    prune: float = 1e-4
    """Score at which soft-NMS drops a candidate."""
    rounds: int = 50
    """Timed rounds a case."""
    out: str = "runs/benchmark"
    """Folder for nms.json, nms.csv and nms.png."""


@dataclass(frozen=True)
class Case:
    """What is timed together: boxes, scores and classes of one image, or with a leading axis I of several."""

    name: str
    alive: int
    max_detections: int
    batched: bool
    candidates: tuple[np.ndarray, np.ndarray, np.ndarray]


def nms(arguments: Nms) -> None:
    """Time every method on every case and publish the report.

    Raises:
      RuntimeError: an exact method keeps other boxes than ``class_wise_nms``; nothing is timed then.
    """
    prepared = [(case, *_prepare(case, arguments)) for case in _cases(arguments)]
    rows: list[Row] = []
    for case, functions, kept in prepared:
        for method, times in interleaved(functions, arguments.rounds).items():
            rows.append(
                {
                    "case": case.name,
                    "method": method,
                    **percentiles(times),
                    "kept": kept[method],
                    "alive": case.alive,
                    "max_detections": case.max_detections,
                    "images": len(case.candidates[0]) if case.batched else 1,
                }
            )
    Report(
        name="nms",
        title=f"Non-maximum suppression of {arguments.candidates} candidates an image, {arguments.classes} classes",
        columns=[
            Column("case", "case"),
            Column("method", "method"),
            *(Column(f"ms_p{p}", f"ms p{p}", ms) for p in (50, 90, 99)),
            Column("kept", "kept"),
        ],
        rows=rows,
        notes=[
            f"{arguments.rounds} interleaved rounds a case in one process; "
            "all but soft_nms were found to keep the same boxes in the same order before anything was timed",
        ],
        not_run=["quadratic on several images: an M x M matrix each"] if arguments.images else [],
        draw=partial(_draw, rows=rows, max_detections=arguments.max_detections[0]),
    ).publish(arguments.out, arguments)


def clustered(
    rng: np.random.Generator, candidates: int, *, objects: int, classes: int, alive: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Candidates as a detector's heads give them: many around each object, the better the nearer.

    Returns:
      boxes float32 ``[M, 4]``, scores float32 ``[M]``, -inf but for the ``alive`` best, classes int32
      ``[M]``, mostly the object's.
    """
    center = rng.random((objects, 2)) * [1344, 800]
    size = np.exp(rng.uniform(np.log(12), np.log(150), (objects, 2)))
    confidence = rng.beta(2, 2, objects)
    label = rng.integers(0, classes, objects)

    of = rng.integers(0, objects, candidates)
    error = rng.normal(0, 0.15, (candidates, 4))
    near = center[of] + error[:, :2] * size[of]
    half = 0.5 * size[of] * np.exp(error[:, 2:])
    scores = confidence[of] * np.exp(-4 * np.abs(error).sum(1) * rng.random(candidates))
    scores[np.argsort(-scores)[alive:]] = -np.inf
    mistaken = rng.random(candidates) < 0.15
    return (
        np.concatenate([near - half, near + half], axis=1).astype(np.float32),
        scores.astype(np.float32),
        np.where(mistaken, rng.integers(0, classes, candidates), label[of]).astype(np.int32),
    )


def tiled_nms(
    boxes: Array, scores: Array, classes: Array, *, iou_threshold: float, max_detections: int, tile: int
) -> tuple[Array, Array]:
    """Exact class-wise NMS as it is usual on a TPU, with the arguments and results of ``class_wise_nms``.

    Candidates are sorted by score and cut into tiles of ``tile``; of each tile what kept boxes of former
    tiles suppress is dropped, then the tile is settled within itself, until there are ``max_detections``.
    """
    tiles = -(-len(scores) // tile)
    order = jnp.argsort(-scores, stable=True)
    # Absent candidates fill the last tile; their boxes may be infinite, but they are not present.
    order = jnp.pad(order, (0, tiles * tile - len(scores)))
    present = (jnp.arange(tiles * tile) < len(scores)) & (scores[order] > -jnp.inf)
    boxes, classes = (x.reshape(tiles, tile, *x.shape[1:]) for x in (boxes[order], classes[order]))
    order, present = order.reshape(tiles, tile), present.reshape(tiles, tile)

    def again(state: tuple[Array, ...]) -> Array:
        number, count, *_ = state
        return (count < max_detections) & (number < tiles) & present[jnp.minimum(number, tiles - 1), 0]

    def one_tile(state: tuple[Array, ...]) -> tuple[Array, ...]:
        number, count, keep, kept_boxes, kept_classes = state
        overlaps = suppressed_by(boxes[number], classes[number], kept_boxes, kept_classes, iou_threshold=iou_threshold)
        free = present[number] & ~jnp.any(overlaps, axis=0)
        kept = settle(boxes[number], classes[number], free, iou_threshold=iou_threshold)
        slot = jnp.where(kept, count + jnp.cumsum(kept) - 1, max_detections)
        return (
            number + 1,
            jnp.minimum(count + jnp.sum(kept), max_detections),
            keep.at[slot].set(order[number].astype(jnp.int32), mode="drop"),
            kept_boxes.at[slot].set(boxes[number], mode="drop"),
            kept_classes.at[slot].set(classes[number], mode="drop"),
        )

    start = (
        jnp.int32(0),
        jnp.int32(0),
        jnp.zeros((max_detections,), jnp.int32),
        # Slots not in use hold empty boxes, which overlap nothing.
        jnp.zeros((max_detections, 4), boxes.dtype),
        jnp.zeros((max_detections,), classes.dtype),
    )
    _, count, keep, *_ = lax.while_loop(again, one_tile, start)
    return keep, jnp.arange(max_detections) < count


def quadratic_nms(
    boxes: Array, scores: Array, classes: Array, *, iou_threshold: float, max_detections: int
) -> tuple[Array, Array]:
    """Exact class-wise NMS by the textbook, with the arguments and results of ``class_wise_nms``: the whole
    matrix of overlaps, then every candidate in order of score drops what it overlaps."""
    order = jnp.argsort(-scores, stable=True)
    boxes, classes = boxes[order], classes[order]
    overlaps = suppressed_by(boxes, classes, boxes, classes, iou_threshold=iou_threshold)
    later = jnp.arange(len(scores))

    def one(place: Array, kept: Array) -> Array:
        return kept & ~(kept[place] & overlaps[place] & (later > place))

    kept = lax.fori_loop(0, len(scores), one, scores[order] > -jnp.inf)
    slot = jnp.where(kept, jnp.cumsum(kept) - 1, max_detections)
    keep = jnp.zeros((max_detections,), jnp.int32).at[slot].set(order.astype(jnp.int32), mode="drop")
    return keep, jnp.arange(max_detections) < jnp.sum(kept)


def _cases(arguments: Nms) -> list[Case]:
    rng = np.random.default_rng(0)
    draw = partial(clustered, rng, arguments.candidates, objects=arguments.objects, classes=arguments.classes)
    images = [(alive, draw(alive=alive)) for alive in arguments.alive]
    most, fewest = max(arguments.alive), min(arguments.alive)
    batch = [draw(alive=most if image == 0 else fewest) for image in range(arguments.images)]
    cases = []
    for limit in arguments.max_detections:
        cases += [Case(f"{alive} alive, D {limit}", alive, limit, False, image) for alive, image in images]
        if batch:
            boxes, scores, classes = (np.stack(parts) for parts in zip(*batch, strict=True))
            name = f"{len(batch)} images, one crowded, D {limit}"
            cases.append(Case(name, most, limit, True, (boxes, scores, classes)))
    return cases


def _methods(arguments: Nms, max_detections: int, *, batched: bool) -> tuple[dict[str, Method], dict[str, Method]]:
    """The exact methods, the first of them ours, and the others."""
    common: dict[str, Any] = {"iou_threshold": arguments.iou_threshold, "max_detections": max_detections}
    exact: dict[str, Method] = {OURS: partial(class_wise_nms, **common)}
    exact |= {f"tiled {tile}": partial(tiled_nms, tile=tile, **common) for tile in arguments.tiles}
    if not batched:
        exact["quadratic"] = partial(quadratic_nms, **common)
    soft = partial(soft_nms, method="gaussian", sigma=arguments.sigma, prune=arguments.prune, **common)
    return exact, {SOFT: soft}


def _prepare(case: Case, arguments: Nms) -> tuple[dict[str, Callable[[], Any]], dict[str, int]]:
    """Compiled methods on the case's candidates, and how many boxes each keeps.

    Raises:
      RuntimeError: the exact methods do not agree.
    """
    exact, others = _methods(arguments, case.max_detections, batched=case.batched)
    candidates = jax.device_put(case.candidates)
    functions: dict[str, Callable[[], Any]] = {}
    kept: dict[str, int] = {}
    expected: tuple[np.ndarray, np.ndarray] | None = None
    for name, method in (exact | others).items():
        compiled = jax.jit(jax.vmap(method) if case.batched else method)
        keep, valid, *_ = map(np.asarray, compiled(*candidates))
        expected = expected or (keep, valid)
        if name in exact and not all(map(np.array_equal, (keep, valid), expected)):
            raise RuntimeError(f"{case.name}: {name} keeps other boxes than {OURS}")
        functions[name] = partial(compiled, *candidates)
        kept[name] = int(valid.sum())
    return functions, kept


def _draw(figure: Any, *, rows: list[Row], max_detections: int) -> None:
    """Time against the candidates that are alive, a line a method, for one image."""
    series: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        if row["images"] == 1 and row["max_detections"] == max_detections:
            alive, times = series.setdefault(row["method"], ([], []))
            alive.append(row["alive"])
            times.append(row["ms_p50"])
    plots.lines(
        figure,
        dict(series),
        x="candidates above the score threshold",
        y="ms (median)",
        title=f"NMS of one image, at most {max_detections} detections",
        log_x=True,
        log_y=True,
    )
