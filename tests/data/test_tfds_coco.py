"""COCO in ArrayRecord: written from a folder or from tfrecord, and read like the folder."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import pickle
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from querydet_jax.cli.prepare import prepare
from querydet_jax.config import Config, DataConfig, override
from querydet_jax.data import open_dataset, train_batches
from querydet_jax.data.prepare import coco as tfds_prepare
from querydet_jax.data.prepare.coco import prepare_coco
from querydet_jax.data.readers import tfds_coco
from querydet_jax.data.readers.images import Reading
from querydet_jax.data.readers.records import Records
from querydet_jax.data.readers.tfds_coco import COCO_CLASSES, COCO_IDS, TfdsCocoDataset, pixel_boxes, whole_areas
from querydet_jax.evaluation.coco import evaluate
from querydet_jax.runtime.errors import ConfigError, DataError

COPY = "coco/2017/1.1.0"


def encoded(seed: int, height: int, width: int, kind: str) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write_folder(root: Path, categories: list[dict[str, Any]], train: int = 7, val: int = 3) -> None:
    """COCO's own layout: alternately wide and high images, descending ids, unordered boxes with two decimals."""
    rng = np.random.default_rng(5)
    for split, count in (("train", train), ("val", val)):
        images, annotations = [], []
        (root / f"{split}2017").mkdir(parents=True)
        for n in range(count):
            h, w = (48, 72) if n % 2 else (72, 48)
            name = f"{n:012d}.jpg"
            # The suffix says JPEG; the file's bytes are kept whatever they are.
            (root / f"{split}2017" / name).write_bytes(encoded(n, h, w, "PNG" if n == 2 else "JPEG"))
            images.append({"id": 900 - n, "file_name": name, "height": h, "width": w})
            for k in range(0 if n == 1 else 4):
                x, y = np.round(rng.uniform(0, 30, 2), 2).tolist()
                box_w, box_h = np.round(rng.uniform(2, 18, 2), 2).tolist()
                annotations.append(
                    {
                        "id": 5000 - len(annotations),
                        "image_id": 900 - n,
                        "category_id": categories[int(rng.integers(len(categories)))]["id"],
                        "bbox": [x, y, box_w, box_h],
                        "area": float(np.round(box_w * box_h * 0.7, 4)),
                        "iscrowd": int(k == 3),
                    }
                )
        (root / "annotations").mkdir(exist_ok=True)
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """7 + 3 images, categories 9 "boat" and 4 "car"."""
    root = tmp_path_factory.mktemp("coco")
    write_folder(root, [{"id": 9, "name": "boat"}, {"id": 4, "name": "car"}])
    return root


@pytest.fixture(scope="module")
def prepared(folder, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tensorflow_datasets")
    prepare_coco(folder, root)
    return root


@pytest.fixture
def copy(prepared, tmp_path) -> Path:
    """A data directory to modify."""
    shutil.copytree(prepared, tmp_path / "copy")
    return tmp_path / "copy"


def assert_same(a, b, *, area: float) -> None:
    """``a`` from a folder, ``b`` from a copy of it; areas of segments agree within ``area``."""
    assert (len(a), a.classes, a.category_ids) == (len(b), b.classes, b.category_ids)
    for i in range(len(a)):
        assert (a.image_id(i), a.file_name(i), a.size(i)) == (b.image_id(i), b.file_name(i), b.size(i))
        np.testing.assert_array_equal(a.load(i), b.load(i))
        for field in ("boxes", "classes", "crowd"):
            x, y = getattr(a.annotation(i), field), getattr(b.annotation(i), field)
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y, err_msg=f"{field} of image {i}")
    x, y = a.coco_ground_truth(), b.coco_ground_truth()
    assert (x["images"], x["categories"]) == (y["images"], y["categories"])
    for p, q in zip(x["annotations"], y["annotations"], strict=True):
        assert p["area"] == pytest.approx(q["area"], abs=area)
        assert {**p, "area": 0} == {**q, "area": 0}


