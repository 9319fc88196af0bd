"""Folders as people have them: one listing for every reader, and names as file systems store them."""

from __future__ import annotations

import logging
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from querydet_jax.config import DataConfig
from querydet_jax.data import Dataset, open_dataset
from querydet_jax.data.readers.folders import SUFFIXES, list_files
from querydet_jax.data.readers.pictures import open_pictures
from querydet_jax.runtime.errors import DataError

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 10), (10, 20, 30)).save(path, "PNG")


def yolo(root: Path) -> Dataset:
    (root / "data.yaml").write_text("names: [car]")
    return open_dataset(DataConfig(source="yolo", root=str(root)), "train")


def visdrone(root: Path) -> Dataset:
    return open_dataset(DataConfig(source="visdrone", root=str(root), train_images="."), "train")


def as_yolo(root: Path, image: str, text: str = "") -> Dataset:
    picture(root / "images/train" / image)
    label = root / "labels/train" / (text or Path(image).with_suffix(".txt"))
    label.parent.mkdir(parents=True, exist_ok=True)
    label.write_text("0 0.5 0.5 0.5 0.5\n")
    return yolo(root)


def as_visdrone(root: Path, image: str, text: str = "") -> Dataset:
    picture(root / "images" / image)
    label = root / "annotations" / (text or Path(image).with_suffix(".txt"))
    label.parent.mkdir(parents=True, exist_ok=True)
    label.write_text("5,2,10,5,1,4,0,0\n")
    return visdrone(root)


def as_pictures(root: Path, image: str, text: str = "") -> Dataset:
    picture(root / image)
    return open_pictures([root], ("car",))


READERS = [as_yolo, as_visdrone, as_pictures]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "name", ["a.jpg", "a.JPG", "a.jfif", "a.jpe", "a.Jpeg", "a.mpo", "a.gif", "a.TIF", "a.jp2", "a.pgm", "a.webp"]
)
def test_every_suffix_of_a_picture_is_taken(tmp_path, reader, name):
    dataset = reader(tmp_path, name)
    assert len(dataset) == 1 and Path(dataset.file_name(0)).name == name
    assert (dataset.load(0) == (10, 20, 30)).all()  # the content, not the suffix, tells the format


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["._a.jpg", ".hidden.jpg", "Thumbs.db", "notes.txt", "a.pdf", "a.eps", "noname"])
def test_other_files_are_passed_over_and_counted(tmp_path, reader, name, caplog):
    images = {as_yolo: "images/train", as_visdrone: "images", as_pictures: ""}[reader]
    (tmp_path / images).mkdir(parents=True, exist_ok=True)
    (tmp_path / images / name).write_bytes(b"no picture")
    with caplog.at_level(logging.INFO, logger="querydet_jax"):
        dataset = reader(tmp_path, "z.png")
    assert [Path(dataset.file_name(i)).name for i in range(len(dataset))] == ["z.png"]
    reason = "hidden" if name.startswith(".") else Path(name).suffix or "without suffix"
    assert f"passed over 1 {reason}; took 1" in caplog.text


def test_what_is_passed_over_is_one_line_by_reason(tmp_path, caplog):
    for n in range(8):
        (tmp_path / f"{n}.txt").write_text("")
    for name in (".DS_Store", "._a.png", "__MACOSX"):
        (tmp_path / name).mkdir()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    picture(tmp_path / "a.png")
    picture(tmp_path / "below" / "b.png")
    with caplog.at_level(logging.INFO, logger="querydet_jax"):
        assert list_files(tmp_path, SUFFIXES) == ["a.png", "below/b.png"]
        assert list_files(tmp_path, SUFFIXES, deep=False) == ["a.png"]
    first, second = caplog.messages
    assert first == f"{tmp_path}: passed over 8 .txt, 3 hidden, 1 broken link; took 2 (first broken link: gone.png)"
    assert (
        second
        == f"{tmp_path}: passed over 8 .txt, 3 hidden, 1 subfolder, 1 broken link; took 1 (first broken link: gone.png)"
    )


def _to_parent(folder: Path) -> None:
    (folder / "again").symlink_to(folder.parent)


def _to_itself(folder: Path) -> None:
    (folder / "again").symlink_to(folder)


def _to_each_other(folder: Path) -> None:
    for one, other in (("one", "other"), ("other", "one")):
        (folder / one).mkdir()
        (folder / one / "again").symlink_to(folder / other)


def _to_nothing(folder: Path) -> None:
    (folder / "again").symlink_to(folder / "again")


@pytest.mark.parametrize("loop", [_to_parent, _to_itself, _to_each_other, _to_nothing])
def test_links_are_followed_and_loops_end(tmp_path, loop):
    elsewhere, folder = tmp_path / "disk", tmp_path / "all" / "images"
    picture(elsewhere / "deep" / "b.png")
    picture(elsewhere / "c.png")
    folder.mkdir(parents=True)
    (folder / "linked").symlink_to(elsewhere / "deep")
    (folder / "c.png").symlink_to(elsewhere / "c.png")
    loop(folder)
    assert list_files(folder, SUFFIXES)[:2] == ["c.png", "linked/b.png"]
    assert len(list_files(folder, SUFFIXES)) == 2


