"""Prediction on many pictures: every picture has one line, whoever is killed. The detector returns mean colours."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import psutil
import pytest
from PIL import Image
from pyarrow import parquet

import querydet_jax as qd
from querydet_jax.config import DataConfig
from querydet_jax.inference import many
from querydet_jax.inference.many import predict_many, write_part
from querydet_jax.runtime import stores
from querydet_jax.runtime.errors import ConfigError, DataError, QueryDetError
from querydet_jax.runtime.stores import StoreError, as_path, download, files_below, upload


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


def lines_of(folder, parse=json.loads):
    return [parse(line) for path in sorted(folder.glob("part-*.jsonl")) for line in path.open()]


def rows_of(path):
    return parquet.read_table(path).to_pylist()


def serial(files):
    broken: list[str] = []
    results = list(make().predict(files, min_score=0.2, on_broken=broken.append))
    return {str(found.path): (found.boxes.tolist(), found.scores.tolist(), found.names) for found in results}, broken


def assert_equal_to_serial(lines, files):
    expected, broken = serial(files)
    assert [line["path"] for line in lines] == files  # none lost, none twice, in order
    assert {
        line["path"]: (line["boxes"], line["scores"], line["classes"]) for line in lines if not line.get("error")
    } == expected
    assert [line["error"] for line in lines if line.get("error")] == broken and len(broken) == 1


SCORES = np.full(3, 0.2, np.float32)


def test_a_part_is_what_predict_gives(tmp_path):
    files = pictures(tmp_path / "in", 9)
    assert len(write_part(make(), SCORES, files, tmp_path / "part-00000.jsonl")) == 1
    assert_equal_to_serial(lines_of(tmp_path), files)
    write_part(make(), SCORES, files, tmp_path / "part.parquet")
    assert_equal_to_serial(rows_of(tmp_path / "part.parquet"), files)
    assert [f"{field.name}: {field.type}" for field in parquet.read_table(tmp_path / "part.parquet").schema] == [
        "path: string",
        "height: int32",
        "width: int32",
        "boxes: list<element: list<element: float>>",
        "scores: list<element: float>",
        "classes: list<element: string>",
        "class_ids: list<element: int32>",
        "error: string",
    ]


def test_each_of_a_part_without_any_good_picture_says_why(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"damaged")
    files = [str(tmp_path / name) for name in ("a.png", "gone.png", "b.png")]
    said = write_part(make(), SCORES, files, tmp_path / "part.jsonl")
    assert [line["error"] for line in map(json.loads, (tmp_path / "part.jsonl").open())] == said
    reasons = ("not readable", "no such image file", "not readable")
    for file, message, reason in zip(files, said, reasons, strict=True):
        assert message.startswith(f"{file}: {reason}")


def in_this_process(computed, fails_after=10**6):
    """What ``_run`` returns, without Ray; ends early after so many parts."""

    def run(parts, workers, arguments):
        worker = many._Worker(*arguments)
        rows = []
        for part in parts[:fails_after]:
            computed.append(part["path"])
            rows.append(worker(part))
            assert not rows[-1]["fault"], rows[-1]
        if len(rows) < len(parts):
            raise QueryDetError("ended")
        return {row["path"]: row["broken"] for row in rows}

    return run


@pytest.fixture
def with_ray(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


def test_a_second_start_computes_what_is_missing(tmp_path, monkeypatch, with_ray):
    computed = []
    monkeypatch.setattr(many, "_run", in_this_process(computed, 2))
    files = pictures(tmp_path / "in", 10)
    out = tmp_path / "out"
    options = {"facts": {"source": "colours"}, "min_score": "0.2", "part": 3}
    with pytest.raises(QueryDetError, match="ended"):
        predict_many(make, [str(tmp_path / "in")], out, **options)
    monkeypatch.setattr(many, "_run", in_this_process(computed))
    for _ in range(2):  # the last has nothing to do
        number, broken = predict_many(make, [str(tmp_path / "in" / "*.png")], out, **options)
        assert (number, len(broken)) == (10, 1)
    assert len(computed) == len(set(computed)) == 4
    assert_equal_to_serial(lines_of(out), files)
    for names, changes in (
        (files[:3], {}),
        (files, {"results": "parquet"}),
        (files, {"facts": {"source": "colours", "config": {"query": "dense"}}}),
    ):
        with pytest.raises(ConfigError, match="other pictures or settings"):
            predict_many(make, names, out, **options | changes)


def test_names_are_found_as_everywhere(tmp_path, monkeypatch, with_ray):
    """Relative to the folder of the command; workers have others."""
    monkeypatch.setattr(many, "_run", in_this_process([]))
    (tmp_path / "empty").mkdir()
    files = pictures(tmp_path / "in", 4)
    monkeypatch.chdir(tmp_path)
    predict_many(make, ["in/*3.png", "in", "in/../in"], Path("out"), facts={}, min_score="0.2")
    assert_equal_to_serial(lines_of(tmp_path / "out"), [files[3], *files[:3]])
    for name in ("nowhere", "empty", "in/*.jpg"):
        with pytest.raises(DataError) as error:
            predict_many(make, ["in", name], tmp_path / "new", facts={})
        with pytest.raises(DataError) as of_predict:
            make().predict(["in", name])
        assert str(error.value) == str(of_predict.value) and not (tmp_path / "new").exists()


@pytest.mark.parametrize("results", ["jsonl", "parquet"])
def test_from_a_store_to_a_store(tmp_path, monkeypatch, memory_store, with_ray, results):
    files = pictures(tmp_path / "in", 10)
    upload(tmp_path / "in", as_path("s3://bucket/in"))
    computed, out = [], as_path("s3://bucket/out")
    options = {"facts": {}, "min_score": "0.2", "part": 4, "results": results}
    monkeypatch.setattr(many, "_run", in_this_process(computed, 1))
    with pytest.raises(QueryDetError, match="ended"):
        predict_many(make, ["s3://bucket/in"], out, **options)
    monkeypatch.setattr(many, "_run", in_this_process(computed))
    number, (broken,) = predict_many(make, ["s3://bucket/in/*.png"], out, **options)
    assert number == 10 and broken.startswith("s3://bucket/in/00005.png: not readable")
    names = [f"part-0000{n}.{results}" for n in range(3)]
    assert computed == [f"s3://bucket/out/{name}" for name in names]
    assert files_below(out) == [*names, "pictures.json"]
    download(out, tmp_path / "out")
    if results == "jsonl":
        rows = lines_of(tmp_path / "out")
    else:
        rows = [row for name in names for row in rows_of(tmp_path / "out" / name)]
    for row in rows:
        row["path"] = str(tmp_path / "in" / row["path"].removeprefix("s3://bucket/in/"))
        row["error"] = row.get("error") and row["error"].replace("s3://bucket/in", str(tmp_path / "in"))
    assert_equal_to_serial(rows, files)
    with pytest.raises(ConfigError, match="s3://bucket/out: holds results of other pictures"):
        predict_many(make, ["s3://bucket/in/00001.png"], out, **options)


def test_a_store_that_does_not_answer_makes_no_picture_a_broken_one(tmp_path, monkeypatch, memory_store):
    def silent(*arguments, **options):
        raise StoreError(5, "the store does not answer (silence)", "s3://bucket/a.png")

    monkeypatch.setattr(stores.StorePath, "ask", silent)
    with pytest.raises(StoreError, match="a.png: the store does not answer"):
        write_part(make(), SCORES, ["s3://bucket/a.png"], tmp_path / "part.jsonl")
    assert not (tmp_path / "part.jsonl").exists()


def test_without_ray_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(QueryDetError, match="requirements-ray.txt"):
        predict_many(make, [], tmp_path, facts={})


def test_a_cluster_that_does_not_answer_is_one_line(tmp_path, monkeypatch, with_ray):
    def refused(**options):
        raise ConnectionError("Failed to connect to Ray cluster at 10.0.0.9:6379\nTraceback")

    ray, data = ModuleType("ray"), ModuleType("ray.data")
    ray.is_initialized, ray.init, ray.data = lambda: False, refused, data
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.data", data)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.9:6379")
    pictures(tmp_path / "in", 3)
    with pytest.raises(QueryDetError, match=r"RAY_ADDRESS 10.0.0.9:6379: no cluster of Ray answers \(.*9\); check"):
        predict_many(make, [str(tmp_path / "in")], tmp_path / "out", facts={})


# With Ray: what kills is another process than what predicts ---------------------------------------


def drive(folder, images="", out="", **options):
    """Predict on ``folder/in``, or on ``images``; each worker leaves the number of its process in ``folder``."""
    folder = Path(folder)
    images, out = images or str(folder / "in"), as_path(out or str(folder / "out"))

    def make_and_note():
        (folder / f"worker-{os.getpid()}").touch()
        return make(0.005)

    predict_many(make_and_note, [images], out, facts={}, min_score="0.2", workers=2, part=32, **options)


@contextlib.contextmanager
def process(folder, name, *words, **environment):
    """Run Python with ``words`` in a folder, its output in ``name.log``; kill it and what it started at the end."""
    here = Path(__file__)
    paths = {"PYTHONPATH": f"{here.parent}:{here.parents[1]}:{here.parents[2]}"}  # Ray's workers find this module
    with (folder / f"{name}.log").open("w") as log:
        started = subprocess.Popen(
            [sys.executable, *words], cwd=folder, stdout=log, stderr=log, env={**os.environ, **paths, **environment}
        )
    try:
        yield started
    finally:
        kill_all(started)
        started.wait()


def kill_all(started):
    with contextlib.suppress(psutil.NoSuchProcess):
        for one in (psutil.Process(started.pid), *psutil.Process(started.pid).children(recursive=True)):
            one.kill()


def until(true, seconds=200):
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.05)


def parts_of(folder):
    return sorted((folder / "out").glob("part-*"))


@pytest.mark.slow
def test_a_killed_worker_loses_and_doubles_nothing(tmp_path):
    pytest.importorskip("ray", reason="needs requirements-ray.txt")
    files = pictures(tmp_path / "in", 2000)
    code = f"import ray, test_many; ray.init('local', num_cpus=2); test_many.drive({str(tmp_path)!r})"
    with process(tmp_path, "driver", "-c", code) as driver:
        until(lambda: len(parts_of(tmp_path)) >= 6 or driver.poll() is not None)
        os.kill(int(min(tmp_path.glob("worker-*")).name[7:]), signal.SIGKILL)
        assert len(parts_of(tmp_path)) < 50
        assert driver.wait(200) == 0, (tmp_path / "driver.log").read_text()
    assert len(list(tmp_path.glob("worker-*"))) >= 3
    assert_equal_to_serial(lines_of(tmp_path / "out"), files)
    assert "| 2000/2000 [" in (tmp_path / "driver.log").read_text()  # the bar's end


@pytest.mark.slow
def test_a_killed_machine_loses_and_doubles_nothing(tmp_path):
    """Two nodes of Ray on loopback, each with one worker and processes of its own; all of the second are killed."""
    pytest.importorskip("ray", reason="needs requirements-ray.txt")
    files = pictures(tmp_path / "in", 1500)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    words = "-m ray.scripts.scripts start --block --disable-usage-stats --num-cpus 1 --object-store-memory 100000000"
    cluster = {"RAY_ADDRESS": f"127.0.0.1:{port}", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    code = f"""
