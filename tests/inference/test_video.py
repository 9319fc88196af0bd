"""Videos: frames, times and faults as read; results per frame; the video and the lines that `predict` writes."""

from __future__ import annotations

import itertools
import json
import logging
import struct
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from querydet_jax.cli import predict_video as command
from querydet_jax.cli.predict import PredictArguments, _predict
from querydet_jax.config import DataConfig
from querydet_jax.data.readers.images import Reading
from querydet_jax.data.readers.video import Video, is_video
from querydet_jax.inference.predictor import Predictor
from querydet_jax.runtime.errors import DataError, QueryDetError
from querydet_jax.viz.video import VideoWriter

SIZE = (48, 64)
DATA = DataConfig(test_short=48, test_max=64, test_canvases=((48, 64), (64, 48)), threads=0)


class Found(NamedTuple):
    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    valid: np.ndarray


def brightness(images: np.ndarray, sizes: np.ndarray) -> Found:
    """One box over the left half; its score is the picture's mean."""
    boxes = np.concatenate([np.zeros_like(sizes), sizes[:, ::-1] // (2, 1)], axis=1).astype(np.float32)[:, None]
    means = np.stack([image[:h, :w].mean() for image, (h, w) in zip(images, sizes, strict=True)]) / 255
    shape = boxes.shape[:2]
    return Found(boxes, means.astype(np.float32)[:, None], np.zeros(shape, np.int32), np.ones(shape, bool))


def toy(detector=brightness, data: DataConfig = DATA, batch_size: int = 1) -> Predictor:
    return Predictor(detector, name="toy", classes=("car",), data=data, query="csq", batch_size=batch_size)


@pytest.fixture(scope="module")
def av():
    return pytest.importorskip("av", reason="pip install -r requirements-video.txt")


def write(av, path: Path, times: Sequence[float], options: dict[str, str] | None = None) -> Path:
    """Write grey frames of brightness 20, 28, 36, ... with an upper left quarter that is 30 brighter."""
    with av.open(str(path), "w", options=options or {}) as out:
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        stream = out.add_stream(codec, rate=10, options={"g": "4", "bf": "0"})
        stream.height, stream.width = SIZE
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, 1000)
        for i, seconds in enumerate(times):
            image = np.full((*SIZE, 3), 20 + 8 * i, np.uint8)
            image[: SIZE[0] // 2, : SIZE[1] // 2] += 30
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = round(1000 * seconds), Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def even(n: int) -> list[float]:
    return [i / 10 for i in range(n)]


@pytest.fixture(scope="module")
def film(av, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(av, tmp_path_factory.mktemp("films") / "film.mp4", even(20))


def cut(av, film: Path, frame: int, into: Path, more: int = 20) -> Path:
    """Write the film up to some bytes of a frame."""
    with av.open(str(film)) as opened:
        at = [packet.pos for packet in opened.demux(video=0)]
    into.write_bytes(film.read_bytes()[: at[frame] + more])
    return into


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def predict(*names: Path | str, out: Path, predictor: Predictor | None = None, **arguments) -> None:
    arguments = {"min_score": "0", **arguments}
    _predict(predictor or toy(), PredictArguments(tuple(map(str, names)), str(out), **arguments))


# Without PyAV ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "video"),
    [
        ("film.MP4", True),
        ("rtsp://host/1", True),
        ("HTTP://host/picture.jpg", True),
        ("/dev/video0", True),
        ("/dev/video", False),
        ("mp4", False),
        ("a.jpg", False),
        ("folder.mp4", False),
    ],
)
def test_which_names_are_videos(name: str, video: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.mp4").mkdir()
    assert is_video(name) == is_video(Path(name) if "//" not in name else name) == video


def test_without_pyav_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    for do in (
        lambda: toy().predict("film.mp4"),
        lambda: predict(tmp_path / "a.png", "film.mp4", out=tmp_path / "out"),
    ):
        with pytest.raises(QueryDetError, match=r"^videos need an extra: pip install -r requirements-video\.txt$"):
            do()
    assert not (tmp_path / "out").exists()


# Reading ---------------------------------------------------------------------------------------


def test_frames_and_times(film: Path) -> None:
    video = Video(film)
    assert (video.size, video.rate, video.length, video.live) == (SIZE, 10, 20, False)
    frames = list(video.frames())
    assert [frame.index for frame in frames] == list(range(20)) and not video.fault
    np.testing.assert_allclose([frame.time for frame in frames], even(20), atol=1e-6)
    for frame in frames:
        assert np.abs(frame.pixels[30:, 40:].astype(int) - (20 + 8 * frame.index)).max() <= 4
    assert [frame.index for frame in Video(film).frames(stride=6)] == [0, 6, 12, 18]


def test_times_of_a_variable_rate_are_kept(av, tmp_path: Path) -> None:
    times = [0.5, 0.533, 0.9, 0.933, 1.5]  # the first is time 0
    frames = list(Video(write(av, tmp_path / "x.mkv", times)).frames())
    np.testing.assert_allclose([frame.time for frame in frames], [0, 0.033, 0.4, 0.433, 1.0], atol=1e-6)


@pytest.mark.parametrize(
    ("matrix", "bright"),  # where the bright corner goes, as (row, column)
    [
        ((0, 1, -1, 0), (0, 1)),  # a phone held upright
        ((0, -1, 1, 0), (1, 0)),
        ((-1, 0, 0, -1), (1, 1)),
        ((-1, 0, 0, 1), (0, 1)),  # mirrored
    ],
)
def test_a_film_of_a_phone_is_turned(film: Path, tmp_path: Path, caplog, matrix, bright) -> None:
    caplog.set_level(logging.INFO, logger="querydet_jax")
    data = bytearray(film.read_bytes())
    at = data.find(b"tkhd") + 4 + 40  # QuickTime file format, track header
    a, b, c, d = (65536 * x for x in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "phone.mp4").write_bytes(data)
    video = Video(tmp_path / "phone.mp4")
    size = SIZE[::-1] if matrix[1] else SIZE
    frame = next(video.frames())
    assert video.size == size == frame.pixels.shape[:2]
    corners = frame.pixels[:: size[0] - 1, :: size[1] - 1].mean(axis=2)
    assert np.unravel_index(corners.argmax(), (2, 2)) == bright
    assert f"turned as its metadata say, to {size[1]} x {size[0]}" in caplog.text
    assert Video(tmp_path / "phone.mp4", Reading(exif="ignore")).size == SIZE


def test_colours_are_those_that_the_film_states(av, tmp_path: Path) -> None:
    """In BT.709, and so written back."""
    image = np.full((720, 64, 3), (200, 40, 60), np.uint8)
    with VideoWriter(tmp_path / "red.mp4", (720, 64)) as writer:
        writer.add(image, 0.0)
    (frame,) = Video(tmp_path / "red.mp4").frames()
    assert np.abs(frame.pixels.astype(int) - image).max() <= 6
    with av.open(str(tmp_path / "red.mp4")) as film:
        assert next(film.decode(video=0)).colorspace == 1


def test_a_cut_film_gives_the_frames_before_and_says_so_once(av, tmp_path: Path) -> None:
    whole = write(av, tmp_path / "x.mp4", even(20), {"movflags": "faststart"})
    said: list[str] = []
    results = list(toy().predict(cut(av, whole, 10, tmp_path / "cut.mp4"), min_score=0.0, on_broken=said.append))
    n = len(results)
    assert n == 10 and [result.frame for result in results] == list(range(n))
    assert len(said) == 1 and f"cut.mp4: broken off after frame {n - 1} (" in said[0] and "\n" not in said[0]
    given = 0
    with pytest.raises(DataError, match="broken off after frame"):
        for _ in toy().predict(tmp_path / "cut.mp4"):
            given += 1
    assert given == n


def test_a_film_that_ends_before_its_stated_end(av, tmp_path: Path) -> None:
    """At the border of two frames, where the decoder sees nothing wrong."""
    whole = write(av, tmp_path / "x.mkv", even(20))
    video = Video(cut(av, whole, 12, tmp_path / "cut.mkv", more=0))
    assert len(list(video.frames())) == 12
    assert "ends after frame 11 (1.10 s), where its header states 2.00 s" in video.fault


def test_what_is_no_video(av, film: Path, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("hello\n" * 100)
    (tmp_path / "empty.mp4").write_bytes(b"")
    cut(av, film, 10, tmp_path / "cut.mp4")  # its index would be at the end
    (tmp_path / "codec.mp4").write_bytes(film.read_bytes().replace(b"avc1", b"zzzz").replace(b"mp4v", b"zzzz"))
    with av.open(str(tmp_path / "sound.mkv"), "w") as out:
        stream = out.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        out.mux(stream.encode(sound))
    for name, message in {
        "text.mp4": "cannot be opened as a video",
        "empty.mp4": "cannot be opened as a video",
        "cut.mp4": "cannot be opened as a video",
        "codec.mp4": "its codec is not known",
        "sound.mkv": "holds no video",
        "none.mp4": "no such video",
    }.items():
        with pytest.raises(DataError, match=f"{name}: {message}") as error:
            toy().predict(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="no frame can be decoded|cannot be opened as a video"):
        data = film.read_bytes()
        at = data.find(b"mdat") + 4
        (tmp_path / "zeros.mp4").write_bytes(
            data[:at] + bytes(data.find(b"moov") - 4 - at) + data[data.find(b"moov") - 4 :]
        )
        Video(tmp_path / "zeros.mp4")
    with pytest.raises(DataError, match="too large, 3,072 pixels where 3,000 are allowed"):
        Video(film, Reading(max_pixels=3000))


def test_a_password_is_never_shown(av) -> None:
    with pytest.raises(DataError) as error:
        Video("rtsp://bob:secret@127.0.0.1:9/door")
    assert "rtsp://bob:***@127.0.0.1:9/door: cannot be opened" in str(error.value)
    names = ["rtsp://bob:secret@host/door?key=1", "rtsp://bob:secret@10.0.0.7:554", "https://host/film.mp4"]
    assert command.video_stems(names) == ["door", "10.0.0.7_554", "film"]


# Results ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_result_per_frame(film: Path, batch_size: int) -> None:
    results = list(toy(batch_size=batch_size).predict(film, min_score=0.0, stride=3))
    assert [(result.index, result.frame) for result in results] == [(i, 3 * i) for i in range(7)]
    np.testing.assert_allclose([result.time for result in results], even(20)[::3], atol=1e-6)
    for result in results:
        assert result.path == film and result.size == SIZE and result.image.shape == (*SIZE, 3)
        assert 255 * result.scores[0] == pytest.approx(20 + 8 * result.frame + 7.5, abs=3)
        np.testing.assert_allclose(result.boxes, [[0, 0, SIZE[1] / 2, SIZE[0]]])
    assert repr(results[1]) == f"Prediction({film.parent}/film_frame_000003.mp4: car 1)"


def test_what_python_refuses_at_once(film: Path) -> None:
    for source, options, message in [
        ([film, film], {}, "film.mp4: is a video among others"),
        (["a.png", film], {}, "film.mp4: is a video among others"),
        (film, {"stride": 0}, "stride 0: give a whole number"),
        (film, {"stride": 1.5}, "stride 1.5: give a whole number"),
        (np.zeros((48, 64, 3), np.uint8), {"stride": 2}, "stride 2: is for videos"),
    ]:
        with pytest.raises(QueryDetError, match=message):
            toy().predict(source, **options)
    with pytest.raises(DataError, match="film.mp4: 48x64 .* fits no test canvas"):
        list(toy(data=DataConfig(test_short=48, test_max=64, test_canvases=((32, 32),))).predict(film))


def test_reading_ends_with_whoever_takes_the_results(film: Path) -> None:
    results = toy().predict(film)
    next(results)
    results.close()
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if "_work" in name], names


# The command -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 4])
def test_the_command_writes_the_film_and_a_line_per_frame(film: Path, tmp_path: Path, capsys, stride: int) -> None:
    predict(film, out=tmp_path, stride=stride)
    found = lines(tmp_path / "film_detections.jsonl")
    assert [line["frame"] for line in found] == list(range(0, 20, stride))
    assert [line["time"] for line in found] == even(20)[::stride]
    assert found[0]["boxes"] == [[0, 0, 32, 48]] and found[0]["classes"] == [0] and found[0]["names"] == ["car"]
    video = Video(tmp_path / "film_detections.mp4")
    drawn = list(video.frames())
    assert video.size == SIZE and [frame.time for frame in drawn] == pytest.approx(even(20)[::stride], abs=1e-4)
    assert (tmp_path / "film_detections.mp4").exists() and not video.fault
    # The box's line stands at its right side.
    assert np.ptp(drawn[0].pixels[40, 30:40].astype(int), axis=0).max() > 60
    assert f"{len(found)} frames, {len(found)} objects" in capsys.readouterr().out


def test_the_drawn_film_keeps_times_of_a_variable_rate(av, tmp_path: Path) -> None:
    times = [0.0, 0.033, 0.4, 0.433, 1.0]
    predict(write(av, tmp_path / "x.mkv", times), out=tmp_path)
    with av.open(str(tmp_path / "x_detections.mp4")) as film:
        assert [frame.time for frame in film.decode(video=0)] == pytest.approx(times, abs=1e-4)


@pytest.mark.parametrize("size", [(47, 63), (48, 63)])
def test_a_film_of_odd_size_keeps_it(av, tmp_path: Path, size: tuple[int, int]) -> None:
    with VideoWriter(tmp_path / "odd.mp4", size) as writer:
        writer.add(np.zeros((*size, 3), np.uint8), 0.0)
    assert Video(tmp_path / "odd.mp4").size == size


def test_pictures_and_films_in_one_call(film: Path, tmp_path: Path, caplog, capsys) -> None:
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    (tmp_path / "text.mp4").write_text("hello")
    with pytest.raises(DataError, match=r"none\.mp4: no such video"):
        predict(tmp_path / "text.mp4", film, tmp_path / "a.png", "none.mp4", out=tmp_path / "out", draw="none")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"detections.json", "film_detections.jsonl"}
    assert caplog.text.count("text.mp4: cannot be opened as a video") == 1
    for arguments, message in [
        ({"draw": "queries"}, "--draw queries: is for pictures"),
        ({"save_json": "x.json"}, "--save-json: is for pictures"),
        ({"stride": 0}, "--stride 0: give a whole number"),
    ]:
        with pytest.raises(QueryDetError, match=message):
            predict(film, out=tmp_path / "new", **arguments)
    with pytest.raises(QueryDetError, match="--stride 2: is for videos"):
        predict(tmp_path / "a.png", out=tmp_path / "new", stride=2)
    assert not (tmp_path / "new").exists()


def test_a_film_is_never_overwritten(film: Path, tmp_path: Path) -> None:
    kept = tmp_path / "x_detections.mp4"
    kept.write_bytes(film.read_bytes())
    (tmp_path / "x.mp4").symlink_to(kept)
    predict(tmp_path / "x.mp4", out=tmp_path)
    assert kept.read_bytes() == film.read_bytes() and (tmp_path / "x_detections_.mp4").exists()


def test_a_damaged_film_leaves_what_was_found(av, tmp_path: Path) -> None:
    whole = write(av, tmp_path / "x.mp4", even(20), {"movflags": "faststart"})
    with pytest.raises(DataError, match=r"cut\.mp4: broken off after frame \d+"):
        predict(cut(av, whole, 10, tmp_path / "cut.mp4"), out=tmp_path)
    found = lines(tmp_path / "cut_detections.jsonl")
    assert len(found) == 10 and len(list(Video(tmp_path / "cut_detections.mp4").frames())) == len(found)


@pytest.mark.parametrize("where", ["drawing", "detecting"])
def test_an_interruption_or_a_fault_leaves_whole_files(film: Path, tmp_path: Path, monkeypatch, where: str) -> None:
    calls = itertools.count()
    if where == "drawing":
        draw = command.draw_on_frame

        def interrupted(*args):
            if next(calls) == 7:
                raise KeyboardInterrupt
            return draw(*args)

        monkeypatch.setattr(command, "draw_on_frame", interrupted)
        detector, kind = brightness, KeyboardInterrupt
    else:

        def detector(images, sizes):
            if next(calls) == 8:
                raise QueryDetError("out of memory")
            return brightness(images, sizes)

        kind = QueryDetError
    with pytest.raises(kind):
        predict(film, out=tmp_path, predictor=toy(detector))
    found = lines(tmp_path / "film_detections.jsonl")
    drawn = list(Video(tmp_path / "film_detections.mp4").frames())
    assert 7 <= len(drawn) <= len(found) <= 8


def test_a_full_disk_is_one_line(film: Path, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    (tmp_path / "film_detections.jsonl").symlink_to("/dev/full")
    with pytest.raises(QueryDetError, match=r"film_detections\.jsonl: cannot be written \(No space left"):
        predict(film, out=tmp_path)
    (tmp_path / "film_detections.mp4").unlink(missing_ok=True)
    (tmp_path / "film_detections.jsonl").unlink()
    (tmp_path / "film_detections.mp4").symlink_to("/dev/full")
    with pytest.raises(QueryDetError, match=r"film_detections\.mp4: cannot be written"):
        predict(film, out=tmp_path)


def test_a_camera_is_not_held_up(film: Path, caplog) -> None:
    """It sends faster than results are taken: frames are passed over, and the newest are used."""
    caplog.set_level(logging.INFO, logger="querydet_jax")
    predictor = toy()
    video = predictor.open_video(film)
    video.live = True

    def slow() -> Iterator[int]:
        for result in predictor.run_video(video, np.zeros(1, np.float32)):
            time.sleep(0.05)
            yield result.frame

    frames = list(slow())
    assert frames == sorted(frames) and frames[-1] == 19 and len(frames) < 20
    assert f"passed over {20 - len(frames)} frames" in caplog.text
