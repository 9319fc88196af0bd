"""Static against dynamic sparsity: one head, its weights and masks; dense, on sites, on tiles, in crops, by spconv."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import xla_bridge

from benchmarks import plots
from benchmarks.queries import clustered
from benchmarks.report import Column, Report, Row, decimals, ms, share, times
from benchmarks.timing import interleaved, percentiles
from querydet_jax.runtime.errors import QueryDetError
from querydet_jax.sparse import (
    CascadeLevel,
    Conv,
    SparseOptions,
    Stack,
    buffer_sizes,
    children,
    conv_rows,
    crop_stacks,
    grow,
    ladder_capacities,
    masked_dense_stacks,
    neighbour_table,
    run_stacks,
    run_stacks_on_tiles,
    select_sites,
    select_tiles,
    tile_count,
    tile_sites,
)

CONTEXT = 2
LADDER = (0.01, 0.03, 0.06, 0.12, 0.25, 0.5)
DENSE, GATHER, KEYS, TILES, CROPS = "dense", "gather", "gather, keys only", "tiles", "crops"
COLD, WARM = "spconv cold", "spconv warm"


@dataclass(frozen=True)
class StaticVsDynamic:
    """One head or layer: dense, gather, tiles, crops and real spconv at several active shares."""

    subject: Literal["head", "layer"] = "head"
    """head: two towers of four layers and their predictions. layer: one 3x3 convolution with a ReLU."""
    channels: int = 256
    """Channels of the map and the towers."""
    classes: int = 80
    """Classes of the head (9 anchors a cell)."""
    height: int = 200
    """Height of the map in cells; 200x336 is P2 of 800x1344."""
    width: int = 336
    """Width of the map in cells."""
    active: tuple[float, ...] = (0.005, 0.01, 0.026, 0.05, 0.10, 0.19, 0.25)
    """Active shares, clustered like real objects."""
    threads: int = 1
    """Cores to use (0: all). spconv runs on one only: its CPU kernels race with more."""
    tile: int = 8
    """Side of a tile in cells."""
    chunk: int = 256
    """Rows a turn of the gather convolution."""
    crops_up_to: float = 0.05
    """Largest share at which crops run, too: a key's crop costs as much as some forty cells of the dense head."""
    rounds: int = 20
    """Timed rounds."""
    out: str = "runs/benchmark"
    """Folder for the json, csv and plot."""


@dataclass(frozen=True)
class Masks:
    """Keys and active cells of one share, bool ``[1, h, w]``."""

    keys: np.ndarray
    active: np.ndarray

    @property
    def share(self) -> float:
        return float(self.active.mean())