def test_a_copy_reads_as_its_folder(folder, prepared):
    for split, count in (("train", 7), ("val", 3)):
        a = open_dataset(DataConfig(source="coco", root=str(folder)), split)
        b = open_dataset(DataConfig(source="tfds", root=str(prepared)), split)
        assert len(b) == count and b.category_ids == (4, 9)
        assert_same(a, b, area=0.5)
        again = pickle.loads(pickle.dumps(b))
        np.testing.assert_array_equal(again.load(0), b.load(0))
    assert {type(b.image_id(0)), *map(type, b.size(0))} == {int}
    json.dumps(b.coco_ground_truth())
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(("exif", "turned"), [("auto", True), ("apply", True), ("ignore", False)])
def test_prepared_copies_remember_the_rule(tmp_path, exif, turned):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    tag = Image.Exif()
    tag[0x0112] = 6
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 24, "width": 24}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 6, 9]}],
        "categories": [{"id": 1, "name": "car"}],
    }
    source = tmp_path / "coco"
    for split in ("train", "val"):
        (source / f"{split}2017").mkdir(parents=True)
        Image.fromarray(pixels).save(source / f"{split}2017" / "a.png", exif=tag)
    (source / "annotations").mkdir()
    for split in ("train", "val"):
        (source / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    prepare_coco(source, tmp_path / "out", reading=Reading.of(DataConfig(exif=exif)))

    def load(setting: str) -> np.ndarray:
        dataset = open_dataset(DataConfig(source="tfds", root=str(tmp_path / "out"), exif=setting), "train")
        assert dataset.annotation(0).boxes.tolist() == [[1, 2, 7, 11]] and "1 of 1 pictures" in dataset.exif_note
        return dataset.load(0)

    expected = np.rot90(pixels, -1) if turned else pixels
    np.testing.assert_array_equal(load("auto"), expected)
    np.testing.assert_array_equal(load("apply" if turned else "ignore"), expected)
    np.testing.assert_array_equal(load("ignore" if turned else "apply"), pixels if turned else np.rot90(pixels, -1))


def test_a_copy_scores_as_its_folder(folder, prepared):
    truths = [
        open_dataset(DataConfig(source=source, root=str(root)), "train").coco_ground_truth()
        for source, root in (("coco", folder), ("tfds", prepared))
    ]
    rng = np.random.default_rng(0)
    results = [
        {
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "bbox": (np.array(a["bbox"]) * rng.uniform(0.9, 1.1, 4)).tolist(),
            "score": float(rng.random()),
        }
        for a in truths[0]["annotations"] * 2
    ]
    first, second = (evaluate(truth, results) for truth in truths)
    assert 5 < first.metrics["AP"] < 95
    np.testing.assert_equal(first.metrics, second.metrics)
    assert first.objects == second.objects


@pytest.mark.parametrize("processes", [0, 1])
def test_the_same_seed_gives_the_same_batches(folder, prepared, processes):
    data = DataConfig(
        train_short=(48, 64), train_max=96, train_canvases=((64, 96), (96, 64)), max_boxes=4, processes=processes
    )
    sources = []
    for source, root in (("coco", folder), ("tfds", prepared)):
        changed = dataclasses.replace(data, source=source, root=str(root))
        batches = train_batches(open_dataset(changed, "train"), changed, batch_size=2, seed=3)
        sources.append([next(batches) for _ in range(6)])
        batches.close()
    assert {b["images"].shape[1:3] for b in sources[0]} == {(64, 96), (96, 64)}
    for a, b in zip(*sources, strict=True):
        assert (a["classes"] >= 0).any()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_what_a_folder_may_hold(tmp_path, monkeypatch, caplog):
    """Boxes over the edge, boxes without area or without the field ``area``, and several files per split."""
    write_folder(tmp_path / "coco", [{"id": 1, "name": "car"}], train=5, val=1)
    path = tmp_path / "coco" / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"][0].update(bbox=[-4.5, 60, 20, 30])
    content["annotations"][1].update(bbox=[1, 1, 0, 5])
    del content["annotations"][2]["area"]
    path.write_text(json.dumps(content))
    monkeypatch.setattr(tfds_prepare, "_SHARD", 2)
    prepare_coco(tmp_path / "coco", tmp_path / "out")
    assert len(list((tmp_path / "out" / COPY).glob("coco-train.array_record-*-of-00003"))) == 3
    a = open_dataset(DataConfig(source="coco", root=str(tmp_path / "coco")), "train")
    b = TfdsCocoDataset(tmp_path / "out", "coco/2017", "train")
    for i in range(5):
        np.testing.assert_array_equal(a.annotation(i).boxes, b.annotation(i).boxes)
        np.testing.assert_array_equal(a.load(i), b.load(i))
    assert b.annotation(0).boxes[0].tolist() == [0, 60, 15.5, 72]
    truths = [d.coco_ground_truth()["annotations"][1] for d in (a, b)]
    assert truths[0]["area"] == pytest.approx(truths[1]["area"], abs=1e-6)
    # TFDS's own copies also hold boxes without area, which prepare_coco drops.
    index = dict(np.load(tmp_path / "out" / COPY / "querydet_index-train.npz"))
    index["shares"][3] = (0.5, 0.25, 0.5, 0.75)
    np.savez(tmp_path / "out" / COPY / "querydet_index-train.npz", **index)
    with caplog.at_level(logging.WARNING, logger="querydet_jax"):
        caplog.clear()
        c = TfdsCocoDataset(tmp_path / "out", "coco/2017", "train")
    assert "left out 1 of 15 boxes" in caplog.text
    assert [len(c.annotation(i).boxes) for i in range(5)] == [3, 0, 3, 4, 4]
    np.testing.assert_array_equal(c.annotation(2).boxes, b.annotation(2).boxes[1:])


def test_pixels_are_the_decimals_of_the_annotation_file():
    rng = np.random.default_rng(0)
    sizes = rng.integers(32, 4096, (20000, 2))
    sides = np.tile(sizes[:, ::-1], 2)
    boxes = np.round(np.sort(rng.random((20000, 2, 2)), axis=1).reshape(-1, 4) * sides, 2)
    shares = (boxes / sides)[:, [1, 0, 3, 2]].astype(np.float32)
    assert np.abs(shares[:, [1, 0, 3, 2]] * sides - boxes).max() < 3e-4
    np.testing.assert_array_equal(pixel_boxes(shares, sizes), boxes)


def test_areas_of_boxes_are_restored_and_those_of_segments_get_half_a_pixel():
    sides = np.array([[32, 32], [10.5, 10.5], [40, 40], [40, 40]])
    got = whole_areas(np.array([1024, 110, 1024, 1600]), sides)
    # 32x32, 110.25, a segment between 1024 and 1025 (medium for COCO, because above 32 x 32), 40x40
    assert got.tolist() == [1024, 110.25, 1024.5, 1600]


def test_the_index_is_made_once_and_rebuilt_for_other_records(copy, monkeypatch, caplog):
    expected = TfdsCocoDataset(copy, "coco/2017", "val").coco_ground_truth()
    path = copy / COPY / "querydet_index-validation.npz"

    made = []
    make = TfdsCocoDataset._make_index
    monkeypatch.setattr(TfdsCocoDataset, "_make_index", lambda self: made.append(1) or make(self))
    assert TfdsCocoDataset(copy, "coco/2017", "val").coco_ground_truth() == expected and not made
    for content in (path.read_bytes()[:100], b"", None):
        path.unlink() if content is None else path.write_bytes(content)
        assert TfdsCocoDataset(copy, "coco/2017", "val").coco_ground_truth() == expected
        assert path.stat().st_size > 1000
    assert len(made) == 3
    index = dict(np.load(path))
    np.savez(path, **{**index, "of": np.array([*index["of"][:-1], "coco-validation.array_record-00000-of-00001 7"])})
    assert TfdsCocoDataset(copy, "coco/2017", "val").coco_ground_truth() == expected and len(made) == 4

    path.unlink()
    monkeypatch.setattr(tfds_coco, "written_aside", _full)
    with caplog.at_level(logging.WARNING, logger="querydet_jax"):
        caplog.clear()
        assert TfdsCocoDataset(copy, "coco/2017", "val").coco_ground_truth() == expected
    assert "cannot be written (No space left)" in caplog.text and not path.exists()


def _full(path):
    raise OSError(28, "No space left")


@pytest.mark.parametrize(
    ("key", "at", "value", "message"),
    [
        ("shares", (0, 3), 1.5, "a box exceeds its image"),
        ("shares", (0, 3), np.nan, "a box exceeds its image"),
        ("labels", 0, 2, "a label outside 0 to 1"),
        ("ids", 0, 899, "two images have the same id"),
        ("areas", 0, -1, "a negative area"),
        ("names", 0, "", "an image without a file name"),
        ("names", 0, "/", "an image without a file name"),
    ],
)
def test_impossible_records_are_refused(copy, key, at, value, message):
    path = copy / COPY / "querydet_index-train.npz"
    index = dict(np.load(path))
    index[key][at] = value
    np.savez(path, **index)
    with pytest.raises(DataError, match=f"damaged copy of a data set .{message}.; prepare the copy again") as error:
        TfdsCocoDataset(copy, "coco/2017", "train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("counts", lambda a: -a),
        ("counts", lambda a: a.astype(float)),
        ("shares", lambda a: a[:-1]),
        ("sizes", lambda a: a * 0),
        ("names", lambda a: np.array([1.5] * len(a))),
        ("crowd", lambda a: a[:, None]),
    ],
)
def test_an_index_that_does_not_fit_together_is_made_again(copy, key, change, caplog):
    expected = TfdsCocoDataset(copy, "coco/2017", "train").coco_ground_truth()
    path = copy / COPY / "querydet_index-train.npz"
    index = dict(np.load(path))
    np.savez(path, **index | {key: change(index[key])})
    with caplog.at_level(logging.WARNING, logger="querydet_jax"):
        assert TfdsCocoDataset(copy, "coco/2017", "train").coco_ground_truth() == expected
    assert "querydet_index-train.npz: not readable" in caplog.text


