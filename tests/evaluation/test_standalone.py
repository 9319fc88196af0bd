"""Scoring of result files by `querydet score`, and the curves it writes."""

from __future__ import annotations

import csv
import json
import sys

import numpy as np
import pytest
from PIL import Image

from querydet_jax.cli.score import score
from querydet_jax.evaluation import evaluate, output
from querydet_jax.evaluation.standalone import score_coco, score_visdrone
from querydet_jax.evaluation.visdrone import VisDroneImage, evaluate_visdrone
from querydet_jax.runtime.errors import DataError

# One car found, one found with a loose box, one bus missed; an ignored region over the right edge.
TRUTH = "10,10,20,20,1,4,0,0\n60,10,20,20,1,4,0,0,\n10,60,30,20,1,9,0,0\n90,60,40,40,0,0,0,0\n"
RESULTS = "10,10,20,20,0.9,4,-1,-1\n60,10,20,12,0.8,4,-1,-1\n95,62,10,10,0.7,9,-1,-1\n2,2,5,5,0.6,4\n"


@pytest.fixture
def split(tmp_path):
    """Images a (100x120) and b, which has no objects, with results of both."""
    for folder in ("val/images", "val/annotations", "results"):
        (tmp_path / folder).mkdir(parents=True)
    for name, truth, results in (("a", TRUTH, RESULTS), ("b", "", "")):
        Image.new("RGB", (120, 100)).save(tmp_path / "val" / "images" / f"{name}.jpg")
        (tmp_path / "val" / "annotations" / f"{name}.txt").write_text(truth)
        (tmp_path / "results" / f"{name}.txt").write_text(results)
    return tmp_path


def rows(text):
    return np.array([[float(v) for v in line.strip(",").split(",")[:6]] for line in text.splitlines()])


def test_visdrone_files_score_as_their_rows(split):
    images = [
        VisDroneImage("a", (100, 120), rows(TRUTH), rows(RESULTS)),
        VisDroneImage("b", (100, 120), np.zeros((0, 8)), np.zeros((0, 8))),
    ]
    expected = evaluate_visdrone(images).to_dict()
    assert expected["metrics"]["AP50"] == pytest.approx(50)
    for folder in ("val", "val/annotations"):
        assert score_visdrone(split / "results", split / folder).to_dict() == expected
    (split / "val" / "images").rename(split / "pictures")
    assert score_visdrone(split / "results", split / "val", split / "pictures").to_dict() == expected
    found = score_visdrone(split / "results", split / "val")
    assert "no images, so no sizes" in found.notes[-1] and "--images" in found.notes[-1]
    assert found.metrics == pytest.approx(expected["metrics"])
    (split / "results" / "b.txt").unlink()
    found = score_visdrone(split / "results", split / "val")
    assert found.notes[-1] == "no result file for 1 of the 2 images: counted as without detections"
    assert found.metrics == pytest.approx(expected["metrics"])


def test_bad_visdrone_folders_are_named(split, tmp_path):
    def message():
        with pytest.raises(DataError) as error:
            score_visdrone(split / "results", split / "val")
        assert "\n" not in str(error.value)
        return str(error.value)

    (split / "results" / "a.txt").write_text(RESULTS + "1,2,3\n")
    assert message().startswith(f"{split}/results/a.txt: line 5: not 6 to 8 numbers")
    (split / "results" / "a.txt").write_text(RESULTS)
    (split / "val" / "annotations" / "b.txt").write_text("1,2,3,4,5,6,7,8\n")
    assert message().startswith(f"{split}/val/annotations/b.txt: line 1 has score 5")
    (split / "results" / "c.txt").write_text("")
    assert f"results/c.txt: there is no annotation file {split}/val/annotations/c.txt" in message()
    (split / "results" / "c.txt").unlink()
    (split / "val" / "images" / "b.jpg").unlink()
    assert f"annotations/b.txt: there is no image {split}/val/images/b.jpg" in message()
    for empty in (split / "nowhere", split / "val" / "images"):
        with pytest.raises(DataError, match="give the folder of the results, one text file per image"):
            score_visdrone(empty, split / "val")
    with pytest.raises(DataError, match="nothing: no such folder; give the folder of the images"):
        score_visdrone(split / "results", split / "val", tmp_path / "nothing")


