"""The COCO reader: what it reads, and the errors it raises."""

from __future__ import annotations

import json
import logging
import pickle

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from querydet_jax.config import DataConfig
from querydet_jax.data import open_dataset
from querydet_jax.data.readers.coco import CocoDataset
from querydet_jax.data.readers.images import read_image
from querydet_jax.runtime.errors import DataError, shown


def test_reads_sparse_ids_crowd_and_sizes(folder):
    dataset = folder.open()
    assert len(dataset) == 2
    assert dataset.classes == ("car", "boat") and dataset.category_ids == (4, 9)
    assert [dataset.image_id(i) for i in range(2)] == [7, 3]
    assert dataset.size(0) == (40, 60) and dataset.file_name(1) == "3.png"
    first, second = dataset.annotation(0), dataset.annotation(1)
    np.testing.assert_array_equal(first.boxes, np.array([[5, 6, 12, 14]], np.float32))
    assert first.boxes.dtype == np.float32 and first.classes.dtype == np.int32
    assert first.classes.tolist() == [0] and first.crowd.tolist() == [True]
    assert second.classes.tolist() == [1] and second.crowd.tolist() == [False]
    np.testing.assert_array_equal(dataset.load(0), np.asarray(Image.open(folder.images / "7.png")))


def test_an_image_without_boxes_stays(folder):
    folder.image(5, 20, 20)
    dataset = folder.open()
    assert dataset.annotation(2).boxes.shape == (0, 4)
    folder.content["annotations"] = []
    dataset = folder.open()
    assert [len(dataset.annotation(i).classes) for i in range(3)] == [0, 0, 0]


def test_boxes_are_clipped_and_empty_ones_dropped(folder, caplog):
    folder.box(7, 4, [-5, 30, 20, 100])
    folder.box(7, 4, [10, 10, 0, 5])
    folder.box(7, 4, [60 - 1e-6, 10, 5, 5])  # nothing is left after clipping
    with caplog.at_level(logging.WARNING, logger="querydet_jax"):
        dataset = folder.open()
    np.testing.assert_array_equal(dataset.annotation(0).boxes[1:], np.array([[0, 30, 15, 40]], np.float32))
    messages = [r.getMessage() for r in caplog.records]
    assert len(messages) == 1 and "left out 2 of 5 boxes" in messages[0]


@pytest.mark.parametrize(
    ("boxes", "said"),
    [
        ([[10, 10, 5, 5], [20, 5, 50, 30]], "1 of 4 boxes reach beyond their image"),
        ([[30, 10, 45, 20], [20, 5, 50, 30], [20, 10, 60, 40]], "all would fit as x1, y1, x2, y2, but the format's"),
        ([[10, 10, 5, 5]] * 3, "2 of 5 boxes repeat another of the same image, class and place"),
        ([[10, 10, 51, 5], [10, 10, 5, 5], [10, 10, 5, 5.5]], ""),
    ],
)
def test_boxes_that_are_hardly_meant_are_counted(folder, caplog, boxes, said):
    for box in boxes:
        folder.box(7, 4, box)
    if "x1" in said:
        del folder.content["annotations"][:2]
    with caplog.at_level(logging.INFO, logger="querydet_jax"):
        folder.open()
    assert said in caplog.text and len(caplog.records) == bool(said)
    assert not said or (caplog.records[0].levelname == "INFO") == said.startswith("1 of 4")


@pytest.mark.parametrize("size", [(40, 60), (50, 30), (9, 9)])
def test_fractions_are_refused_where_pixels_belong(folder, size):
    folder.content.update(images=[], annotations=[])
    folder.image(1, *size)
    folder.box(1, 4, [0.2, 0.3, 0.5, 0.4])
    folder.box(1, 4, [0, 0, 1, 1])
    with pytest.raises(DataError, match="annotations: every bbox lies within 0 and 1, as fractions do; give x, y"):
        folder.open()
    folder.box(1, 4, [0, 0, 1.5, 1])
    folder.open()


@pytest.mark.parametrize("again", ["7.png", "./7.png", "x/../7.png"])
def test_a_file_that_is_listed_more_than_once_is_said(folder, caplog, again):
    folder.content["images"].append({"id": 1, "file_name": again, "height": 40, "width": 60})
    folder.open()
    assert "1 files are listed more than once (first 7.png), each time as another image" in caplog.text


