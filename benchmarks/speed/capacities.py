"""The capacity ladder for a data set: what its images ask of the sparse levels, and a ladder proposed from that.

A ladder is a tuple of ascending fractions of a level's cells, as ``inference.capacities``. Its cost is counted in
cells: a batch costs the buffer that it runs in, or the whole level where no buffer holds it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import charts
from benchmarks.options import Run
from benchmarks.report import Column, Report, Row, decimals, share, times
from benchmarks.subjects import open_run
from benchmarks.timing import interleaved
from querydet_jax.config import InferenceConfig
from querydet_jax.data import eval_batches
from querydet_jax.data.loader import EvalBatches
from querydet_jax.evaluation.runner import first_images
from querydet_jax.inference.detector import Detector
from querydet_jax.inference.pipeline import QueryTrace, cascade_levels, sparse_options
from querydet_jax.models import DenseDetector
from querydet_jax.runtime.errors import ConfigError
from querydet_jax.runtime.progress import progress
from querydet_jax.sparse import SparseOptions, buffer_sizes
from querydet_jax.sparse.methods import room_needed
from querydet_jax.viz.text import text_table

CONFIGURED, PROPOSED = "configured", "proposed"
_WORTH_A_RUNG = 0.01  # share of all cells that one more rung must save


@dataclass(frozen=True)
class Capacities(Run):
    """What a trained run's images ask of the sparse levels, and a capacity ladder for them."""

    batch_size: int = 0
    """Images per batch; they share the buffers (0: the run's inference.batch_size)."""
    max_rungs: int = 3
    """Largest number of buffers to propose."""
    rounds: int = 5
    """Timed rounds."""
    timed_batches: int = 20
    """Batches to time the detector on, evenly spread from the emptiest to the fullest."""


@dataclass(frozen=True)
class LevelCounts:
    """What n batches ask of one sparse level.

    Attributes:
      shape: (B, h, w) of the level.
      counts: n numbers each: ``queries``, ``keys`` and ``active`` as in ``LevelStats``, and ``room``, the cells that a
        buffer must hold.
    """

    shape: tuple[int, int, int]
    counts: dict[str, list[int]]

    @property
    def cells(self) -> int:
        return math.prod(self.shape)

    @property
    def shares(self) -> np.ndarray:
        """Room over cells, ``[n]``."""
        return np.asarray(self.counts["room"]) / self.cells

    def run(self, options: SparseOptions) -> tuple[np.ndarray, np.ndarray]:
        """Return the rung of ``options.capacities`` that each batch runs on (the dense one last), and its cells."""
        sizes = buffer_sizes(options, self.shape)[0]
        rung = np.searchsorted(sizes, self.counts["room"])
        return rung, np.append(sizes, self.cells)[rung]


def capacities(arguments: Capacities) -> None:
    _check(arguments)
    config, model, dataset = open_run(arguments.run)
    # With overflow cap the detections depend on the capacities, and the cheapest ladder finds nothing.
    inference = dataclasses.replace(config.inference, query="csq", overflow="dense")
    batch_size = arguments.batch_size or inference.batch_size
    batches = partial(
        eval_batches, dataset, config.data, batch_size=batch_size, indices=first_images(dataset, arguments.images)
    )
    levels, fullness = count(model, inference, batches())
    distribution = _print_distribution(levels)
    ladders = {CONFIGURED: inference.capacities, PROPOSED: propose(list(levels.values()), arguments.max_rungs)}
    timed = _spread(fullness, arguments.timed_batches)
    measured = _time_detectors(model, inference, ladders, _chosen(batches(), timed), arguments.rounds)
    options = sparse_options(inference)
    rows = [_row(name, options._replace(capacities=ladder), levels, measured) for name, ladder in ladders.items()]
    proposal = ladders[PROPOSED]
    flags = f"--inference.capacities {' '.join(map(repr, proposal))}" if proposal else "--inference.query dense"
    notes = [
        f"proposed: {flags}",
        "cells computed / needed: of all batches and levels; a dense level counts as all its cells",
        f"measured: whole detector, ms per batch, mean of {len(timed)} batches from the emptiest to the fullest, "
        f"medians of {arguments.rounds} interleaved rounds",
    ]
    if config.inference.overflow == "cap":
        notes.append("this run has inference.overflow cap: smaller capacities then drop more queries")
    Report(
        "capacities",
        f"Capacity ladder: {arguments.run}, {arguments.images or 'all'} validation images in {len(fullness)} batches "
        f"of {batch_size}, kernel {inference.kernel}",
        [
            Column("ladder", "ladder"),
            Column("capacities", "capacities", lambda ladder: " ".join(f"{x:g}" for x in ladder) or "none"),
            Column("computed_per_needed", "cells computed / needed", times),
            *(Column(f"rungs_{name}", f"{name} rungs, dense", _percentages) for name in levels),
            Column("measured_ms", "measured ms", decimals(1)),
            Column("measured_ratio", "ratio", decimals(3)),
        ],
        rows,
        notes=notes,
        results={"proposed": {"capacities": list(proposal), "flags": flags}, "distribution": distribution},
        draw=partial(_draw, levels, ladders),
    ).publish(arguments.out, arguments)


