"""Every benchmark runs and writes what it prints: one small run per command, the others marked slow."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from benchmarks.main import COMMANDS, main
from benchmarks.options import RunOrRandomNetwork
from benchmarks.paper.ablation import parts
from benchmarks.paper.figure4 import at_scale
from benchmarks.query_layout import at_level, clustered
from benchmarks.report import Column, Report, share
from benchmarks.speed.precision import agreement
from benchmarks.subjects import random_model
from querydet_jax.config import DataConfig, LossConfig, ModelConfig, QueryConfig
from querydet_jax.runtime.errors import ConfigError

SMALL = "--backbone resnet10 --classes 2 --channels 8 --rounds 2".split()
ONE_SIZE = "--height 64 --width 96".split()


def assert_numbers(rows: list[dict], *keys: str) -> None:
    """Assert that every row has a positive finite number under every key."""
    for row in rows:
        for key in keys:
            value = row[key]
            assert isinstance(value, float | int) and np.isfinite(value) and value > 0, (key, row)


def call(monkeypatch: pytest.MonkeyPatch, out: Path, *words: str) -> dict:
    """Run `benchmark.py WORDS` and return its json file."""
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *words, "--out", str(out)])
    main()
    (written,) = out.glob("*.json")
    return json.loads(written.read_text())


@pytest.mark.parametrize(
    ("name", "words", "methods"),
    [
        pytest.param("table4", "--start-levels 6 4", ["dense", "P6", "P4"], marks=pytest.mark.slow),
        pytest.param("table5", "", ["dense", "CQ", "CCQ", "CSQ"], marks=pytest.mark.slow),
        pytest.param("table6", "--contexts 0 5", ["dense", "1x1", "11x11"], marks=pytest.mark.slow),
    ],
)
def test_tables_from_random_weights(monkeypatch, capsys, tmp_path, name, words, methods):
    found = call(monkeypatch, tmp_path, name, *SMALL, *ONE_SIZE, *words.split())
    assert [row["method"] for row in found["rows"]] == methods
    assert_numbers(found["rows"], "ms_p50", "ms_p90", "ms_p99", "speed_up", "paper_AP", "paper_speed_up")
    assert_numbers(found["rows"][1:], "active_P2")
    assert found["rows"][0]["speed_up"] == 1.0 and "AP" not in found["rows"][0]
    assert any("--run" in entry for entry in found["not_run"])
    printed = capsys.readouterr().out
    assert "not run: accuracy: needs --run" in printed and "jax" in printed and methods[-1] in printed
    with (tmp_path / f"{name}.csv").open() as file:
        assert [row["method"] for row in csv.DictReader(file)] == methods
    if name == "table4":  # a coarser start looks at more
        assert found["rows"][1]["active_P2"] >= found["rows"][2]["active_P2"]
    if name == "table6":
        assert found["rows"][1]["active_P2"] < found["rows"][2]["active_P2"]


@pytest.mark.parametrize(
    ("backbone", "flavor"),
    [
        ("resnet10", "msra"),
        ("efficientnet_lite0", "efficientnet_lite"),
        ("mobilenet_v2", "torchvision"),
        ("shufflenet_v2", "torchvision"),
    ],
)
def test_random_weights_have_their_networks_flavor(backbone, flavor):
    config = nnx.eval_shape(lambda: random_model(backbone, 2, 8)).config
    assert (config.backbone.name, config.backbone.flavor) == (backbone, flavor)


@pytest.mark.slow
def test_table_from_a_run(monkeypatch, tmp_path, run_folder):
    found = call(monkeypatch, tmp_path, "table6", "--run", str(run_folder), "--contexts", "0", "2")
    assert [row["method"] for row in found["rows"]] == ["dense", "1x1", "5x5"]
    assert all(0 <= row["AP"] <= 100 for row in found["rows"]) and not any("AP" in x for x in found["not_run"])
    assert_numbers(found["rows"], "ms_p50", "speed_up", "fps")


def test_ablation_of_runs(monkeypatch, tmp_path, run_folder, retinanet_folder):
    found = call(monkeypatch, tmp_path, "table3", "--runs", str(retinanet_folder), str(run_folder))
    marks = [[row[part] for part in ("HR", "RB", "QH", "CSQ")] for row in found["rows"]]
    assert marks == [["", "", "", ""], ["x", "x", "x", ""], ["x", "x", "x", "x"]]
    assert [row["paper_AP"] for row in found["rows"]] == [37.46, 38.53, 38.36]
    assert found["rows"][1]["speed_up"] == 1.0  # QueryDet's dense heads, though RetinaNet was named first
    assert_numbers(found["rows"], "ms_p50", "speed_up", "fps")
    # Each row is its own model's.
    alone = call(monkeypatch, tmp_path / "alone", "table1", "--runs", str(retinanet_folder))
    assert alone["rows"][0]["AP"] == found["rows"][0]["AP"]


@pytest.mark.slow
def test_the_papers_numbers_beside_fcos_are_those_of_its_table(monkeypatch, tmp_path, run_folder, fcos_folder):
    found = call(monkeypatch, tmp_path / "3", "table3", "--runs", str(fcos_folder), str(run_folder))
    published = {row["method"]: row["paper_AP"] for row in found["rows"]}
    name, other = fcos_folder.name, run_folder.name
    assert published == {f"{name} dense": 40.05, f"{name} csq": 39.49, f"{other} dense": 38.53, f"{other} csq": 38.36}
    # Tables 4 to 6 are of RetinaNet alone.
    found = call(monkeypatch, tmp_path / "6", "table6", "--run", str(fcos_folder), "--contexts", "2")
    assert [row["paper_AP"] for row in found["rows"]] == [None, None]
    assert_numbers(found["rows"], "ms_p50", "speed_up")
    found = call(monkeypatch, tmp_path / "end", "end-to-end", "--run", str(fcos_folder))
    assert found["not_run"][0].startswith("FCOS P3..P7: needs --plain-run")


def test_ablation_refuses_what_cannot_be_compared(monkeypatch, tmp_path, run_folder):
    with pytest.raises(ConfigError, match="--runs: table3 needs trained models"):
        call(monkeypatch, tmp_path, "table3")
    with pytest.raises(ConfigError, match="--base other: is not one of --runs"):
        call(monkeypatch, tmp_path, "table3", "--runs", str(run_folder), "--base", "other")
    config = json.loads((run_folder / "config.json").read_text())
    config["data"]["test_short"] = 32
    other = tmp_path / "other"
    shutil.copytree(run_folder, other, ignore=shutil.ignore_patterns("data"))
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="data.test_short is 32, that of .* 64"):
        call(monkeypatch, tmp_path / "out", "table3", "--runs", str(run_folder), str(other))


def test_parts_of_a_model():
    uniform = LossConfig(level_weighting="uniform")
    assert parts(ModelConfig(), "csq") == {"HR": True, "RB": True, "QH": True, "CSQ": True}
    assert parts(ModelConfig(min_level=3, loss=uniform, query=QueryConfig(enabled=False)), "dense") == {
        "HR": False, "RB": False, "QH": False, "CSQ": False
    }  # fmt: skip
    assert parts(ModelConfig(loss=LossConfig(level_weights=(2.0,) * 6)), "dense")["RB"] is False
    assert parts(ModelConfig(loss=LossConfig(level_weighting="linear")), "dense")["RB"] is True


def test_end_to_end_from_random_weights(monkeypatch, tmp_path):
    found = call(monkeypatch, tmp_path, "end-to-end", *SMALL, *"--sizes 64 64 --active 0.3 --batch 2".split())
    names = ["dense P2..P7", "RetinaNet P3..P7", "CSQ 30%", "CQ 3%", "CCQ 3%"]
    assert [row["method"] for row in found["rows"]] == names
    assert {row["size"] for row in found["rows"]} == {"64x64"}
    assert_numbers(found["rows"], "ms_p50", "speed_up")


@pytest.mark.slow
def test_end_to_end_from_a_run(monkeypatch, tmp_path, run_folder):
    found = call(monkeypatch, tmp_path, "end-to-end", "--run", str(run_folder))
    assert [row["method"] for row in found["rows"]] == ["dense P2..P7", "CSQ", "CQ", "CCQ"]
    assert found["not_run"][0].startswith("RetinaNet P3..P7: needs --plain-run")


def test_figure2_counts_what_the_arithmetic_says(monkeypatch, tmp_path):
    found = call(monkeypatch, tmp_path, "figure2", *SMALL, *"--height 64 --width 96 --rounds 1".split())
    rows = {row["module"]: row for row in found["rows"]}
    plain, dense, sparse = "RetinaNet", "RetinaNet + P2", "QueryDet, CSQ"
    for row in rows.values():
        assert all(value is None or value > 0 for key, value in row.items() if key != "module")
    assert rows["heads P2"][f"{plain} GFLOP"] is None and rows["query head P4"][f"{dense} GFLOP"] is None
    # 2 towers of 4 layers and the predictions, 9 anchors of 2 classes and 4 deltas, without what the border saves.
    per_cell = 2 * 9 * 8 * (8 * 8 + 18 + 36)
    assert rows["heads P2"][f"{dense} GFLOP"] == pytest.approx(16 * 24 * per_cell / 1e9, rel=0.15)
    assert rows["heads P3"][f"{dense} GFLOP"] == rows["heads P3"][f"{plain} GFLOP"]
    for system in (plain, dense, sparse):
        parts = [row[f"{system} GFLOP"] or 0 for name, row in rows.items() if name != "sum"]
        assert rows["sum"][f"{system} GFLOP"] == pytest.approx(sum(parts))
    assert 0 < found["p2_p3_head_flop_share"]


def test_figure4(monkeypatch, tmp_path, run_folder):
    found = call(
        monkeypatch, tmp_path, "figure4", "--run", str(run_folder), *"--thresholds 0.42 0.48 --scales 1".split()
    )
    assert [row["threshold"] for row in found["rows"]] == ["dense", "0.42", "0.48"]
    assert found["rows"][1]["active_P3"] >= found["rows"][2]["active_P3"] > 0
    assert {row["short side"] for row in found["rows"]} == {64}


def test_figure4_needs_a_run(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="--run: figure4 needs a trained model"):
        call(monkeypatch, tmp_path, "figure4")


def test_sizes_of_figure4():
    data = DataConfig(test_short=800, test_max=1333, test_canvases=((800, 1344), (1344, 800)))
    scaled = at_scale(data, 0.75)
    assert (scaled.test_short, scaled.test_max) == (600, 1000)
    assert scaled.test_canvases == ((608, 1024), (1024, 608))


def test_precision_from_a_run(monkeypatch, tmp_path, run_folder):
    found = call(monkeypatch, tmp_path, "precision", "--run", str(run_folder), "--min-score", "0.2")
    assert [row["method"] for row in found["rows"]] == [
        f"{query} {dtype}" for dtype in ("float32", "bfloat16") for query in ("dense", "csq")
    ]
    half = found["rows"][2]
    assert 0.5 < half["found_again"] <= 1 and 0 <= half["score_change"] < 0.05


@pytest.mark.slow
def test_precision_from_random_weights(monkeypatch, tmp_path):
    found = call(monkeypatch, tmp_path, "precision", *SMALL, *ONE_SIZE)
    assert_numbers(found["rows"], "ms_p50", "speed_up")


def test_agreement_by_hand():
    def result(image: int, category: int, box: list[float], score: float) -> dict:
        return {"image_id": image, "category_id": category, "bbox": box, "score": score}

    reference = [
        result(1, 1, [0, 0, 10, 10], 0.9),
        result(1, 2, [50, 50, 10, 10], 0.5),
        result(2, 1, [0, 0, 9, 9], 0.1),
    ]
    other = [result(1, 1, [0, 0, 10, 10.5], 0.8), result(1, 1, [0, 0, 10, 5], 0.9), result(1, 1, [50, 50, 10, 10], 0.5)]
    found, change = agreement(reference, other, 0.3)
    assert found == 0.5 and change == pytest.approx(0.1)
    assert agreement(reference, other, 0.95) == (None, None)


def test_queries_on_other_levels():
    fires = clustered((5, 7), 3)
    assert fires.any() and not fires.all()
    np.testing.assert_array_equal(at_level(fires, 4, 4, (5, 7)), fires)
    fine = at_level(fires, 4, 3, (10, 14))
    np.testing.assert_array_equal(fine, np.kron(fires, np.ones((2, 2), bool)))
    coarse = at_level(fires, 4, 5, (3, 4))
    padded = np.pad(fires, ((0, 1), (0, 1)))
    for y, x in np.ndindex(3, 4):
        assert coarse[y, x] == padded[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].any()


def test_a_report_shows_what_is_missing(capsys, tmp_path):
    rows = [{"name": "a", "part": 0.5, "more": 1}, {"name": "b", "part": None}]
    report = Report("thing", "A thing", [Column("name", "name"), Column("part", "part", share)], rows, not_run=["x: y"])
    report.publish(tmp_path / "out", RunOrRandomNetwork())
    printed = capsys.readouterr().out
    assert printed.startswith("A thing\n") and "50.0%" in printed and "not run: x: y" in printed
    assert report.table().splitlines()[-1].split() == ["b", "-"]
    assert (tmp_path / "out" / "thing.csv").read_text().splitlines() == ["name,part,more", "a,0.5,1", "b,,"]
    content = json.loads((tmp_path / "out" / "thing.json").read_text())
    assert content["rows"] == rows and content["arguments"]["images"] == 100 and content["machine"]["jax"]
    assert not (tmp_path / "out" / "thing.png").exists()  # nothing was to be drawn


def test_a_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import charts

    for name, draw in {
        "lines": lambda figure: charts.lines(figure, {"a": ([1, 2], [3, 4])}, x="x", y="y", title="t", log_x=True),
        "bars": lambda figure: charts.bars(figure, ["a", "b"], {"p": [1, 2], "q": [3, 4]}, x="x", title="t"),
    }.items():
        Report(name, "t", [Column("k", "k")], [{"k": 1}], draw=draw).publish(tmp_path, RunOrRandomNetwork())
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_every_command_says_what_it_is(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--help"])
    with pytest.raises(SystemExit):
        main()
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)
    assert all(kind.__doc__ for kind, _ in COMMANDS.values())


def test_runtimes_agree_before_they_are_timed(monkeypatch, tmp_path, run_folder):
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package, reason="needs requirements-onnx.txt")
    found = call(monkeypatch, tmp_path, "onnx", "--run", str(run_folder), "--images", "2", "--threads", "1")
    rows = {(row["runtime"], row["method"]): row for row in found["rows"]}
    assert {("JAX", "dense"), ("JAX", "csq"), ("ONNX Runtime", "dense"), ("ONNX Runtime", "csq")} <= set(rows)
    assert_numbers(found["rows"], "ms_p50", "ms_p90", "speed_up")
    for method in ("dense", "csq"):
        row = rows["ONNX Runtime", method]
        assert row["found"] == 1 and row["scores"] <= 1e-5 and row["boxes"] <= 1e-3, row
        assert rows["ONNX Runtime int8", method]["over_float32"] > 0


def test_the_loader_is_timed_by_parts_and_cores_follow(monkeypatch, tmp_path):
    words = "--number 2 --rounds 2 --short 320 --devices 4 --rates 10"
    found = call(monkeypatch, tmp_path, "loader", *words.split())
    assert_numbers(found["rows"], "ms_p50", "ms_p90", "per_second")
    whole = found["rows"][-1]
    assert whole["part"] == "all, loader"
    assert found["cores"]["10"] == pytest.approx(40 / whole["per_second"])
    with pytest.raises(ConfigError, match="--short 900"):
        call(monkeypatch, tmp_path, "loader", "--number", "1", "--short", "900")
