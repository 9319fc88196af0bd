"""The ladder of buffers that costs least, given what batches asked for and what that costs. NumPy alone.

A buffer's slots are cells of a level, or its tiles where the kernel works on tiles. Letters: n batches,
M candidate fractions, L loads.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from querydet_jax.sparse.ladder import ladder_capacities

Ladder = tuple[float, ...]
"""Increasing fractions of a level's cells; empty: always dense."""

_SAME = 1e-9  # relative: times that differ by less are equal but for rounding


class Cost(NamedTuple):
    """Milliseconds of a level: ``fixed + per_slot * slots + per_turn * turns`` in a buffer, ``dense`` without it."""

    fixed: float
    per_slot: float
    per_turn: float
    dense: float


@dataclass(frozen=True)
class Load:
    """What batches asked of one level, and what that costs.

    Attributes:
      level: its name.
      total: slots for the whole map, over the batch.
      needed: int ``[n]``, slots that each batch needs.
      sites: ``[n]``, slots that are computed, a mean over the layers by their arithmetic: layers near the
        result need fewer than the first.
      turns: ``[n]``, the loops' turns, the same mean.
      chunk: wanted slots a turn, as ``ladder_capacities`` takes it.
      cost: measured at this chunk.
    """

    level: str
    total: int
    needed: np.ndarray
    sites: np.ndarray
    turns: np.ndarray
    chunk: int
    cost: Cost

    @property
    def rows(self) -> int:
        """Slots a turn; a small map takes fewer than were wanted."""
        return ladder_capacities((), self.total, self.chunk)[1]

    def size(self, fraction: float) -> int:
        """Slots of the buffer that inference makes of a fraction."""
        return ladder_capacities((fraction,), self.total, self.chunk)[0][0]


class Ran(NamedTuple):
    """How the batches of a load run on a ladder, ``[n]`` each.

    ``rung``: number of the buffer, the dense rung last; ``slots`` of the buffer; ``rows`` computed, like
    ``Load.sites`` but with what fills up a turn (both: the whole map on the dense rung); ``ms``.
    """

    rung: np.ndarray
    slots: np.ndarray
    rows: np.ndarray
    ms: np.ndarray


def run(load: Load, ladder: Ladder) -> Ran:
    """What ``querydet_jax.sparse.run_ladder`` does with each batch of ``load``."""
    sizes = np.array([load.size(fraction) for fraction in ladder], int)
    rung = np.searchsorted(sizes, load.needed)  # the smallest that holds it
    dense = rung == len(sizes)
    slots = np.append(sizes, load.total)[rung]
    cost = load.cost
    sparse_ms = cost.fixed + cost.per_slot * slots + cost.per_turn * load.turns
    return Ran(rung, slots, np.where(dense, load.total, load.turns * load.rows), np.where(dense, cost.dense, sparse_ms))


def total_ms(loads: Sequence[Load], ladder: Ladder) -> float:
    """Expected milliseconds of all batches on all levels."""
    return float(sum(run(load, ladder).ms.sum() for load in loads))


