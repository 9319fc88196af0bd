"""The capacity ladder: the proposal against exhaustive search, the counts against the detector's, the command."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.speed.capacities import (
    CONFIGURED,
    PROPOSED,
    Capacities,
    LevelCounts,
    capacities,
    count,
    propose,
)
from benchmarks.subjects import open_run
from querydet_jax.cli.arguments import parse
from querydet_jax.data import eval_batches
from querydet_jax.inference.detector import Detector
from querydet_jax.inference.pipeline import sparse_options
from querydet_jax.runtime.errors import ConfigError
from querydet_jax.sparse import SparseOptions, run_ladder


def level(shares: np.ndarray | list[float], side: int = 100) -> LevelCounts:
    return LevelCounts((1, side, side), {"room": np.round(np.asarray(shares) * side**2).astype(int).tolist()})


def cells(levels: list[LevelCounts], ladder: tuple[float, ...]) -> float:
    """Return the cells computed on ``ladder``, by its definition."""
    return sum(
        one.cells * min((f for f in ladder if share <= f), default=1.0) for one in levels for share in one.shares
    )


@pytest.mark.parametrize("seed", range(3))
def test_the_proposal_against_exhaustive_search(seed):
    rng = np.random.default_rng(seed)
    draw = [lambda: rng.uniform(0, 1, 9), lambda: np.minimum(rng.lognormal(-3, 1.5, 9), 1), lambda: rng.uniform(size=9)]
    levels = [level(draw[seed](), side) for side in (50, 100)]
    # Nothing is gained by a rung above the percent that some batch just fits.
    grid = sorted({float(np.ceil(100 * share) / 100) for one in levels for share in one.shares} - {0.0, 1.0})
    total = cells(levels, ())
    for rungs in (1, 2, 3):
        ladder = propose(levels, rungs)
        assert len(ladder) <= rungs and list(ladder) == sorted(set(ladder))
        least = min(cells(levels, found) for found in itertools.combinations(grid, rungs))
        assert least * (1 - 1e-9) <= cells(levels, ladder) <= least + 0.01 * total * (rungs - len(ladder)) + 1e-6


def test_proposals_by_hand():
    assert propose([level([0.333] * 5)], 3) == (0.34,)  # one size needs one rung
    assert propose([level([0.0] * 3), level([0.0] * 3, 20)], 3) == (0.01,)
    assert propose([level([0.05] * 50 + [1.0])], 3) == (0.05,)  # the tail is left to the dense rung
    assert propose([level([0.05] * 5 + [0.3] * 5)], 3) == (0.05, 0.3)
    assert propose([level([0.05] * 5 + [0.3] * 5)], 1) == (0.3,)
    assert propose([level([0.999] * 4)], 3) == ()  # no buffer is smaller than the map


def test_batches_run_on_the_rungs_that_run_ladder_takes():
    one = level(np.random.default_rng(0).uniform(0, 1, 40))
    ladder = (0.05, 0.3, 0.55)
    sizes = [10 * -(-round(one.cells * f) // 10) for f in ladder]
    run = jax.jit(lambda room: run_ladder(room, sizes, lambda size: jnp.int32(size), lambda: jnp.int32(0)))
    for room, rung, cells in zip(one.counts["room"], *one.run(SparseOptions(0.5, 2, ladder, 10)), strict=True):
        _, used, over = run(jnp.int32(room))
        assert cells == (one.cells if over else used) and (rung == len(ladder)) == over


SMALL = Capacities(images=0, rounds=1, timed_batches=1)


def test_proposes_a_ladder_for_a_run(monkeypatch, capsys, tmp_path, run_folder):
    out = tmp_path / "out"
    capacities(dataclasses.replace(SMALL, run=str(run_folder), out=str(out)))
    found = json.loads((out / "capacities.json").read_text())
    rows = {row["ladder"]: row for row in found["rows"]}
    assert list(rows) == [CONFIGURED, PROPOSED]
    assert rows[CONFIGURED]["capacities"] == [0.05, 0.25] and rows[CONFIGURED]["measured_ratio"] == 1.0
    for row in rows.values():
        assert row["computed_per_needed"] >= 1 and row["measured_ms"] > 0
        for name in ("P3", "P2"):
            assert len(row[f"rungs_{name}"]) == len(row["capacities"]) + 1
            assert sum(row[f"rungs_{name}"]) == pytest.approx(1)
    assert rows[PROPOSED]["computed_per_needed"] <= rows[CONFIGURED]["computed_per_needed"] * 1.1
    proposed = found["proposed"]
    assert rows[PROPOSED]["capacities"] == proposed["capacities"]
    printed = capsys.readouterr().out
    assert f"proposed: {proposed['flags']}" in printed and "P2 room" in printed
    # Pasted behind `eval.py RUN`.
    _, config, _ = parse(Nothing, "", [str(run_folder), *proposed["flags"].split()], "eval.py")
    assert config.inference.capacities == tuple(proposed["capacities"])
    with (out / "capacities.csv").open() as file:
        assert [row["ladder"] for row in csv.DictReader(file)] == list(rows)


@dataclasses.dataclass(frozen=True)
class Nothing:
    pass


@pytest.mark.parametrize("kernel", ["gather", pytest.param("tiles", marks=pytest.mark.slow)])
def test_counts_what_the_detector_counts(run_folder, kernel):
    config, model, dataset = open_run(str(run_folder))
    inference = dataclasses.replace(config.inference, kernel=kernel, capacities=(0.3, 0.6, 1.0))
    levels, fullness = count(model, inference, eval_batches(dataset, config.data, batch_size=2))
    assert list(levels) == ["P3", "P2"] and levels["P2"].shape == (2, 16, 24) and len(fullness) == 2
    detector, options = Detector(model, inference), sparse_options(inference)
    for number, batch in enumerate(eval_batches(dataset, config.data, batch_size=2)):
        stats = jax.device_get(detector(batch["images"], batch["sizes"])).stats
        for name, of_level in levels.items():
            mine = stats[int(name[1:])]
            for key in ("queries", "keys", "active"):
                assert of_level.counts[key][number] == getattr(mine, key)
            assert mine.capacity == of_level.run(options)[1][number]  # the room decides which buffer runs
    assert max(levels["P2"].counts["keys"]) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": ""}, "--run: capacities needs a trained model"),
        ({"max_rungs": 0}, "--max-rungs 0: must be at least 1"),
        ({"timed_batches": 0}, "--timed-batches 0"),
        ({"images": -1}, "--images -1: must be at least 0"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ConfigError, match=message):
        capacities(dataclasses.replace(SMALL, **{"run": "somewhere", **changes}))
