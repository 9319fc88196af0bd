"""Prediction on many pictures: every picture has one line, whoever is killed. The detector returns mean colours."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import threading
import time
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

import querydet_jax as qd
from querydet_jax.config import DataConfig
from querydet_jax.inference import many
from querydet_jax.inference.many import predict_many, write_part
from querydet_jax.runtime.errors import ConfigError, DataError, QueryDetError


class Found(NamedTuple):
    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    valid: np.ndarray


def make(seconds: float = 0.0) -> qd.Predictor:
    def mean_colour(images, sizes):
        time.sleep(seconds)
        boxes = np.concatenate([np.zeros_like(sizes), sizes[:, ::-1]], axis=1).astype(np.float32)
        means = (images.sum((1, 2)) / sizes.prod(axis=1, keepdims=True) / 255).astype(np.float32)
        classes = np.tile(np.arange(3), (len(images), 1))
        return Found(np.repeat(boxes[:, None], 3, 1), means, classes, classes >= 0)

    data = DataConfig(test_short=32, test_max=64, test_canvases=((32, 64), (64, 32)), threads=0)
    names = ("red", "green", "blue")
    return qd.Predictor(mean_colour, name="colours", classes=names, data=data, query="csq")


def pictures(folder, number):
    folder.mkdir()
    for n in range(number):
        Image.new("RGB", (30 + n % 7, 20), (n % 256, n // 8 % 256, 90)).save(folder / f"{n:05}.png")
    (folder / f"{number // 2:05}.png").write_bytes(b"damaged")
    return sorted(map(str, folder.iterdir()))


def lines_of(folder):
    return [json.loads(line) for path in sorted(folder.glob("part-*.jsonl")) for line in path.open()]


def serial(files):
    broken: list[str] = []
    results = list(make().predict(files, min_score=0.2, on_broken=broken.append))
    return {str(found.path): (found.boxes.tolist(), found.scores.tolist(), found.names) for found in results}, broken


def assert_equal_to_serial(lines, files):
    expected, broken = serial(files)
    assert [line["path"] for line in lines] == files  # none lost, none twice, in order
    assert {
        line["path"]: (line["boxes"], line["scores"], line["classes"]) for line in lines if "error" not in line
    } == expected
    assert [line["error"] for line in lines if "error" in line] == broken and len(broken) == 1


def test_a_part_is_what_predict_gives(tmp_path):
    files = pictures(tmp_path / "in", 9)
    write_part(make(), np.full(3, 0.2, np.float32), files, tmp_path / "part-00000.jsonl")
    assert_equal_to_serial(lines_of(tmp_path), files)
    write_part(make(), np.full(3, 0.2, np.float32), files[4:5], tmp_path / "alone.jsonl")  # none can be read
    assert "00004.png: not readable" in json.loads((tmp_path / "alone.jsonl").read_text())["error"]


def test_a_second_start_computes_what_is_missing(tmp_path, monkeypatch):
    computed = []

    def run(parts, workers, arguments):
        for part in parts[: 2 if not computed else None]:  # the first start ends early
            computed.append(part["path"])
            write_part(make(), np.full(3, 0.2, np.float32), part["files"], many.Path(part["path"]))
        if len(computed) == 2:
            raise QueryDetError("ended")

    monkeypatch.setattr(many, "_run", run)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    files = pictures(tmp_path / "in", 10)
    out = tmp_path / "out"
    with pytest.raises(QueryDetError, match="ended"):
        predict_many(make, [str(tmp_path / "in")], out, facts={}, min_score="0.2", part=3)
    number, broken = predict_many(make, [str(tmp_path / "in")], out, facts={}, min_score="0.2", part=3)
    assert (number, len(broken)) == (10, 1)
    assert len(computed) == len(set(computed)) == 4
    assert_equal_to_serial(lines_of(out), files)
    with pytest.raises(ConfigError, match="other pictures or settings"):
        predict_many(make, files[:3], out, facts={}, min_score="0.2", part=3)
    with pytest.raises(DataError, match="nowhere: no such picture"):
        predict_many(make, [str(tmp_path / "nowhere")], tmp_path / "new", facts={})


def test_without_ray_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(QueryDetError, match="requirements-ray.txt"):
        predict_many(make, [], tmp_path, facts={})


@pytest.mark.slow
def test_a_killed_worker_loses_and_doubles_nothing(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="needs requirements-ray.txt")
    files, out = pictures(tmp_path / "in", 2000), tmp_path / "out"
    killed = []
    here = many.Path(__file__)
    monkeypatch.setenv("PYTHONPATH", f"{here.parent}:{here.parents[2]}")  # for Ray's workers

    def make_and_note():
        (tmp_path / f"worker-{os.getpid()}").touch()
        return make(0.005)

    def kill():
        while len(list(out.glob("part-*.jsonl"))) < 6:
            time.sleep(0.05)
        killed.append(int(min(tmp_path.glob("worker-*")).name[7:]))
        os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    ray.init(num_cpus=2)
    try:
        number, broken = predict_many(make_and_note, [str(tmp_path / "in")], out, facts={}, min_score="0.2", workers=2)
    finally:
        ray.shutdown()
        thread.join(5)
    assert (number, len(broken)) == (2000, 1) and killed
    assert len(list(tmp_path.glob("worker-*"))) >= 2
    assert_equal_to_serial(lines_of(out), files)