def test_ground_truth_loads_into_pycocotools(folder, tmp_path, capsys):
    folder.box(7, 4, [-5, 30, 20, 100])
    truth = folder.open().coco_ground_truth()
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(truth))
    coco = COCO(str(path))
    assert sorted(coco.getImgIds()) == [3, 7] and coco.getCatIds() == [4, 9]
    assert sorted(coco.anns) == [1, 2, 3]  # never 0, which pycocotools reads as "no match"
    crowd = coco.anns[2]
    assert (crowd["iscrowd"], crowd["area"], crowd["image_id"], crowd["category_id"]) == (1, 50, 7, 4)
    assert coco.anns[1]["area"] == 200
    assert coco.anns[3]["bbox"] == [-5, 30, 20, 100]  # the file's own box


def _images(content):
    return content["images"][1]


def _annotations(content):
    return content["annotations"][1]


def _categories(content):
    return content["categories"][1]


@pytest.mark.parametrize(
    ("entry", "change", "message"),
    [
        *((_images, {key: None}, rf"images\[1\] has no '{key}'") for key in ("id", "file_name", "width", "height")),
        *((_annotations, {k: None}, rf"annotations\[1\] has no '{k}'") for k in ("image_id", "bbox", "id")),
        (_annotations, {"category_id": None}, r"annotations\[1\] has no 'category_id'"),
        *((_categories, {key: None}, rf"categories\[1\] has no '{key}'") for key in ("id", "name")),
        (_images, {"id": 7}, r"images\[1\] has the same id 7 as images\[0\]; make the ids unique"),
        (_images, {"id": "x"}, r"images\[1\] has id 'x'; give every entry an integer id"),
        (_images, {"width": 0}, r"images\[1\] has width 0; give"),
        (_images, {"height": 3.5}, r"images\[1\] has height 3.5; give"),
        (_images, {"file_name": 3}, r"images\[1\] has file_name 3; give"),
        (_annotations, {"id": 0}, r"annotations\[1\] has the same id 0 as annotations\[0\]"),
        (_annotations, {"image_id": 99}, r"annotations\[1\] \(id 1\) has image_id 99, which no image has"),
        (_annotations, {"category_id": 1}, r"annotations\[1\] \(id 1\) has category_id 1, which no category has"),
        (_annotations, {"bbox": [1, 2, 3]}, r"bbox \[1, 2, 3\]; give four finite numbers"),
        (_annotations, {"bbox": [1, 2, 3, "4"]}, r"give four finite numbers"),
        (_annotations, {"bbox": [1, 2, float("nan"), 4]}, r"give four finite numbers"),
        (_annotations, {"bbox": [1, 2, -3, 4]}, r"negative width or height"),
        (_annotations, {"bbox": [60, 2, 3, 4]}, r"bbox \[60, 2, 3, 4\] outside its image of 60x40"),
        (_annotations, {"bbox": [-9, 2, 3, 4]}, r"outside its image of 60x40"),
        (_annotations, {"iscrowd": 2}, r"iscrowd 2; give 0 or 1"),
        (_annotations, {"area": "big"}, r"area 'big'; give a finite number"),
        (_categories, {"id": 9}, r"categories\[1\] has the same id 9"),
        (_categories, {"name": 1}, r"categories\[1\] has name 1; give"),
        (_categories, {"name": "a\nb"}, r"categories\[1\] has name 'a\\nb'; give .* without control characters"),
        (_categories, {"name": "\x9b31m"}, r"categories\[1\] has name '\\x9b31m'; give"),
        (_categories, {"name": "\ud800"}, r"categories\[1\] has name '\\ud800'; give"),
        (_categories, {"name": " "}, r"categories\[1\] has name ' '; give"),
    ],
)  # fmt: skip
def test_bad_entries_are_refused(folder, entry, change, message):
    changed = entry(folder.content)
    for key, value in change.items():
        if value is None:
            del changed[key]
        else:
            changed[key] = value
    with pytest.raises(DataError, match=message) as error:
        folder.open()
    assert str(error.value).startswith(str(folder.root / "instances.json"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("entry", "field"),
    [
        *((_images, field) for field in ("id", "file_name", "width", "height")),
        *((_annotations, field) for field in ("id", "image_id", "category_id", "bbox", "area", "iscrowd")),
        *((_categories, field) for field in ("id", "name")),
    ],
)
@pytest.mark.parametrize(
    "value", ["null", '""', "[]", "[[[[]]]]", "{}", "1.5", "-1e999", "NaN", "1" + "0" * 5000, "-7"]
)
def test_every_field_is_checked(folder, entry, field, value):
    if field == "id" and value == "-7":
        value = "true"  # -7 is an id
    entry(folder.content)[field] = "HERE"
    path = folder.root / "instances.json"
    path.write_text(json.dumps(folder.content).replace('"HERE"', value))
    if (field, value) == ("area", "1.5"):
        CocoDataset(path, folder.images)
        return
    with pytest.raises(DataError, match=rf"instances.json: \w+\[1\].* has {field} .*; (give|correct)") as error:
        CocoDataset(path, folder.images)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ((_annotations, "iscrowd"), True),
        ((_annotations, "iscrowd"), 1.0),
        ((_annotations, "image_id"), 7.0),
        ((_annotations, "area"), 0),
        ((_images, "width"), 30.0),
    ],
)
def test_values_that_mean_the_same_are_taken(folder, change, value):
    (entry, field) = change
    entry(folder.content)[field] = value
    assert folder.open().annotation(0).crowd.tolist() == [True]


