"""The paper's numbers, the cards that give them, and `benchmark.py paper`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from unittest.mock import create_autospec

import jax
import numpy as np
import pytest
from flax import nnx
from small_detector import BASE, MODEL, model

from benchmarks.flops import counted, gflop, inference_gflop
from benchmarks.main import main
from benchmarks.paper import numbers as paper
from benchmarks.subjects import laid_out_queries
from querydet_jax.config import InferenceConfig, load_card, load_config, override, save_config
from querydet_jax.inference.detector import Detector
from querydet_jax.models import build_model
from querydet_jax.runtime.errors import ConfigError, QueryDetError

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
FULL_SIZE = (256, 320)


def run(monkeypatch: pytest.MonkeyPatch, out: Path, *words: str) -> dict:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "paper", *words, "--out", str(out)])
    main()
    return json.loads((out / "paper.json").read_text())


def test_the_tables_are_complete() -> None:
    assert {number: len(table.rows) for number, table in paper.TABLES.items()} == {
        1: 6, 2: 3, 3: 6, 4: 5, 5: 4, 6: 7, 7: 6, 8: 3, 9: 2
    }  # fmt: skip
    for number, table, row in paper.rows():
        assert len(row.values) == len(table.columns), (number, row.name)
        ap, ap50 = (table.value(row, column) for column in ("AP", "AP50"))
        assert ap is not None and ap50 is not None and ap < ap50
        base = table.row(row.over or row.name)
        assert base is not None and base.query == "dense" and table.speed_up(base) == 1.0, (number, row.name)
    assert all(len({row.name for row in table.rows}) == len(table.rows) for table in paper.TABLES.values())


def test_what_the_paper_says_of_its_own_numbers() -> None:
    def column(number: int, name: str, column: str = "AP") -> float | None:
        row = paper.TABLES[number].row(name)
        assert row is not None
        return paper.TABLES[number].value(row, column)

    # Abstract and section 4: +1.0 AP and +2.0 APs on COCO, 3.0x and 2.3x with CSQ.
    assert column(1, "QueryDet") - column(1, "RetinaNet") == pytest.approx(1.07)
    assert column(1, "QueryDet", "APs") - column(1, "RetinaNet", "APs") == pytest.approx(2.0)
    assert paper.columns(1, "QueryDet, CSQ")["paper_speed_up"] == pytest.approx(3.07, abs=0.005)
    assert paper.columns(2, "QueryDet, CSQ")["paper_speed_up"] == pytest.approx(2.37, abs=0.005)
    assert column(2, "QueryDet, CSQ", "APs") is None
    assert paper.columns(7, "ResNet-50")["paper_AP"] is None and paper.columns(None, "dense")["paper_FPS"] is None
    # A run of Faster R-CNN with P2, a query head and losses that are not re-balanced.
    assert paper.ablation("faster_rcnn", HR=True, RB=False, QH=True, CSQ=True)["paper_AP"] == 38.20
    assert paper.ablation("fcos", HR=True, RB=False, QH=False, CSQ=False)["paper_AP"] is None
    assert paper.ablation("another", HR=True, RB=True, QH=True, CSQ=True)["paper_AP"] is None


@pytest.mark.parametrize("name", sorted({row.card for _, _, row in paper.rows()}))
def test_every_card_of_the_papers_tables_exists_and_names_its_numbers(name: str) -> None:
    path = CONFIGS / f"{name}.py"
    card = load_card(path)
    numbers = [
        (number, table.value(row, column))
        for number, table, row in paper.rows()
        for column in ("AP", "FPS")
        # Tables 4 to 6 are measured by one card, which tells where; it gives the numbers of its own row.
        if row.card == name and (number not in (4, 5, 6) or name != "coco_querydet_r50")
    ]
    for number, value in numbers:
        assert re.search(rf"Tables? (\d(,| and) )*{number}\b", card.title), number
        assert f"{value:.2f}" in card.reproduces, (number, value)
    config = load_config(path)
    for _, _, row in paper.rows():
        if row.card == name:
            override(config, {"inference.query": row.query, **{f"inference.{k}": v for k, v in row.changes.items()}})
    assert card.command.startswith(f"python train.py configs/{name}.py --data.root ") and card.needs


def test_the_listing(monkeypatch, capsys, tmp_path) -> None:
    found = run(monkeypatch, tmp_path, "--configs", str(CONFIGS), "--tables", "6", "8")
    assert [row["table"] for row in found["rows"]] == ["Table 6"] * 7 + ["Table 8"] * 3
    context = found["rows"][1]
    assert context["evaluate"] == "python eval.py runs/coco_querydet_r50 --methods csq --inference.context 0"
    assert context["train"].startswith("python train.py configs/coco_querydet_r50.py --data.root COCO")
    assert (context["needs"], context["paper_AP"], context["paper_APm"]) == ("COCO and an accelerator", 38.25, 41.97)
    # 40,711,669 trained and what freeze_at freezes.
    assert context["parameters"] == 40_934_069 and "gflop" not in context and "ms_p50" not in context
    assert found["rows"][8]["parameters"] != found["rows"][7]["parameters"]
    printed = capsys.readouterr().out
    assert "--methods csq --inference.context 5" in printed and "benchmark.py table6 --run" in printed
    assert "not run: FLOPs: --flops" in printed and "python train.py configs/coco_fcos_r50.py" in printed


def test_figures_and_absent_cards_are_listed(monkeypatch, capsys, tmp_path) -> None:
    found = run(monkeypatch, tmp_path / "out", "--configs", str(tmp_path))
    assert [row["table"] for row in found["rows"][-2:]] == ["Figure 2", "Figure 4"]
    assert found["rows"][-1]["evaluate"].startswith("python benchmark.py figure4 --run runs/coco_querydet_r50")
    assert all(row["paper_AP"] and row["evaluate"] and row.get("parameters") is None for row in found["rows"][:-2])
    assert f"coco_fcos_r50: {tmp_path}/coco_fcos_r50.py is absent" in "\n".join(found["not_run"])


def test_flops_and_speed_of_small_cards(monkeypatch, tmp_path) -> None:
    """With the names of Table 9, and a model that compiles quickly."""
    folder = tmp_path / "configs"
    folder.mkdir()
    small = {
        "model": MODEL,
        "model.backbone.name": "resnet10",
        "model.max_level": 5,
        "model.loss.level_weighting": "uniform",
        "inference": BASE,
        "inference.capacities": (0.25,),
    }
    save_config(override(load_config(CONFIGS / "demo.py"), small), folder / "small.json")
    (folder / "coco_querydet_faster_rcnn_r50.py").write_text(
        "from pathlib import Path\nfrom querydet_jax.config import Card, load_config\n"
        'card = Card(title="A toy", reproduces="9", command="python train.py small.json", pod="-", needs="a toy")\n'
        'config = load_config(Path(__file__).with_name("small.json"), {"data.test_canvases": ((64, 96),)})\n'
    )
    found = run(monkeypatch, tmp_path, *"--tables 9 --flops --speed --rounds 2 --configs".split(), str(folder))
    dense, sparse = found["rows"]
    assert dense["speed_up"] == 1.0 and (dense["needs"], dense["train"]) == (
        "a toy",
        "python train.py small.json",
    )
    for row in found["rows"]:
        assert all(np.isfinite(row[key]) and row[key] > 0 for key in ("gflop", "ms_p50", "ms_p90", "speed_up"))
    assert sparse["paper_speed_up"] == pytest.approx(19.03 / 17.57)


def test_flops_of_the_methods() -> None:
    """By arithmetic: the methods share all but the fine levels."""
    detector = nnx.eval_shape(lambda: build_model(MODEL))
    queries = laid_out_queries(*FULL_SIZE, 0.03)
    options = InferenceConfig(chunk=8, context=1)
    found = {
        name: inference_gflop(detector, override(options, changes), FULL_SIZE, queries)
        for name, changes in {
            "dense": {"query": "dense"},
            "csq": {},
            "wider": {"context": 3},
            "cq": {"query": "cq"},
            "ccq": {"query": "ccq"},
        }.items()
    }
    assert found["csq"] < found["wider"] < found["dense"] < found["ccq"]
    assert found["csq"] < found["cq"]
    # CCQ is dense inference and the query head, two layers and the prediction, on P4 and P3.
    cells = sum(FULL_SIZE[0] * FULL_SIZE[1] // 4**level for level in (3, 4))
    assert found["ccq"] - found["dense"] == pytest.approx(2 * 9 * 16 * (16 + 16 + 1) * cells / 1e9, rel=0.06)
    # Without queries nothing is left of the fine levels; with queries everywhere at least the dense work is done.
    none, all_cells = (np.full_like(queries, value) for value in (False, True))
    assert inference_gflop(detector, options, FULL_SIZE, none) < found["csq"]
    assert inference_gflop(detector, options, FULL_SIZE, all_cells) >= found["dense"]


def test_flops_of_a_program_are_its_arithmetic() -> None:
    a, b = np.zeros((8, 16), np.float32), np.zeros((16, 32), np.float32)
    assert gflop(lambda a, b: a @ b, a, b) == pytest.approx(2 * 8 * 16 * 32 / 1e9)
    # Weights change nothing.
    shapes = nnx.eval_shape(lambda: build_model(MODEL))
    dense = override(BASE, {"query": "dense"})
    counts = [counted(Detector(m, dense).lower((1, 64, 96))) for m in (shapes, model(max_level=7))]
    assert counts[0] == counts[1] > 0


def test_a_backend_that_counts_nothing() -> None:
    program = create_autospec(jax.stages.Lowered, instance=True)
    program.cost_analysis.return_value = None
    with pytest.raises(QueryDetError, match="backend cpu counts no FLOPs: set JAX_PLATFORMS=cpu"):
        counted(program)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--tables 10", "--tables 10: the paper has Tables 1 to 9"),
        ("--size 100 64", "multiples of 32"),
        ("--size 0 64", "multiples of 32, or 0 0"),
    ],
)
def test_what_cannot_be_listed(monkeypatch, tmp_path, words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(monkeypatch, tmp_path, *words.split())
    assert not list(tmp_path.iterdir())
