"""`querydet predict` over folders as people have them. The detector is a stand-in, so nothing is compiled."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from querydet_jax.cli.predict import PredictArguments, _predict
from querydet_jax.cli.process import run
from querydet_jax.config import DataConfig
from querydet_jax.data.sources import images_folder
from querydet_jax.inference.detections_file import DetectionsFile, coco_ids
from querydet_jax.inference.predictor import Predictor
from querydet_jax.runtime.errors import ConfigError, DataError, QueryDetError
from querydet_jax.runtime.files import beside, identity


class Found(NamedTuple):
    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    valid: np.ndarray


def one_box(images: np.ndarray, sizes: np.ndarray) -> Found:
    """Find one object in every image: all of it."""
    boxes = np.concatenate([np.zeros_like(sizes), sizes[:, ::-1]], axis=1).astype(np.float32)[:, None]
    shape = boxes.shape[:2]
    return Found(boxes, np.full(shape, 0.9, np.float32), np.zeros(shape, np.int32), np.ones(shape, bool))


def toy(detector: Callable[..., Found], data: DataConfig, batch_size: int = 1) -> Predictor:
    return Predictor(detector, name="toy", classes=("car",), data=data, query="csq", batch_size=batch_size)


def predict(
    *images: str | Path,
    out: Path,
    batch_size: int = 1,
    canvases: tuple[tuple[int, int], ...] = ((32, 64), (64, 32)),
    **arguments: Any,
) -> dict[str, Any]:
    resizing = DataConfig(test_short=32, test_max=64, test_canvases=canvases, threads=0)
    _predict(toy(one_box, resizing, batch_size), PredictArguments(tuple(map(str, images)), str(out), **arguments))
    return json.loads((out / "detections.json").read_text())


def picture(path: Path, height: int = 20, width: int = 30, value: int = 90) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(path)
    return path


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("damage", ["text", "empty", "cut", "wrong suffix", "all"])
def test_a_broken_picture_costs_itself_alone(tmp_path, capsys, damage, batch_size):
    folder = tmp_path / "in"
    for n in range(4):
        picture(folder / f"{n}.png")
    broken = folder / "2.png"
    data = broken.read_bytes()
    broken.write_bytes({"text": b"hello", "empty": b"", "cut": data[:-30]}.get(damage, b"%!PS-Adobe-3.0 EPSF-3.0\n"))
    if damage == "all":
        for n in (0, 1, 3):
            (folder / f"{n}.png").write_bytes(b"")
    out = tmp_path / "out"
    with pytest.raises(DataError) as error:
        predict(folder, out=out, batch_size=batch_size)
    text = str(error.value)
    assert "annotation" not in text and "\n" not in text
    if damage == "all":
        assert text.startswith("none of 4 pictures can be read, the first: ")
        return
    assert text.startswith("1 of 4 pictures could not be used") and "2.png" in text
    content = json.loads((out / "detections.json").read_text())
    assert sorted(Path(e["file"]).name for e in content["images"]) == ["0.png", "1.png", "3.png"]
    assert len(content["broken"]) == 1 and content["broken"][0].startswith(str(broken))
    assert files(out) == {"detections.json", *(f"{n}_detections.jpg" for n in (0, 1, 3))}
    for e in content["images"]:
        assert (e["height"], e["width"]) == (20, 30)
        assert e["detections"][0]["box_xyxy"] == pytest.approx([0, 0, 30, 20], abs=0.5)


def test_a_picture_that_fits_no_canvas_costs_itself_alone(tmp_path):
    for name, shape in (("wide.png", (20, 30)), ("square.png", (20, 20)), ("tall.png", (30, 20))):
        picture(tmp_path / "in" / name, *shape)
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"2 of 3 pictures could not be used.*fits no test canvas"):
        predict(tmp_path / "in", out=out, canvases=((32, 32),))
    assert files(out) == {"detections.json", "square_detections.jpg"}
    (tmp_path / "in" / "square.png").unlink()
    with pytest.raises(DataError, match="2 of 2 pictures"):
        predict(tmp_path / "in", out=out, canvases=((32, 32),))
    assert len(json.loads((out / "detections.json").read_text())["broken"]) == 2


def test_pictures_of_one_name_keep_their_results_apart(tmp_path):
    out = tmp_path / "out"
    paths = [picture(tmp_path / camera / "0001.png", value=v) for camera, v in (("cam1", 10), ("cam2", 200))]
    paths.append(picture(tmp_path / "cam2" / "0001.jpg", value=100))
    content = predict(*paths, out=out)
    assert len(content["images"]) == 3 and not content["broken"]
    values = {}
    for name in files(out) - {"detections.json"}:
        with Image.open(out / name) as drawn:
            values[name] = np.asarray(drawn)[:200].mean()
    assert len(values) == 3 and len({round(v / 30) for v in values.values()}) == 3


@pytest.mark.parametrize("out", ["in", "in/../in", "link"])
def test_inputs_are_never_overwritten(tmp_path, caplog, out):
    folder = tmp_path / "in"
    names = ["a.png", "a_detections.jpg", "a_detections_.jpg"]
    before = {name: picture(folder / name, value=40 * n).read_bytes() for n, name in enumerate(names)}
    (tmp_path / "link").symlink_to(folder)
    predict(folder, out=tmp_path / out)
    for name, data in before.items():
        assert (folder / name).read_bytes() == data
    assert len(files(folder)) == 3 + 3 + 1 and "holds the pictures, too" in caplog.text


@pytest.mark.parametrize("damage", ["text", "too large", "linked"])
def test_inputs_that_cannot_be_used_are_never_overwritten(tmp_path, damage, caplog):
    folder = tmp_path / "in"
    picture(folder / "a.png")
    other, kept = folder / "a_detections.jpg", tmp_path / "kept.jpg"
    if damage == "too large":
        picture(other, 40, 50)
    else:
        kept.write_text("no picture")
        (other.symlink_to if damage == "linked" else other.write_bytes)(
            kept if damage == "linked" else kept.read_bytes()
        )
    before = other.read_bytes()
    with pytest.raises(DataError, match="1 of 2 pictures could not be used"):
        _predict(toy(one_box, DataConfig(threads=0, max_pixels=1000)), PredictArguments((str(folder),), str(folder)))
    assert other.read_bytes() == before and (damage != "linked" or other.is_symlink())
    assert files(folder) == {"a.png", "a_detections.jpg", "a_detections_.jpg", "detections.json"}


@pytest.mark.parametrize("kind", ["itself", "link", "hard link"])
def test_a_picture_in_the_place_of_the_list_is_kept(tmp_path, kind):
    out = tmp_path / "out"
    shown = picture(tmp_path / "in" / "x.png")
    out.mkdir()
    listed = out / "detections.json"
    if kind == "itself":
        shown = shown.rename(listed)
    elif kind == "link":
        listed.symlink_to(shown)
    else:
        os.link(shown, listed)
    before = shown.read_bytes()
    with pytest.raises(ConfigError, match=r"its detections\.json is one of the pictures; choose another folder"):
        predict(shown, out=out)
    assert shown.read_bytes() == before and files(out) == {"detections.json"}


@pytest.mark.parametrize("again", ["in", "in/../in", "link", "in/x.png"])
def test_a_picture_named_again_is_left_out(tmp_path, caplog, again):
    caplog.set_level("INFO", logger="querydet_jax")
    picture(tmp_path / "in" / "x.png")
    (tmp_path / "link").symlink_to("in")
    content = predict(tmp_path / "in", tmp_path / again, out=tmp_path / "out", draw="none")
    assert [entry["file"] for entry in content["images"]] == [str(tmp_path / "in" / "x.png")]
    assert "left out 1 pictures that are named again" in caplog.text


@pytest.mark.parametrize(
    ("images", "score", "message"),
    [
        ("", 0.3, "--images: one of the names is empty"),
        ("in/*.jpg", 0.3, r"in/\*.jpg: the pattern matches no picture and no folder"),
        ("in", float("nan"), "--min-score nan: give a score from 0 to 1"),
        ("in", 30.0, "--min-score 30: give a score from 0 to 1"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(tmp_path, monkeypatch, images, score, message):
    picture(tmp_path / "in" / "x.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(QueryDetError, match=message):
        predict(images, out=tmp_path / "out", min_score=score)
    assert not (tmp_path / "out").exists()


def test_a_pattern_in_quotes_is_expanded_and_a_name_with_its_signs_is_a_name(tmp_path):
    for name in ("b.png", "a.png", "c.jpg", "[1].png"):
        picture(tmp_path / "in" / name)
    content = predict(tmp_path / "in" / "[ab].png", tmp_path / "in" / "[1].png", out=tmp_path / "out", draw="none")
    assert [Path(entry["file"]).name for entry in content["images"]] == ["a.png", "b.png", "[1].png"]


def test_results_follow_the_order_of_the_pictures(tmp_path):
    """Whatever their canvases."""
    shapes = {"a": (20, 30), "b": (30, 20), "c": (20, 30), "d": (30, 20)}
    for name, shape in shapes.items():
        picture(tmp_path / "in" / f"{name}.png", *shape)
    content = predict(tmp_path / "in", out=tmp_path / "out", draw="none")
    assert [Path(entry["file"]).stem for entry in content["images"]] == list(shapes)


def test_coco_results_are_written_beside_the_list(tmp_path):
    for number in (139, 7):
        picture(tmp_path / "in" / f"{number:012}.jpg")
    predict(tmp_path / "in", out=tmp_path / "out", draw="none", save_json=str(tmp_path / "coco.json"))
    rows = json.loads((tmp_path / "coco.json").read_text())
    assert [(row["image_id"], Path(row["file_name"]).name) for row in rows] == [
        (7, "000000000007.jpg"),
        (139, "000000000139.jpg"),
    ]
    assert rows[0]["category_id"] == 1 and rows[0]["score"] == pytest.approx(0.9)
    assert rows[0]["bbox"] == pytest.approx([0, 0, 30, 20], abs=0.5)
    assert coco_ids(["x/7.jpg", "y/007.jpg"]) == [1, 2] and coco_ids(["7.jpg", "b.jpg"]) == [1, 2]
    for name in (tmp_path / "in" / "000000000007.jpg", tmp_path / "out" / "detections.json"):
        with pytest.raises(ConfigError, match="--save-json .*choose another file"):
            predict(tmp_path / "in", out=tmp_path / "out", save_json=str(name))


@pytest.mark.parametrize(("score", "kept"), [("0.9", 1), ("0.95", 0), ("car=0.95", 0), ("0.95,car=0.2", 1)])
def test_scores_from_which_detections_count(tmp_path, score, kept):
    picture(tmp_path / "in" / "x.png")
    content = predict(tmp_path / "in", out=tmp_path / "out", min_score=score)
    assert len(content["images"][0]["detections"]) == kept


@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (1, 2), (3, 1), (1, 64), (2, 2), (1, 300)], ids=lambda value: str(value)
)
def test_pictures_of_a_pixel_work(tmp_path, height, width):
    picture(tmp_path / "in" / "x.png", height, width)
    content = predict(tmp_path / "in", out=tmp_path / "out")
    assert len(content["images"]) == 1 and files(tmp_path / "out") == {"detections.json", "x_detections.jpg"}


@pytest.mark.parametrize("name", ["a\nERROR: forged", "b\x1b[2J", "c\r\n"])
def test_a_message_with_a_name_is_one_line(tmp_path, capsys, name):
    (tmp_path / f"{name}.png").write_bytes(b"no picture")
    picture(tmp_path / "x.png")
    with pytest.raises(SystemExit):
        run(lambda: predict(tmp_path, out=tmp_path / "out"))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and said[0].startswith("WARNING: left out ") and said[1].startswith("error: 1 of 2")
    assert all(line.isprintable() for line in said)


def test_odd_names_lose_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    folder = tmp_path / "in"
    picture(folder / "x.png")
    names = ["\x1b[2Jred.png", "é" * 120 + ".png", "line\nbreak.png"]
    raw = os.fsencode(str(folder)) + b"/\xff.png"
    for name in names:
        (folder / name).write_bytes((folder / "x.png").read_bytes())
    try:
        Path(os.fsdecode(raw)).write_bytes((folder / "x.png").read_bytes())
    except OSError:  # a file system that takes only text
        names.pop()
    content = predict(folder, out=out)
    assert len(content["images"]) == len(list(folder.iterdir())) and not content["broken"]
    assert len(files(out)) == 1 + len(content["images"])
    said = capsys.readouterr().out
    assert "\x1b" not in said and len(said.splitlines()) == len(content["images"]) + 1


@pytest.mark.parametrize("gone", ["a.png", "b.png", "c.png"])
def test_a_picture_that_is_removed_before_it_is_drawn_costs_itself_alone(tmp_path, monkeypatch, gone):
    for name in ("a.png", "b.png", "c.png"):
        picture(tmp_path / "in" / name)

    def found(images: np.ndarray, sizes: np.ndarray) -> Found:
        (tmp_path / "in" / gone).unlink(missing_ok=True)
        return find(images, sizes)

    find = one_box
    monkeypatch.setitem(globals(), "one_box", found)
    with pytest.raises(DataError, match=f"1 of 3 pictures could not be used, the first: .*{gone}: no such image file"):
        predict(tmp_path / "in", out=tmp_path / "out", batch_size=3)
    assert len(files(tmp_path / "out")) == 1 + 2


@pytest.mark.parametrize(
    ("source", "named", "folder"),
    [
        ("coco", "", "val2017"),
        ("coco", "pictures", "pictures"),
        ("visdrone", "", "VisDrone2019-DET-val/images"),
        ("yolo", "", "images/val"),
    ],
)
def test_drawn_pictures_of_an_evaluation_stand_beside_its_images(tmp_path, source, named, folder):
    image = picture(tmp_path / folder / "a.jpg")
    found = images_folder(DataConfig(source=source, root=str(tmp_path), val_images=named), "val")
    assert found is not None and found == image.parent
    inputs = {identity(found / "a.jpg")}
    (tmp_path / "link").symlink_to(found)
    assert beside(tmp_path / "link" / "a.jpg", inputs).name == "a_.jpg"
    assert beside(tmp_path / "link" / "b.jpg", inputs).name == "b.jpg"


@pytest.mark.parametrize("draw", ["none", "boxes"])
def test_what_is_drawn(tmp_path, draw):
    picture(tmp_path / "in" / "x.png")
    predict(tmp_path / "in", out=tmp_path / "out", draw=draw)
    assert files(tmp_path / "out") == {"detections.json", *(["x_detections.jpg"] if draw == "boxes" else [])}


@pytest.mark.parametrize("kind", ["file", "below a file", "detections.json is a folder"])
def test_a_folder_that_cannot_be_written_is_found_before_the_work(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "detections.json is a folder":
        (out / "detections.json").mkdir(parents=True)
    else:
        out.write_text("a file")
    picture(tmp_path / "in" / "x.png")

    def never(images: np.ndarray, sizes: np.ndarray) -> Found:
        raise AssertionError("ran")

    out = out / "deeper" if kind == "below a file" else out
    with pytest.raises(QueryDetError, match="cannot be written"):
        _predict(toy(never, DataConfig(threads=0)), PredictArguments((str(tmp_path / "in"),), str(out)))


def test_the_list_is_complete_json_after_every_picture(tmp_path):
    path = tmp_path / "detections.json"
    path.write_text("former")
    with DetectionsFile(path, {"model": "toy"}) as listed:
        assert path.read_text() == "former"
        for n in range(3):
            listed.add({"file": f"\udcff{n}", "detections": [n]})
            assert len(json.loads(path.read_text())["images"]) == n + 1
        listed.broken += ["bad"] * 2
    content = json.loads(path.read_text())
    assert content["model"] == "toy" and content["broken"] == ["bad", "bad"] and len(content["images"]) == 3
    with DetectionsFile(path, {"model": "toy"}):
        pass
    assert json.loads(path.read_text()) == {"model": "toy", "images": [], "broken": []}
    with pytest.raises(KeyboardInterrupt), DetectionsFile(path, {"model": "toy"}) as listed:
        listed.add({"file": "x"})
        raise KeyboardInterrupt
    assert len(json.loads(path.read_text())["images"]) == 1