@pytest.mark.parametrize("key", ["images", "annotations", "bbox", "image_id", "area"])
def test_a_key_given_twice_is_refused(folder, key):
    path = folder.root / "instances.json"
    path.write_text(json.dumps(folder.content).replace(f'"{key}": ', f'"{key}": [], "{key}": ', 1))
    with pytest.raises(
        DataError, match=rf"instances.json: not readable as JSON \(an object.* has the key '{key}' twice"
    ):
        CocoDataset(path, folder.images)
    path.write_text(json.dumps(folder.content | {"info": {"note": f'the "{key}" of all', "x": [key, key]}}))
    assert len(CocoDataset(path, folder.images)) == 2


def test_deep_nesting_is_refused_where_it_is_read_and_where_not(folder):
    path = folder.root / "instances.json"
    for key in ("bbox", "segmentation"):
        _annotations(folder.content)[key] = "HERE"
        path.write_text(json.dumps(folder.content).replace('"HERE"', "[" * 100_000 + "]" * 100_000))
        with pytest.raises(DataError, match="instances.json: not readable as JSON .nested too deeply"):
            CocoDataset(path, folder.images)
        _annotations(folder.content)[key] = [1, 1, 5, 5]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("../../secret.png", "outside the data set; move the picture below data.root, or set data.outside_root"),
        ("/etc/secret.png", "outside the data set"),
        ("x/../../../secret.png", "outside the data set"),
        ("a\0.png", "which no file can have"),
        ("\ud800.png", "which no file can have"),
        ("a" * 300 + ".png", "which no file can have"),
        ("a/" * 3000 + "b.png", "which no file can have"),
        (".", "which no file can have"),
        ("/", "which no file can have"),
    ],
    ids=shown,
)
def test_names_that_lead_out_or_that_no_file_can_have(folder, name, problem):
    _images(folder.content)["file_name"] = name
    with pytest.raises(DataError, match=rf"images\[1\] has file_name .*, {problem}") as error:
        folder.open()
    assert str(error.value).isprintable() and len(str(error.value)) < 400
    data = DataConfig(
        "coco", str(folder.root), train_annotations="instances.json", train_images="images", outside_root=True
    )
    if "outside" in problem:
        assert open_dataset(data, "train").file_name(1) == name
    else:
        with pytest.raises(DataError, match=problem):
            open_dataset(data, "train")


def test_names_within_the_data_set_may_be_absolute_or_go_up(folder):
    pixels = folder.open().load(1)
    (folder.root / "other").mkdir()
    (folder.images / "3.png").rename(folder.root / "other" / "3.png")
    (folder.images / "link").symlink_to(folder.root / "other")  # a link is its owner's decision
    data = DataConfig("coco", str(folder.root), train_annotations="instances.json", train_images="images")
    for name in ("../other/3.png", str(folder.root / "other" / "3.png"), "x/../../other/3.png", "link/3.png"):
        _images(folder.content)["file_name"] = name
        (folder.root / "instances.json").write_text(json.dumps(folder.content))
        np.testing.assert_array_equal(open_dataset(data, "train").load(1), pixels)
    # As written, this stays inside; the system would follow the link and leave.
    _images(folder.content)["file_name"] = "link/../other/3.png"
    with pytest.raises(DataError, match=r"link/../other/3.png: no such image file"):
        folder.open().load(1)


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_missing_list(folder, key):
    del folder.content[key]
    with pytest.raises(DataError, match=f"has no list '{key}'"):
        folder.open()


@pytest.mark.parametrize(("key", "message"), [("images", "lists no images"), ("categories", "lists no categories")])
def test_empty_list(folder, key, message):
    folder.content[key] = []
    with pytest.raises(DataError, match=message):
        folder.open()