@pytest.fixture
def coco(tmp_path):
    """Twenty classes with one object each; the detections' boxes get looser from class to class."""
    truth = {
        "images": [{"id": 1, "width": 300, "height": 300}],
        "categories": [{"id": k, "name": f"class {k}"} for k in range(1, 21)],
        "annotations": [{"id": k, "image_id": 1, "category_id": k, "bbox": [0, 0, 100, 100]} for k in range(1, 20)],
    }
    results = [{"image_id": 1, "category_id": k, "bbox": [0, 0, 100, 104 - 4 * k], "score": 0.5} for k in range(1, 20)]
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "results.json").write_text(json.dumps(results))
    return tmp_path


def test_coco_files_score_as_their_content(coco):
    truth, results = (json.loads((coco / f"{name}.json").read_text()) for name in ("truth", "results"))
    found = score_coco(coco / "results.json", coco / "truth.json", (1, 500))
    assert found.to_dict() == evaluate(truth, results, max_detections=(1, 500)).to_dict()
    assert "AR500" in found.metrics
    *means, whole = found.curves.means
    assert (means[0].ap, means[5].ap, whole.ap) == pytest.approx([found.metrics[k] for k in ("AP50", "AP75", "AP")])
    assert [line.precision.mean() for line in (*means, whole)] == pytest.approx([line.ap for line in (*means, whole)])
    lines = {line.name: line for line in found.curves.classes}
    assert list(lines) == list(found.per_class)
    np.testing.assert_allclose(lines["class 1"].precision, 100)
    assert (lines["class 19"].precision == 0).all()
    assert np.isnan(lines["class 20"].precision).all() and np.isnan(lines["class 20"].ap)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("results", "[{]", r"results.json: not readable as JSON \(.*line 1 column 3"),
        ("results", "{}", r"results.json: not a list of detections"),
        ("results", '[{"image_id": 1}]', r"results.json: results\[0\] has no 'category_id'; add it"),
        ("truth", "[]", r"truth.json: not a COCO annotation file"),
        ("truth", None, r"truth.json: not readable \(No such file"),
    ],
)
def test_bad_coco_files_are_named(coco, name, text, message):
    (coco / f"{name}.json").unlink()
    if text is not None:
        (coco / f"{name}.json").write_text(text)
    with pytest.raises(DataError, match=message) as error:
        score_coco(coco / "results.json", coco / "truth.json")
    assert "\n" not in str(error.value)


def test_commands(split, coco, monkeypatch, capsys):
    out = split / "out"
    for words in (
        ["visdrone", "results", "val"],
        ["coco", "results.json", "truth.json", "--max-detections", "1", "500"],
    ):
        monkeypatch.chdir(split)
        score([*words, "--out", "out"], "querydet score")
        printed = capsys.readouterr().out
        assert f"wrote to out: report.json, curves_{words[0]}.csv, " in printed and "AR500" in printed
        report = json.loads((out / "report.json").read_text())
        with (out / f"curves_{words[0]}.csv").open() as file:
            lines = list(csv.DictReader(file))
        assert {line["method"] for line in lines} == {"results"}
        assert float(lines[0]["AP"]) == pytest.approx(report["metrics"]["AP50"], abs=1e-3)
        assert lines[-1]["iou"] == "0.50" and lines[-1]["AP"] == lines[-1]["R0"] == ""  # a class without objects


@pytest.mark.parametrize("classes", [1, 20])
def test_curves_are_drawn(coco, tmp_path, classes):
    pytest.importorskip("matplotlib")
    curves = score_coco(coco / "results.json", coco / "truth.json").curves
    curves = output.Curves(curves.means, curves.classes[:classes])
    written = output.write_curves(tmp_path / "out", {"coco": {"dense": curves, "csq": curves}})
    assert written == ["curves_coco.csv", "curves_coco.png"]
    assert (tmp_path / "out" / "curves_coco.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_numbers_are_written(coco, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    curves = {"dense": score_coco(coco / "results.json", coco / "truth.json").curves}
    written = output.write_curves(tmp_path / "out", {"coco": curves})
    assert written[1] == "no .png of the curves, which needs matplotlib (pip install -r requirements-plots.txt)"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["curves_coco.csv"]


@pytest.mark.parametrize("drawn", [False, True])
def test_errors_are_explained(coco, tmp_path, monkeypatch, capsys, drawn):
    if drawn:
        pytest.importorskip("matplotlib")
    else:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    out = tmp_path / "out"
    score(
        ["coco", str(coco / "results.json"), str(coco / "truth.json"), "--errors", "--out", str(out)], "querydet score"
    )
    printed = capsys.readouterr().out
    assert "best threshold of each class" in printed and "background" in printed
    report = json.loads((out / "report.json").read_text())
    assert report["errors"]["ap50"] == pytest.approx(report["metrics"]["AP50"])
    assert (out / "errors.png").is_file() == drawn
