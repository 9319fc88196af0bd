"""Evaluation of pictures in windows: as whole ones where nothing is cut, otherwise what predict finds."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from small_detector import BASE, detector, pictures

from querydet_jax.config import DataConfig
from querydet_jax.data.dataset import Annotation, Dataset
from querydet_jax.evaluation.coco import evaluate
from querydet_jax.evaluation.runner import evaluate_detectors, evaluate_tiled
from querydet_jax.inference.predictor import Predictor
from querydet_jax.inference.tiling import Tiles

DATA = DataConfig(test_short=64, test_max=96, test_canvases=((64, 96),), threads=0)
BOXES = np.array([[4, 4, 60, 60], [20, 20, 27, 30], [70, 30, 90, 58]], np.float32)


class Three(Dataset):
    classes, category_ids = ("a", "b", "c"), (1, 2, 3)

    def __init__(self):
        self.pixels = pictures(3, 64, 96, seed=2)

    def __len__(self) -> int:
        return 3

    def image_id(self, i: int) -> int:
        return 7 + i

    def file_name(self, i: int) -> str:
        return f"{7 + i}.png"

    def size(self, i: int) -> tuple[int, int]:
        return 64, 96

    def annotation(self, i: int) -> Annotation:
        return Annotation(BOXES, np.array([0, 1, 2], np.int32), np.zeros(3, bool))

    def load(self, i: int) -> np.ndarray:
        return self.pixels[i]


def evaluated(run, *arguments, **options):
    (result,) = run({"csq": detector()}, Three(), DATA, *arguments, show_progress=False, **options).values()
    return result


def test_what_is_not_cut_is_evaluated_as_whole():
    whole, tiled = evaluated(evaluate_detectors), evaluated(evaluate_tiled, Tiles())
    assert len(whole.scores.results) > 20 and whole.scores.results == tiled.scores.results
    assert whole.scores.to_dict() == tiled.scores.to_dict()
    assert whole.active == tiled.active and whole.dense_rungs == tiled.dense_rungs
    assert len(tiled.ms) == 3 and min(tiled.ms) > 0
    one = evaluated(evaluate_tiled, Tiles(), indices=[1])
    assert {entry["image_id"] for entry in one.scores.results} == {8} and len(one.ms) == 1


def test_what_is_cut_is_evaluated_as_predicted(tmp_path):
    dataset = Three()
    files = [tmp_path / dataset.file_name(i) for i in range(3)]
    for file, pixels in zip(files, dataset.pixels, strict=True):
        Image.fromarray(pixels).save(file)
    tiled = evaluated(evaluate_tiled, Tiles(2, 0.25))
    predictor = Predictor(
        detector(), name="small", classes=("a", "b", "c"), data=DATA, query="csq", nms_iou=BASE.nms_iou
    )
    found = []
    for result in predictor.predict(files, tiles=2, overlap=0.25, min_score=0.0):
        found += result.to_coco(7 + result.index)
    key = lambda entry: json.dumps(entry, sort_keys=True)  # noqa: E731
    assert len(found) > 20 and sorted(found, key=key) == sorted(tiled.scores.results, key=key)
    assert found != evaluated(evaluate_detectors).scores.results
    assert len(tiled.active[2]) == 3 * 4  # windows
    metrics = evaluate(dataset.coco_ground_truth(), found).metrics
    assert metrics["AR100"] >= 0
    for name, value in metrics.items():
        assert tiled.scores.coco.metrics[name] == pytest.approx(value, nan_ok=True)
