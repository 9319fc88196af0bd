"""VisDrone's folders: rows, patches as in the published code, the prepared copy, and errors."""

from __future__ import annotations

import json
import logging
import os
import pickle
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from querydet_jax.cli.prepare import prepare as prepare_command
from querydet_jax.config import Config, DataConfig, override
from querydet_jax.data import eval_batches, open_dataset, train_batches
from querydet_jax.data import transforms as t
from querydet_jax.data.prepare import visdrone as prepare
from querydet_jax.data.prepare.visdrone import prepare_visdrone
from querydet_jax.data.readers.coco import CocoDataset
from querydet_jax.data.readers.visdrone import (
    CLASSES,
    VisDroneDataset,
    parse_annotations,
    patch_window,
    split_rows,
    training_rows,
)
from querydet_jax.runtime.errors import ConfigError, DataError

GOLDEN = Path(__file__).parents[1] / "golden" / "aux.npz"

# 41 x 61 (height x width), cut at y 20, x 30.
FIRST = (
    "29,19,10,10,1,1,0,0\n"  # its corner is the last pixel of the top left patch
    "30,20,50,50,1,10,0,2\n"  # reaches over the edge of the image
    "0,0,20,20,0,0,0,0\n"  # ignored region
    "5,5,4,4,0,11,0,0\n"  # others
    "6,6,4,4,1,11,0,0\n"  # others, with the score of an object
    "7,7,4,4,0,4,0,0\n"  # an ignored car
    "3,25,4,0,1,4,0,0\n"  # without area
    "40,2,4,6,1,4,1,1,\n"  # some lines of the official files end in a comma
)


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """Images a (41x61) and b (40x60, nothing in it)."""
    folder = tmp_path / "VisDrone2019-DET-train"
    for name, shape, text in (("b", (40, 60, 3), ""), ("a", (41, 61, 3), FIRST)):
        for inside in ("images", "annotations"):
            (folder / inside).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(len(text)).integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{name}.png")
        (folder / "annotations" / f"{name}.txt").write_text(text)
    return folder


def test_reads_objects_and_keeps_the_official_rows(split, caplog):
    with caplog.at_level(logging.WARNING, logger="querydet_jax"):
        dataset = VisDroneDataset(split)
    assert "left out 1 of 4 boxes" in caplog.text
    assert dataset.classes == CLASSES and dataset.category_ids == tuple(range(1, 11))
    assert [dataset.file_name(i) for i in range(len(dataset))] == ["a.png", "b.png"]
    assert [dataset.size(i) for i in range(2)] == [(41, 61), (40, 60)]
    first, second = dataset.annotation(0), dataset.annotation(1)
    np.testing.assert_array_equal(first.boxes, np.array([[29, 19, 39, 29], [30, 20, 61, 41], [40, 2, 44, 8]]))
    assert first.boxes.dtype == np.float32 and first.classes.dtype == np.int32
    assert first.classes.tolist() == [0, 9, 3] and not first.crowd.any()
    assert second.boxes.shape == (0, 4)
    truth = dataset.official_truth(0)
    assert truth.shape == (8, 8) and truth.dtype == np.int32
    assert truth[2].tolist() == [0, 0, 20, 20, 0, 0, 0, 0] and truth[7].tolist() == [40, 2, 4, 6, 1, 4, 1, 1]
    assert dataset.official_truth(1).shape == (0, 8)
    coco = dataset.coco_ground_truth()
    assert [a["category_id"] for a in coco["annotations"]] == [1, 10, 4]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(dataset)).load(0), dataset.load(0))


def test_patches_tile_the_image_and_take_the_boxes_of_their_corner(split):
    whole, dataset = VisDroneDataset(split), VisDroneDataset(split, patches=True)
    assert len(dataset) == 8 and len({dataset.image_id(i) for i in range(8)}) == 8
    assert [dataset.file_name(i) for i in (0, 3, 4)] == ["a_0.jpg", "a_3.jpg", "b_0.jpg"]
    assert [dataset.size(i) for i in range(4)] == [(20, 30), (20, 31), (21, 30), (21, 31)]
    parts = [dataset.load(i) for i in range(4)]
    assert [part.shape[:2] for part in parts] == [dataset.size(i) for i in range(4)]
    rows = [np.concatenate(parts[:2], axis=1), np.concatenate(parts[2:], axis=1)]
    np.testing.assert_array_equal(np.concatenate(rows), whole.load(0))
    boxes = [dataset.annotation(i).boxes.tolist() for i in range(4)]
    assert boxes == [[[29, 19, 30, 20]], [[10, 2, 14, 8]], [], [[0, 0, 31, 21]]]
    assert dataset.official_truth(3).tolist() == [[0, 0, 50, 50, 1, 10, 0, 2]]