def _check(arguments: Capacities) -> None:
    if not arguments.run:
        raise ConfigError("--run: capacities needs a trained model; name a run folder of train.py")
    for name, least in {"max_rungs": 1, "rounds": 1, "timed_batches": 1, "images": 0, "batch_size": 0}.items():
        if getattr(arguments, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must be at least {least}")


def count(
    model: DenseDetector, inference: InferenceConfig, batches: EvalBatches
) -> tuple[dict[str, LevelCounts], list[float]]:
    """Run the cascade over batches and count.

    Returns:
      counts by name of the level, coarse to fine, apart for canvases of different area; and how full each batch makes
      the levels: the sum of its shares of their cells.
    """
    detector, options = Detector(model, inference), sparse_options(inference)
    found: dict[tuple[int, int], LevelCounts] = {}
    fullness: list[float] = []
    try:
        for batch in progress(batches, "counting", "batch", total=len(batches)):
            arrays = jax.device_put((batch["images"], batch["sizes"]))
            shapes = jax.eval_shape(partial(cascade_levels, model, inference), *arrays)
            margins = tuple((level, shape.margin) for level, shape in shapes.items())
            fullness.append(0.0)
            for level, counts in jax.device_get(_count(detector.trace(*arrays), margins, options)).items():
                size, height, width, _ = shapes[level].features.shape
                mine = found.setdefault((level, size * height * width), LevelCounts((size, height, width), {}))
                for name, value in counts.items():
                    mine.counts.setdefault(name, []).append(int(value))
                fullness[-1] += mine.shares[-1]
    finally:
        batches.close()
    several = len({level for level, _ in found}) < len(found)
    ordered = sorted(found.items(), key=lambda item: (-item[0][0], item[0][1]))
    names = [f"P{level}" + (f" of {of.shape[1]}x{of.shape[2]}" if several else "") for (level, _), of in ordered]
    return dict(zip(names, (of for _, of in ordered), strict=True)), fullness


@partial(jax.jit, static_argnames=("margins", "options"))
def _count(
    trace: QueryTrace, margins: tuple[tuple[int, int], ...], options: SparseOptions
) -> dict[int, dict[str, jax.Array]]:
    def number(mask: jax.Array) -> jax.Array:
        return jnp.sum(mask.astype(jnp.int32))

    return {
        level: {
            "queries": number(trace.probability[level + 1] > options.threshold),
            "keys": number(trace.keys[level]),
            "active": number(trace.active[level]),
            "room": room_needed(trace.keys[level], margin, options),
        }
        for level, margin in margins
    }


def propose(levels: Sequence[LevelCounts], max_rungs: int) -> tuple[float, ...]:
    """Return the ladder of percents, of at most ``max_rungs``, that computes the fewest cells over all batches.

    Dynamic programming over the largest rung: a rung of fraction f saves 1 - f of the cells of every batch that it
    holds and no smaller rung does. A rung that saves less than a hundredth of all cells is left out.
    """
    shares = np.concatenate([level.shares for level in levels])
    cells = np.concatenate([np.full(len(level.shares), float(level.cells)) for level in levels])
    fractions = np.arange(1, 100) / 100
    held = np.array([cells[shares <= fraction].sum() for fraction in fractions])
    kept, least = (), 0.0
    saved, ladders = held * (1 - fractions), [(fraction,) for fraction in fractions.tolist()]
    for _ in range(max_rungs):
        best = int(np.argmax(saved))
        if saved[best] < least + _WORTH_A_RUNG * cells.sum():
            break
        kept, least = ladders[best], saved[best]
        # [j, i]: the ladder whose largest rung is i, and j above it.
        both = saved[None] + np.maximum(held[:, None] - held[None], 0) * (1 - fractions[:, None])
        below = np.argmax(np.where(np.tri(len(fractions), k=-1, dtype=bool), both, -np.inf), axis=1)
        longer = [(*ladders[i], fraction) for i, fraction in zip(below, fractions.tolist(), strict=True)]
        saved, ladders = np.append(-np.inf, both[np.arange(1, len(below)), below[1:]]), longer
    return kept


def _print_distribution(levels: dict[str, LevelCounts]) -> dict[str, dict[str, dict[str, float]]]:
    """Print percentiles of the counts per batch, as counts and as shares of the level's cells, and return them."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    lines = []
    for name, level in levels.items():
        found[name] = {}
        for quantity, counts in level.counts.items():
            values = {f"p{p}": float(np.percentile(counts, p)) for p in (50, 90, 99)} | {"max": float(max(counts))}
            found[name][quantity] = values
            # Queries are cells of the coarser level.
            shares = [share(value / level.cells) if quantity != "queries" else "" for value in values.values()]
            lines.append(
                [f"{name} {quantity}", *(f"{v:,.0f} {s:>6}" for v, s in zip(values.values(), shares, strict=True))]
            )
    print(f"\n{text_table(['cells per batch', 'p50', 'p90', 'p99', 'max'], lines)}\n", flush=True)
    return found


def _spread(fullness: Sequence[float], number: int) -> list[int]:
    """Return the positions of ``number`` batches evenly spread in the order of their fullness."""
    order = np.argsort(fullness, kind="stable")
    number = min(number, len(order))
    return sorted(order[((np.arange(number) + 0.5) * len(order) / number).astype(int)].tolist())


def _chosen(batches: EvalBatches, positions: Sequence[int]) -> list[tuple[jax.Array, jax.Array]]:
    try:
        return [
            jax.device_put((batch["images"], batch["sizes"]))
            for position, batch in enumerate(batches)
            if position in positions
        ]
    finally:
        batches.close()


def _time_detectors(
    model: DenseDetector,
    inference: InferenceConfig,
    ladders: dict[str, tuple[float, ...]],
    batches: Sequence[tuple[jax.Array, jax.Array]],
    rounds: int,
) -> dict[str, float]:
    """Return ms per batch of the whole detector with each ladder: the mean over batches of medians over rounds."""
    detectors = {
        name: Detector(model, dataclasses.replace(inference, capacities=ladder))
        for name, ladder in ladders.items()
        if ladder
    }
    calls: list[tuple[str, Callable[[], Any]]] = [
        (name, partial(detector, *batch)) for batch in batches for name, detector in detectors.items()
    ]
    # A call's time depends on the memory that the call before it left: in random order, that is chance.
    order = np.random.default_rng(0).permutation(len(calls))
    measured = interleaved({str(i): calls[i][1] for i in order}, rounds)
    medians: dict[str, list[float]] = {}
    for i, (name, _) in enumerate(calls):
        medians.setdefault(name, []).append(float(np.median(measured[str(i)])))
    return {name: float(np.mean(values)) for name, values in medians.items()}


def _row(name: str, options: SparseOptions, levels: dict[str, LevelCounts], measured: dict[str, float]) -> Row:
    ran = {of: level.run(options) for of, level in levels.items()}
    needed = sum(sum(level.counts["room"]) for level in levels.values())
    rungs = len(options.capacities) + 1
    return {
        "ladder": name,
        "capacities": list(options.capacities),
        "computed_per_needed": sum(float(cells.sum()) for _, cells in ran.values()) / needed if needed else None,
        **{f"rungs_{of}": (np.bincount(rung, minlength=rungs) / len(rung)).tolist() for of, (rung, _) in ran.items()},
        "measured_ms": measured.get(name),
        "measured_ratio": measured[name] / measured[CONFIGURED] if name in measured else None,
    }


def _percentages(shares: Sequence[float]) -> str:
    return " ".join(f"{value:.0%}" for value in shares)


def _draw(levels: dict[str, LevelCounts], ladders: dict[str, tuple[float, ...]], figure: Any) -> None:
    """Draw how many batches fit a buffer of any size, a curve per level, with the rungs as vertical lines."""
    series = {}
    for name, level in levels.items():
        shares = np.sort(level.shares)
        series[name] = (shares.tolist(), (np.arange(1, len(shares) + 1) / len(shares)).tolist())
    charts.lines(
        figure,
        series,
        x="share of the level's cells that the buffer must hold",
        y="share of batches",
        title="Room needed, and the proposed (solid) and configured (dashed) capacities",
    )
    (axes,) = figure.axes
    for name, style in ((PROPOSED, "-"), (CONFIGURED, "--")):
        for fraction in ladders[name]:
            axes.axvline(fraction, color="black", linestyle=style, linewidth=1)
