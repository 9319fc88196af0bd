"""`predict(tiles=...)`: windows, and every object once whatever cut it lies across.

The detector of these tests sees its own: every object is a rectangle of a colour, of which it returns what the window
shows, so that cuts are exact.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import querydet_jax as qd
from querydet_jax.cli.predict import PredictArguments, _predict
from querydet_jax.config import DataConfig
from querydet_jax.data.readers.memory import Frames
from querydet_jax.inference.tiling import Found, Grid, Tiles, merge, parse_tiles, plan_windows
from querydet_jax.ops.nms import class_wise_nms
from querydet_jax.runtime.errors import ConfigError, DataError, QueryDetError

DATA = DataConfig(test_short=64, test_max=96, test_canvases=((64, 96), (96, 64)), threads=0)
MOST = 40  # detections of a window


class Output(NamedTuple):
    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    valid: np.ndarray


class Seeing:
    """Returns, of every red value above 0, the box around its pixels; the class is the value modulo 3."""

    def __init__(self):
        self.shapes: list[tuple[int, ...]] = []
        self.sizes: list[tuple[int, int]] = []

    def __call__(self, images: np.ndarray, sizes: np.ndarray) -> Output:
        self.shapes.append(images.shape)
        self.sizes += map(tuple, sizes.tolist())
        out = Output(np.zeros((len(images), MOST, 4), np.float32), *(np.zeros((len(images), MOST), t) for t in "fi?"))
        for n, (image, (h, w)) in enumerate(zip(images, sizes, strict=True)):
            red = image[:h, :w, 0]
            # The more is seen, the better; the best first.
            values = sorted(np.setdiff1d(red, [0]), key=lambda value: -self._score(red, value))
            for slot, value in enumerate(values[:MOST]):
                y, x = np.nonzero(red == value)
                out.boxes[n, slot] = x.min(), y.min(), x.max() + 1, y.max() + 1
                out.classes[n, slot], out.valid[n, slot] = value % 3, True
                out.scores[n, slot] = self._score(red, value)
        return out

    @staticmethod
    def _score(red: np.ndarray, value: int) -> float:
        return 0.5 + min(int((red == value).sum()), 4000) / 10000


def predictor(detector=None, data: DataConfig = DATA, **more) -> qd.Predictor:
    detector = detector or Seeing()
    return qd.Predictor(detector, name="toy", classes=("a", "b", "c"), data=data, query="csq", **more)


def scene(size: tuple[int, int], boxes) -> np.ndarray:
    picture = np.zeros((*size, 3), np.uint8)
    for value, (x0, y0, x1, y1) in enumerate(boxes, start=1):
        picture[y0:y1, x0:x1] = value
    return picture


def found(picture, detector=None, data: DataConfig = DATA, min_score=0.0, **options) -> list[tuple[int, ...]]:
    """The class and box of each detection."""
    (result,) = predictor(detector, data).predict(picture, min_score=min_score, **options)
    assert (np.diff(result.scores) <= 0).all() and result.boxes.dtype == np.float32
    assert result.size == picture.shape[:2] and result.queries is None
    return sorted((int(k), *map(float, box)) for k, box in zip(result.classes, result.boxes, strict=True))


def truth(boxes) -> list[tuple[int, ...]]:
    return sorted((value % 3, *map(float, box)) for value, box in enumerate(boxes, start=1))


# In a picture of 150 x 240 with windows of 64 x 96 and an overlap of a quarter, lefts are 0, 72, 144, tops 0, 43, 86.
CUTS = {
    "in no cut": (10, 10, 30, 30),
    "in the overlap": (76, 5, 92, 17),
    "between columns": (60, 5, 80, 20),
    "ends at a border": (80, 5, 96, 20),
    "begins at a border": (72, 5, 90, 20),
    "between rows": (10, 35, 30, 52),
    "at a corner": (66, 38, 88, 56),
    "a pixel beyond": (50, 10, 97, 20),
    "larger than the overlap": (58, 5, 110, 25),
    "larger than the overlap, between rows": (10, 30, 30, 80),
    "larger than the overlap, at a corner": (60, 30, 110, 80),
    "across three columns": (60, 10, 170, 30),
    "across three rows": (10, 20, 40, 130),
    "larger than a window": (20, 20, 220, 140),
    "all of the picture": (0, 0, 240, 150),
    "along the end": (200, 100, 240, 150),
}


@pytest.mark.parametrize("overlap", [0.0, 0.1, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("box", CUTS.values(), ids=CUTS)
def test_an_object_across_a_cut_is_found_once(box, overlap: float) -> None:
    assert found(scene((150, 240), [box]), tiles="auto", overlap=overlap) == truth([box])


@pytest.mark.parametrize("seed", range(6))
def test_many_objects_in_pictures_of_odd_sizes(seed: int) -> None:
    """Side by side, of all sizes; every one once."""
    rng = np.random.default_rng(seed)
    size = tuple(rng.integers(100, 400, 2).tolist())
    boxes: list[tuple[int, ...]] = []
    for _ in range(60):
        y, x = (int(rng.integers(0, length - 5)) for length in size)
        sides = rng.integers(4, (12, 30, 110)[len(boxes) % 3], 2)
        box = (x, y, int(min(x + sides[1], size[1])), int(min(y + sides[0], size[0])))
        if all(min(a[2], box[2]) <= max(a[0], box[0]) or min(a[3], box[3]) <= max(a[1], box[1]) for a in boxes):
            boxes.append(box)
    assert len(boxes) > 8
    for overlap in (0.0, 0.2, 0.6):
        assert found(scene(size, boxes), tiles="auto", overlap=overlap) == truth(boxes)


def test_neighbours_stay_apart() -> None:
    """Of one class, on both sides of a cut; on either side of a border, in line."""
    boxes = [
        (80, 10, 96, 26),
        (0, 0, 0, 0),
        (0, 0, 0, 0),
        (97, 10, 113, 26),
        (0, 0, 0, 0),
        (0, 0, 0, 0),
        (74, 30, 90, 46),
    ]
    kept = [box for box in boxes if any(box)]
    assert found(scene((150, 240), boxes), tiles="auto", overlap=0.25) == sorted((1, *map(float, box)) for box in kept)


def a_grid(columns: int = 2) -> Grid:
    """Windows of 100 x 100, every 80 px."""
    lefts = np.arange(columns) * 80
    return Grid((100, 20 + 80 * columns), (100, 100), (np.zeros(1, np.int64), lefts), (100, 100), (100, 100))


def merged(*rows, columns: int = 2):
    """Rows of box, score, class, column."""
    boxes, scores, classes, column = zip(*rows, strict=True)
    windows = np.stack([np.zeros(len(rows), np.int64), column], axis=1)
    out = merge(Found(np.float32(boxes), np.float32(scores), np.int64(classes), windows), a_grid(columns), 0.5)
    return [(box.tolist(), round(float(score), 2), int(k)) for box, score, k in zip(*out, strict=True)]


def test_detections_as_they_are() -> None:
    # One object in the overlap: boxes differ by pixels, the better one stays; another class is another object.
    assert merged(([84, 10, 94, 20], 0.8, 0, 0), ([85, 11, 95, 20], 0.9, 0, 1), ([84, 10, 94, 20], 0.5, 1, 0)) == [
        ([85, 11, 95, 20], 0.9, 0),
        ([84, 10, 94, 20], 0.5, 1),
    ]
    # What one window's own NMS has left is left.
    both = [([10, 10, 30, 30], 0.9, 0), ([12, 10, 32, 30], 0.4, 0)]
    assert merged(*((*row, 0) for row in both)) == both
    # A part is not taken for the object, whatever its score and class: the next window shows all of it.
    assert merged(([88, 10, 100, 30], 0.9, 1, 0), ([88, 10, 110, 30], 0.3, 0, 1)) == [([88, 10, 110, 30], 0.3, 0)]
    # Parts whose better one is certain are not spoilt by faint ones, nor joined where they do not face each other.
    apart = [([40, 10, 100, 30], 0.9, 0), ([80, 10, 170, 32], 0.1, 0)]
    assert merged((*apart[0], 0), (*apart[1], 1)) == apart
    apart = [([40, 10, 100, 30], 0.9, 0), ([80, 28, 170, 60], 0.8, 0)]
    assert merged((*apart[0], 0), (*apart[1], 1)) == apart
    assert merged(([40, 10, 99, 30], 0.9, 0, 0), ([81, 11, 170, 30], 0.6, 0, 1)) == [([40, 10, 170, 30], 0.9, 0)]


def test_greedy_as_the_repositorys_own() -> None:
    """Between windows of one detection each, what is kept is what ``class_wise_nms`` keeps."""
    rng = np.random.default_rng(3)
    n = 300
    corners = rng.uniform(110, 150, (n, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(5, 25, (n, 2))], axis=1).astype(np.float32)
    scores, classes = rng.permutation(n).astype(np.float32) / n, rng.integers(0, 3, n)
    # A row each; no box is near a border, whichever window it is of.
    rows, column = np.arange(n), np.zeros(n, np.int64)
    grid = Grid((330, 300), (300, 300), (rows // 10, column[:1]), (300, 300), (300, 300))
    windows = np.stack([rows, column], axis=1)
    arrays = map(jnp.asarray, (boxes, scores, classes.astype(np.int32)))
    keep, valid = class_wise_nms(*arrays, iou_threshold=0.5, max_detections=n)
    expected = boxes[np.asarray(keep)[np.asarray(valid)]]
    assert 20 < len(expected) < 250
    np.testing.assert_array_equal(merge(Found(boxes, scores, classes, windows), grid, 0.5)[0], expected)


# Windows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "tiles", "window", "rows", "columns", "canvas"),
    [
        ((64, 96), Tiles(), (64, 96), 1, 1, (64, 96)),
        ((60, 40), Tiles(), (60, 40), 1, 1, (96, 64)),
        ((65, 96), Tiles(0, 0.0), (64, 96), 2, 1, (64, 96)),
        ((128, 192), Tiles(0, 0.0), (64, 96), 2, 2, (64, 96)),
        ((129, 193), Tiles(0, 0.0), (96, 64), 2, 4, (96, 64)),  # eight, where the other canvas needs nine
        ((64, 960), Tiles(0, 0.2), (64, 96), 1, 13, (64, 96)),
        ((960, 30), Tiles(0, 0.2), (96, 30), 13, 1, (96, 64)),
        ((400, 600), Tiles(4, 0.0), (100, 150), 4, 4, (64, 96)),
        ((400, 600), Tiles(4, 0.5), (160, 240), 4, 4, (64, 96)),
        ((600, 400), Tiles(4, 0.25), (185, 124), 4, 4, (96, 64)),
        ((64, 96), Tiles(2, 0.0), (32, 48), 2, 2, (64, 96)),
        ((1, 1), Tiles(9), (1, 1), 1, 1, (64, 96)),
        ((1, 700), Tiles(3, 0.0), (1, 234), 1, 3, (64, 96)),
    ],
)
def test_windows(size, tiles: Tiles, window, rows: int, columns: int, canvas) -> None:
    grid = plan_windows(tiles, Frames([np.zeros((*size, 3), np.uint8)], ("a",)), 0, DATA)
    assert (grid.window, len(grid.starts[0]), len(grid.starts[1]), grid.canvas) == (window, rows, columns, canvas)
    for axis in (0, 1):
        starts = grid.starts[axis]
        # From end to end, each overlapping the next by what was asked for, up to a pixel.
        assert starts[0] == 0 and starts[-1] + window[axis] == size[axis]
        assert (np.diff(starts) > 0).all() and (np.diff(starts) <= window[axis] * (1 - tiles.overlap) + 1).all()
        assert 1 <= grid.shape[axis] <= grid.canvas[axis]
    if len(grid) > 1 and not tiles.number:
        assert grid.shape == grid.window


def test_a_number_of_windows_scales_the_picture() -> None:
    boxes = [(20, 20, 60, 50), (140, 100, 200, 160), (300, 200, 400, 300)]
    picture = np.kron(scene((100, 150), [[v // 4 for v in box] for box in boxes]), np.ones((4, 4, 1), np.uint8))
    data = dataclasses.replace(DATA, test_canvases=((128, 192),), test_short=128, test_max=192)
    for number in (2, 3):
        detector = Seeing()
        assert len(list(predictor(detector, data).predict(picture, tiles=number, min_score=0.0))) == 1
        assert len(detector.shapes) == number**2 and set(detector.shapes) == {(1, 128, 192, 3)}
    # Even one that a canvas holds, and boxes come back to its pixels.
    (result,) = predictor().predict(scene((64, 96), [(40, 10, 60, 20)]), tiles=2, overlap=0.25, min_score=0.5)
    assert result.scale < 0.7 and np.abs(result.boxes - [40, 10, 60, 20]).max(axis=1).min() <= 1


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (50, 70), (20, 20), (1, 1), (64, 50)])
def test_what_no_window_is_needed_for_is_seen_whole(size) -> None:
    picture = np.random.default_rng(0).integers(0, 9, (*size, 3), dtype=np.uint8)
    whole, tiled = (list(predictor().predict(picture, tiles=t, min_score=0.0)) for t in ("off", "auto"))
    for one, other in zip(whole, tiled, strict=True):
        for name in ("boxes", "scores", "classes", "size", "scale"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_one_program_and_every_window_in_a_full_batch() -> None:
    picture = scene((150, 240), CUTS.values())
    results = []
    for batch in (1, 4):
        detector = Seeing()
        (result,) = predictor(detector, windows=batch).predict(picture, tiles="auto", overlap=0.25)
        # 3 x 3 windows; the last batch is filled up, and what it repeats counts once.
        assert detector.shapes == [(batch, 64, 96, 3)] * -(-9 // batch) and set(detector.sizes) == {(64, 96)}
        results.append(result)
    np.testing.assert_array_equal(results[0].boxes, results[1].boxes)
    # An artifact's batch is its own.
    detector = Seeing()
    next(predictor(detector, batch_size=2).predict(picture, tiles="auto"))
    assert {shape[0] for shape in detector.shapes} == {2}


def test_a_full_window_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """The detector's limit is that of a window; where it cuts off what counts, one line says so."""
    rows, columns = np.divmod(np.arange(60), 10)
    boxes = [(9 * x, 9 * y, 9 * x + 5, 9 * y + 5) for x, y in zip(columns, rows, strict=True)]
    with caplog.at_level("WARNING", "querydet_jax"):
        assert len(found(scene((150, 240), boxes), tiles="auto", min_score=0.1)) >= MOST
    (record,) = caplog.records
    assert re.match(r"picture 0: \d of 9 windows hold as many detections as the detector returns", record.message)
    caplog.clear()
    assert len(found(scene((150, 240), boxes[:30]), tiles="auto", min_score=0.1)) == 30
    assert not caplog.records