@pytest.mark.parametrize("ids", [5, [1], [1, "2"], [1, 1], [True, 2], [1, 10**30], [1, None], {"0": 1, "1": 2}])
def test_category_ids_of_a_copy_are_checked(copy, ids):
    (copy / COPY / "metadata.json").write_text(json.dumps({"category_ids": ids}))
    with pytest.raises(DataError, match="category_ids is not a list of 2 integers, one per class, each once"):
        TfdsCocoDataset(copy, "coco/2017", "train")


def test_damaged_records_are_refused(copy):
    dataset = TfdsCocoDataset(copy, "coco/2017", "train")
    (record,) = (copy / COPY).glob("coco-train.array_record*")
    record.write_bytes(record.read_bytes()[:100])
    for read in (lambda: dataset.load(3), lambda: TfdsCocoDataset(copy, "coco/2017", "train")):
        with pytest.raises(DataError, match=f"{COPY}: damaged copy of a data set .*; prepare the copy again"):
            read()
    record.unlink()
    with pytest.raises(DataError, match="damaged copy"):
        TfdsCocoDataset(copy, "coco/2017", "train")
    (copy / COPY / "features.json").write_text("{")
    with pytest.raises(DataError, match="damaged copy"):
        TfdsCocoDataset(copy, "coco/2017", "val")


