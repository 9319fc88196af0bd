"""Static against dynamic sparsity: one head with the same weights and masks, computed in every way.

The ways are dense, gather on sites, tiles, crops, and spconv (``benchmarks.speed.sparse_ways``).
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import charts
from benchmarks.options import Options
from benchmarks.query_layout import clustered
from benchmarks.report import Column, Report, Row, decimals, ms, share, times
from benchmarks.speed.sparse_ways import (
    COLD,
    CONTEXT,
    CROPS,
    DENSE,
    GATHER,
    KEYS,
    TILES,
    WARM,
    Masks,
    Spconv,
    StaticWays,
)
from benchmarks.timing import interleaved, percentiles
from querydet_jax.runtime.errors import ConfigError, QueryDetError
from querydet_jax.sparse import Conv, Stack, children, grow, masked_dense_stacks


@dataclass(frozen=True)
class StaticVsDynamic(Options):
    """One head or layer, computed densely, by gather, tiles and crops, and by spconv."""

    subject: Literal["head", "layer"] = "head"
    """head: two towers of four layers and their predictions. layer: one 3x3 convolution with a ReLU."""
    channels: int = 256
    """Channels of the map and the towers."""
    classes: int = 80
    """Classes of the head (9 anchors per cell)."""
    height: int = 200
    """Height of the map in cells; 200x336 is P2 of 800x1344."""
    width: int = 336
    """Width of the map in cells."""
    active: tuple[float, ...] = (0.005, 0.01, 0.026, 0.05, 0.10, 0.19, 0.25)
    """Active shares, clustered like real objects."""
    threads: int = 1
    """Cores to use (0: all). spconv runs on one only: with more, its CPU kernels race."""
    tile: int = 8
    """Side of a tile in cells."""
    chunk: int = 256
    """Rows per turn of the gather convolution."""
    crops_up_to: float = 0.05
    """Largest active share at which crops run: the crop of one key costs as much as forty cells of the dense head."""
    rounds: int = 20
    """Timed rounds."""


def static_vs_dynamic(arguments: StaticVsDynamic) -> None:
    notes = confine(arguments.threads)
    rng = np.random.default_rng(0)
    stacks = _stacks(arguments, rng)
    features = jnp.asarray(rng.normal(size=(1, arguments.height, arguments.width, arguments.channels)), jnp.float32)
    programs = StaticWays(
        stacks,
        (arguments.height, arguments.width),
        relu_last=arguments.subject == "layer",
        chunk=arguments.chunk,
        tile=arguments.tile,
    )
    spconv, not_run = _spconv(arguments, stacks)
    rows: list[Row] = []
    for target in arguments.active:
        masks = lay_out(arguments.height, arguments.width, target)
        measured = {row["way"]: row for row in _measure(arguments, stacks, features, masks, programs, spconv)}
        for row in measured.values():
            row["speed_up"] = measured[DENSE]["ms_p50"] / row["ms_p50"]
            row["over_spconv"] = row["ms_p50"] / measured[COLD]["ms_p50"] if COLD in measured else None
        rows += measured.values()
    what = "two-tower head" if arguments.subject == "head" else "one 3x3 layer"
    Report(
        "static_vs_dynamic" + ("_layer" if arguments.subject == "layer" else ""),
        f"Static against dynamic sparsity: {what}, {arguments.channels} channels, {arguments.height}x{arguments.width} "
        f"cells, float32, medians of {arguments.rounds} interleaved rounds",
        [
            Column("active", "active", share),
            Column("way", "way"),
            Column("ms_p50", "ms p50", ms),
            Column("ms_p90", "p90", ms),
            Column("ms_p99", "p99", ms),
            Column("gflop_s", "GFLOP/s", decimals(0)),
            Column("speed_up", "over dense", times),
            Column("over_spconv", "time / spconv cold", decimals(2)),
            Column("compile_s", "compile s", decimals(1)),
            Column("compilations", "programs"),
            Column("temp_mib", "temp MiB", decimals(1)),
            Column("capacity", "buffer", decimals(0)),
        ],
        rows,
        notes=[
            *notes,
            *([spconv.versions] if spconv is not None else []),
            "all ways but dense start from the dense map and the mask: building the index is part of their time; "
            "only spconv warm has its index and features ready",
            "GFLOP/s: work of the dense convolutions at the active cells (crops, keys only: the keys), over the time",
            "all ways were found to agree before anything was timed",
        ],
        not_run=[*not_run, *_without_crops(arguments, rows)],
        draw=lambda figure: charts.lines(
            figure,
            {
                way: (
                    [100 * row["active"] for row in rows if row["way"] == way],
                    [row["ms_p50"] for row in rows if row["way"] == way],
                )
                for way in dict.fromkeys(row["way"] for row in rows)
            },
            x="active cells, %",
            y="ms",
            title=f"{what}, {arguments.threads or 'all'} core(s)",
            log_x=True,
            log_y=True,
        ),
    ).publish(arguments.out, arguments)


def _without_crops(arguments: StaticVsDynamic, rows: list[Row]) -> list[str]:
    if all(row["active"] <= arguments.crops_up_to for row in rows):
        return []
    return [f"crops above {arguments.crops_up_to:.0%} active: need a larger --crops-up-to (slow)"]


def lay_out(height: int, width: int, target: float) -> Masks:
    """Lay out keys in clusters that make the share ``target`` of the cells active.

    The fewest objects that make enough cells active are placed. Since one large object can be a third of a small share,
    only as many of their keys are kept, in map order, as are needed.
    """
    shape = (-(-height // 4), -(-width // 4))

    def masks(keys: Any) -> Masks:
        return Masks(np.asarray(keys), np.asarray(grow(jnp.asarray(keys), CONTEXT)[-1]))

    def of_objects(objects: int) -> Masks:
        coarse = jnp.asarray(clustered(shape, objects))[None]
        middle = children(coarse, (2 * shape[0], 2 * shape[1]))[:, : -(-height // 2), : -(-width // 2)]
        return masks(children(middle, (height, width)))

    found = of_objects(_fewest(4096, lambda objects: of_objects(objects).share >= target))
    flat = found.keys.reshape(-1)
    order = np.cumsum(flat)

    def first(number: int) -> Masks:
        return masks((flat & (order <= number)).reshape(found.keys.shape))

    return first(_fewest(int(flat.sum()), lambda number: first(number).share >= target))


def _fewest(most: int, enough: Callable[[int], bool]) -> int:
    """Return the smallest number from 1 on that is ``enough``; ``most`` if none below it is."""
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low


def _stacks(arguments: StaticVsDynamic, rng: np.random.Generator) -> list[Stack]:
    def conv(outputs: int) -> Conv:
        c = arguments.channels
        kernel = rng.normal(0, np.sqrt(2 / (9 * c)), (3, 3, c, outputs))
        return Conv(jnp.asarray(kernel, jnp.float32), jnp.asarray(rng.normal(0, 0.1, outputs), jnp.float32))

    if arguments.subject == "layer":
        return [[conv(arguments.channels)]]
    return [[*(conv(arguments.channels) for _ in range(4)), conv(outputs)] for outputs in (9 * arguments.classes, 36)]


def _flop(stacks: Sequence[Stack]) -> int:
    """Return the FLOPs of one cell."""
    return sum(2 * conv.kernel.size for stack in stacks for conv in stack)


def _measure(
    arguments: StaticVsDynamic,
    stacks: Sequence[Stack],
    features: jax.Array,
    masks: Masks,
    programs: StaticWays,
    spconv: Spconv | None,
) -> list[Row]:
    """Measure every way at one active share, a row each."""
    ways = [DENSE, GATHER, *([KEYS] if arguments.subject == "head" else []), TILES]
    ways += [CROPS] if masks.share <= arguments.crops_up_to else []
    calls: dict[str, Callable[[], Any]] = {}
    facts: dict[str, Row] = {}
    for way in ways:
        capacity = programs.capacity(way, masks)
        calls[way], facts[way] = programs.get(way, capacity, features, masks)
        facts[way]["capacity"] = capacity or None
    if spconv is not None:
        spconv.set(np.asarray(features), masks.active)
        calls |= {COLD: spconv.cold, WARM: spconv.warm}
    _check(arguments, calls, stacks, features, masks)
    measured = interleaved(calls, arguments.rounds)
    work = {way: int((masks.keys if way in (KEYS, CROPS) else masks.active).sum()) for way in calls}
    work[DENSE] = masks.active.size
    return [
        {
            "active": masks.share,
            "sites": int(masks.active.sum()),
            "keys": int(masks.keys.sum()),
            "way": way,
            **percentiles(values),
            "gflop_s": work[way] * _flop(stacks) / 1e6 / float(np.median(values)),
            **facts.get(way, {}),
        }
        for way, values in measured.items()
    ]


def _check(
    arguments: StaticVsDynamic,
    calls: dict[str, Callable[[], Any]],
    stacks: Sequence[Stack],
    features: jax.Array,
    masks: Masks,
) -> None:
    """Compare all ways before they are timed.

    On sites the reference is the masked dense convolution, in crops the dense one away from the border.

    Raises:
      QueryDetError: a way computes other cells than it should, or other values.
    """
    masked = jax.jit(masked_dense_stacks)(features, jnp.asarray(masks.active), stacks)
    if arguments.subject == "layer":
        masked = [jax.nn.relu(y) for y in masked]
    flat = [np.asarray(y).reshape(-1, y.shape[-1]) for y in masked]
    dense = [np.asarray(y).reshape(-1, y.shape[-1]) for y in calls[DENSE]()]
    depth = max(len(stack) for stack in stacks)
    inner = np.zeros(masks.keys.shape, bool)
    inner[:, depth:-depth, depth:-depth] = True
    for way, call in calls.items():
        if way == DENSE:
            continue
        wanted = np.flatnonzero(masks.keys if way in (KEYS, CROPS) else masks.active)
        if way in (COLD, WARM):
            outputs, cells = [y.numpy() for y in call()], wanted  # rows in map order, as `nonzero` finds the sites
        else:
            outputs, sites = call()
            used = np.flatnonzero(sites.is_key)
            cells = np.asarray(sites.index)[used]
            outputs = [np.asarray(y)[used] for y in outputs]
        if not np.array_equal(np.sort(cells), wanted) or any(len(y) != len(cells) for y in outputs):
            raise QueryDetError(f"{way}: computed other cells than the {len(wanted)} asked for; nothing was timed")
        compared = inner.reshape(-1)[cells] if way == CROPS else np.ones(len(cells), bool)
        expected = dense if way == CROPS else flat
        _compare(way, [y[compared] for y in outputs], [y[cells[compared]] for y in expected])


def _compare(way: str, outputs: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> None:
    for y, reference in zip(outputs, expected, strict=True):
        difference = float(np.abs(y - reference).max(initial=0.0))
        if not difference <= 1e-4 * max(1.0, float(np.abs(reference).max(initial=0.0))):
            raise QueryDetError(f"{way}: differs by {difference:.2g} from the dense convolution; nothing was timed")


def _spconv(arguments: StaticVsDynamic, stacks: Sequence[Stack]) -> tuple[Spconv | None, list[str]]:
    """Return spconv if it can be measured here, else what it needs."""
    if arguments.threads != 1:
        return None, ["spconv: needs --threads 1, its CPU kernels give wrong results with more"]
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("spconv") is None:
        return None, ["spconv: needs torch and spconv (pip install -r requirements-spconv.txt)"]
    if jax.default_backend() != "cpu":
        return None, [f"spconv: runs on the CPU here, jax on {jax.default_backend()}; needs JAX_PLATFORMS=cpu"]
    return Spconv(stacks, relu_last=arguments.subject == "layer"), []


def confine(threads: int) -> list[str]:
    """Confine this process to a number of cores (0: all) and return what a reader of the times must know.

    Call it before jax computes anything: XLA's CPU client makes its pool as large as the set of cores that it finds
    when it starts, and OpenMP reads its variable when it is loaded.

    Raises:
      ConfigError: this system has fewer cores, or does not let a process choose them.
    """
    if threads:
        if not hasattr(os, "sched_setaffinity"):
            raise ConfigError(f"--threads {threads}: this system does not let a process choose its cores; use 0 (all)")
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < threads:
            raise ConfigError(f"--threads {threads}: there are only {len(cores)} cores")
        os.environ["OMP_NUM_THREADS"] = str(threads)
        os.sched_setaffinity(0, cores[:threads])
    return [f"cores: {threads or 'all'} asked for; a matrix product of jax kept {_cores_used():.1f} busy"]


def _cores_used() -> float:
    """Return the processor seconds per second of a matrix product."""
    x = jnp.ones((1000, 1000))
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(10):
        product(x).block_until_ready()
    return (time.process_time() - cpu) / (time.perf_counter() - wall)