import ray, test_many
ray.init(log_to_driver=False)
test_many.until(lambda: sum(node["Alive"] for node in ray.nodes()) == 2)
test_many.drive({str(tmp_path)!r}, results="parquet")
"""
    with contextlib.ExitStack() as started:
        # Its sockets want a short name; Ray's own folder would make other tests find this cluster.
        temporary = started.enter_context(tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True))
        for name, options in (
            ("head", ["--head", "--port", port, "--include-dashboard", "false", "--temp-dir", temporary]),
            ("other", ["--address", cluster["RAY_ADDRESS"]]),
        ):
            node = started.enter_context(process(tmp_path, name, *words.split(), *options, **cluster))
            until(lambda name=name: "This command will now block" in (tmp_path / f"{name}.log").read_text())
        driver = started.enter_context(process(tmp_path, "driver", "-c", code, **cluster))
        until(lambda: len(parts_of(tmp_path)) >= 6 or driver.poll() is not None)
        kill_all(node)
        assert len(parts_of(tmp_path)) < 40
        assert driver.wait(200) == 0, (tmp_path / "driver.log").read_text()
    assert len(list(tmp_path.glob("worker-*"))) >= 3
    assert_equal_to_serial([row for path in parts_of(tmp_path) for row in rows_of(path)], files)


@pytest.mark.slow
def test_workers_read_from_a_bucket_and_write_to_it(tmp_path, s3_server):
    pytest.importorskip("ray", reason="needs requirements-ray.txt")
    files = pictures(tmp_path / "in", 200)
    upload(tmp_path / "in", as_path("s3://bucket/in"))
    code = "import ray, test_many; ray.init('local', num_cpus=2); "
    code += f"test_many.drive({str(tmp_path)!r}, 's3://bucket/in', 's3://bucket/out')"
    with process(tmp_path, "driver", "-c", code) as driver:
        assert driver.wait(200) == 0, (tmp_path / "driver.log").read_text()
    download(as_path("s3://bucket/out"), tmp_path / "out")
    rows = [
        json.loads(line.replace("s3://bucket/in", str(tmp_path / "in"))) for line in lines_of(tmp_path / "out", str)
    ]
    assert_equal_to_serial(rows, files)