def candidates(loads: Sequence[Load]) -> list[float]:
    """Fractions M among which a best ladder lies, increasing.

    All batches run alike between one multiple of a chunk and the next, and of a rung that some batch
    just fits, nothing is gained by making it larger. So one fraction for each chunk that a batch of any level
    ends in is enough: half way from that chunk's beginning to where any level's buffer grows next.
    """
    steps = [load.rows / load.total for load in loads]
    last = [np.maximum(-(-load.needed // load.rows), 1) - 1 for load in loads]  # number of the chunk it ends in
    begins = np.unique(np.concatenate([step * number for step, number in zip(steps, last, strict=True)]))
    ends = np.min([(np.floor(begins / step + _SAME) + 1) * step for step in steps], axis=0)
    fractions = (begins + np.minimum(ends, 1.0)) / 2
    by_sizes = {tuple(load.size(fraction) for load in loads): float(fraction) for fraction in fractions}
    return sorted(by_sizes.values())


def best_ladders(loads: Sequence[Load], max_rungs: int) -> list[tuple[Ladder, float]]:
    """The cheapest ladders, and their ``total_ms``, of at most 0, 1, .. ``max_rungs`` rungs.

    Dynamic programming over the largest rung: what the batches that fit it cost splits into what those
    that fit the next smaller rung cost, and the rest, which run on this one. Exact.
    """
    fractions = candidates(loads)
    sizes = np.array([[load.size(fraction) for fraction in fractions] for load in loads])  # [L, M]
    per_slot = np.array([load.cost.per_slot for load in loads])
    fits = [load.needed[:, None] <= size[None] for load, size in zip(loads, sizes, strict=True)]  # [n, M] each
    count = np.stack([fit.sum(axis=0) for fit in fits])  # [L, M]
    work = np.zeros(len(fractions))  # what the batches that fit cost apart from their buffers
    dense = np.zeros(len(fractions))  # what those that do not fit cost
    for load, fit in zip(loads, fits, strict=True):
        work += (load.cost.fixed + load.cost.per_turn * load.turns) @ fit
        dense += load.cost.dense * (~fit).sum(axis=0)

    found: list[tuple[Ladder, float]] = [((), float(sum(load.cost.dense * len(load.needed) for load in loads)))]
    buffers = (per_slot[:, None] * sizes * count).sum(axis=0)  # [M]: with this one rung
    rungs: list[list[int]] = [[j] for j in range(len(fractions))]
    for _ in range(max_rungs):
        total = buffers + work + dense
        best = int(np.argmin(total))
        better = total[best] < found[-1][1] * (1 - _SAME)
        found.append((tuple(fractions[j] for j in rungs[best]), float(total[best])) if better else found[-1])
        longer, ladders = np.full_like(buffers, np.inf), list(rungs)
        for j in range(1, len(fractions)):
            moved = count[:, j, None] - count[:, :j]  # [L, j]: batches between rung i and rung j
            through = buffers[:j] + (per_slot[:, None] * sizes[:, j, None] * moved).sum(axis=0)
            i = int(np.argmin(through))
            longer[j], ladders[j] = through[i], [*rungs[i], j]
        buffers, rungs = longer, ladders
    return found


def exhaustive(loads: Sequence[Load], grid: Sequence[float], max_rungs: int) -> tuple[Ladder, float, int]:
    """The cheapest of all ladders of up to ``max_rungs`` fractions of ``grid``, its time, and how many there are."""
    ladders = [ladder for rungs in range(max_rungs + 1) for ladder in itertools.combinations(sorted(grid), rungs)]
    times = [total_ms(loads, ladder) for ladder in ladders]
    best = int(np.argmin(times))
    return ladders[best], times[best], len(ladders)


def coarse_grid(loads: Sequence[Load], points: int) -> list[float]:
    """About ``points`` fractions: half of them quantiles of what was needed, half in equal ratios up to 1."""
    shares = np.concatenate([load.needed / load.total for load in loads])
    least = min(load.rows / load.total for load in loads)
    quantiles = np.quantile(shares, np.linspace(0, 1, points - points // 2))
    return sorted({*np.maximum(quantiles, least).tolist(), *np.geomspace(min(least, 1.0), 1.0, points // 2).tolist()})


def readable(ladder: Ladder, loads: Sequence[Load]) -> Ladder:
    """The same buffers on every level, from fractions of as few decimals as that takes."""

    def shortest(fraction: float) -> float:
        sizes = [load.size(fraction) for load in loads]
        for digits in range(1, 16):
            rounded = round(fraction, digits)
            if 0 < rounded <= 1 and [load.size(rounded) for load in loads] == sizes:
                return rounded
        return fraction

    return tuple(shortest(fraction) for fraction in ladder)


def fit_cost(slots: np.ndarray, turns: np.ndarray, ms: np.ndarray, dense: float) -> tuple[Cost, float]:
    """The cost that explains measured times ``ms [k]`` best, no part of it negative.

    Least squares of relative errors, so that small buffers count as much as large ones.

    Returns:
      the cost, and the root mean square of the relative errors.
    """
    terms = np.stack([np.ones(len(ms)), slots, turns], axis=1) / ms[:, None]
    best, error = [0.0] * 3, math.inf
    # With three terms every choice of those above zero can be tried; the best of those that stay there is the answer.
    for number in (1, 2, 3):
        for chosen in map(list, itertools.combinations(range(3), number)):
            values = np.linalg.lstsq(terms[:, chosen], np.ones(len(ms)))[0]
            missed = float(np.sqrt(np.mean((terms[:, chosen] @ values - 1) ** 2)))
            if (values >= 0).all() and missed < error:
                best, error = [0.0] * 3, missed
                for term, value in zip(chosen, values.tolist(), strict=True):
                    best[term] = value
    return Cost(best[0], best[1], best[2], dense), error
