"""Orientation of picture files: EXIF applied or ignored, by the sizes that annotations state or by the option."""

from __future__ import annotations

import json
import logging
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from querydet_jax.config import DataConfig
from querydet_jax.data import Dataset, open_dataset
from querydet_jax.data.prepare.visdrone import prepare_visdrone
from querydet_jax.data.readers.coco import CocoDataset
from querydet_jax.data.readers.images import Reading, read_header, read_image
from querydet_jax.data.readers.orientation import TAG
from querydet_jax.data.readers.pictures import open_pictures
from querydet_jax.evaluation import standalone
from querydet_jax.evaluation.visdrone import VisDroneImage
from querydet_jax.runtime.errors import DataError

# 8x16 and 12x12 pixels in which every orientation differs.
WIDE = np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8)
SQUARE = np.random.default_rng(1).integers(0, 256, (12, 12, 3), dtype=np.uint8)


def save(path: Path, pixels: np.ndarray, orientation: int = 1) -> np.ndarray:
    """Save a picture with an EXIF orientation; return its turned pixels as Pillow's own tool computes them."""
    exif = Image.Exif()
    exif[TAG] = orientation
    Image.fromarray(pixels).save(path, exif=exif)
    with Image.open(path) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def coco(folder, sizes: dict[str, tuple[int, int]], exif: str = "auto") -> Dataset:
    """Open a COCO file that states these sizes (height, width) for pictures that are there already."""
    folder.content["images"] = [
        {"id": n, "file_name": name, "height": h, "width": w} for n, (name, (h, w)) in enumerate(sizes.items())
    ]
    folder.content["annotations"] = []
    (folder.root / "instances.json").write_text(json.dumps(folder.content))
    paths = {"train_annotations": "instances.json", "train_images": "images"}
    return open_dataset(DataConfig(source="coco", root=str(folder.root), exif=exif, **paths), "train")


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_applied_or_ignored(tmp_path, orientation, suffix):
    path = tmp_path / f"a{suffix}"
    save(path, WIDE, orientation)
    stored = read_image(path, "a", reading=Reading("ignore"))
    if suffix != ".webp":  # which loses detail
        np.testing.assert_array_equal(stored, WIDE)
    turned = np.asarray(ImageOps.exif_transpose(_tagged(stored, orientation)))
    np.testing.assert_array_equal(read_image(path, "a", reading=Reading("apply")), turned)
    header = read_header(path, "a")
    assert header.orientation == orientation
    assert header.size(upright=False) == (8, 16) and header.size(upright=True) == turned.shape[:2]


def _tagged(pixels: np.ndarray, orientation: int) -> Image.Image:
    image = Image.fromarray(pixels)
    image.getexif()[TAG] = orientation
    return image


@pytest.mark.parametrize("kept", [3, 2, 4])
@pytest.mark.parametrize(("stated", "applied"), [((8, 16), False), ((16, 8), True)])
def test_sizes_in_the_annotations_decide_for_the_whole_set(folder, caplog, kept, stated, applied):
    turned = {
        "a.png": save(folder.images / "a.png", WIDE, 6),  # whose size tells
        "b.png": save(folder.images / "b.png", WIDE, kept),  # of the same size either way
        "c.png": save(folder.images / "c.png", SQUARE, 8),
    }
    with caplog.at_level(logging.INFO, logger="querydet_jax"):
        dataset = coco(folder, {"a.png": stated, "b.png": (8, 16), "c.png": (12, 12)})
    for i, stored in enumerate((WIDE, WIDE, SQUARE)):
        np.testing.assert_array_equal(dataset.load(i), turned[dataset.file_name(i)] if applied else stored)
    (said,) = [r.getMessage() for r in caplog.records]
    assert dataset.exif_note in said and "3 of 3 pictures have an EXIF orientation" in said
    assert f"which is {'applied' if applied else 'ignored'}: the sizes in the annotations" in said


@pytest.mark.parametrize(("exif", "applied"), [("auto", True), ("apply", True), ("ignore", False)])
def test_a_set_whose_sizes_cannot_tell_follows_the_convention_or_the_option(folder, exif, applied):
    turned = save(folder.images / "a.png", SQUARE, 6)
    dataset = coco(folder, {"a.png": (12, 12)}, exif)
    np.testing.assert_array_equal(dataset.load(0), turned if applied else SQUARE)


def test_a_mixed_set_is_warned_of_and_each_picture_follows_its_own_size(folder, caplog):
    turned = [save(folder.images / f"{name}.png", WIDE, 6) for name in "abc"]
    dataset = coco(folder, {"a.png": (16, 8), "b.png": (16, 8), "c.png": (8, 16)})
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warned) == 1 and "say the opposite of 1 of these pictures (first c.png)" in warned[0]
    np.testing.assert_array_equal(dataset.load(1), turned[1])
    np.testing.assert_array_equal(dataset.load(2), WIDE)


@pytest.mark.parametrize(
    ("exif", "stated", "remedy"), [("apply", (8, 16), "auto or ignore"), ("ignore", (16, 8), "auto or apply")]
)
def test_an_option_that_contradicts_the_sizes_names_the_picture(folder, exif, stated, remedy):
    save(folder.images / "a.png", WIDE, 6)
    dataset = coco(folder, {"a.png": stated}, exif)
    with pytest.raises(DataError, match=rf"a.png: the annotations say .* but data.exif is {exif}; set it to {remedy}"):
        dataset.load(0)


