"""Classes are matched by name: between training and validation files, and between a run and any file."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from querydet_jax.config import Config, DataConfig, ModelConfig
from querydet_jax.data import open_dataset, open_split
from querydet_jax.data.dataset import Dataset
from querydet_jax.evaluation.coco import ImageDetections
from querydet_jax.evaluation.scoring import score
from querydet_jax.runtime.errors import DataError

TRAIN = {"car": 1, "bus": 2, "boat": 3}
BOXES = [("car", [2, 3, 10, 12]), ("boat", [20, 5, 8, 9]), ("car", [4, 20, 12, 8]), ("boat", [30, 22, 6, 6])]


def write(root: Path, split: str, categories: dict[str, int], boxes: list[tuple[str, list[int]]]) -> None:
    (root / f"{split}2017").mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(root / f"{split}2017" / "a.png")
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 40, "width": 50}],
        "categories": [{"id": i, "name": name} for name, i in categories.items()],
        "annotations": [
            {"id": n, "image_id": 1, "category_id": categories[name], "bbox": bbox}
            for n, (name, bbox) in enumerate(boxes, 1)
        ],
    }
    (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))


def config_of(root: Path, classes: tuple[str, ...] = tuple(TRAIN), **data: Any) -> Config:
    return Config(
        classes=classes, model=ModelConfig(num_classes=len(classes)), data=DataConfig("coco", str(root), **data)
    )


def perfect(dataset: Dataset, numbers: dict[str, int], boxes: list[tuple[str, list[int]]]) -> list[ImageDetections]:
    """What a perfect model of the classes ``numbers`` finds."""
    xywh = np.array([bbox for _, bbox in boxes], np.float32)
    corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    labels = np.array([numbers[name] for name, _ in boxes])
    return [ImageDetections(dataset.image_id(0), corners, np.linspace(0.9, 0.5, len(boxes)), labels)]


@pytest.mark.parametrize(
    "categories",
    [
        {"car": 1, "bus": 2, "boat": 3},
        {"car": 3, "bus": 1, "boat": 2},
        {"boat": 7, "car": 11, "bus": 90},
        {"boat": 0, "car": 1},  # no bus here
    ],
)
def test_any_numbering_gives_the_same_ground_truth_and_scores(tmp_path, categories):
    write(tmp_path, "val", categories, BOXES)
    dataset = open_split(config_of(tmp_path), "val")
    assert dataset.classes == tuple(TRAIN) and len(dataset) == 1
    assert dataset.annotation(0).classes.tolist() == [0, 2, 0, 2]
    assert dataset.category_ids == tuple(categories.get(name) for name in TRAIN)
    found = score(dataset, perfect(dataset, {name: k for k, name in enumerate(TRAIN)}, BOXES))
    assert found.coco.metrics["AP"] == pytest.approx(100)
    # The result file uses the ids of the data set's own file.
    assert {r["category_id"] for r in found.results} == {categories["car"], categories["boat"]}
    assert {e["category_id"] for e in dataset.coco_ground_truth()["annotations"]} <= set(categories.values())
    again = pickle.loads(pickle.dumps(dataset))  # for loader processes
    assert again.annotation(0).classes.tolist() == [0, 2, 0, 2] and again.load(0).shape == (40, 50, 3)


def test_detections_of_a_class_that_the_file_lacks_are_left_out_and_counted(tmp_path):
    write(tmp_path, "val", {"boat": 5, "car": 6}, BOXES)
    dataset = open_split(config_of(tmp_path), "val")
    extra = [*BOXES, ("bus", [1, 1, 9, 9])]
    found = score(dataset, perfect(dataset, {name: k for k, name in enumerate(TRAIN)}, extra))
    assert found.coco.metrics["AP"] == pytest.approx(100) and len(found.results) == len(BOXES)
    assert any("left out 1 detections of bus" in note for note in found.coco.notes)


@pytest.mark.parametrize("unknown", ["ship", "Boat", "things", "b oat"])
def test_an_unknown_class_is_an_error_with_both_files_and_lists(tmp_path, unknown):
    write(tmp_path, "val", {"car": 1, unknown: 2}, [("car", [2, 3, 10, 12])])
    with pytest.raises(DataError) as error:
        open_split(config_of(tmp_path), "val", "runs/x/config.json")
    text = str(error.value)
    assert "instances_val2017.json" in text and "runs/x/config.json" in text and "\n" not in text
    assert f"car, {unknown}" in text and "car, bus, boat" in text and "--data.ignore-classes" in text
    assert ("is 'boat' there" in text) == (unknown in ("Boat", "b oat"))


def test_accents_in_one_or_two_characters_are_the_same_name(tmp_path):
    write(tmp_path, "val", {"ve\u0301lo": 1}, [("ve\u0301lo", [2, 3, 10, 12])])
    assert open_split(config_of(tmp_path, ("v\u00e9lo",)), "val").annotation(0).classes.tolist() == [0]


@pytest.mark.parametrize("left_out", [("things",), ("things", "bus")])
def test_categories_can_be_left_out(tmp_path, caplog, left_out):
    categories = {"things": 0, **TRAIN}
    write(tmp_path, "train", categories, [*BOXES, ("bus", [1, 1, 9, 9])])
    kept = tuple(name for name in categories if name not in left_out)
    with caplog.at_level(logging.INFO, logger="querydet_jax"):
        dataset = open_split(config_of(tmp_path, kept, ignore_classes=left_out), "train")
    assert "left out things" in caplog.text and "no boxes of" not in caplog.text
    assert dataset.classes == kept and len(dataset.annotation(0).boxes) == len(BOXES) + ("bus" in kept)
    assert {c["name"] for c in dataset.coco_ground_truth()["categories"]} == set(kept)
    assert open_dataset(DataConfig("coco", str(tmp_path), ignore_classes=left_out), "train").classes == kept


@pytest.mark.parametrize("absent", [("Things",), ("0",), ("lorry", "tram")])
def test_categories_to_leave_out_that_are_not_there_are_said(tmp_path, caplog, absent):
    write(tmp_path, "val", {"things": 0, **TRAIN}, BOXES)
    with caplog.at_level(logging.INFO, logger="querydet_jax"):
        dataset = open_dataset(DataConfig("coco", str(tmp_path), ignore_classes=(*absent, "bus")), "val")
    assert "bus" not in dataset.classes and "things" in dataset.classes
    assert f"has no {', '.join(absent)} to leave out (data.ignore_classes); it has things, " in caplog.text


def test_a_category_without_boxes_is_reported(tmp_path, caplog):
    write(tmp_path, "train", {"things": 0, **TRAIN}, BOXES)
    with caplog.at_level(logging.WARNING, logger="querydet_jax"):
        open_split(config_of(tmp_path, ("things", *TRAIN)), "train")
    assert "no boxes of things (id 0), bus (id 2)" in caplog.text and "--data.ignore-classes things bus" in caplog.text


@pytest.mark.parametrize("split", ["train", "val"])
def test_what_cannot_be_matched_is_an_error(tmp_path, split):
    write(tmp_path, split, TRAIN, BOXES)
    with pytest.raises(DataError, match="has 3 categories .* to evaluate weights, name the classes"):
        open_split(Config(model=ModelConfig(num_classes=2), data=DataConfig("coco", str(tmp_path))), split)
    with pytest.raises(DataError, match="leaves no class"):
        open_split(config_of(tmp_path, ignore_classes=tuple(TRAIN)), split)
    path = tmp_path / "annotations" / f"instances_{split}2017.json"
    path.write_text(path.read_text().replace('"bus"', '"car"'))
    with pytest.raises(DataError, match="the categories 1 and 2 are both named 'car'"):
        open_split(config_of(tmp_path), split)


def test_weights_that_name_no_classes_take_the_files_order_and_say_so(tmp_path, caplog):
    write(tmp_path, "val", {"boat": 9, "car": 2}, BOXES)
    with caplog.at_level(logging.INFO, logger="querydet_jax"):
        dataset = open_split(Config(model=ModelConfig(num_classes=2), data=DataConfig("coco", str(tmp_path))), "val")
    assert dataset.classes == ("car", "boat") and "classes in the order of" in caplog.text


def test_official_visdrone_truth_follows(tmp_path):
    split = tmp_path / "VisDrone2019-DET-val"
    for name in ("images", "annotations"):
        (split / name).mkdir(parents=True)
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(split / "images" / "a.png")
    (split / "annotations" / "a.txt").write_text("1,1,8,8,1,4,0,0\n20,5,8,9,1,1,0,0\n0,0,5,5,0,0,0,0\n")
    names = ("car", "pedestrian")
    others = "people", "bicycle", "van", "truck", "tricycle", "awning-tricycle", "bus", "motor"
    data = DataConfig("visdrone", str(tmp_path), ignore_classes=others)
    dataset = open_split(Config(classes=names, model=ModelConfig(num_classes=2), data=data), "val")
    assert dataset.annotation(0).classes.tolist() == [0, 1] and dataset.category_ids == (4, 1)
    boxes = np.array([[1, 1, 9, 9], [20, 5, 28, 14]], np.float32)
    found = score(dataset, [ImageDetections(1, boxes, np.array([0.9, 0.8]), np.array([0, 1]))])
    assert found.visdrone is not None and found.visdrone.metrics["AP"] == pytest.approx(100)
    dropped = open_dataset(DataConfig("visdrone", str(tmp_path), ignore_classes=("car",)), "val")
    assert dropped.official_truth(0)[:, 5].tolist() == [1, 0]  # the ignored region stays
