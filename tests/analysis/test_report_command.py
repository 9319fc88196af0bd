"""`querydet report` on a folder without image files."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from querydet_jax.analysis.findings import measure, results
from querydet_jax.analysis.tables import text
from querydet_jax.cli.report import report
from querydet_jax.config import load_config, override
from querydet_jax.data import open_dataset
from querydet_jax.runtime.errors import QueryDetError

CONFIG = str(Path(__file__).parents[2] / "configs/demo.py")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Image a with a small, a medium and a crowd box; b with many boxes, of another size; c without boxes."""
    boxes = [(1, [16, 16, 8, 8], 0, 1), (1, [20, 20, 40, 40], 0, 2), (1, [0, 0, 50, 50], 1, 2)]
    boxes += [(2, [10 * n, 10, 6, 6], 0, 2) for n in range(5)]
    content = {
        "images": [
            {"id": 1, "file_name": "a.jpg", "height": 64, "width": 64},
            {"id": 2, "file_name": "b.jpg", "height": 64, "width": 96},
            {"id": 3, "file_name": "c.jpg", "height": 64, "width": 64},
        ],
        "annotations": [
            {"id": n, "image_id": image, "category_id": k, "bbox": box, "iscrowd": crowd}
            for n, (image, box, crowd, k) in enumerate(boxes, start=1)
        ],
        "categories": [{"id": 1, "name": "car"}, {"id": 2, "name": "boat"}],
    }
    (tmp_path / "images").mkdir()
    (tmp_path / "all.json").write_text(json.dumps(content))
    return tmp_path


def call(monkeypatch: pytest.MonkeyPatch, folder: Path, words: str) -> dict:
    data = f"--data.source coco --data.root {folder}"
    for split in ("train", "val"):
        data += f" --data.{split}-annotations all.json --data.{split}-images images"
    rule = "--data.test-short 64 --data.test-max 96 --data.test-canvases 64 96 --data.max-boxes 3"
    line = [CONFIG, *data.split(), *rule.split(), "--out", str(folder / "out"), *words.split()]
    report(line, "querydet report")
    return json.loads((folder / "out" / "report.json").read_text())


def test_counts_by_hand(monkeypatch, capsys, folder):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    found = call(monkeypatch, folder, "--split val")
    images = found["images"]
    assert (images["number"], images["objects"], images["without_objects"], images["crowd"]) == (3, 7, 1, 1)
    assert images["sizes"][0] == {"height": 64, "width": 64, "images": 2}
    assert images["canvases"] == [{"height": 64, "width": 96, "images": 3, "filled": pytest.approx(7 / 9)}]
    boxes = found["boxes_an_image"]
    assert (boxes["mean"], boxes["max"], boxes["images_over"], boxes["boxes_over"]) == (pytest.approx(7 / 3), 5, 1, 2)
    assert [(row["class"], row["objects"], row["images"]) for row in found["classes"]] == [
        ("boat", 6, 2),
        ("car", 1, 1),
    ]
    assert [(row["bin"], row["input"]) for row in found["sizes"]][:4] == [
        ("0_8", 5),
        ("8_16", 1),
        ("16_32", 0),
        ("32_96", 1),
    ]
    by_bin = {row["bin"]: row for row in found["anchors"]}
    # 8 px within the 16 px anchor of the nearest cell: 64 / 256. 40 px has the 40.3 px anchor of P3.
    assert by_bin["8_16"]["P2..P7"] == {"below": 1, "between": 0, "above": 0}
    assert by_bin["32_96"]["P2..P7"]["above"] == by_bin["32_96"]["P3..P7"]["above"] == 1
    assert by_bin["all"]["objects"] == 7
    # On P4 the 40 px object makes its cells queries, too; on P3 it is not small.
    assert [(row["level"], row["small_objects"]) for row in found["queries"]] == [("P4", 7), ("P3", 6), ("P2", 6)]
    active = {(row["level"], row["context"]): row["mean"] for row in found["inference"]["active"]}
    assert len(active) == 12 and 0 < active["P2", 0] < active["P2", 5] <= 1 and active["P2", 2] < active["P3", 2]
    held = [row["held"] for row in found["inference"]["capacities"]["suggested"]]
    assert held[0] >= 0.5 and held[-1] == 1.0

    printed = capsys.readouterr().out
    values = ", ".join(f"{row['capacity']:g}" for row in found["inference"]["capacities"]["suggested"])
    assert f"inference.capacities ({values}) would hold 50 % / 99 % of the images on P3 and P2" in printed
    assert "1 images over data.max_boxes 3\n" in printed and "no report.png, which needs matplotlib" in printed
    with (folder / "out" / "images.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["image"], row["objects"], row["crowd"]) for row in rows] == [
        ("a.jpg", "2", "1"),
        ("b.jpg", "5", "0"),
        ("c.jpg", "0", "0"),
    ]
    assert float(rows[2]["active_share_P2"]) == 0 < float(rows[1]["active_share_P3"])