def test_a_folder_under_two_names_is_listed_under_its_own(tmp_path):
    picture(tmp_path / "real" / "a.png")
    (tmp_path / "alias").symlink_to(tmp_path / "real")
    (tmp_path / "zalias").symlink_to(tmp_path / "real")
    assert list_files(tmp_path, SUFFIXES) == ["real/a.png"]


@pytest.mark.parametrize("make", [as_yolo, as_visdrone])
@pytest.mark.parametrize("on_disk", [COMPOSED, DECOMPOSED])
@pytest.mark.parametrize("inside", ["", "folder_\u00fc/"])
def test_accents_match_however_they_are_stored(tmp_path, make, on_disk, inside):
    other = DECOMPOSED if on_disk == COMPOSED else COMPOSED
    folder = unicodedata.normalize("NFD" if on_disk == COMPOSED else "NFC", inside)
    dataset = make(tmp_path, f"{inside}{on_disk}.png", f"{folder}{other}.txt")
    assert len(dataset.annotation(0).boxes) == 1
    assert dataset.file_name(0) == f"{inside}{on_disk}.png"


@pytest.mark.parametrize(
    ("on_disk", "named"),
    [
        (f"{DECOMPOSED}.png", f"{COMPOSED}.png"),
        (f"{COMPOSED}.png", f"{DECOMPOSED}.png"),
        (f"{DECOMPOSED}/a.png", f"{COMPOSED}/a.png"),
        ("a.PNG", "a.png"),
        ("a.jpg", "a.JPG"),
        ("a.png", "./a.png"),
        ("b/a.png", "b//a.png"),
    ],
)
def test_coco_finds_names_that_are_stored_otherwise(folder, on_disk, named):
    picture(folder.images / on_disk)
    folder.content["images"].append({"id": 1, "file_name": named, "height": 10, "width": 20})
    dataset = folder.open()
    assert (dataset.load(2) == (10, 20, 30)).all() and dataset.file_name(2) == named


@pytest.mark.parametrize(
    ("on_disk", "named", "hint"),
    [
        ("b/a.png", "b\\a.png", r" \(its name has backslashes; write / in their place\)"),
        ("a.png", "b\\c\\a.png", r" \(its name has backslashes; write / in their place\)"),
        ("IMG_1.png", "img_1.png", r" \(there is IMG_1.png\)"),
        ("Day/a.png", "day/a.png", r" \(there is Day/a.png\)"),
        ("a.png", "images/a.png", r" \(there is a.png\)"),
        ("b/a 1.png", "http://x/y/a%201.png?v=3", r" \(there is b/a 1.png\)"),
        ("b/a.png", "c/A.jpeg", ""),
        ("a.png", "c.png", ""),
        ("a.png", "a.png/b.png", ""),
        ("a.png", "a\n.png", ""),
    ],
)
def test_coco_hints_at_the_name_that_is_meant(folder, on_disk, named, hint):
    picture(folder.images / on_disk)
    folder.content["images"].append({"id": 1, "file_name": named, "height": 10, "width": 20})
    with pytest.raises(DataError, match=rf"no such image file{hint}; restore it or remove its entry from .*instances"):
        folder.open().load(2)


@pytest.mark.parametrize("make", [as_yolo, as_visdrone])
def test_a_label_that_differs_in_case_is_hinted_at(tmp_path, make):
    with pytest.raises(DataError, match=r"there is (no image|no annotation file) .* \(there is \w+\); restore"):
        make(tmp_path, "IMG_1.png", "img_1.txt")


@pytest.mark.parametrize("make", [as_yolo, as_visdrone])
@pytest.mark.parametrize("names", [("a.png", "a.jpg"), ("a.png", "a.PNG"), (f"{COMPOSED}.png", f"{DECOMPOSED}.png")])
def test_two_pictures_with_the_same_labels_are_refused(tmp_path, make, names):
    make(tmp_path, names[0])
    with pytest.raises(DataError, match="differ only in their suffix"):
        make(tmp_path, names[1])


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    picture(tmp_path / "locked" / "a.png")
    scan: Callable = os.scandir

    def refuse(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"locked: not readable \(Permission denied\); check the folder"):
        list_files(tmp_path, SUFFIXES)


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n"])
def test_pictures_that_cannot_be_read_are_kept_apart(tmp_path, content):
    picture(tmp_path / "b.png")
    (tmp_path / "a.png").write_bytes(content)
    os.mkfifo(tmp_path / "c.png")
    pictures = open_pictures([tmp_path], ("car",))
    assert [Path(pictures.file_name(i)).name for i in range(len(pictures))] == ["b.png"]
    assert np.shape(pictures.load(0)) == (10, 20, 3)
    first, second = pictures.broken
    assert f"{tmp_path}/a.png: not readable as an image" in first and "c.png: is a folder, pipe" in second