def test_split_agrees_with_the_published_code():
    kept = dropped = 0
    for h, w, x, y, bw, bh, category, ignore, patch, *expected in np.load(GOLDEN)["visdrone_split"].tolist():
        parts = split_rows(np.array([[x, y, bw, bh, 1 - ignore, category, 0, 0]], np.int32), (h, w))
        found = [(p, [*row[:4], row[5]]) for p, rows in enumerate(parts) for row in rows.tolist()]
        if category == 11:  # the published code drops it only by its score
            assert not found
        elif patch < 0:
            assert not found
            dropped += 1
        else:
            assert found == [(patch, expected)]
            kept += 1
    assert kept > 80 and dropped > 10


def test_resized_sizes_agree_with_the_published_code():
    for h, w, short, maximum, *expected in np.load(GOLDEN)["resize"].tolist():
        assert list(t.resize_shape(h, w, short, maximum)) == expected


def test_flipping_after_the_resize_is_flipping_before_it():
    # The published VisDrone training (visdrone/mapper.py) flips first, train_example last.
    image = np.random.default_rng(0).integers(0, 256, (54, 97, 3), dtype=np.uint8)
    boxes = np.array([[3, 4, 31, 20]], np.float32)
    shape = t.resize_shape(54, 97, 120, 199)
    after, boxes_after = t.flip(t.resize(image, shape), t.resize_boxes(boxes, (54, 97), shape))
    flipped, boxes_flipped = t.flip(image, boxes)
    np.testing.assert_array_equal(after, t.resize(flipped, shape))
    np.testing.assert_allclose(boxes_after, t.resize_boxes(boxes_flipped, (54, 97), shape), atol=1e-4)


def test_every_row_of_a_crowded_image():
    # The fullest training image has 902 objects.
    line = "1,2,3,4,1,4,0,0\n"
    assert training_rows(parse_annotations(line * 902, "full")).shape == (902, 8)


@pytest.mark.parametrize("size", [(2, 2), (41, 61), (40, 60)])
def test_patch_windows_cover_the_image_once(size):
    seen = np.zeros(size, int)
    for y, x, h, w in (patch_window(size, patch) for patch in range(4)):
        seen[y : y + h, x : x + w] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1,2,3,4,1,4,0", "is '1,2,3,4,1,4,0'; a VisDrone annotation line has eight whole numbers"),
        ("1,2,3,4,1,4,0,0,0", "is '1,2,3,4,1,4,0,0,0'; a VisDrone"),
        ("1,2,3,4,1,4,0,x", "is '1,2,3,4,1,4,0,x'; a VisDrone"),
        ("1,2,3.5,4,1,4,0,0", "is '1,2,3.5,4,1,4,0,0'; a VisDrone"),
        ("99999999999,2,3,4,1,4,0,0", "is '99999999999,2,3,4,1,4,0,0'; a VisDrone"),
        ("1,2,-3,4,1,4,0,0", "has width -3, height 4, but neither can be negative"),
        ("1,2,3,4,2,4,0,0", "has score 2, not 1"),
        ("1,2,3,4,1,12,0,0", "has category 12, not 0"),
        ("1,2,3,4,1,-1,0,0", "has category -1"),
    ],
)
def test_malformed_lines_are_refused_by_file_and_line(split, line, message):
    path = split / "annotations" / "a.txt"
    path.write_text(f"1,2,3,4,1,4,0,0\n\n{line}\n")
    with pytest.raises(DataError) as error:
        VisDroneDataset(split)
    assert str(error.value).startswith(f"{path}: line 3 {message}")
    assert "\n" not in str(error.value) and "correct or remove" in str(error.value)


