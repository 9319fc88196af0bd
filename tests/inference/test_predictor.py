"""`qd.load(source).predict(pictures)`: sources, pictures of every kind, and what a result can become."""

from __future__ import annotations

import dataclasses
import functools
import io
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import small_detector as small
from PIL import Image

import querydet_jax as qd
from querydet_jax.config import Config, DataConfig, zoo
from querydet_jax.inference import predictor as predictor_module
from querydet_jax.models import RetinaNet
from querydet_jax.runtime.errors import ConfigError, DataError, QueryDetError
from querydet_jax.weights import state_dict
from querydet_jax.weights.packaged import ModelCard, write_packaged

DATA = DataConfig(test_short=32, test_max=64, test_canvases=((32, 64), (64, 32)), threads=0)
CARD = ModelCard(
    title="t", data="d", licence="l", attribution="a", recipe="r", limits="l", measured="m",
    min_scores={"ant": 0.3, "bee": 0.5, "cow": 0.99},
)  # fmt: skip


class Found(NamedTuple):
    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    valid: np.ndarray


def mean_colour(images: np.ndarray, sizes: np.ndarray) -> Found:
    """Three boxes over all of each picture; the scores are its mean red, green and blue."""
    boxes = np.concatenate([np.zeros_like(sizes), sizes[:, ::-1]], axis=1).astype(np.float32)
    means = np.stack([image[:h, :w].mean((0, 1)) for image, (h, w) in zip(images, sizes, strict=True)]) / 255
    classes = np.tile(np.arange(3), (len(images), 1))
    return Found(np.repeat(boxes[:, None], 3, 1), means.astype(np.float32), classes, classes >= 0)


def colours(data: DataConfig = DATA, **more) -> qd.Predictor:
    names = ("red", "green", "blue")
    return qd.Predictor(mean_colour, name="colours", classes=names, data=data, query="csq", **more)


def seen(source, data: DataConfig = DATA, **options) -> list[list[float]]:
    """The mean colours, 0..255, that the detector saw of each picture."""
    results = colours(data).predict(source, min_score=0.0, **options)
    return [(255 * result.scores).round().astype(int).tolist() for result in results]


