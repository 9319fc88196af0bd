"""The capacity ladder: the optimiser against exhaustive search, and the command on a small run."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.speed.capacities import CONFIGURED, DENSE, PROPOSED, SINGLE, Capacities, capacities
from benchmarks.speed.ladder_cost import (
    Cost,
    Load,
    best_ladders,
    candidates,
    coarse_grid,
    exhaustive,
    fit_cost,
    readable,
    run,
    total_ms,
)
from benchmarks.speed.level_cost import calibrate, observe
from benchmarks.subject import open_run
from querydet_jax.cli.command_line import parse
from querydet_jax.data import eval_batches
from querydet_jax.inference.detector import Detector
from querydet_jax.runtime.errors import ConfigError
from querydet_jax.sparse import ladder_capacities, run_ladder
from querydet_jax.sparse.tiles import grid_shape

COST = Cost(fixed=1.0, per_slot=0.01, per_turn=0.5, dense=60.0)


def load(needed, total: int = 1000, chunk: int = 10, cost: Cost = COST, level: str = "P2") -> Load:
    """All layers computed on all sites."""
    needed = np.asarray(needed)
    rows = ladder_capacities((), total, chunk)[1]
    return Load(level, total, needed, needed, -(-needed // rows), chunk, cost)


def random_loads(seed: int) -> list[Load]:
    """Two levels of different size and cost, asked for in one of several manners."""
    rng = np.random.default_rng(seed)
    shape = [
        lambda: rng.uniform(0, 1, 12),
        lambda: np.minimum(rng.lognormal(-3, 1.5, 12), 1),
        lambda: rng.choice([0.02, 0.3, 0.9], 12),
    ][seed % 3]
    return [
        load((shape() * total).astype(int), total, 40, Cost(*rng.uniform(0, (1, 0.1, 2, 100))), level)
        for level, total in (("P3", 250), ("P2", 1000))
    ]


@pytest.mark.parametrize("seed", range(12))
def test_best_ladders_against_exhaustive_search(seed):
    loads = random_loads(seed)
    found = best_ladders(loads, 3)
    fine = sorted({*np.linspace(0.04, 1, 16), *coarse_grid(loads, 8)})
    for rungs, (ladder, time) in enumerate(found):
        assert len(ladder) <= rungs and list(ladder) == sorted(set(ladder))
        assert time == pytest.approx(total_ms(loads, ladder))
        best, best_time, number = exhaustive(loads, fine, rungs)
        assert best_time == pytest.approx(total_ms(loads, best)) and number >= len(fine) ** min(rungs, 1)
        assert time <= best_time * (1 + 1e-9)  # at most 5 % above is what is promised
        if rungs < 3:  # nothing better lies between the candidates
            assert time == pytest.approx(exhaustive(loads, candidates(loads), rungs)[1])
    times = [time for _, time in found]
    assert times == sorted(times, reverse=True)  # a further rung never costs more


def test_run_is_what_run_ladder_does():
    rng = np.random.default_rng(0)
    for ladder in ((), (0.05,), (0.001, 0.002, 0.3), (0.1, 0.55, 1.0)):
        one = load(rng.integers(0, 1001, 40))
        sizes, chunk = ladder_capacities(ladder, one.total, one.chunk)
        ran = run(one, ladder)
        for needed, slots, rows in zip(one.needed, ran.slots, ran.rows, strict=True):
            _, used, over = run_ladder(jnp.int32(needed), sizes, lambda size: lambda: size, lambda: 0)
            assert slots == (one.total if over else used)
            assert rows == (one.total if over else -(-needed // chunk) * chunk)


def test_equal_counts_get_one_rung_of_their_size():
    one = load([333] * 5)
    found = best_ladders([one], 3)
    assert found[1] == found[2] == found[3]
    (fraction,) = found[3][0]
    assert one.size(fraction) == 340
    assert readable((fraction,), [one]) == (0.34,)


def test_levels_without_queries_get_the_smallest_buffer():
    loads = [load([0, 0, 0]), load([0, 0, 0], total=4000)]
    (fraction,), time = best_ladders(loads, 3)[3]
    assert [one.size(fraction) for one in loads] == [10, 10]
    assert time == pytest.approx(6 * 1.1)
    assert run(loads[0], (fraction,)).rows.sum() == 0


def test_a_heavy_tail_is_left_to_the_dense_rung():
    tailed = load([50] * 50 + [1000], cost=COST._replace(dense=30.0))  # in a buffer the last takes 61 ms
    ladder, time = best_ladders([tailed], 3)[3]
    assert run(tailed, ladder).rung.tolist() == [0] * 50 + [1]
    assert time == pytest.approx(50 * (1 + 0.5 + 2.5) + 30)


def test_no_buffer_where_dense_is_cheaper():
    assert best_ladders([load([50, 900], cost=COST._replace(dense=0.5))], 3)[3] == ((), 1.0)


def test_readable_fractions_make_the_same_buffers():
    for seed in range(6):
        loads = random_loads(seed)
        ladder = tuple(candidates(loads))
        short = readable(ladder, loads)
        assert [[one.size(f) for f in short] for one in loads] == [[one.size(f) for f in ladder] for one in loads]
        assert all(len(repr(f)) <= 6 for f in short) and list(short) == sorted(set(short))


def test_fit_finds_the_cost_and_no_negative_one():
    slots, turns = np.array([10, 10, 50, 50, 50]), np.array([0, 1, 0, 1, 5])
    cost, error = fit_cost(slots, turns, COST.fixed + COST.per_slot * slots + COST.per_turn * turns, 60.0)
    np.testing.assert_allclose(cost, COST)
    assert error < 1e-9
    cost, error = fit_cost(slots, turns, 1 - 0.001 * slots + turns, 60.0)
    assert cost.per_slot == 0.0 and cost.fixed > 0.9 and 0 < error < 0.05


SMALL = Capacities(images=0, chunks=(8,), rounds=1, timed_batches=2)


def test_proposes_a_ladder_for_a_run(monkeypatch, capsys, tmp_path, run_folder):
    out = tmp_path / "out"
    capacities(dataclasses.replace(SMALL, run=str(run_folder), out=str(out)))
    found = json.loads((out / "capacities.json").read_text())
    rows = {row["ladder"]: row for row in found["rows"]}
    assert list(rows) == [CONFIGURED, PROPOSED, SINGLE, DENSE]
    assert rows[CONFIGURED]["capacities"] == [0.05, 0.25] and rows[CONFIGURED]["measured_ratio"] == 1.0
    for name, row in rows.items():
        assert row["expected_ms"] > 0 and row["rows_per_site"] >= 1 and row["slots_per_site"] >= 1
        for level in ("P3", "P2"):
            shares = row[f"rungs_{level}"]
            assert len(shares) == len(row["capacities"]) + 1 and sum(shares) == pytest.approx(1)
        assert name == DENSE or row["measured_ms"] > 0
    # Measured, the proposal is never slower than what is configured; if it is another, no ladder on the grid is
    # expected to be much cheaper.
    assert rows[PROPOSED]["measured_ms"] <= rows[CONFIGURED]["measured_ms"]
    kept = (rows[PROPOSED]["capacities"], rows[PROPOSED]["chunk"]) == ([0.05, 0.25], 16)
    assert kept or found["grid"]["above"] <= 0.05
    assert found["grid"]["ladders"] > 300
    for row in found["costs"]:
        assert row["dense"] > 0 and row["per_slot"] >= 0 and np.isfinite(row["fit_error"])

    proposed = found["proposed"]
    assert rows[PROPOSED]["capacities"] == proposed["capacities"]
    printed = capsys.readouterr().out
    assert f"use: {proposed['flags']}" in printed and "P2 room" in printed
    # As pasted behind `eval.py RUN`.
    monkeypatch.setattr(sys, "argv", ["eval.py", str(run_folder), *proposed["flags"].split()])
    _, config, _ = parse(Nothing, "")
    assert config.inference.capacities == tuple(proposed["capacities"]) and config.inference.chunk == proposed["chunk"]
    with (out / "capacities.csv").open() as file:
        assert [row["ladder"] for row in csv.DictReader(file)] == list(rows)


@dataclasses.dataclass(frozen=True)
class Nothing:
    pass


@pytest.mark.parametrize("kernel", ["gather", "tiles"])
def test_counts_what_the_detector_counts(run_folder, kernel):
    config, model, dataset = open_run(str(run_folder))
    inference = dataclasses.replace(config.inference, kernel=kernel)
    demands, fullness = observe(model, inference, eval_batches(dataset, config.data, batch_size=2))
    assert list(demands) == ["P3", "P2"] and demands["P2"].shape == (2, 16, 24) and len(fullness) == 2
    detector = Detector(model, dataclasses.replace(inference, capacities=(0.3, 0.6, 1.0)))
    for number, batch in enumerate(eval_batches(dataset, config.data, batch_size=2)):
        stats = jax.device_get(detector(batch["images"], batch["sizes"])).stats
        for demand in demands.values():
            mine = stats[demand.level]
            for key in ("queries", "keys", "active"):
                assert demand.counts[key][number] == getattr(mine, key)
            # The room decides which buffer runs.
            cells = 64 if kernel == "tiles" else 1
            total = int(np.prod(grid_shape(demand.shape, 8))) if kernel == "tiles" else demand.cells
            sizes = [cells * n for n in ladder_capacities((0.3, 0.6, 1.0), total, max(1, 16 // cells))[0]]
            assert mine.capacity == min(size for size in sizes if size >= demand.room[number])
    assert max(demands["P2"].counts["keys"]) > 0
    if kernel == "tiles":  # timed with cells in the command's own test
        ((one, error),) = calibrate(model, inference, "P2", demands["P2"], [128], rounds=1).values()
        assert (one.total, one.rows) == (12, 2) and one.turns.tolist() == (-(-one.needed // 2)).tolist()
        assert one.cost.dense > 0 and np.isfinite(error)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": ""}, "--run: capacities needs a trained model"),
        ({"max_rungs": 0}, "--max-rungs 0: must be at least 1"),
        ({"timed_batches": 0}, "--timed-batches 0"),
        ({"images": -1}, "--images -1: must not be negative"),
        ({"chunks": (64, 0)}, "--chunks"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ConfigError, match=message):
        capacities(dataclasses.replace(SMALL, **{"run": "somewhere", **changes}))
