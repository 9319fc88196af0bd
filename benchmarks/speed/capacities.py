"""The ladder of buffers for a data set: what its pictures ask for, what that costs here, which ladder costs least."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from benchmarks import plots
from benchmarks.report import Column, Report, Row, decimals, ms, share, times
from benchmarks.speed.ladder_cost import (
    Ladder,
    Load,
    best_ladders,
    coarse_grid,
    exhaustive,
    readable,
    run,
    total_ms,
)
from benchmarks.speed.level_cost import Demand, calibrate, observe
from benchmarks.subject import open_run
from benchmarks.timing import interleaved
from querydet_jax.config import InferenceConfig
from querydet_jax.data import eval_batches
from querydet_jax.data.loader import EvalBatches
from querydet_jax.evaluation.runner import first_images
from querydet_jax.inference.detector import Detector
from querydet_jax.models import DenseDetector
from querydet_jax.runtime.errors import ConfigError
from querydet_jax.viz.text import text_table

CONFIGURED, PROPOSED, SINGLE, DENSE = "configured", "proposed", "best single capacity", "always dense"
_WORTH_IT = 0.005  # relative gain below which fewer rungs are preferred, and the configured chunk
_GRID_POINTS = 24  # of the exhaustive check

Loads = dict[int, list[Load]]
"""By chunk."""


@dataclass(frozen=True)
class Capacities:
    """The capacities and the chunk that cost least for a run on its own images (needs --run)."""

    run: str = ""
    """A run folder of train.py: its model on its validation images."""
    images: int = 100
    """The first so many images (0: all)."""
    batch_size: int = 0
    """Images a batch; they share the buffers (0: the run's inference.batch_size)."""
    max_rungs: int = 3
    """Buffers to propose at most."""
    chunks: tuple[int, ...] = (64, 128, 256)
    """Rows a turn to choose from, beside the run's own."""
    rounds: int = 5
    """Timed rounds."""
    timed_batches: int = 20
    """Batches on which whole detectors are timed, spread from the emptiest to the fullest."""
    out: str = "runs/benchmark"
    """Folder for the json, csv and plot."""


@dataclass(frozen=True)
class Choice:
    capacities: Ladder
    chunk: int

    @property
    def flags(self) -> str:
        return f"--inference.capacities {' '.join(map(repr, self.capacities))} --inference.chunk {self.chunk}"


def capacities(arguments: Capacities) -> None:
    _check(arguments)
    config, model, dataset = open_run(arguments.run)
    # With overflow cap the result depends on the capacities, and the cheapest would find nothing.
    inference = dataclasses.replace(config.inference, query="csq", overflow="dense")
    batch_size = arguments.batch_size or inference.batch_size
    batches = partial(
        eval_batches, dataset, config.data, batch_size=batch_size, indices=first_images(dataset, arguments.images)
    )

    demands, fullness = observe(model, inference, batches())
    distribution = _print_distribution(demands)
    loads, costs = _calibrated(model, inference, demands, arguments)
    configured = Choice(inference.capacities, inference.chunk)
    cheapest = {chunk: _cheapest(mine, chunk, arguments.max_rungs) for chunk, mine in loads.items()}
    some = _spread(fullness, arguments.timed_batches)
    timed = dict.fromkeys([configured, *(choice for pair in cheapest.values() for choice in pair)])
    measured = _time_detectors(model, inference, list(timed), _chosen(batches(), some), arguments.rounds)
    choices = _choices(configured, cheapest, measured)
    check = _compare_with_grid(loads, choices[PROPOSED], arguments.max_rungs)

    rows = [
        _row(name, choice, loads[choice.chunk], len(fullness), measured.get(choice)) for name, choice in choices.items()
    ]
    for row in rows:
        if row["measured_ms"] is not None:
            row["measured_ratio"] = row["measured_ms"] / rows[0]["measured_ms"]
    Report(
        "capacities",
        f"Capacity ladder: {arguments.run}, {arguments.images or 'all'} validation images in {len(fullness)} batches "
        f"of {batch_size}, kernel {inference.kernel}",
        [
            Column("ladder", "ladder"),
            Column("capacities", "capacities", lambda ladder: " ".join(f"{x:g}" for x in ladder) or "none"),
            Column("chunk", "chunk"),
            Column("expected_ms", "expected ms", ms),
            Column("rows_per_site", "rows/site", times),
            Column("slots_per_site", "slots/site", times),
            *(Column(f"rungs_{name}", f"{name} rungs, dense", _percentages) for name in demands),
            Column("measured_ms", "measured ms", decimals(1)),
            Column("measured_ratio", "ratio", decimals(3)),
        ],
        rows,
        notes=[
            f"use: {choices[PROPOSED].flags}",
            f"the proposal costs {check['above']:+.2%} over the best of {check['ladders']} ladders on a grid",
            "expected: the sparse levels alone, a batch, mean over all; rows computed and slots of the buffers over "
            "sites needed, all batches together, a dense level counting as all its cells",
            f"measured: whole detector, a batch, mean of {len(some)} batches from the emptiest to the fullest, medians "
            f"of {arguments.rounds} rounds in turn; ratio is over the configured ladder",
            *(["no buffer pays here: dense heads are cheaper"] if not choices[PROPOSED].capacities else []),
            *(
                ["inference.overflow is cap in this run: fewer capacities then also leave out more queries"]
                if config.inference.overflow == "cap"
                else []
            ),
        ],
        results={
            "proposed": {**dataclasses.asdict(choices[PROPOSED]), "flags": choices[PROPOSED].flags},
            "grid": check,
            "costs": costs,
            "distribution": distribution,
        },
        draw=partial(_draw, loads[inference.chunk], choices),
    ).publish(arguments.out, arguments)


def _check(arguments: Capacities) -> None:
    if not arguments.run:
        raise ConfigError("--run: capacities needs a trained model; name a run folder of train.py")
    for name in ("max_rungs", "rounds", "timed_batches"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must be at least 1")
    for name in ("images", "batch_size"):
        if getattr(arguments, name) < 0:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must not be negative")
    if any(chunk < 1 for chunk in arguments.chunks):
        raise ConfigError(f"--chunks {arguments.chunks}: must be at least 1 each")


def _print_distribution(demands: dict[str, Demand]) -> dict[str, dict[str, dict[str, float]]]:
    """Percentiles of the counts a batch, printed as counts and shares of the level's cells."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    lines = []
    for name, demand in demands.items():
        found[name] = {}
        for quantity in ("queries", "keys", "active", "room"):
            counts = demand.room if quantity == "room" else demand.counts[quantity]
            values = {f"p{p}": float(np.percentile(counts, p)) for p in (50, 90, 99)} | {"max": float(max(counts))}
            found[name][quantity] = values
            # Queries are cells of the coarser level.
            shares = [share(value / demand.cells) if quantity != "queries" else "" for value in values.values()]
            lines.append(
                [f"{name} {quantity}", *(f"{v:,.0f} {s:>6}" for v, s in zip(values.values(), shares, strict=True))]
            )
    print(f"\n{text_table(['cells a batch', 'p50', 'p90', 'p99', 'max'], lines)}\n", flush=True)
    return found


def _calibrated(
    model: DenseDetector, inference: InferenceConfig, demands: dict[str, Demand], arguments: Capacities
) -> tuple[Loads, list[Row]]:
    chunks = sorted({*arguments.chunks, inference.chunk})
    loads: Loads = {chunk: [] for chunk in chunks}
    costs: list[Row] = []
    for name, demand in demands.items():
        for chunk, (load, error) in calibrate(model, inference, name, demand, chunks, arguments.rounds).items():
            loads[chunk].append(load)
            costs.append({"level": name, "chunk": chunk, **load.cost._asdict(), "fit_error": error})
    header = ["level, chunk", "ms fixed", "ms a 1000 slots", "ms a turn", "ms dense", "error of fit"]
    lines = []
    for row in costs:
        parts = (row["fixed"], 1000 * row["per_slot"], row["per_turn"])
        lines.append(
            [f"{row['level']}, {row['chunk']}", *map(decimals(3), parts), ms(row["dense"]), share(row["fit_error"])]
        )
    print(f"\n{text_table(header, lines)}\n", flush=True)
    return loads, costs


def _cheapest(loads: list[Load], chunk: int, max_rungs: int) -> tuple[Choice, Choice]:
    """At one chunk: the ladder that costs least (fewer rungs where more are not worth it), the best single capacity."""
    ladders = best_ladders(loads, max_rungs)
    least = ladders[-1][1]
    ladder = next(ladder for ladder, time in ladders if time <= least * (1 + _WORTH_IT))
    return Choice(readable(ladder, loads), chunk), Choice(readable(ladders[1][0], loads), chunk)


def _choices(
    configured: Choice, cheapest: dict[int, tuple[Choice, Choice]], measured: dict[Choice, float]
) -> dict[str, Choice]:
    """The configured ladder, the proposed one, the best single capacity and no ladder, by name.

    The model of the cost is good enough to choose a ladder, not to choose among chunks, which differ by a few per
    cent: what was measured decides there, and whether anything is better than what is configured.
    """
    chunk = min(cheapest, key=lambda chunk: measured[cheapest[chunk][0]])
    proposed = min(configured, cheapest[chunk][0], key=lambda choice: measured[choice])
    single = min((single for _, single in cheapest.values()), key=lambda choice: measured[choice])
    return {CONFIGURED: configured, PROPOSED: proposed, SINGLE: single, DENSE: Choice((), configured.chunk)}


def _compare_with_grid(loads: Loads, proposed: Choice, max_rungs: int) -> dict[str, Any]:
    """How far the proposal's expected cost lies above the best of all ladders on a coarse grid, at its chunk."""
    mine = loads[proposed.chunk]
    ladder, time, number = exhaustive(mine, coarse_grid(mine, _GRID_POINTS), max_rungs)
    return {
        "ladders": number,
        "capacities": list(readable(ladder, mine)),
        "above": total_ms(mine, proposed.capacities) / time - 1,
    }


def _spread(fullness: Sequence[float], number: int) -> list[int]:
    """``number`` batches evenly spread in the order of their fullness."""
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
    choices: Sequence[Choice],
    batches: Sequence[tuple[jax.Array, jax.Array]],
    rounds: int,
) -> dict[Choice, float]:
    """Milliseconds a batch of the whole detector with each choice, mean over the batches of medians over rounds."""
    detectors = {
        choice: Detector(model, dataclasses.replace(inference, capacities=choice.capacities, chunk=choice.chunk))
        for choice in choices
    }
    calls: list[tuple[Choice, Callable[[], Any]]] = [
        (choice, partial(detector, *batch)) for batch in batches for choice, detector in detectors.items()
    ]
    # What ran before, and left its memory behind, differs from call to call: by chance, not by detector.
    order = np.random.default_rng(0).permutation(len(calls))
    measured = interleaved({str(i): calls[i][1] for i in order}, rounds)
    medians: dict[Choice, list[float]] = {}
    for i, (choice, _) in enumerate(calls):
        medians.setdefault(choice, []).append(float(np.median(measured[str(i)])))
    return {choice: float(np.mean(values)) for choice, values in medians.items()}


def _row(name: str, choice: Choice, loads: list[Load], batches: int, measured: float | None) -> Row:
    ran = [run(load, choice.capacities) for load in loads]

    def ratio(values: Sequence[np.ndarray], over: Sequence[np.ndarray]) -> float | None:
        total = float(sum(value.sum() for value in over))
        return float(sum(value.sum() for value in values)) / total if total else None

    return {
        "ladder": name,
        "capacities": list(choice.capacities),
        "chunk": choice.chunk,
        "expected_ms": total_ms(loads, choice.capacities) / batches,
        "rows_per_site": ratio([r.rows for r in ran], [load.sites for load in loads]),
        "slots_per_site": ratio([r.slots for r in ran], [load.needed for load in loads]),
        **{
            f"rungs_{load.level}": (np.bincount(r.rung, minlength=len(choice.capacities) + 1) / len(r.rung)).tolist()
            for load, r in zip(loads, ran, strict=True)
        },
        "measured_ms": measured,
    }


def _percentages(shares: Sequence[float]) -> str:
    return " ".join(f"{value:.0%}" for value in shares)


def _draw(loads: Sequence[Load], choices: dict[str, Choice], figure: Any) -> None:
    """How many batches fit into a buffer of any size, a curve a level, with the rungs as vertical lines."""
    series = {}
    for load in loads:
        least = load.needed[load.needed > 0].min(initial=load.total)  # an empty batch has no place on a log axis
        shares = np.sort(np.maximum(load.needed, least) / load.total)
        series[load.level] = (shares.tolist(), (np.arange(1, len(shares) + 1) / len(shares)).tolist())
    plots.lines(
        figure,
        series,
        x="share of the level's cells that the buffer must hold",
        y="share of batches",
        title="Room needed, and the proposed (solid) and configured (dashed) capacities",
        log_x=True,
    )
    (axes,) = figure.axes
    for name, style in ((PROPOSED, "-"), (CONFIGURED, "--")):
        for fraction in choices[name].capacities:
            axes.axvline(fraction, color="black", linestyle=style, linewidth=1)
