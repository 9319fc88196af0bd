"""Generated scenes and their storage."""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pytest

from querydet_jax.config import DataConfig
from querydet_jax.data import open_dataset
from querydet_jax.data.scenes.layouts import CLASSES, draw_scene
from querydet_jax.runtime.errors import ConfigError, DataError

DATA = DataConfig(scenes_train=6, scenes_val=2, scenes_size=(96, 96), scenes_seed=3)


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene((1, 0, i), (160, 192)) for i in range(48)]


def test_a_scene_is_a_function_of_its_seed():
    first, again, other = draw_scene((1, 2), (96, 128)), draw_scene((1, 2), (96, 128)), draw_scene((1, 3), (96, 128))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert first[0].shape == (96, 128, 3) and first[0].dtype == np.uint8
    assert (first[0] != other[0]).mean() > 0.5


def test_boxes_are_valid(scenes):
    for image, boxes, classes in scenes:
        assert image.shape == (160, 192, 3)
        assert boxes.dtype == np.float32 and classes.dtype == np.int32
        assert boxes.shape == (len(classes), 4) and len(classes) <= 25
        assert (boxes >= 0).all() and (boxes <= [192, 160, 192, 160]).all()
        sizes = np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
        assert ((sizes >= 5.99) & (sizes <= 48.01)).all()
        assert ((classes >= 0) & (classes < len(CLASSES))).all()


def test_boxes_overlap_little(scenes):
    for _, boxes, _ in scenes:
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                sides = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0)
                smaller = min(np.prod(a[2:] - a[:2]), np.prod(b[2:] - b[:2]))
                assert np.prod(sides) <= 0.301 * smaller


def test_the_mixture(scenes):
    classes = np.concatenate([c for _, _, c in scenes])
    assert all((classes == k).sum() >= 10 for k in range(len(CLASSES)))
    boxes = np.concatenate([b for _, b, _ in scenes])
    sizes = np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
    assert 0.45 < (sizes < 16).mean() < 0.8
    counts = [len(c) for _, _, c in scenes]
    assert min(counts) == 0 and max(counts) > 12


def test_objects_show_in_the_picture(scenes):
    """Objects differ from their surroundings: pixels in a box vary more than grain alone would."""
    spread = [
        image[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))].astype(float).mean(axis=2).std()
        for image, boxes, _ in scenes
        for x0, y0, x1, y1 in boxes
    ]
    assert np.quantile(spread, 0.05) > 8


def test_stored_scenes_equal_the_generator_and_are_made_once(tmp_path):
    data = DataConfig(**{**vars(DATA), "root": str(tmp_path)})
    train, val = open_dataset(data, "train"), open_dataset(data, "val")
    assert (len(train), len(val)) == (6, 2) and train.classes == CLASSES
    for split, dataset in enumerate((train, val)):
        for i in range(len(dataset)):
            image, boxes, classes = draw_scene((3, split, i), (96, 96))
            np.testing.assert_array_equal(dataset.load(i), image)
            np.testing.assert_array_equal(dataset.annotation(i).boxes, boxes)
            np.testing.assert_array_equal(dataset.annotation(i).classes, classes)
            assert dataset.size(i) == (96, 96) and dataset.image_id(i) == i + 1
    truth = train.coco_ground_truth()
    assert len(truth["images"]) == 6
    assert [a["id"] for a in truth["annotations"]] == list(range(1, len(truth["annotations"]) + 1))
    assert {c["id"]: c["name"] for c in truth["categories"]} == {1: "car", 2: "boat", 3: "tank"}
    copied = pickle.loads(pickle.dumps(train))
    np.testing.assert_array_equal(copied.load(5), train.load(5))
    # A second opening draws nothing; other settings use another folder; TensorFlow is not imported.
    records = sorted(tmp_path.rglob("*.array_record*"))
    times = [p.stat().st_mtime_ns for p in records]
    open_dataset(data, "train")
    assert [p.stat().st_mtime_ns for p in records] == times
    open_dataset(DataConfig(**{**vars(data), "scenes_seed": 4, "scenes_train": 1, "scenes_val": 1}), "val")
    assert len(sorted(tmp_path.rglob("*.array_record*"))) == 2 * len(records)
    assert "tensorflow" not in sys.modules


def test_an_interrupted_preparation_is_not_mistaken_for_finished(tmp_path, monkeypatch):
    from querydet_jax.data.scenes import builder as scenes_builder

    def stop(seed, size):
        if seed[2] == 3:
            raise KeyboardInterrupt
        return draw_scene(seed, size)

    data = DataConfig(**{**vars(DATA), "root": str(tmp_path)})
    with monkeypatch.context() as patch:
        patch.setattr(scenes_builder, "draw_scene", stop)
        with pytest.raises(KeyboardInterrupt):
            open_dataset(data, "train")
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.stat().st_size]
    # Leftovers of a killed process do not count either.
    setting = next(p for p in (tmp_path / "querydet_scenes").iterdir())
    (setting / "incomplete.ABCDEF_1.0.0").mkdir()
    assert len(open_dataset(data, "train")) == 6


def test_damaged_storage_is_refused(tmp_path):
    data = DataConfig(**{**vars(DATA), "root": str(tmp_path)})
    open_dataset(data, "train")
    record = next(tmp_path.rglob("*train.array_record*"))
    record.write_bytes(record.read_bytes()[:100])
    with pytest.raises(DataError, match="damaged generated scenes .*; delete the folder"):
        open_dataset(data, "train")


def test_bad_settings(tmp_path):
    for change in ({"scenes_train": 0}, {"scenes_size": (16, 96)}, {"scenes_seed": -1}):
        with pytest.raises(ConfigError, match="data.scenes_train"):
            open_dataset(DataConfig(**{**vars(DATA), "root": str(tmp_path), **change}), "train")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written .*; set data.root"):
        open_dataset(DataConfig(**{**vars(DATA), "root": str(tmp_path / "file")}), "train")


def test_other_sources_do_not_import_tensorflow_datasets():
    code = "import sys, querydet_jax.data; assert 'tensorflow_datasets' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
