"""Several hosts, one of which is told to stop, fails or disappears: real processes over loopback."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from several_hosts import finished, hosts, started
from small_training import assert_same_run

from querydet_jax.runtime import host_failures
from querydet_jax.weights import read_tensors

ENDLESS = ["--train.steps", "100000", "--train.eval-every", "0", "--train.schedule", "steps"]  # not a cosine to the end


def lines(run: Path) -> list[dict[str, float]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def pair(first: Path, second: Path, data: tuple[Path, Path], *words: str) -> list[subprocess.Popen[str]]:
    """Start two hosts of one device each that train in ``first``, and wait for three steps."""
    for folder in (first, second):
        folder.mkdir()
    places = zip((first, second), data, hosts(2), strict=True)
    processes = [started(cwd, source, 1, *flags, *ENDLESS, *words) for cwd, source, flags in places]
    deadline = time.monotonic() + 200
    while len(lines(first / "run")) < 3:
        if any(process.poll() is not None for process in processes) or time.monotonic() > deadline:
            for process in processes:
                process.kill()
            pytest.fail("\n".join(process.communicate()[0] for process in processes))
        time.sleep(0.05)
    return processes


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("scenes")


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory) -> tuple[Path, int, list[str]]:
    """A run that stopped because its second host got SIGTERM, in a step or in the evaluation after it; the step that
    was saved; the output of both."""
    root, words = tmp_path_factory.mktemp("stopped"), ["--train.checkpoint-every", "2", "--train.eval-every", "1"]
    processes = pair(root / "first", root / "second", (data, data), *words)
    processes[1].send_signal(signal.SIGTERM)
    outputs = finished(*processes, status=143)
    assert not list((root / "second").iterdir())
    run = root / "first" / "run"
    return run, max(int(path.name) for path in (run / "checkpoints").iterdir()), outputs


def test_sigterm_to_one_host_saves_a_step_of_all(stopped, data, tmp_path):
    """A single process that resumes from the checkpoint before reaches the state that was saved."""
    run, step, outputs = stopped
    for output in outputs:
        assert f"stopped by SIGTERM: step {step} is saved in run; --resume goes on from there" in output
    trained = [line["step"] for line in lines(run) if "loss" in line]
    evaluated = [line["step"] for line in lines(run) if "loss" not in line]
    assert trained == list(range(1, step + 1)) and evaluated in (trained, trained[:-1])
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    (tmp_path / "run" / "metrics.jsonl").unlink()
    finished(started(tmp_path, data, 2, *ENDLESS, "--train.steps", str(step), "--resume"))
    again = {line["step"]: line["loss"] for line in lines(tmp_path / "run")}
    saved = {line["step"]: line["loss"] for line in lines(run) if "loss" in line and line["step"] in again}
    assert step in saved
    assert_same_run((read_tensors(tmp_path / "run"), again), (read_tensors(run), saved))


def test_two_hosts_evaluate_as_one(stopped, data, tmp_path):
    """On three images; the report and the pictures are written once."""
    run, _, _ = stopped
    one, first, second = (tmp_path / name for name in ("one", "first", "second"))
    for folder in (one, first, second):
        folder.mkdir()
    command = f"eval.py {run} --out out --pictures 2"
    processes = [
        started(cwd, data, 1, *flags, command=command)
        for cwd, flags in zip((first, second, one), [*hosts(2), []], strict=True)
    ]
    outputs = finished(*processes)
    reports = [json.loads((folder / "out" / "report.json").read_text())["methods"]["dense"] for folder in (one, first)]
    times = ("ms_per_image", "ms_per_image_p90", "fps")
    expected, found = ({key: value for key, value in report.items() if key not in times} for report in reports)
    assert found == expected and "AP" in str(expected)
    written = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in (one, first)]
    assert written[0] == written[1] and len([name for name in written[1] if name.endswith(".jpg")]) == 2
    assert not list(second.iterdir()) and "wrote to out" in outputs[0] and "AP" not in outputs[1]


def test_a_host_that_fails_ends_the_others(data, tmp_path):
    """The second one's images disappear in the middle, while the first waits for it in a step."""
    rng, folders = np.random.default_rng(0), (tmp_path / "mine", tmp_path / "yours")
    for folder in folders:
        for split in ("train", "val"):
            for kind in ("images", "labels"):
                (folder / kind / split).mkdir(parents=True)
            for i in range(11):
                picture = Image.fromarray(rng.integers(0, 256, (96, 96, 3), dtype=np.uint8))
                picture.save(folder / "images" / split / f"{i}.png")
                (folder / "labels" / split / f"{i}.txt").write_text("0 0.5 0.5 0.3 0.3\n")
        (folder / "data.yaml").write_text("path: .\nnc: 3\nnames: [a, b, c]\n")
        if (data / "compiled").is_dir():
            shutil.copytree(data / "compiled", folder / "compiled")
    words = ["--data.source", "yolo", "--train.checkpoint-every", "1"]
    processes = pair(tmp_path / "first", tmp_path / "second", folders, *words)
    begun = time.monotonic()
    shutil.rmtree(folders[1] / "images" / "train")
    outputs = finished(*processes, status=2)
    assert time.monotonic() - begun < 60  # jax's own limits are 100 and 300 s
    assert re.search(r"^error: .* could .*be read, .*no such image file; ", outputs[1], re.MULTILINE), outputs[1]
    assert re.search(
        r"^error: another host has failed, and its own output says why .*--resume", outputs[0], re.MULTILINE
    )
    assert "Traceback" not in outputs[0] + outputs[1]
    assert read_tensors(tmp_path / "first" / "run")


def test_only_what_another_host_causes_is_explained_by_it():
    lost = jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer\nmore")
    line = host_failures.lost_host(lost)
    assert line is not None and line.startswith("another host has failed") and "Gloo all-reduce failed" in line
    assert "more" not in line
    assert host_failures.lost_host(TypeError("connection")) is None
    assert host_failures.lost_host(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")) is None
