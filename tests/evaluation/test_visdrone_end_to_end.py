"""VisDrone, as distributed, through eval.py to its official metrics."""

from __future__ import annotations

import csv
import dataclasses
import json

import numpy as np
import pytest
import small_detector
from PIL import Image

from querydet_jax import build_model, export_weights
from querydet_jax.cli.eval import evaluate as run_eval
from querydet_jax.config import Config, DataConfig, save_config
from querydet_jax.data.readers.visdrone import VisDroneDataset
from querydet_jax.evaluation.visdrone import VisDroneImage, evaluate_visdrone
from querydet_jax.evaluation.visdrone_files import read_result_file

SIZES = {"0000001_b": (96, 128), "0000002_a": (90, 120), "0000001_c": (96, 128)}
METHODS = ("dense", "csq")


def write_truth(split, rows_of):
    for name in SIZES:
        lines = [",".join(map(str, row)) + "\n" for row in rows_of.get(name, [])]
        (split / "annotations" / f"{name}.txt").write_text("".join(lines))


def evaluate(root, *words):
    """Run the evaluation without its slow extras; return the methods in its report."""
    line = [f"{root}/config.json", "--weights", f"{root}/weights.npz", "--out", f"{root}/out"]
    run_eval([*line, "--pictures", "0", "--no-query-recall", *words], "querydet eval")
    return json.loads((root / "out" / "report.json").read_text())["methods"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Three images of two sizes, and a model with random weights that finds half of the annotated objects."""
    root = tmp_path_factory.mktemp("visdrone")
    split = root / "VisDrone2019-DET-val"
    for name in ("images", "annotations"):
        (split / name).mkdir(parents=True)
    for seed, (name, shape) in enumerate(SIZES.items()):
        Image.fromarray(small_detector.pictures(1, *shape, seed)[0]).save(split / "images" / f"{name}.png")
    write_truth(split, {})
    backbone = dataclasses.replace(small_detector.MODEL.backbone, name="resnet10")
    model = dataclasses.replace(small_detector.MODEL, num_classes=10, backbone=backbone)
    config = Config(
        name="tiny",
        model=model,
        data=DataConfig(
            source="visdrone", root=str(root), patches=True, test_short=128, test_max=128, test_canvases=((96, 128),)
        ),
        inference=dataclasses.replace(small_detector.BASE, capacities=(0.5,), score_threshold=0.01, max_detections=60),
    )
    save_config(config, root / "config.json")
    export_weights(small_detector.randomize(build_model(model, seed=0), seed=16), root / "weights.npz")
    evaluate(root, "--methods", "csq")
    truth = {}
    for name in SIZES:
        found = read_result_file(root / "out" / "visdrone_csq" / f"{name}.txt")
        rows = np.maximum(np.rint(found[::3]).astype(int), 1)
        rows[:, 4] = 1
        missed = [(5, 5, 20, 20, 1, category, 0, 0) for category in range(1, 12)]
        truth[name] = [(0, 0, 12, 12, 0, 0, 0, 0), *missed, *rows[:, [0, 1, 2, 3, 4, 5, 4, 4]].tolist()]
    write_truth(split, truth)
    return root


def test_official_figures_are_those_of_the_files_written(root, capsys):
    methods = evaluate(root)
    printed = capsys.readouterr().out
    dataset = VisDroneDataset(root / "VisDrone2019-DET-val")
    assert list(methods) == list(METHODS)
    for name in METHODS:
        images = []
        for i in range(len(dataset)):
            path = (root / "out" / f"visdrone_{name}" / dataset.file_name(i)).with_suffix(".txt")
            rows = read_result_file(path)
            assert 0 < len(rows) <= 60 and (np.diff(rows[:, 4]) <= 0).all()
            images.append(VisDroneImage(path.stem, dataset.size(i), dataset.official_truth(i), rows))
        official = evaluate_visdrone(images)
        assert methods[name]["visdrone"] == json.loads(official.to_json())
        assert methods[name]["num_images"] == 3 and methods[name]["metrics"]["AP50"] > 1  # COCO metrics, too
        assert official.metrics["AP50"] > 1
    rows = [line.split() for line in printed[printed.index("\nmethod") :].splitlines()[1:5]]
    assert rows[0][:8] == ["method", "VisDrone", "AP", "AP50", "AP75", "AR500", "COCO", "AP"]
    assert rows[3][:5] == ["csq", *(f"{official.metrics[key]:.2f}" for key in ("AP", "AP50", "AP75", "AR500"))]
    for part in ("by images (official)", "precision, IoU 75 %", "awning-tricycle", "COCO evaluation"):
        assert part in printed
    # The curves, as numbers.
    for protocol in ("coco", "visdrone"):
        with (root / "out" / f"curves_{protocol}.csv").open() as file:
            lines = list(csv.DictReader(file))
        assert {line["method"] for line in lines} == set(METHODS) and len(lines) == 2 * (11 + 10)
        expected = (methods["csq"] if protocol == "coco" else methods["csq"]["visdrone"])["metrics"]
        means = {line["iou"]: line for line in lines if (line["method"], line["class"]) == ("csq", "mean of classes")}
        for iou, key in {"0.50": "AP50", "0.75": "AP75", "0.50:0.95": "AP"}.items():
            assert float(means[iou]["AP"]) == pytest.approx(expected[key], abs=1e-3)


def test_a_later_evaluation_replaces_the_result_files(root, capsys):
    folder = root / "out" / "visdrone_csq"
    assert sorted(path.name for path in folder.iterdir()) == ["0000001_b.txt", "0000001_c.txt", "0000002_a.txt"]
    methods = evaluate(root, "--methods", "csq", "--images", "2")
    assert sorted(path.name for path in folder.iterdir()) == ["0000001_b.txt", "0000001_c.txt"]
    assert methods["csq"]["visdrone"]["num_images"] == 2
    assert "visdrone_csq/*.txt, curves_visdrone.csv" in capsys.readouterr().out
    assert not list((root / "out").glob(".*"))  # no temporary files remain