def test_bad_files(folder, tmp_path):
    with pytest.raises(DataError, match=r"absent.json: no such annotation file; correct data.root"):
        CocoDataset(tmp_path / "absent.json", folder.images)
    path = tmp_path / "cut.json"
    for text, message in (('{"images": [', "not readable as JSON"), ("[]", "the top level is not an object")):
        path.write_text(text)
        with pytest.raises(DataError, match=rf"cut.json: .*{message}"):
            CocoDataset(path, folder.images)
    path.write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(DataError, match="not text in UTF-8 or UTF-16"):
        CocoDataset(path, folder.images)
    folder.open()
    with pytest.raises(DataError, match=r"nowhere: no such image folder"):
        CocoDataset(folder.root / "instances.json", tmp_path / "nowhere")


def test_open_dataset_joins_paths(folder):
    folder.open()
    data = DataConfig(
        source="coco",
        root=str(folder.root),
        train_annotations="instances.json",
        train_images="images",
        val_annotations="absent.json",
        val_images="images",
    )
    assert len(open_dataset(data, "train")) == 2
    with pytest.raises(DataError, match="absent.json"):
        open_dataset(data, "val")


def test_damaged_or_other_images_are_refused_at_load(folder):
    dataset = folder.open()
    whole = (folder.images / "7.png").read_bytes()
    (folder.images / "7.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"7.png: not readable as an image .*; restore the file"):
        dataset.load(0)
    (folder.images / "7.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"7.png: not readable as an image"):
        dataset.load(0)
    (folder.images / "7.png").unlink()
    with pytest.raises(DataError, match=r"7.png: no such image file"):
        dataset.load(0)
    Image.new("RGB", (31, 50)).save(folder.images / "3.png")
    with pytest.raises(DataError, match=r"3.png: the image is 31x50 .* but the annotations say 30x50"):
        dataset.load(1)


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.99])
def test_a_truncated_jpeg_is_refused(tmp_path, cut):
    path = tmp_path / "a.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: int(cut * path.stat().st_size)])
    with pytest.raises(DataError, match="a.jpg: not readable"):
        read_image(path, str(path))


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("LA", (90, 10), (90, 90, 90)),
        ("RGBA", (1, 2, 3, 0), (1, 2, 3)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("I;16", 0x1234, (0x12, 0x12, 0x12)),
    ],
)
def test_every_kind_of_pixel_becomes_rgb(tmp_path, mode, value, expected):
    path = tmp_path / "a.tif"
    Image.new(mode, (5, 3), value).save(path)
    image = read_image(path, "a")
    assert image.dtype == np.uint8 and image.shape == (3, 5, 3)
    assert (image == expected).all()


def test_palette_with_transparency(tmp_path):
    picture = Image.new("P", (5, 3), 1)
    picture.putpalette([0, 0, 0, 10, 20, 30])
    picture.save(tmp_path / "a.png", transparency=bytes([0, 128]))
    assert (read_image(tmp_path / "a.png", "a") == (10, 20, 30)).all()


def test_32_bit_pixels_are_refused(tmp_path):
    Image.new("F", (5, 3), 0.5).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="a.tif: pixels are 32-bit numbers"):
        read_image(tmp_path / "a.tif", "a.tif")


def test_exif_orientation(folder):
    # Stored 20 wide and 10 high, the left half white; shown turned by 90 degrees clockwise, the top half white.
    stored = np.zeros((10, 20, 3), np.uint8)
    stored[:, :10] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(stored).save(folder.images / "turned.png", exif=exif)
    shown = read_image(folder.images / "turned.png", "turned")
    assert shown.shape == (20, 10, 3) and (shown[:10] == 255).all() and not shown[10:].any()

    entry = {"id": 1, "file_name": "turned.png", "height": 20, "width": 10}
    folder.content["images"].append(entry)
    np.testing.assert_array_equal(folder.open().load(2), shown)
    # Annotations that state the stored size refer to the stored pixels.
    entry["height"], entry["width"] = 10, 20
    dataset = folder.open()
    np.testing.assert_array_equal(dataset.load(2), stored)
    assert dataset.size(2) == (10, 20)
    entry["height"], entry["width"] = 11, 20
    with pytest.raises(DataError, match="turned.png: the image is 10x20 .* say 20x11"):
        folder.open().load(2)


def test_pickles(folder):
    dataset = pickle.loads(pickle.dumps(folder.open()))
    assert dataset.load(1).shape == (50, 30, 3)