def test_invalid_folders_are_refused(split, tmp_path):
    annotations, images = split / "annotations", split / "images"
    (annotations / "a.txt").write_bytes(b"\xff\xfe1")
    with pytest.raises(DataError, match=r"a.txt: not text in UTF-8"):
        VisDroneDataset(split)
    (annotations / "a.txt").unlink()
    with pytest.raises(DataError, match=r"images/a.png: there is no annotation file annotations/a.txt"):
        VisDroneDataset(split)
    (annotations / "a.txt").write_bytes(b"\xef\xbb\xbf" + FIRST.replace("\n", "\r\n").encode())
    assert len(VisDroneDataset(split).official_truth(0)) == 8
    (annotations / "c.txt").write_text(FIRST)
    with pytest.raises(DataError, match=r"annotations/c.txt: there is no image images/c.jpg"):
        VisDroneDataset(split)
    (annotations / "c.txt").unlink()
    (images / "a.jpg").write_bytes((images / "a.png").read_bytes())
    with pytest.raises(DataError, match=r"a.jpg and a.png differ only in their suffix"):
        VisDroneDataset(split)
    (images / "a.jpg").unlink()
    (images / "._a.jpg").write_bytes(b"of macOS")
    (images / "b.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"b.png: not readable as an image"):
        VisDroneDataset(split)
    Image.new("RGB", (60, 1)).save(images / "b.png")
    with pytest.raises(DataError, match=r"b.png: is too small for four patches"):
        VisDroneDataset(split, patches=True)
    with pytest.raises(DataError, match=r"nowhere/images: no such folder; give a split folder"):
        VisDroneDataset(tmp_path / "nowhere")
    for name in ("images", "annotations"):
        (tmp_path / "bare" / name).mkdir(parents=True)
    with pytest.raises(DataError, match=r"bare: no images in images/"):
        VisDroneDataset(tmp_path / "bare")


def test_batches_from_the_configuration(split):
    (split.parent / "VisDrone2019-DET-val").symlink_to(split)
    data = DataConfig(
        source="visdrone", root=str(split.parent), patches=True, keep_empty=True, max_boxes=8,
        train_short=(40,), train_max=64, train_canvases=((64, 64),), test_short=64, test_max=64,
        test_canvases=((64, 64),), threads=1,
    )  # fmt: skip
    train, val = open_dataset(data, "train"), open_dataset(data, "val")
    assert (len(train), len(val)) == (8, 2)  # validation uses whole images
    batches = train_batches(train, data, batch_size=8, seed=0)
    batch = next(batches)
    batches.close()
    assert sorted(batch["image_ids"].tolist()) == list(range(1, 9))  # including patches without boxes
    assert (batch["classes"] >= 0).sum() == 3
    assert len(list(eval_batches(val, data, batch_size=2))) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.patches": True}, "data.patches: needs data.source visdrone"),
        ({"data.source": "visdrone", "data.val_annotations": "x"}, "visdrone reads the annotations/"),
    ],
)
def test_fields_that_contradict_the_source(changes, message):
    with pytest.raises(ConfigError, match=message):
        override(Config(), changes)


def test_prepared_patches_are_the_patches(split, tmp_path):
    out = tmp_path / "prepared"
    assert prepare_visdrone(split, out, patches=True) == f"wrote 8 images with 3 boxes to {out}"
    direct, official = VisDroneDataset(split, patches=True), VisDroneDataset(out)
    coco = CocoDataset(out / "instances.json", out / "images")
    assert coco.classes == direct.classes and coco.category_ids == direct.category_ids
    for i in range(8):
        for copy in (official, coco):
            assert (copy.file_name(i), copy.size(i)) == (direct.file_name(i), direct.size(i))
            np.testing.assert_array_equal(copy.annotation(i).boxes, direct.annotation(i).boxes)
            np.testing.assert_array_equal(copy.annotation(i).classes, direct.annotation(i).classes)
        assert coco.image_id(i) == direct.image_id(i)
        np.testing.assert_array_equal(official.official_truth(i), direct.official_truth(i))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["VisDrone2019-DET-train", "prepared"]


