"""YOLO text folders: what is read, and the errors raised."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from querydet_jax.config import DataConfig
from querydet_jax.data import Dataset, open_dataset
from querydet_jax.data.readers.yolo import labels_beside, read_names
from querydet_jax.runtime.errors import DataError, shown


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Images a (40x80, height x width), b (no labels) and c/d, in the layout of ultralytics."""
    for inside in ("images/train/c", "labels/train/c"):
        (tmp_path / inside).mkdir(parents=True)
    for name, size in (("a.png", (80, 40)), ("b.jpg", (30, 20)), ("c/d.JPG", (64, 64))):
        Image.new("RGB", size, (10, 20, 30)).save(tmp_path / "images/train" / name)
    (tmp_path / "labels/train/a.txt").write_text("1 0.5 0.5 0.25 0.5\n\n0 0.05 0.5 0.2 0.1\n")
    (tmp_path / "labels/train/c/d.txt").write_text("0.0 1.0005 1 0.5 0.5\n1 0.5 0.5 0 0.5\n")
    (tmp_path / "data.yaml").write_text("path: .\nnc: 2\nnames: [car, 'small boat']  # two\n")
    return tmp_path


def _open(root: Path, **changes: str) -> Dataset:
    return open_dataset(DataConfig(source="yolo", root=str(root), **changes), "train")


def test_reads_boxes_in_pixels(root, caplog):
    with caplog.at_level(logging.WARNING, logger="querydet_jax"):
        dataset = _open(root)
    assert "left out 1 of 4 boxes" in caplog.text
    assert dataset.classes == ("car", "small boat") and dataset.category_ids == (0, 1)
    assert [dataset.file_name(i) for i in range(len(dataset))] == ["a.png", "b.jpg", "c/d.JPG"]
    assert [dataset.size(i) for i in range(3)] == [(40, 80), (20, 30), (64, 64)]
    assert [dataset.image_id(i) for i in range(3)] == [1, 2, 3]
    first = dataset.annotation(0)
    np.testing.assert_allclose(first.boxes, [[30, 10, 50, 30], [0, 18, 12, 22]], atol=1e-5)  # the second clipped
    assert first.boxes.dtype == np.float32 and first.classes.tolist() == [1, 0] and not first.crowd.any()
    assert dataset.annotation(1).boxes.shape == (0, 4)
    assert dataset.annotation(2).classes.tolist() == [0] and dataset.annotation(2).boxes.max() == 64
    assert pickle.loads(pickle.dumps(dataset)).load(2).shape == (64, 64, 3)
    assert [a["category_id"] for a in dataset.coco_ground_truth()["annotations"]] == [1, 0, 0]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("0 0.3 0.3 0.1 0.1\n" * 3, "2 of 5 boxes repeat another of the same image, class and place"),
        ("0 0.9 0.3 0.4 0.1\n0 0.3 0.5 0.1 0.1\n", "1 of 4 boxes reach beyond their image and are cut off"),
        ("1 0.7 0.6 0.9 0.9\n0 0.3 0.5 0.8 0.9\n", "all would fit as x1, y1, x2, y2, but the format's are centre x"),
        ("0 0.2 0.3 0.1 0.1\n1 0.2 0.3 0.1 0.1\n", "labels/train: 1 of 3 images have no label file, and so no objects"),
    ],
)
def test_labels_that_are_hardly_meant_are_counted(root, caplog, lines, said):
    (root / "labels/train/a.txt").write_text(lines)
    (root / "labels/train/c/d.txt").write_text("0 0.3 0.3 0.5 0.5\n0 0.3 0.3 0.6 0.5\n")
    with caplog.at_level(logging.INFO, logger="querydet_jax"):
        _open(root)
    assert said in caplog.text and ("boxes" in caplog.text) != ("no label" in said)


def test_labels_refer_to_the_upright_image(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 40)).save(root / "images/train/a.png", exif=exif)
    dataset = _open(root)
    assert dataset.size(0) == (80, 40) == dataset.load(0).shape[:2]
    np.testing.assert_allclose(dataset.annotation(0).boxes[0], [15, 20, 25, 60], atol=1e-5)


def test_other_layouts(root):
    (root / "train").mkdir()
    (root / "images/train").rename(root / "train/images")
    (root / "labels/train").rename(root / "train/labels")
    assert len(_open(root, train_images="train/images")) == 3  # Roboflow's layout
    (root / "train/images").rename(root / "pictures")
    with pytest.raises(DataError, match=r"pictures: no part of this path is named images"):
        _open(root, train_images="pictures")
    assert len(_open(root, train_images="pictures", train_annotations="train/labels")) == 3


def test_labels_beside_replaces_the_last_images():
    assert labels_beside(Path("images/x/images/train")) == Path("images/x/labels/train")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.1", "is '0 0.5 0.5 0.1'; a line has five numbers"),
        ("0 0.1 0.1 0.2 0.1 0.2 0.2", "is '0 0.1 0.1 0.2 0.1 0.2 0.2'; a line has five numbers"),
        ("0 0.5 0.5 0.1 x", "is '0 0.5 0.5 0.1 x'; a line"),
        ("0 0.5 0.5 0.1 nan", "is '0 0.5 0.5 0.1 nan'; a line"),
        ("2 0.5 0.5 0.1 0.1", "has class 2, but only 0 to 1 have names"),
        ("-1 0.5 0.5 0.1 0.1", "has class -1"),
        ("0.5 0.5 0.5 0.1 0.1", "has class 0.5"),
        ("0 20 0.5 0.1 0.1", "has 20 0.5 0.1 0.1, not all between 0 and 1"),
        ("0 0.5 0.5 -0.1 0.1", "has 0.5 0.5 -0.1 0.1, not all"),
    ],
)
def test_malformed_lines_are_refused_by_file_and_line(root, line, message):
    path = root / "labels/train/a.txt"
    path.write_text(f"0 0.5 0.5 0.1 0.1\n{line}\n")
    with pytest.raises(DataError) as error:
        _open(root)
    assert str(error.value).startswith(f"{path}: line 2 {message}") and "\n" not in str(error.value)