def static_vs_dynamic(arguments: StaticVsDynamic) -> None:
    notes = _use_threads(arguments.threads)
    rng = np.random.default_rng(0)
    stacks = _stacks(arguments, rng)
    features = jnp.asarray(rng.normal(size=(1, arguments.height, arguments.width, arguments.channels)), jnp.float32)
    programs = Programs(arguments, stacks)
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
            "every way but dense starts from the dense map and the mask: building its index is part of its time; "
            "spconv warm alone has its index and features ready",
            "GFLOP/s: work of the dense convolutions at the active cells (crops, keys only: the keys), over the time",
            "all ways were found to agree before anything was timed",
        ],
        not_run=[*not_run, *_without_crops(arguments, rows)],
        draw=lambda figure: plots.lines(
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
    return [f"crops above {arguments.crops_up_to:.0%} active: need --crops-up-to, and patience"]


def lay_out(height: int, width: int, target: float) -> Masks:
    """Keys in clusters, and their context, for ``target`` of the cells.

    The fewest objects that make enough cells active; then, since one large object can be a third of a small share,
    as many of their keys in map order as are needed.
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
    """The smallest number from 1 on that is ``enough``; ``most`` if none below it is."""
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
    """Of one cell."""
    return sum(2 * conv.kernel.size for stack in stacks for conv in stack)


class Programs:
    """The static ways, compiled once a buffer size."""

    def __init__(self, arguments: StaticVsDynamic, stacks: Sequence[Stack]):
        self._arguments, self._stacks = arguments, stacks
        self._compiled: dict[tuple[str, int], tuple[Any, float, float | None]] = {}
        self._functions: dict[str, Callable[..., Any]] = {
            DENSE: self._dense, GATHER: self._gather, KEYS: self._keys_only, TILES: self._tiles, CROPS: self._crops,
        }  # fmt: skip

    def get(self, way: str, capacity: int, features: jax.Array, masks: Masks) -> tuple[Callable[[], Any], Row]:
        """A call of ``way``, and what it took: compile seconds (of this size), programs so far, temporary MiB."""
        values = (self._stacks, features, jnp.asarray(masks.active), jnp.asarray(masks.keys))
        if (way, capacity) not in self._compiled:
            begun = time.perf_counter()
            program = jax.jit(lambda *values: self._functions[way](capacity, *values)).lower(*values).compile()
            seconds = time.perf_counter() - begun
            memory = program.memory_analysis()
            self._compiled[way, capacity] = program, seconds, memory and memory.temp_size_in_bytes / 2**20
        program, seconds, mib = self._compiled[way, capacity]
        count = sum(name == way for name, _ in self._compiled)
        return lambda: program(*values), {"compile_s": seconds, "compilations": count, "temp_mib": mib}

    def _dense(self, capacity: int, stacks: Any, features: jax.Array, active: jax.Array, keys: jax.Array) -> Any:
        return self._finished(masked_dense_stacks(features, jnp.ones_like(active), stacks))

    def _gather(self, capacity: int, stacks: Any, features: jax.Array, active: jax.Array, keys: jax.Array) -> Any:
        return self._on_sites([active], capacity, stacks, features)

    def _keys_only(self, capacity: int, stacks: Any, features: jax.Array, active: jax.Array, keys: jax.Array) -> Any:
        return self._on_sites(grow(keys, CONTEXT), capacity, stacks, features)

    def _on_sites(self, rings: list[jax.Array], capacity: int, stacks: Any, features: jax.Array) -> Any:
        sites = select_sites(rings, capacity)
        rows = features.reshape(-1, features.shape[-1]).at[sites.index].get(mode="fill", fill_value=0)
        table = neighbour_table(sites)
        if self._arguments.subject == "head":
            return run_stacks(rows, table, sites, stacks, chunk=self._chunk()), sites
        # With the ReLU inside the loop over chunks, not as a pass of its own over the whole buffer.
        layer = [conv for stack in stacks for conv in stack]
        return conv_rows(rows, table, layer, sites.counts[-1], relu=True, chunk=self._chunk()), sites

    def _tiles(self, capacity: int, stacks: Any, features: jax.Array, active: jax.Array, keys: jax.Array) -> Any:
        side = self._arguments.tile
        tiles = select_tiles(active, capacity // side**2, side)
        _, chunk = buffer_sizes(self.options("tiles"), active.shape)
        outputs = run_stacks_on_tiles(CascadeLevel(2, features), active, tiles, stacks, chunk=chunk)
        return self._finished(outputs), tile_sites(tiles, active)

    def _crops(self, capacity: int, stacks: Any, features: jax.Array, active: jax.Array, keys: jax.Array) -> Any:
        sites = select_sites([keys], capacity)
        return self._finished(crop_stacks(features, sites, stacks, chunk=self._chunk(8))), sites

    def _finished(self, outputs: list[jax.Array]) -> list[jax.Array]:
        """A stack has no ReLU after its last layer; the single layer has one."""
        return [jax.nn.relu(y) for y in outputs] if self._arguments.subject == "layer" else outputs

    def _chunk(self, divisor: int = 1) -> int:
        cells = self._arguments.height * self._arguments.width
        return ladder_capacities(LADDER, cells, max(8, self._arguments.chunk // divisor))[1]

    def options(self, kernel: Literal["gather", "tiles"]) -> SparseOptions:
        return SparseOptions(
            0.5, CONTEXT, (*LADDER, 1.0), self._arguments.chunk, kernel=kernel, tile=self._arguments.tile
        )

    def capacity(self, way: str, masks: Masks) -> int:
        """The smallest buffer of the ladder, in cells, that holds what ``way`` computes."""
        if way == DENSE:
            return 0
        shape = masks.active.shape
        if way == TILES:
            sizes = buffer_sizes(self.options("tiles"), shape)[0]
            needed = self._arguments.tile**2 * int(tile_count(jnp.asarray(masks.active), self._arguments.tile))
        elif way == CROPS:
            sizes = ladder_capacities((*LADDER, 1.0), masks.keys.size, max(8, self._arguments.chunk // 8))[0]
            needed = int(masks.keys.sum())
        else:
            sizes, needed = buffer_sizes(self.options("gather"), shape)[0], int(masks.active.sum())
        return min(size for size in sizes if size >= needed)


def _measure(
    arguments: StaticVsDynamic,
    stacks: Sequence[Stack],
    features: jax.Array,
    masks: Masks,
    programs: Programs,
    spconv: Spconv | None,
) -> list[Row]:
    """One row a way at one share."""
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
    """Raise unless every way gives each of its cells once and all agree: with the masked dense convolution at the
    sites, and in crops with the dense one away from the border."""
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


class Spconv:
    """The stacks as spconv's submanifold convolutions, on one thread.

    Kernels there are [out, kh, kw, in], coordinates int32 ``[N, 3]`` (image, y, x), which must be contiguous: others
    are read as garbage without complaint. A layer leaves its input's dictionary of indices alone and gives the filled
    one to its output: unless that is carried over, every tower, and every call, builds the index anew.
    """

    def __init__(self, stacks: Sequence[Stack], *, relu_last: bool = False):
        self._torch: Any = importlib.import_module("torch")
        self._spconv: Any = importlib.import_module("spconv.pytorch")
        self._torch.set_num_threads(1)
        self.versions = f"torch {self._torch.__version__}, spconv {importlib.metadata.version('spconv')}"
        self._relu_last = relu_last
        self._layers = [[self._layer(conv) for conv in stack] for stack in stacks]

    def _layer(self, conv: Conv) -> Any:
        _, _, inputs, outputs = conv.kernel.shape
        # Its CPU kernels refuse a bias of their own: it is added after.
        layer = self._spconv.SubMConv2d(inputs, outputs, 3, bias=False, indice_key="sites")
        kernel = self._torch.from_numpy(np.ascontiguousarray(np.asarray(conv.kernel).transpose(3, 0, 1, 2)))
        layer.weight.data.copy_(kernel)
        return layer.eval(), self._torch.from_numpy(np.array(conv.bias))

    def set(self, features: np.ndarray, active: np.ndarray) -> None:
        """Take a dense map ``[1, h, w, C]`` and the active cells bool ``[1, h, w]``."""
        self._features = self._torch.from_numpy(np.array(features))
        self._active = self._torch.from_numpy(np.array(active))
        self._ready = self._sites()
        self._run(self._ready)  # fills the index that `warm` reuses

    def cold(self) -> list[Any]:
        """From the dense map and the mask, index building included."""
        return self._run(self._sites())

    def warm(self) -> list[Any]:
        """From features at the sites, the index built before."""
        return self._run(self._ready)

    def _sites(self) -> Any:
        index = self._active.nonzero().int().contiguous()
        rows = self._features[self._active]
        return self._spconv.SparseConvTensor(rows, index, list(self._active.shape[1:]), 1)

    def _run(self, sites: Any) -> list[Any]:
        outputs = []
        with self._torch.inference_mode():
            for stack in self._layers:
                x = sites
                for number, (layer, bias) in enumerate(stack):
                    x = layer(x)
                    sites.indice_dict = x.indice_dict
                    y = x.features.add_(bias)
                    x = x.replace_feature(y.relu_() if number < len(stack) - 1 or self._relu_last else y)
                outputs.append(x.features)
        return outputs


def _spconv(arguments: StaticVsDynamic, stacks: Sequence[Stack]) -> tuple[Spconv | None, list[str]]:
    """spconv if it can be measured, else what it needs."""
    if arguments.threads != 1:
        return None, ["spconv: needs --threads 1, its CPU kernels give wrong results with more"]
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("spconv") is None:
        return None, ["spconv: needs torch and spconv (pip install -r requirements-spconv.txt)"]
    if jax.default_backend() != "cpu":
        return None, [f"spconv: runs on the CPU here, jax on {jax.default_backend()}; needs JAX_PLATFORMS=cpu"]
    return Spconv(stacks, relu_last=arguments.subject == "layer"), []


def _use_threads(threads: int) -> list[str]:
    """Confine this process to so many cores (0: all), before anything starts its threads; what a reader must know.

    XLA's CPU client makes its pool as large as the set of cores that it may use when it starts; OpenMP reads its
    variable when it is loaded.
    """
    if not threads:
        return []
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if not hasattr(os, "sched_setaffinity"):
        return ["--threads had no effect on jax: this system does not let a process choose its cores"]
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < threads:
        return [f"--threads {threads}: there are only {len(cores)} core(s)"]
    if len(cores) > threads and xla_bridge.backends_are_initialized():
        return [f"--threads {threads} had no effect on jax, which had started before: it used {len(cores)} cores"]
    os.sched_setaffinity(0, cores[:threads])
    return [f"every way on {threads} core(s)"]