def test_patches_are_not_cut_again(split, tmp_path):
    prepare_visdrone(split, tmp_path / "whole")
    assert len(VisDroneDataset(tmp_path / "whole", patches=True)) == 8
    out = tmp_path / "prepared"
    prepare_visdrone(tmp_path / "whole", out, patches=True)
    for cut in (VisDroneDataset, lambda folder, patches: prepare_visdrone(folder, split / "x", patches=patches)):
        with pytest.raises(DataError) as error:
            cut(out, patches=True)
        assert str(error.value).startswith(f"{out}: its images are patches already")
        assert "--data.no-patches" in str(error.value) and "\n" not in str(error.value)
    # Images with such names, but not in fours, are whole images.
    for kind, suffix in (("images", "jpg"), ("annotations", "txt")):
        (out / kind / f"a_2.{suffix}").unlink()
    assert len(VisDroneDataset(out, patches=True)) == 7 * 4


def test_prepared_pixels_are_close(split, tmp_path):
    y, x = np.mgrid[:41, :61]
    smooth = np.stack([4 * x, 4 * y, 2 * (x + y)], axis=2).astype(np.uint8)
    Image.fromarray(smooth).save(split / "images" / "a.png")
    prepare_visdrone(split, tmp_path / "prepared", patches=True)
    written = VisDroneDataset(tmp_path / "prepared").load(3).astype(int)
    assert np.abs(written - smooth[20:, 30:]).mean() < 3  # JPEG


def test_a_whole_copy_is_byte_for_byte(split, tmp_path):
    out = tmp_path / "prepared"
    prepare_visdrone(split, out)
    for name in ("images/a.png", "annotations/a.txt"):
        assert (out / name).read_bytes() == (split / name).read_bytes()
    names = [image["file_name"] for image in json.loads((out / "instances.json").read_text())["images"]]
    assert names == ["a.png", "b.png"]
    with pytest.raises(DataError, match=r"prepared: is prepared already; add --overwrite"):
        prepare_visdrone(split, out)
    prepare_visdrone(split, out, patches=True, overwrite=True)
    assert len(list((out / "images").iterdir())) == 8
    with pytest.raises(DataError, match=r"prepared: is the source of the images"):
        prepare_visdrone(out, out, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_preparation_did_not_write_is_not_replaced(split, tmp_path, overwrite):
    with pytest.raises(DataError, match=r"VisDrone2019-DET-train: exists and is not empty"):
        prepare_visdrone(split, split, overwrite=overwrite)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match=r"file: exists and is not a folder"):
        prepare_visdrone(split, tmp_path / "file", overwrite=overwrite)
    assert len(VisDroneDataset(split)) == 2


def _damage(split: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = split / "images" / "b.png"
    path.write_bytes(path.read_bytes()[:2000])  # the header is complete, the pixels are not


def _interrupt(split: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_json(path: Path, value: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "write_json", write_json)


def _fill_the_disk(split: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_json(path: Path, value: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(prepare, "write_json", write_json)


def _stop_before_the_last_rename(split: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def stop_once(old: Path, new: Path) -> None:
        if new.name == "prepared":
            monkeypatch.setattr(os, "rename", rename)
            raise KeyboardInterrupt
        rename(old, new)

    monkeypatch.setattr(os, "rename", stop_once)


@pytest.mark.parametrize(
    ("harm", "error", "message"),
    [
        (_damage, DataError, r"b.png: not readable as an image"),
        (_interrupt, KeyboardInterrupt, "^$"),
        (_stop_before_the_last_rename, KeyboardInterrupt, "^$"),
        (_fill_the_disk, DataError, r"prepared: not written, and no partial copy remains \(.*No space left"),
    ],
)
@pytest.mark.parametrize("before", [False, True])
def test_a_preparation_that_fails_leaves_what_was_there(split, tmp_path, monkeypatch, harm, error, message, before):
    out = tmp_path / "prepared"
    if before:
        prepare_visdrone(split, out)
    names = sorted(path.name for path in tmp_path.iterdir())
    harm(split, monkeypatch)
    with pytest.raises(error, match=message):
        prepare_visdrone(split, out, patches=True, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert not before or len(VisDroneDataset(out)) == 2


def test_command(split, tmp_path, monkeypatch, capsys):
    former = signal.getsignal(signal.SIGTERM)
    out = tmp_path / "prepared"
    try:
        prepare_command(["visdrone", str(split), "--out", str(out), "--patches"], "querydet prepare")
    finally:
        signal.signal(signal.SIGTERM, former)
    assert capsys.readouterr().out == f"wrote 8 images with 3 boxes to {out}\n"