def test_invalid_folders_are_refused(root):
    labels = root / "labels/train"
    (labels / "classes.txt").write_text("car\nboat\n")  # LabelImg's class names, not labels
    _open(root)
    (labels / "z.txt").write_text("")
    with pytest.raises(DataError, match=r"labels/train/z.txt: there is no image .*images/train/z.\* for these labels"):
        _open(root)
    (labels / "z.txt").unlink()
    Image.new("RGB", (9, 9)).save(root / "images/train/b.png")
    with pytest.raises(DataError, match=r"b.jpg and b.png differ only in their suffix"):
        _open(root)
    (root / "images/train/b.png").unlink()
    (root / "images/train/b.jpg").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"b.jpg: not readable as an image"):
        _open(root)
    with pytest.raises(DataError, match=r"images/nothing: no such image folder"):
        _open(root, train_images="images/nothing")
    with pytest.raises(DataError, match=r"labels/nothing: no such folder of labels"):
        _open(root, train_annotations="labels/nothing")
    (root / "images/empty").mkdir()
    with pytest.raises(DataError, match=r"images/empty: no images in this folder"):
        _open(root, train_images="images/empty", train_annotations="labels/train")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("names: [car, 'no', 7]", ("car", "no", "7")),
        ("nc: 2\nnames:\n  - car\n  - boat # afloat\n", ("car", "boat")),
        ("names:\n  1: boat\n  0: car\n", ("car", "boat")),
        ("names: {0: car, 1: 'a, b'}", ("car", "a, b")),
        ("names: [0x10, 1_000, 1e3, 2020-13-45]", ("0x10", "1_000", "1e3", "2020-13-45")),  # as written
        ("classes: &all [car, boat]\nnames: *all", ("car", "boat")),
    ],
)
def test_names_of_data_yaml(tmp_path, text, names):
    (tmp_path / "data.yaml").write_text(text)
    assert read_names(tmp_path) == names


# Each line has nine times the elements of the one before.
LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nc: 2", "has no list `names`"),
        ("names: []", "has no list `names`"),
        ("- car", "has no list `names`"),
        ("names: {1: car}", r"names has the keys \[1\]; number the classes"),
        ("names: [no]", "the name of class 0 is False; write it in quotes"),
        ("nc: 2\nnames: [car\n", "line 3 is not readable as YAML"),
        ("names:\n\t- car", "line 2 is not readable as YAML"),
        ("[" * 10_000 + "]" * 10_000, r"is not readable as YAML \(nested deeper than 20\)"),
        ("names: !!int x", "is not readable as YAML"),
        ("names: !!timestamp x", "is not readable as YAML"),
        ("names: !!bool x", "is not readable as YAML"),
        ("names: !!python/name:os.system", "line 1 is not readable as YAML"),
        ("? [a, {b: c}]\n: 1", "line 1 is not readable as YAML"),
        ("names:\n  0: car\n  1: boat\n  1: ship", r"line 4 is not readable as YAML \(the key '1' is there twice\)"),
        ("names: [car, boat]\nnames: [boat, car]", r"line 2 is not readable as YAML \(the key 'names' is there twice"),
        ("nc: 3\nnames: [car, boat]", "nc is '3', but names has 2 classes; correct one of them"),
        ("nc: [2]\nnames: [car, boat]", r"nc is \['2'\], but names has 2 classes"),
        ("names: *absent", "line 1 is not readable as YAML"),
        (LAUGHS, r"is not readable as YAML \(more than 10 aliases\); correct the file"),
        ("names: &a [*a]", r"the name of class 0 is \[\[\[\[...\]\]\]\]; write it in quotes"),
        (
            "names: [car, ['" + "x" * 100_000 + "']]",
            r"the name of class 1 is \['xxx.{0,60}xxx'\]; write it in quotes",
        ),
        ("names: [car, '']", "the name of class 1 is ''; write it in quotes"),
        ("names: [car, ' ']", "the name of class 1 is ' '; write it in quotes"),
        ('names: [car, "a\\nb"]', r"the name of class 1 is 'a\\nb'; write it in quotes"),
        ('names: [car, "\\e[31m"]', r"the name of class 1 is '\\x1b\[31m'; write it in quotes"),
    ],
    ids=shown,
)
def test_names_that_are_refused(tmp_path, text, message):
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(DataError, match=rf"data.yaml: {message}"):
        read_names(tmp_path)


def test_names_of_classes_txt(tmp_path):
    with pytest.raises(DataError, match=r"data.yaml: no such file, nor classes.txt"):
        read_names(tmp_path)
    path = tmp_path / "classes.txt"
    path.write_text("car\nsmall boat\n\n")
    assert read_names(tmp_path) == ("car", "small boat")
    path.write_text("car\n\nboat\n")
    with pytest.raises(DataError, match=r"classes.txt: has a blank line"):
        read_names(tmp_path)
    path.write_text("car\nbo\x1b[31mat\n")
    with pytest.raises(DataError, match=r"classes.txt: the name of class 1 is 'bo.x1b\[31mat'; give a name without"):
        read_names(tmp_path)
    path.write_text("\n")
    with pytest.raises(DataError, match=r"classes.txt: has no lines"):
        read_names(tmp_path)