def test_fcos_has_no_anchors_and_the_same_queries(monkeypatch, capsys, folder):
    anchors = call(monkeypatch, folder, "--split val")
    capsys.readouterr()
    points = call(monkeypatch, folder, "--split val --model.detector fcos")
    assert points["anchors"] is None and "best anchor" not in capsys.readouterr().out
    assert points["queries"] == anchors["queries"] and points["inference"] == anchors["inference"]
    # s_l is the lower limit of the distances that P_l matches.
    nearer = call(monkeypatch, folder, "--split val --model.detector fcos --model.fcos.range-scale 2")
    assert [row["below_px"] for row in nearer["queries"]] == [row["below_px"] / 2 for row in points["queries"]]


def test_training_rule_and_images_that_fit_nothing(monkeypatch, capsys, folder):
    words = "--data.train-short 32 64 --data.train-max 96 --data.train-canvases 64 64 --data.no-crop"
    found = call(monkeypatch, folder, words + " --data.test-canvases 64 64")
    assert found["rule"] == "training: short side 32/64, one drawn per image, long side at most 96"
    assert found["images"]["may_fit_no_canvas"] == 1  # b at 64x96, whether or not that size was drawn
    assert found["inference"]["images"] == 2 and found["inference"]["left_out"] == 1
    printed = capsys.readouterr().out
    assert "1 images may fit no canvas and training refuses them: add one to data.train_canvases" in printed
    assert "which drops 2 boxes" in printed and "(1 images are left out" in printed
    with (folder / "out" / "images.csv").open() as file:
        assert [row["room_share_P3"] == "" for row in csv.DictReader(file)] == [False, True, False]


@pytest.mark.parametrize("words", ["--model.query.no-enabled --inference.query dense", "--data.test-canvases 32 32"])
def test_without_queries_or_images_for_them(monkeypatch, capsys, folder, words):
    found = call(monkeypatch, folder, f"--split val {words}")
    assert found["inference"] is None and found["anchors"][-1]["objects"] == 7
    printed = capsys.readouterr().out
    assert "no queries: model.query.enabled is off" in printed or "no image fits a canvas of inference" in printed


def test_a_data_set_without_boxes(monkeypatch, capsys, folder):
    content = json.loads((folder / "all.json").read_text())
    (folder / "all.json").write_text(json.dumps({**content, "annotations": []}))
    found = call(monkeypatch, folder, "--split val")
    assert found["images"]["objects"] == 0 and found["inference"]["room"][0]["max"] == 0
    assert "inference.capacities (0.001,) would hold 99 %" in capsys.readouterr().out


def test_bad_input(monkeypatch, folder):
    (folder / "out").write_text("a file")
    with pytest.raises(QueryDetError, match="report.json: cannot be written .*, or choose a folder that can be"):
        call(monkeypatch, folder, "")


def test_the_report_says_what_is_done_about_orientation(tmp_path):
    for inside in ("images/train", "labels/train"):
        (tmp_path / inside).mkdir(parents=True)
    tag = Image.Exif()
    tag[0x0112] = 6
    Image.new("RGB", (64, 32)).save(tmp_path / "images/train/a.jpg", exif=tag)
    (tmp_path / "labels/train/a.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    (tmp_path / "data.yaml").write_text("names: [car]")
    for exif, size, said in (("auto", "64x32", "YOLO tools apply it"), ("ignore", "32x64", "data.exif ignore")):
        config = override(load_config("demo"), {"data.source": "yolo", "data.root": str(tmp_path), "data.exif": exif})
        found = results(measure(open_dataset(config.data, "train"), config, "train"))
        lines = text(found, config)
        assert "1 of 1 pictures have an EXIF orientation, which is" in lines
        assert said in found["exif"] and size in lines