@pytest.mark.parametrize("source", ["visdrone", "yolo", "pictures"])
@pytest.mark.parametrize("exif", ["auto", "apply", "ignore"])
def test_formats_without_sizes_have_a_convention(tmp_path, source, exif, caplog):
    images = tmp_path / ("images" if source == "visdrone" else "images/train")
    labels = tmp_path / ("annotations" if source == "visdrone" else "labels/train")
    for inside in (images, labels):
        inside.mkdir(parents=True)
    turned = [save(images / "a.png", WIDE, 6), save(images / "b.png", SQUARE, 3)]
    for name in "ab":
        (labels / f"{name}.txt").write_text("")
    (tmp_path / "data.yaml").write_text("names: [car]")
    applied = exif == "apply" or (exif == "auto" and source != "visdrone")
    with caplog.at_level(logging.INFO, logger="querydet_jax"):
        if source == "pictures":
            dataset: Dataset = open_pictures([images], ("car",), Reading.of(DataConfig(exif=exif)))
        else:
            place = {"train_images": "."} if source == "visdrone" else {}
            dataset = open_dataset(DataConfig(source=source, root=str(tmp_path), exif=exif, **place), "train")
    for i, stored in enumerate((WIDE, SQUARE)):
        np.testing.assert_array_equal(dataset.load(i), turned[i] if applied else stored)
        assert dataset.size(i) == dataset.load(i).shape[:2]
    assert sum("2 of 2 pictures have an EXIF orientation" in r.getMessage() for r in caplog.records) == 1


@pytest.mark.parametrize(("exif", "width"), [("auto", 16), ("ignore", 16), ("apply", 8)])
def test_scores_take_the_same_sizes(tmp_path, exif, width, monkeypatch):
    for inside in ("images", "annotations", "results"):
        (tmp_path / inside).mkdir()
    save(tmp_path / "images/a.png", WIDE, 6)
    for inside in ("annotations", "results"):
        (tmp_path / inside / "a.txt").write_text("1,1,4,4,1,4,0,0\n")
    seen = []
    monkeypatch.setattr(standalone, "VisDroneImage", lambda *given: seen.append(given[1]) or VisDroneImage(*given))
    standalone.score_visdrone(tmp_path / "results", tmp_path / "annotations", exif=exif)
    assert [size[1] for size in seen] == [width]


@pytest.mark.parametrize("patches", [False, True])
@pytest.mark.parametrize("exif", ["auto", "apply", "ignore"])
def test_a_prepared_visdrone_folder_remembers_the_rule(tmp_path, exif, patches):
    for inside in ("images", "annotations"):
        (tmp_path / "split" / inside).mkdir(parents=True)
    smooth = np.repeat(np.arange(0, 240, 20, dtype=np.uint8)[:, None, None] * np.ones((12, 3), np.uint8), 1, axis=1)
    turned = save(tmp_path / "split/images/a.png", smooth, 6)
    (tmp_path / "split/annotations/a.txt").write_text("1,1,4,4,1,4,0,0\n")
    reading = Reading.of(DataConfig(exif=exif))
    prepare_visdrone(tmp_path / "split", tmp_path / "out", patches=patches, reading=reading)
    dataset = CocoDataset(tmp_path / "out/instances.json", tmp_path / "out/images")
    expected = turned if exif == "apply" else smooth
    found = dataset.load(0).astype(int)
    assert np.abs(found - (expected[:6, :6] if patches else expected)).max() <= (12 if patches else 0)  # JPEG


def _exif(entries: bytes, count: int) -> bytes:
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", count) + entries + b"\0\0\0\0"


_ROTATED = struct.pack(">HHIHH", TAG, 3, 1, 6, 0)


@pytest.mark.parametrize(
    ("exif", "orientation"),
    [
        (_exif(struct.pack(">HHII", 0x011A, 5, 1, 2**31) + _ROTATED, 2), 6),  # a resolution stored far outside
        (_exif(struct.pack(">HHII", 0x8769, 4, 1, 2**31) + _ROTATED, 2), 6),  # further tags stored far outside
        (_exif(struct.pack(">HHII", 0x9999, 99, 2**31, 0) + _ROTATED, 2), 6),  # no such type
        (_exif(_ROTATED, 60_000), 6),  # more entries than there are
        (_exif(struct.pack(">HHIHH", TAG, 3, 1, 77, 0), 1), 1),
        *((_exif(struct.pack(">HHII", TAG, kind, 1, 6), 1), 6) for kind in (4, 9)),  # long numbers
        *((_exif(struct.pack(">HHII", TAG, kind, 1, 6 << 24), 1), 6) for kind in (1, 6, 7)),  # bytes
        (_exif(struct.pack(">HHII", TAG, 2, 1, 0x36000000), 1), 1),  # text
        (_exif(_ROTATED, 1)[:-9], 1),
        (b"Exif\0\0MM", 1),
        (b"Exif\0\0XX\0*\0\0\0\x08", 1),
        (b"nothing of the kind", 1),
    ],
)
@pytest.mark.parametrize("fatal", [False, True])
def test_odd_and_damaged_exif_costs_the_orientation_at_most(tmp_path, exif, orientation, fatal):
    path = tmp_path / "a.jpg"
    Image.new("RGB", (16, 8), (200, 100, 50)).save(path, exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if fatal else "ignore")  # Pillow warns of some of these
        image = read_image(path, "a.jpg")
        assert read_header(path, "a.jpg").orientation == orientation
    assert image.shape == ((16, 8, 3) if orientation == 6 else (8, 16, 3))
    assert abs(image.astype(int) - (200, 100, 50)).max() < 10


def test_exif_behind_the_pixels_of_a_png(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(WIDE).save(path)
    data = path.read_bytes()
    block = _exif(_ROTATED, 1).removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(block)) + b"eXIf" + block + struct.pack(">I", zlib.crc32(b"eXIf" + block))
    path.write_bytes(data[:-12] + chunk + data[-12:])
    assert read_header(path, "a").turned == (16, 8) == read_image(path, "a").shape[:2]
