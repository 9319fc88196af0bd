"""What a data set's pictures ask of the sparse levels, and what those levels cost on this machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from benchmarks.queries import at_level, clustered
from benchmarks.speed.ladder_cost import Load, fit_cost
from benchmarks.subject import LAYOUT_LEVEL
from benchmarks.timing import interleaved
from querydet_jax.config import InferenceConfig
from querydet_jax.data.loader import EvalBatches
from querydet_jax.inference.detector import Detector, QueryTrace, sparse_levels, sparse_options, split_for_inference
from querydet_jax.models import DenseDetector
from querydet_jax.ops.anchors import level_shape
from querydet_jax.runtime.progress import progress
from querydet_jax.sparse import CascadeLevel, Sites, SparseOptions, Stack, buffer_sizes, grow
from querydet_jax.sparse.methods import cascade_sparse_query, room_needed
from querydet_jax.sparse.tiles import grid_shape

_SHARES = (0.01, 0.05, 0.2, 0.5)  # of a level's slots that keys laid out for timing need


@dataclass(frozen=True)
class Demand:
    """What batches asked of a sparse level. Letters: n batches, R rings.

    Attributes:
      level: l of P_l.
      canvas: (height, width) of the images.
      shape: (B, h, w) of the level.
      example: the level on the first batch, for timing.
      counts: cells of a batch, ``[n]`` each, as in ``LevelStats``.
      rings: ``[n][R]``, cells within 0, 1, .. of a key, as far out as the buffer must have room; on tiles
        only one, the cells of the tiles.
    """

    level: int
    canvas: tuple[int, int]
    shape: tuple[int, int, int]
    example: CascadeLevel
    counts: dict[str, list[int]]
    rings: list[np.ndarray]

    @property
    def cells(self) -> int:
        return math.prod(self.shape)

    @property
    def room(self) -> np.ndarray:
        """Cells that the buffer must hold, int ``[n]``."""
        return np.stack(self.rings)[:, -1]


def observe(
    model: DenseDetector, inference: InferenceConfig, batches: EvalBatches
) -> tuple[dict[str, Demand], list[float]]:
    """Run the cascade over batches and count.

    Returns:
      name to demand, one for every sparse level and number of its cells (canvases of equal area share it),
      coarse to fine; and how full each batch makes the levels, the sum of their shares of cells.
    """
    detector = Detector(model, inference)
    options = _options(inference, (), inference.chunk)
    examples: dict[tuple[int, ...], dict[int, CascadeLevel]] = {}
    found: dict[tuple[int, int], Demand] = {}
    fullness: list[float] = []
    try:
        for batch in progress(batches, "counting", "batch", total=len(batches)):
            images, sizes = jax.device_put((batch["images"], batch["sizes"]))
            if images.shape not in examples:
                examples[images.shape] = _sparse_levels(model, inference, images, sizes)
            levels = examples[images.shape]
            margins = tuple((level, example.margin) for level, example in levels.items())
            counted = jax.device_get(_count(detector.trace(images, sizes), margins, options))
            fullness.append(0.0)
            for level, example in levels.items():
                size, height, width, _ = example.features.shape
                canvas = (images.shape[1], images.shape[2])
                empty = Demand(level, canvas, (size, height, width), example, {}, [])
                demand = found.setdefault((level, empty.cells), empty)
                counts, rings = counted[level]
                for key, value in counts.items():
                    demand.counts.setdefault(key, []).append(int(value))
                demand.rings.append(rings)
                fullness[-1] += float(rings[-1]) / demand.cells
    finally:
        batches.close()
    several = len({level for level, _ in found}) < len(found)
    ordered = sorted(found.values(), key=lambda demand: (-demand.level, demand.cells))
    names = [f"P{d.level}" + (f" of {d.canvas[0]}x{d.canvas[1]}" if several else "") for d in ordered]
    return dict(zip(names, ordered, strict=True)), fullness


@partial(jax.jit, static_argnames=("margins", "options"))
def _count(
    trace: QueryTrace, margins: tuple[tuple[int, int], ...], options: SparseOptions
) -> dict[int, tuple[dict[str, Array], Array]]:
    """A demand's counts and rings by level."""
    return {
        level: (
            {
                "queries": _number(trace.probability[level + 1] > options.threshold),
                "keys": _number(trace.keys[level]),
                "active": _number(trace.active[level]),
            },
            _rings(trace.keys[level], margin, options),
        )
        for level, margin in margins
    }