RED = np.full((20, 30, 3), (200, 100, 50), np.uint8)
GREY = np.full((20, 30), 77, np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pictures = tmp_path / "only" / "pictures"
    pictures.mkdir(parents=True)
    for name, colour in {"b.png": (10, 20, 30), "a.png": (40, 50, 60), "c.png": (70, 80, 90)}.items():
        Image.new("RGB", (30, 20) if name != "a.png" else (20, 30), colour).save(pictures / name)
    return pictures


def test_files_in_the_order_given(folder: Path) -> None:
    a, b, c = [40, 50, 60], [10, 20, 30], [70, 80, 90]
    assert seen(folder) == seen(str(folder)) == [a, b, c]
    assert seen(folder / "b.png") == [b]
    assert seen([folder / "c.png", str(folder / "a.png"), folder / "b.png"]) == [c, a, b]
    assert seen(f"{folder}/[bc].png") == seen(f"{folder.parent}/**/[bc].png") == [b, c]
    results = list(colours().predict(folder))
    assert [result.path for result in results] == [folder / f"{name}.png" for name in "abc"]
    assert [result.index for result in results] == [0, 1, 2]
    assert [result.size for result in results] == [(30, 20), (20, 30), (20, 30)]
    assert [len(result) for result in results] == [0, 0, 2]  # from 0.3 on


@pytest.mark.parametrize(
    ("picture", "wanted"),
    [
        (RED, [200, 100, 50]),
        (np.dstack([RED, GREY]), [200, 100, 50]),
        (GREY, [77] * 3),
        (GREY[..., None], [77] * 3),
        ((GREY.astype(np.uint16) << 8), [77] * 3),
        (Image.fromarray(RED), [200, 100, 50]),
        (Image.fromarray(GREY), [77] * 3),
        (Image.fromarray(RED).convert("RGBA"), [200, 100, 50]),
        (Image.fromarray(GREY.astype(np.uint16) << 8), [77] * 3),
    ],
    ids=["rgb", "rgba", "grey", "grey 3d", "uint16", "pillow", "pillow grey", "pillow rgba", "pillow 16"],
)
def test_pictures_in_memory(picture, wanted: list[int]) -> None:
    assert seen(picture) == seen([picture]) == [wanted]
    (result,) = colours().predict([picture])
    assert result.path is None and result.size == (20, 30) and result.image.shape == (20, 30, 3)


def test_several_arrays_opencv_and_devices() -> None:
    assert seen(np.stack([RED, RED // 2])) == seen([RED, RED // 2]) == [[200, 100, 50], [100, 50, 25]]
    assert seen(RED[..., ::-1], channels="bgr") == [[200, 100, 50]]
    assert seen(np.dstack([RED[..., ::-1], GREY]), channels="bgr") == [[200, 100, 50]]
    import jax.numpy as jnp

    assert seen(jnp.asarray(RED)) == [[200, 100, 50]]


def test_a_buffer_may_be_filled_anew() -> None:
    frame = RED.copy()
    results = colours().predict(frame, min_score=0.0)
    frame[:] = 0
    (result,) = results
    assert result.image.max() == 200 and result.scores.max() > 0.7


def test_a_picture_in_memory_is_read_as_its_file_is(tmp_path: Path) -> None:
    """Orientation and depth by the run's own rules."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RED).save(tmp_path / "turned.png", exif=exif)
    for rule, size in (("auto", (30, 20)), ("ignore", (20, 30))):
        data = dataclasses.replace(DATA, exif=rule)
        with Image.open(tmp_path / "turned.png") as picture:
            for source in (tmp_path / "turned.png", picture):
                (result,) = colours(data).predict(source)
                assert result.size == size
    deep = np.arange(600, dtype=np.uint16).reshape(20, 30)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    data = dataclasses.replace(DATA, bit_depth="0:599")
    with Image.open(tmp_path / "deep.png") as picture:
        assert seen(tmp_path / "deep.png", data) == seen(picture, data) == seen(deep, data) == [[128] * 3]
    assert seen(deep.astype(np.float32) / 599, dataclasses.replace(DATA, bit_depth="0:1")) == [[128] * 3]
    small = dataclasses.replace(DATA, max_pixels=599)
    for source in (tmp_path / "deep.png", RED, Image.fromarray(RED)):
        with pytest.raises(DataError, match="too large, 600 pixels where 599 are allowed; set data.max_pixels"):
            colours(small).predict(source)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (RED.astype(np.float32), {}, "picture 0: pixels are 32-bit numbers from 50 to 200; set data.bit_depth"),
        (RED * np.float32(np.nan), {}, "picture 0: no pixel is a finite number; give a picture"),
        (RED > 100, {}, r"picture 0: bool \[20, 30, 3\] is no picture; give uint8"),
        (RED[..., :2], {}, r"picture 0: uint8 \[20, 30, 2\] is no picture"),
        (RED[:0], {}, "is no picture"),
        (np.zeros((2, 0, 3, 3, 3), np.uint8), {}, "is no picture"),
        ([], {}, "no pictures given"),
        (None, {}, "pictures: None is none; give paths, arrays"),
        ([3], {}, r"pictures\[0\]: 3 is none"),
        ((x for x in [RED]), {}, "pictures: <generator .* is none"),
        ([RED, "a.png"], {}, "paths and pictures in memory in one list"),
        ("nowhere.png", {}, "nowhere.png: no such picture or folder"),
        ("n" * 300 + ".png", {}, "n.png: no such picture or folder"),
        ("nowhere*.png", {}, "nowhere.*: the pattern matches no picture"),
        (RED, {"channels": "grb"}, "channels 'grb': choose rgb or bgr"),
        ("a.png", {"channels": "bgr"}, "channels bgr: is for arrays"),
        (RED, {"min_score": 2.0}, "min_score 2: give a score from 0 to 1"),
        (RED, {"min_score": {"rde": 0.2}}, "min_score: no class 'rde'; did you mean red"),
        (RED, {"min_score": "best"}, "min_score best: these weights come from no run folder"),
    ],
)
def test_what_is_refused_at_once(source, options, message: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(QueryDetError, match=message) as error:
        colours().predict(source, **options)
    assert "\n" not in str(error.value)


def test_a_broken_picture(folder: Path) -> None:
    """Raises, or costs itself alone: by its header, by its pixels, because it fits no canvas."""
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:-20])
    (folder / "d.png").write_bytes(b"none")
    Image.new("RGB", (2000, 20)).save(folder / "e.png")
    data = dataclasses.replace(DATA, test_max=2000)
    with pytest.raises(DataError, match="d.png: not readable"):
        list(colours(data).predict(folder))
    said: list[str] = []
    assert [result.path.name for result in colours(data).predict(folder, on_broken=said.append)] == ["a.png", "c.png"]
    assert sorted(Path(line.split(":")[0]).name for line in said) == ["b.png", "d.png", "e.png"]


def test_scores_and_names() -> None:
    predictor = colours(best={"red": 0.5, "green": 0.5, "blue": 0.1})
    for value, names in {
        "": ["red", "green"],
        "best": ["red", "blue"],
        0.5: ["red"],
        "0.5,blue=0.1": ["red", "blue"],
    }.items():
        (result,) = predictor.predict(RED, min_score=value)
        assert result.names == names and len(result) == len(result.boxes) == len(names)
    (result,) = predictor.predict(RED, min_score={"red": 0.9})
    assert result.names == ["green"]


def result_of(folder: Path, **changes) -> qd.Prediction:
    (result,) = colours().predict(folder / "c.png", min_score=0.28)
    return dataclasses.replace(result, **changes)


def test_what_a_result_becomes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = result_of(folder)
    assert result.names == ["green", "blue"] and result.boxes.dtype == np.float32
    assert repr(result) == f"Prediction({folder / 'c.png'}: green 1, blue 1)"
    assert result.to_coco()[0] == {
        "image_id": 1,
        "category_id": 2,
        "bbox": [0.0, 0.0, 30.0, 20.0],
        "score": pytest.approx(80 / 255),
    }
    assert result.to_coco(7)[1]["image_id"] == 7
    plot = result.plot()
    assert plot.mode == "RGB" and plot.width % 30 == 0
    with Image.open(io.BytesIO(result._repr_png_())) as shown:
        assert shown.format == "PNG" and shown.size == plot.size
    assert result.save(folder / "drawn.png") == folder / "drawn.png"
    assert result.save(folder) == result.save(folder / "") == folder / "c_detections.jpg"
    assert result.save(folder / "new") == folder / "new" / "c_detections.jpg"
    before = (folder / "c.png").read_bytes()
    with pytest.raises(DataError, match="c.png: is the picture itself"):
        result.save(folder / "c.png")
    with pytest.raises(DataError, match="suffix|ending|png"):
        result.save(folder / "c.bmp")
    assert (folder / "c.png").read_bytes() == before
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(QueryDetError, match="pip install -r requirements-supervision.txt"):
        result.to_supervision()
    monkeypatch.setitem(sys.modules, "supervision", SimpleNamespace(Detections=lambda **fields: fields))
    fields = result.to_supervision()
    assert fields["xyxy"] is result.boxes and fields["class_id"].tolist() == [1, 2]
    assert fields["data"]["class_name"].tolist() == ["green", "blue"]


def test_a_result_of_supervision_itself(folder: Path) -> None:
    supervision = pytest.importorskip("supervision", reason="pip install -r requirements-supervision.txt")
    detections = result_of(folder).to_supervision()
    assert isinstance(detections, supervision.Detections) and len(detections) == 2
    empty = result_of(folder).at_least(1.0).to_supervision()
    assert len(empty) == 0


# Sources ---------------------------------------------------------------------------------------


CONFIG = Config(
    name="run",
    classes=("ant", "bee", "cow"),
    model=dataclasses.replace(
        small.MODEL,
        max_level=5,
        loss=dataclasses.replace(small.MODEL.loss, level_weighting="uniform"),
        backbone=dataclasses.replace(small.MODEL.backbone, name="resnet10"),
    ),
    data=DataConfig(test_short=64, test_max=96, test_canvases=((64, 96),), threads=0),
    inference=dataclasses.replace(small.BASE, start_level=3, capacities=(0.25,)),
)


@functools.cache
def model() -> RetinaNet:
    model = qd.build_model(CONFIG.model, seed=0)
    assert isinstance(model, RetinaNet)
    return small.randomize(model, seed=16)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo that holds ``toy``."""
    folder = tmp_path_factory.mktemp("zoo")
    write_packaged(folder / "toy", state_dict(model()), CONFIG, CARD)
    return folder


def test_packaged_weights_by_name(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "ZOO", toy)
    predictor = qd.load("toy")
    assert repr(predictor) == "Predictor('toy', csq, 3 classes)" and predictor.card == CARD
    image = small.pictures(2, 64, 96)[1]
    (every,) = predictor.predict(image, min_score=0.0)
    (result,) = predictor.predict(image, maps=True)
    # A picture of the canvas's size is what the network sees.
    direct = predictor.detector(image[None])
    boxes = np.clip(np.asarray(direct.boxes[0]), 0, [96, 64, 96, 64])
    kept = np.asarray(direct.valid[0]) & (boxes[:, 2:] > boxes[:, :2]).all(1)
    np.testing.assert_array_equal(every.scores, np.asarray(direct.scores[0])[kept])
    np.testing.assert_array_equal(every.boxes, boxes[kept])
    # Without a score, each class has the best of its card.
    least = np.array([0.3, 0.5, 0.99], np.float32)
    assert 0 < len(result) < len(every) and (result.scores >= least[result.classes]).all()
    trace = predictor.detector.trace(image[None])
    for level, cells in trace.active.items():
        np.testing.assert_array_equal(result.queries.active[level], np.asarray(cells)[0])
    sheet = result.plot()
    assert every.queries is None and sheet.width > every.plot().width and sheet.height > every.plot().height


def test_settings_of_a_source(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "ZOO", toy)
    monkeypatch.setattr(predictor_module, "open_model", lambda config, path: model())
    dense = qd.load(toy / "toy", {"inference.query": "dense"})
    assert dense.query == "dense"
    with pytest.raises(ConfigError, match="maps: toy has none, because inference.query is dense"):
        dense.predict(RED, maps=True)
    with pytest.raises(ConfigError, match="unknown configuration key inference.qery: did you mean inference.query"):
        qd.load("toy", {"inference.qery": "dense"})


def test_the_packaged_detector_on_a_real_picture() -> None:
    """Of its validation pictures; 17 persons and 7 cars are in it."""
    (result,) = qd.load("hituav").predict(Path(__file__).parents[2] / "examples/hituav/1_130_30_0_03832.jpg")
    assert result.names.count("Person") >= 8 and result.names.count("Car") >= 3 and len(result) <= 40
    sides = result.boxes[:, 2:] - result.boxes[:, :2]
    assert np.median(sides) < 24


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("tyo", "tyo: no such run folder, exported file or packaged weights; did you mean toy.*: toy"),
        ("hituav_querydet", "hituav_querydet: a card holds no weights; give the folder of a run .*: toy"),
        ("{here}", "no config.json in this folder"),
        ("{here}/x.pth", "x.pth: is neither a run folder nor an exported file"),
        ("{here}/x.zip", "x.zip: damaged, cut short or not an artifact"),
        ("{here}/none.zip", "none.zip: no such run folder, exported file or packaged weights"),
        ("n" * 300 + ".zip", "n.zip: no such run folder, exported file or packaged weights"),
        (None, "load: None is no name and no path"),
    ],
)
def test_what_cannot_be_loaded(toy: Path, tmp_path: Path, monkeypatch, source, message: str) -> None:
    monkeypatch.setattr(zoo, "ZOO", toy)
    for name in ("x.pth", "x.zip"):
        (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(QueryDetError, match=message) as error:
        qd.load(source.format(here=tmp_path) if source else source)
    assert "\n" not in str(error.value)


def test_importing_the_package_imports_nothing_heavy() -> None:
    program = (
        "import sys, querydet_jax as qd; assert 'load' in dir(qd); from querydet_jax.config import zoo;"
        "assert not {'jax', 'flax', 'PIL', 'grain'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