def test_class_ids_of_coco_are_known_and_others_must_be_given(copy, tmp_path):
    assert len(COCO_CLASSES) == len(set(COCO_CLASSES)) == len(COCO_IDS) == 80
    known = dict(zip(COCO_CLASSES, COCO_IDS, strict=True))
    assert [known[n] for n in ("person", "fire hydrant", "stop sign", "backpack", "dining table", "toilet")] == [
        1, 11, 13, 27, 67, 70,
    ]  # fmt: skip
    assert (known["tv"], known["book"], known["toothbrush"]) == (72, 84, 90)
    (copy / COPY / "metadata.json").unlink()  # as in a copy written by TFDS
    with pytest.raises(DataError, match="its 2 classes are not COCO's, .* write the ids to metadata.json"):
        TfdsCocoDataset(copy, "coco/2017", "val")
    (copy / COPY / "metadata.json").write_text('{"category_ids": [1]}')
    with pytest.raises(DataError, match="category_ids is not a list of 2 integers, one per class"):
        TfdsCocoDataset(copy, "coco/2017", "val")

    coco = [{"id": i, "name": name} for name, i in known.items()]
    write_folder(tmp_path / "coco", coco[::-1], train=1, val=1)
    prepare_coco(tmp_path / "coco", tmp_path / "out")
    for name in ("metadata.json", "objects-label.labels.txt"):  # class names, which `tfds convert_format` omits
        (tmp_path / "out" / COPY / name).unlink()
        dataset = TfdsCocoDataset(tmp_path / "out", "coco/2017", "val")
        assert (dataset.classes, dataset.category_ids) == (COCO_CLASSES, COCO_IDS)