def _rings(keys: Array, margin: int, options: SparseOptions) -> Array:
    """Cells of the rings ``[R]`` around ``keys [B, h, w]``; the last is ``room_needed``."""
    if options.kernel == "tiles":
        return room_needed(keys, margin, options)[None]
    return jnp.stack([_number(mask) for mask in grow(keys, options.context + margin)])


def _number(mask: Array) -> Array:
    return jnp.sum(mask.astype(jnp.int32))


def calibrate(
    model: DenseDetector, inference: InferenceConfig, name: str, demand: Demand, chunks: Sequence[int], rounds: int
) -> dict[int, tuple[Load, float]]:
    """Time a level by itself, as inference computes it, and fit its cost.

    Keys are laid out like clustered small objects at several densities; each density runs in the buffer that
    it just fits and in those of all denser ones.

    Returns:
      chunk to the load with its cost, and the root mean square of the fit's relative errors.
    """
    compute = _LevelAlone(model, inference, demand)
    layouts = compute.layouts()
    # Slots needed, slots of the buffer and chunk, to the layout's rings and the call.
    points: dict[tuple[int, int, int], tuple[np.ndarray, Callable[[], Any]]] = {}
    for chunk in chunks:
        for fraction in [rings[-1] / compute.total for rings, _ in layouts if rings[-1]]:
            options = _options(inference, (fraction,), chunk)
            program = compute.program(options)
            slots = buffer_sizes(options, demand.shape)[0][0] // compute.slot
            for rings, keys in layouts:
                if rings[-1] <= slots:
                    points[int(rings[-1]), slots, chunk] = rings, partial(program, keys)
    # Neighbours alike, so that none runs in memory that a much larger one has just given back. The first runs
    # after the last, therefore once more before itself.
    order = sorted(points)
    functions = {"after the last": points[order[0]][1], **{str(key): points[key][1] for key in order}}
    measured = interleaved(functions, rounds)

    # All cells are keys, and the only buffer is the smallest there is: the dense rung.
    program = compute.program(_options(inference, (1 / compute.total,), inference.chunk))
    densely = partial(program, jnp.ones(demand.shape, bool))
    dense = float(np.median(interleaved({"dense": densely}, rounds)["dense"]))

    found = {}
    for chunk in chunks:
        rows = buffer_sizes(_options(inference, (), chunk), demand.shape)[1]
        mine = [key for key in order if key[2] == chunk]
        # In a buffer of one turn XLA takes the work out of the loop and does it with or without sites.
        mine = [key for key in mine if key[1] > rows] or mine
        _, turns = compute.work(np.stack([points[key][0] for key in mine]), rows)
        timed = np.array([np.median(measured[str(key)]) for key in mine])
        cost, error = fit_cost(np.array([slots for _, slots, _ in mine]), turns, timed, dense)
        rings = np.stack(demand.rings) // compute.slot
        load = Load(
            name, compute.total, rings[:, -1], *compute.work(rings, rows), max(1, chunk // compute.slot), cost
        )  # fmt: skip
        found[chunk] = load, error
    return found


class _LevelAlone:
    """One sparse level as inference computes it, in the unit of the buffers.

    Attributes:
      slot: cells of a slot: 1, or a tile's where ``inference.kernel`` is tiles.
      total: slots for the whole map, over the batch.
    """

    def __init__(self, model: DenseDetector, inference: InferenceConfig, demand: Demand):
        self.model = nnx.merge(*split_for_inference(model))
        self.inference, self.demand = inference, demand
        tiles = inference.kernel == "tiles"
        self.slot = inference.tile**2 if tiles else 1
        self.total = math.prod(grid_shape(demand.shape, inference.tile)) if tiles else demand.cells
        self._heads = list(self.model.head_stacks())
        # The finest level's queries would lead nowhere.
        query = self.model.query_head if demand.level > model.config.min_level else None
        self._stacks: list[Stack] = self._heads if query is None else [*self._heads, query.stack()]

    def program(self, options: SparseOptions) -> Callable[[Array], Any]:
        """The level at ``keys [B, h, w]``, compiled: its input, the heads, candidates, the next level's queries."""
        level, topk, heads = self.demand.level, self.inference.topk, len(self._heads)

        def finish(outputs: list[Array], sites: Sites) -> Any:
            found = self.model.candidates(level, outputs[:heads], sites, topk=topk)
            return found, [sites.to_mask(sites.is_key & (logits[:, 0] > 0)) for logits in outputs[heads:]]

        @jax.jit
        def compute(example: CascadeLevel, stacks: list[Stack], keys: Array) -> Any:
            return cascade_sparse_query(example, keys, stacks, finish, options).result

        return partial(compute, self.demand.example, self._stacks)

    def work(self, rings: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Slots that are computed and turns of ``rows`` slots, ``[n]``: means over the layers by multiplications.

        Args:
          rings: slots ``[n, R]``. A layer with m layers after it is computed up to ring min(c, m), see ``run_stacks``.
        """
        context, example = self.inference.context, self.demand.example
        layers = [(context + 1, example.lateral), (context, example.output)]
        layers += [(min(context, len(stack) - 1 - i), conv) for stack in self._stacks for i, conv in enumerate(stack)]
        layers = [(ring, conv.kernel.size) for ring, conv in layers if conv is not None]
        sites = rings[:, [min(ring, rings.shape[1] - 1) for ring, _ in layers]]  # [n, layers]
        weights = np.array([size for _, size in layers]) / sum(size for _, size in layers)
        return sites @ weights, -(-sites // rows) @ weights

    def layouts(self) -> list[tuple[np.ndarray, Array]]:
        """Rings, in slots ``[R]``, and keys ``[B, h, w]``: none, and for each share the fewest objects that need it."""
        demand = self.demand
        options = _options(self.inference, (), self.inference.chunk)
        rings = jax.jit(lambda keys: _rings(keys, demand.example.margin, options))
        laid_out = level_shape(*demand.canvas, LAYOUT_LEVEL)

        def layout(objects: int) -> tuple[np.ndarray, Array]:
            fires = at_level(clustered(laid_out, objects), LAYOUT_LEVEL, demand.level, demand.shape[1:])
            keys = jnp.broadcast_to(jnp.asarray(fires)[None], demand.shape)
            return np.asarray(rings(keys)) // self.slot, keys

        found = [layout(0)]
        for share in _SHARES:
            low, high = 1, 4096
            while low < high:
                middle = (low + high) // 2
                if layout(middle)[0][-1] < share * self.total:
                    low = middle + 1
                else:
                    high = middle
            found.append(layout(low))
        return found


def _sparse_levels(
    model: DenseDetector, inference: InferenceConfig, images: Array, sizes: Array
) -> dict[int, CascadeLevel]:
    """What the sparse levels are computed from, by level, coarse to fine, as inference makes it."""
    graph, state = split_for_inference(model)

    @jax.jit
    def compute(state: Any, images: Array, sizes: Array) -> dict[int, CascadeLevel]:
        return sparse_levels(nnx.merge(graph, state), inference, images, sizes)

    # Compiled, levels came as arrays and in ascending order.
    found = compute(state, images, sizes)
    return {level: found[level]._replace(level=level) for level in sorted(found, reverse=True)}


def _options(inference: InferenceConfig, capacities: tuple[float, ...], chunk: int) -> SparseOptions:
    """CSQ as ``inference`` has it but with these buffers, and the dense rung above them."""
    return sparse_options(inference)._replace(capacities=capacities, chunk=chunk, method="csq", overflow="dense")