# As a user calls it ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tiles": "all"}, "tiles 'all': give auto, off, or the number of windows along the longer side, 2 to 100"),
        ({"tiles": 1}, "tiles 1: give auto"),
        ({"tiles": 101}, "tiles 101: give auto"),
        ({"tiles": True}, "tiles True: give auto"),
        ({"tiles": 2.5}, "tiles 2.5: give auto"),
        ({"tiles": "9" * 99}, "tiles '9+.*: give auto"),
        ({"tiles": "auto", "overlap": -0.1}, "overlap -0.1: give the share .* from 0 to 0.75"),
        ({"tiles": "auto", "overlap": 0.76}, "overlap 0.76: give the share"),
        ({"tiles": 3, "overlap": float("nan")}, "overlap nan: give the share"),
        ({"tiles": 3, "overlap": "much"}, "overlap 'much': give the share"),
        ({"overlap": 0.3}, "overlap 0.3: is for windows; set tiles to auto or to a number"),
        ({"tiles": "auto", "maps": True}, "maps: are of whole pictures; set tiles to off"),
    ],
)
def test_options_that_mean_nothing_are_one_line(options, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        predictor().predict(scene((150, 240), []), **options)
    assert "\n" not in str(error.value)


def test_numbers_may_be_text() -> None:
    assert parse_tiles("3", 0.5) == parse_tiles(3, 0.5) == Tiles(3, 0.5)
    assert parse_tiles("auto") == Tiles(0, 0.2) and parse_tiles("off") is None


def test_files_in_their_order_turned_and_broken(tmp_path: Path) -> None:
    """A turned picture is cut as it is shown; one that cannot be read costs itself alone."""
    boxes = [(60, 5, 80, 20), (0, 0, 0, 0), (10, 30, 30, 80)]
    picture = scene((150, 240), boxes)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(picture)).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(picture).save(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes((tmp_path / "b.png").read_bytes()[:-60])
    Image.fromarray(picture[:60, :90]).save(tmp_path / "d.png")
    said: list[str] = []
    results = list(predictor().predict(tmp_path, tiles="auto", on_broken=said.append))
    assert [result.path.name for result in results] == ["a.png", "b.png", "d.png"]
    assert [result.size for result in results] == [(150, 240), (150, 240), (60, 90)]
    assert len(said) == 1 and "c.png" in said[0]
    np.testing.assert_array_equal(results[0].boxes, results[1].boxes)
    assert sorted(results[0].boxes.tolist()) == [[10, 30, 30, 80], [60, 5, 80, 20]]
    np.testing.assert_array_equal(results[0].image, picture)
    with pytest.raises(DataError, match="c.png: not readable"):
        list(predictor().predict(tmp_path, tiles="auto"))


def test_a_long_picture_that_fits_no_canvas_when_shrunk_is_cut() -> None:
    """Whole, it is refused."""
    data = dataclasses.replace(DATA, test_max=700)
    picture = scene((100, 900), [(400, 40, 440, 60)])
    with pytest.raises(DataError, match="fits no test canvas"):
        found(picture, data=data)
    assert found(picture, data=data, tiles="auto") == [(1, 400, 40, 440, 60)]
    with pytest.raises(DataError, match="fits no test canvas"):
        found(picture[:50, :200], data=data, tiles="auto")  # which the rule enlarges


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(scene((150, 240), [(60, 30, 110, 80), (10, 10, 20, 20)])).save(tmp_path / "a.png")
    arguments = PredictArguments((str(tmp_path / "a.png"),), str(tmp_path / "out"), tiles="auto", overlap=0.25)
    _predict(predictor(), arguments)
    content = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert (content["tiles"], content["overlap"]) == ("auto", 0.25)
    assert sorted(e["box_xyxy"] for e in content["images"][0]["detections"]) == [[10, 10, 20, 20], [60, 30, 110, 80]]
    assert "a.png: 2 objects" in capsys.readouterr().out
    for changes, message in (
        ({"tiles": "some"}, "--tiles 'some': give auto, off"),
        ({"overlap": 0.8}, "--overlap 0.8: give the share"),
        ({"tiles": "off"}, "--overlap 0.25: is for windows; set --tiles"),
        ({"draw": "queries"}, "--draw queries: is of whole pictures; leave out --tiles"),
    ):
        with pytest.raises(QueryDetError, match=message):
            _predict(predictor(), dataclasses.replace(arguments, **changes))


_PEAK = """
import resource, sys
from querydet_jax.cli.main import run_command
try:
    run_command(sys.argv[1], sys.argv[2:])
finally:
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_100_megapixels_within_2_gb(tmp_path: Path, suffix: str) -> None:
    """Read, detected on and drawn by the packaged detector."""
    with Image.open(Path(__file__).parents[2] / "examples/hituav/1_130_30_0_03832.jpg") as picture:
        pixels = np.asarray(picture.convert("L"))
    Image.fromarray(np.tile(pixels, (20, 16))[:10000, :10000]).convert("RGB").save(tmp_path / f"large.{suffix}")
    words = ["predict", "hituav", "--images", f"large.{suffix}", "--tiles", "4"]
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, *words],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(Path(qd.__file__).parents[1])},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "predictions" / "large_detections.jpg").exists()
    assert int(done.stdout.split("peak")[-1]) < 2 * 2**30