def test_what_is_not_a_copy_of_coco_is_refused(copy):
    for name in ("coco/2014", "coco/2017:1.0.0", "", "coco"):
        with pytest.raises(DataError, match=r"no prepared copy .*; correct data.root .* querydet prepare coco --help"):
            TfdsCocoDataset(copy, name, "train")
    assert len(TfdsCocoDataset(copy, "coco/2017:1.1.0", "train")) == 7
    newer = copy / "coco/2017/1.10.0"
    shutil.copytree(copy / COPY, newer)
    assert TfdsCocoDataset(copy, "coco/2017", "train")._folder == newer
    info, features = (newer / name for name in ("dataset_info.json", "features.json"))
    whole = info.read_text()
    info.write_text(whole.replace('"array_record"', '"tfrecord"'))
    with pytest.raises(DataError, match=r"1.10.0: stored as tfrecord, which has no random access; convert it"):
        TfdsCocoDataset(copy, "coco/2017", "train")
    info.write_text(whole.replace('"validation"', '"minival"'))
    with pytest.raises(DataError, match=r"has the splits train, minival, not validation; correct data.tfds_name"):
        TfdsCocoDataset(copy, "coco/2017", "val")
    info.write_text(whole)
    features.write_text(features.read_text().replace('"is_crowd"', '"is_group"'))
    with pytest.raises(DataError, match=r"not laid out like coco/2017 \(no is_crowd\); correct data.tfds_name"):
        TfdsCocoDataset(copy, "coco/2017", "val")
    with pytest.raises(ConfigError, match="source tfds reads data.tfds_name under data.root; leave them empty"):
        override(Config(), {"data.source": "tfds", "data.val_images": "val2017"})


