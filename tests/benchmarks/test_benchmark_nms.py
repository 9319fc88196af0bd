"""The NMS benchmark: its reference methods are exact, and it writes what it measures."""

from __future__ import annotations

import csv
import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.speed import nms as benchmark
from benchmarks.speed.nms import Nms, clustered, nms, quadratic_nms, tiled_nms
from querydet_jax.ops.nms import class_wise_nms

SMALL = Nms(
    candidates=300, alive=(20, 300), objects=12, classes=3, max_detections=(10,), images=2, tiles=(64,), rounds=2
)
METHODS = ["class_wise_nms", "tiled 64", "quadratic", "soft_nms gaussian"]


def lattice(seed: int, count: int, alive: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes on a coarse lattice: equal boxes, equal scores, IoUs of exactly 1/2; absent ones are infinite."""
    rng = np.random.default_rng(seed)
    corner = rng.integers(0, 10, (count, 2))
    boxes = np.concatenate([corner, corner + rng.integers(0, 5, (count, 2))], axis=1).astype(np.float32)
    scores = (rng.integers(0, 15, count) / 15).astype(np.float32)
    absent = rng.permutation(count)[alive:]
    scores[absent] = -np.inf
    boxes[absent] = [-np.inf, np.nan, np.inf, np.inf]
    return boxes, scores, rng.integers(0, 2, count).astype(np.int32)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("limit", [8, 150])
@pytest.mark.parametrize("tile", [32, 128])
def test_all_exact_methods_agree(tile: int, limit: int, batched: bool) -> None:
    common = {"iou_threshold": 0.5, "max_detections": limit}
    methods = [
        partial(class_wise_nms, **common),
        partial(tiled_nms, tile=tile, **common),
        partial(quadratic_nms, **common),
    ]
    images = [lattice(seed, 500, alive) for seed, alive in enumerate((500, 0, 1, 129, 300))]
    if batched:
        given = [jnp.asarray(np.stack(parts)) for parts in zip(*images, strict=True)]
        expected, *others = [jax.jit(jax.vmap(method))(*given) for method in methods]
        compare([expected], [[other] for other in others])
    else:
        expected, *others = [[method(*image) for image in images] for method in map(jax.jit, methods)]
        compare(expected, others)


def compare(expected: list, others: list[list]) -> None:
    assert any(np.asarray(valid).any() for _, valid in expected)
    for other in others:
        for (keep, valid), (other_keep, other_valid) in zip(expected, other, strict=True):
            np.testing.assert_array_equal(valid, other_valid)
            np.testing.assert_array_equal(keep, other_keep)


def test_clustered_candidates() -> None:
    boxes, scores, classes = clustered(np.random.default_rng(1), 400, objects=9, classes=4, alive=120)
    assert boxes.shape == (400, 4) and boxes.dtype == scores.dtype == np.float32 and classes.dtype == np.int32
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert (scores > -np.inf).sum() == 120 and scores.max() <= 1 and scores[scores > -np.inf].min() > 0
    assert set(classes) <= set(range(4))


def test_writes_what_it_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nms(dataclasses.replace(SMALL, out=str(tmp_path)))
    with (tmp_path / "nms.csv").open() as file:
        rows = list(csv.DictReader(file))
    by_case: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        by_case.setdefault(row["case"], {})[row["method"]] = row
        assert 0 < float(row["ms_p50"]) <= float(row["ms_p90"]) <= float(row["ms_p99"])
    assert {case: list(methods) for case, methods in by_case.items()} == {
        "20 alive, D 10": METHODS,
        "300 alive, D 10": METHODS,
        "2 images, one crowded, D 10": [method for method in METHODS if method != "quadratic"],
    }
    for methods in by_case.values():
        assert methods["class_wise_nms"]["kept"] == methods["tiled 64"]["kept"] != "0"
    written = json.loads((tmp_path / "nms.json").read_text())
    assert written["arguments"]["candidates"] == 300 and len(written["rows"]) == len(rows)
    printed = capsys.readouterr().out
    assert "300 alive, D 10" in printed and "kept" in printed


def test_times_nothing_when_methods_disagree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def keeps_the_first(boxes, scores, classes, *, iou_threshold, max_detections, tile):
        return jnp.zeros((max_detections,), jnp.int32), jnp.arange(max_detections) < 1

    monkeypatch.setattr(benchmark, "tiled_nms", keeps_the_first)
    monkeypatch.setattr(benchmark, "interleaved", lambda *_: pytest.fail("timed"))
    with pytest.raises(RuntimeError, match="20 alive, D 10: tiled 64"):
        nms(dataclasses.replace(SMALL, out=str(tmp_path)))
    assert not list(tmp_path.iterdir())
