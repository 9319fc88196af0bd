"""The page of the worst pictures: each kind's picture is the one where the error was made, and shows it."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image
from test_errors import BOX, FAR, NEAR

from querydet_jax.cli.score import score
from querydet_jax.evaluation.errors import KINDS
from querydet_jax.runtime.errors import DataError, QueryDetError
from querydet_jax.viz.faults import FAULT, Fault, draw_faults

# One picture per kind, 4 is car and 9 boat: objects, and detections with their scores.
MADE = {
    "class": ([(4, BOX)], [(9, BOX, 0.9)]),
    "location": ([(4, BOX)], [(4, NEAR, 0.8)]),
    "both": ([(4, BOX)], [(9, NEAR, 0.7)]),
    "duplicate": ([(4, BOX)], [(4, BOX, 0.9), (4, BOX, 0.6)]),
    "background": ([], [(4, FAR, 0.9)]),
    "missed": ([(9, FAR), (4, BOX)], []),
    # Each class has right detections, which set its threshold; those below count nowhere.
    "right": ([(4, BOX), (9, FAR)] * 9, [(4, BOX, 0.55), (9, FAR, 0.55), (4, [60, 60, 9, 9], 0.1)]),
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    images, annotations, results = [], [], []
    (tmp_path / "in").mkdir()
    for n, (kind, (objects, found)) in enumerate(MADE.items()):
        name = f'{kind} <b>"&.png'
        Image.fromarray(np.full((130, 150, 3), 90, np.uint8)).save(tmp_path / "in" / name)
        images.append({"id": n, "file_name": name})
        annotations += [
            {"id": len(annotations) + i, "image_id": n, "category_id": c, "bbox": b}
            for i, (c, b) in enumerate(objects[:2])
        ]
        results += [{"image_id": n, "category_id": c, "bbox": b, "score": s} for c, b, s in found]
    categories = [{"id": 4, "name": "car"}, {"id": 9, "name": "<i>boat"}]
    truth = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "found.json").write_text(json.dumps(results))
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Seen(HTMLParser):
    """The pictures and captions of a page, and the names of its tags."""

    def __init__(self, text: str):
        super().__init__()
        self.pictures: list[str] = []
        self.alts: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = dict(attrs)
        if tag == "img":
            self.pictures.append(values["src"] or "")
            self.alts.append(values["alt"] or "")


def run(*words: str) -> None:
    score(["coco", "found.json", "truth.json", *words], "querydet score")


def test_the_page_shows_each_kind_where_it_was_made(folder, capsys):
    run("--worst", "1", "--images", "in", "--out", "out")
    assert "wrote out/worst/index.html with 6 pictures" in capsys.readouterr().out
    page = (folder / "out" / "worst" / "index.html").read_text()
    seen = Seen(page)
    assert [picture.split("_")[:2] for picture in seen.pictures] == [[kind, "1"] for kind in KINDS]
    for kind, picture, alt in zip(KINDS, seen.pictures, seen.alts, strict=True):
        assert kind in unquote(picture).removeprefix(f"{kind}_1_")  # the file in which it was made
        assert (folder / "out" / "worst" / unquote(picture)).is_file(), picture
        assert {
            "class": "<i>boat 0.90: is car",
            "location": "car 0.80: poor box, IoU 0.43",
            "both": "<i>boat 0.70: poor box on car, IoU 0.43",
            "duplicate": "car 0.60: a second box, found with 0.90",
            "background": "car 0.90: no object here",
            "missed": "<i>boat of 20 x 20 px, not detected; car of 20 x 20 px, not detected",
        }[kind] == alt
    assert not seen.tags & {"script", "link", "i"} and "http" not in page  # names are escaped, nothing is fetched


def test_a_small_object_is_enlarged():
    image = np.full((400, 500, 3), 90, np.uint8)
    image[100:106, 200:206] = (200, 30, 200)
    box = np.array([200.0, 100, 206, 106])
    out = draw_faults(
        image, [Fault(box, False, "car 0.90", "car 0.90: no object here")], np.zeros((0, 4)), np.zeros((0, 4))
    )
    whole, place = out[:640, :800], out[:640, 810:]
    object_pixels = [(np.abs(part.astype(int) - (200, 30, 200)).max(axis=2) < 30).sum() for part in (whole, place)]
    assert object_pixels[1] > 30 * object_pixels[0] > 0
    assert all((part == FAULT).all(axis=2).any() for part in (whole, place))


@pytest.mark.parametrize("shape", [(1, 1), (7, 3000), (3000, 7)])
def test_pictures_of_any_shape_are_drawn(shape):
    boxes = np.array([[0.0, 0, 1, 1], [-5, -5, 1e4, 1e4], [0, 0, 0, 0]])
    faults = [Fault(box, missed, "a", "b" * 200, (boxes[0], "c")) for box in boxes for missed in (False, True)]
    assert draw_faults(np.zeros((*shape, 3), np.uint8), faults, boxes, boxes).shape[2] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--worst", "-1"], "--worst -1: give 0 or more"),
        (["--worst", "2"], "--worst 2: add --images FOLDER"),
        (["--worst", "2", "--images", "in"], "and --out FOLDER"),
        (["--worst", "2", "--images", "none", "--out", "out"], "none: no such folder; give the folder of the images"),
        (
            ["--worst", "2", "--images", "out/worst/in", "--out", "out"],
            "--worst replaces .*out/worst, where the pictures",
        ),
        (["--worst", "2", "--images", ".", "--out", "out"], "class <b>"),
    ],
)
def test_bad_input_is_one_line(folder, words, message):
    (folder / "out" / "worst" / "in").mkdir(parents=True)
    with pytest.raises(QueryDetError, match=message) as error:
        run(*words)
    assert "\n" not in str(error.value)
    assert (folder / "out" / "worst" / "in").is_dir()  # what was there stays


def test_an_image_without_a_name_is_named(folder):
    truth = json.loads((folder / "truth.json").read_text())
    del truth["images"][2]["file_name"]
    (folder / "truth.json").write_text(json.dumps(truth))
    with pytest.raises(DataError, match=r"truth.json: images\[2\] has no file_name; add it, or leave out --worst"):
        run("--worst", "1", "--images", "in", "--out", "out")