def to_tfrecord(folder: Path, out: Path) -> None:
    """The copy in TFDS's default format, tfrecord, with a split without annotations. Checksums are zeros."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.array_record*", "*.npz"))
    info = json.loads((folder / "dataset_info.json").read_text())
    for split in info["splits"]:
        (source,) = folder.glob(f"coco-{split['name']}.array_record*")
        with (out / source.name.replace("array_record", "tfrecord")).open("wb") as file:
            stored = Records(folder, split["name"]).open()[0]  # serialised
            for record in map(stored.__getitem__, range(len(stored))):
                file.write(struct.pack("<QI", len(record), 0) + record + bytes(4))
    info["splits"].append({**info["splits"][0], "name": "test"})
    (out / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "tfrecord"}))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"name": "../../coco"}, r"\(name '../../coco'\)"),
        ({"name": None}, "has no attribute 'isidentifier'"),
        ({"splits": None}, "not iterable"),
        ({"splits": [{"name": "train", "shardLengths": ["1e3"]}]}, "invalid literal for int"),
        ({"splits": [{"name": "train", "shardLengths": [float("inf")]}]}, "infinity"),
        ({"splits": [{"name": "train", "shardLengths": [-5]}]}, r"\(shardLengths {'train': \[-5\]}\)"),
    ],
)
def test_a_damaged_description_of_a_copy_is_named(tmp_path, change, problem):
    info = {"name": "coco", "splits": []} | change
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match=f"dataset_info.json: not readable as TFDS's description .*{problem}"):
        prepare_coco(tmp_path, tmp_path / "out")


def test_a_copy_in_tfrecord_is_converted(folder, prepared, tmp_path, capsys):
    source, out = tmp_path / "first" / COPY, tmp_path / "second"
    to_tfrecord(prepared / COPY, source)
    line = prepare_coco(source, out)
    assert line.startswith("wrote 7 train and 3 val images to ") and line.endswith(f"--data.root {out}")
    for split in ("train", "val"):
        a = open_dataset(DataConfig(source="coco", root=str(folder)), split)
        assert_same(a, TfdsCocoDataset(out, "coco/2017", split), area=0.5)
    assert not list(out.rglob("*tfrecord*")) and not list(out.rglob("*test*"))

    with pytest.raises(DataError, match="is the source of the images"):
        prepare_coco(source, tmp_path / "first")
    with pytest.raises(DataError, match="give a copy in tfrecord, the only convertible format"):
        prepare_coco(out / COPY, tmp_path / "third")
    (record,) = source.glob("coco-validation.tfrecord*")
    whole = record.read_bytes()
    for content, message in (
        (whole[:-30], "ends within a record; restore the file"),
        (whole[:5], "ends within a record"),
        (whole + whole, "holds 6 records instead of 3"),
        (b"", "holds 0 records instead of 3"),
        (None, "no such file"),
    ):
        record.unlink() if content is None else record.write_bytes(content)
        with pytest.raises(DataError, match=f"coco-validation.tfrecord-00000-of-00001: {message}"):
            prepare_coco(source, tmp_path / "third")
        assert not [p for p in (tmp_path / "third").rglob("*") if p.is_file()]
    info = source / "dataset_info.json"
    for text, message in (
        ("{", "not readable as JSON"),
        ('{"name": "coco", "splits": []}', "lists the splits ; need"),
    ):
        info.write_text(text)
        with pytest.raises(DataError, match=message):
            prepare_coco(source, tmp_path / "third")


def test_the_command_prepares_once_and_leaves_no_partial_copy(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"

    def command(*more: str) -> None:
        prepare(["coco", str(source), "--out", str(out), *more], "querydet prepare")

    source = tmp_path / "coco"
    shutil.copytree(folder, source)
    command()
    assert capsys.readouterr().out.startswith(f"wrote 7 train and 3 val images to {out / COPY}")
    with pytest.raises(DataError, match="is prepared already; add --overwrite"):
        command()
    (source / "val2017" / "000000000001.jpg").unlink()
    with pytest.raises(DataError, match=r"000000000001.jpg: no such image file; restore it"):
        command("--overwrite")
    assert len(TfdsCocoDataset(out, "coco/2017", "val")) == 3  # the former one
    assert [p.name for p in (out / COPY).parent.iterdir()] == ["1.1.0"]
    (source / "val2017" / "000000000001.jpg").write_bytes(encoded(1, 72, 48, "JPEG"))
    with pytest.raises(DataError, match=r"image is 48x72 .* say 72x48; correct .* without EXIF orientation"):
        command("--overwrite")
    (source / "val2017" / "000000000001.jpg").write_bytes(encoded(8, 48, 72, "JPEG"))
    command("--overwrite")
    val = TfdsCocoDataset(out, "coco/2017", "val")
    np.testing.assert_array_equal(val.load(1), np.asarray(Image.open(source / "val2017" / "000000000001.jpg")))

    (out / COPY / "dataset_info.json").unlink()
    with pytest.raises(DataError, match="exists and is not an ArrayRecord copy; give --out another folder"):
        command("--overwrite")
    path = source / "annotations" / "instances_val2017.json"
    for old, new, message in (
        ('"boat"', '"ship"', "list different categories"),
        ('"car"', '"boat"', "list different categories"),
    ):
        text = path.read_text()
        path.write_text(text.replace(old, new))
        with pytest.raises(DataError, match=message):
            prepare_coco(source, tmp_path / "new")
        path.write_text(text)
    with pytest.raises(DataError, match="nowhere: no such folder"):
        prepare_coco(tmp_path / "nowhere", tmp_path / "new")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="not written, and no partial copy remains"):
        prepare_coco(source, tmp_path / "file")
