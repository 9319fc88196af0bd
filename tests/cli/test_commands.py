"""The commands as a user runs them: a shortened demo, and bad input in one line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import quick
from PIL import Image
from small_detector import BASE, MODEL
from small_detector import model as small_model

from querydet_jax.cli import commands
from querydet_jax.config import Config, override

ROOT = Path(__file__).parents[2]
SHORT = (
    "--train.steps 4 --train.batch-size 2 --train.log-every 1 --data.scenes-train 4 --data.scenes-val 3 "
    "--data.scenes-size 96 96 --data.scenes-val-size 128 128 --data.train-short 96 --data.train-max 96 "
    "--data.train-canvases 96 96 --data.test-short 128 --data.test-max 128 --data.test-canvases 128 128 "
    "--model.backbone.name resnet10 --train.eval-every 2 --train.eval-images 2"
)


def command(name: str, *words: str, cwd: Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command at the top of the checkout from another folder."""
    line = [sys.executable, str(ROOT / name), *words]
    environment = {**os.environ, **quick.environment(os.environ["XLA_FLAGS"])}
    result = subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=400)
    assert result.returncode == status, result.stderr[-3000:]
    return result


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A shortened demo through the same entry points as `make demo`."""
    folder = tmp_path_factory.mktemp("demo")
    trained = command("train.py", str(ROOT / "configs/demo.py"), "--run", "run", *SHORT.split(), cwd=folder)
    assert "step 4/4  loss" in trained.stdout and "data wait" in trained.stdout
    assert re.search(r"4 steps in \d+:\d\d, .* of the time waiting for data", trained.stdout)
    # One evaluation on the way, of two images, logged with the losses.
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "csq/AP50" in line and "dense/ms_per_image" in line] == [2]
    return folder


def test_train_then_eval(run):
    result = command("eval.py", "run", "--pictures", "2", cwd=run)
    assert "dense" in result.stdout and "csq" in result.stdout and "speed-up" in result.stdout
    report = json.loads((run / "run" / "report.json").read_text())
    assert set(report["methods"]) == {"dense", "csq"}
    for method in report["methods"].values():
        assert method["num_images"] == 3 and method["ms_per_image"] > 0
        assert {"AP", "AP50", "APs", "AP_0_16", "AR100"} <= set(method["metrics"])
    assert report["speed_up"]["dense"] == 1.0 and report["machine"]["jax"]
    assert report["config"]["train"]["steps"] == 4
    pictures = sorted((run / "run" / "pictures").iterdir())
    assert len(pictures) == 2
    with Image.open(pictures[0]) as picture:
        assert min(picture.size) > 400
    assert isinstance(json.loads((run / "run" / "detections_csq.json").read_text()), list)
    curves = (run / "run" / "curves_coco.csv").read_text().splitlines()
    assert curves[0].startswith("method,class,iou,AP,R0,R1,") and len(curves) == 1 + 2 * (11 + 3)
    assert not list((run / "run").glob("*visdrone*"))


@pytest.mark.parametrize(
    ("configured", "asked", "expected"),
    [
        ("csq", (), ["dense", "csq"]),
        ("dense", (), ["dense", "csq"]),
        ("cq", (), ["dense", "cq"]),
        ("cq", ("ccq", "dense"), ["dense", "ccq"]),
    ],
)
def test_what_eval_compares(configured: str, asked: tuple[str, ...], expected: list[str]):
    config = Config(model=MODEL, inference=override(BASE, {"query": configured}))
    detectors = commands._detectors(small_model(), config, asked)
    assert [detector.config.query for detector in detectors.values()] == list(detectors) == expected


def test_predict_on_a_folder_of_either_orientation(run, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    # 1000x600 becomes 128x77: not quite the same scale down and across, and no padding below.
    for name, shape in (("wide.jpg", (60, 100, 3)), ("tall.png", (1000, 600, 3))):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / "pictures" / name)
    result = command("predict.py", str(run / "run"), "--images", "pictures", "--out", "seen", cwd=tmp_path)
    assert "wide.jpg" in result.stdout and "tall.png" in result.stdout
    written = {path.name for path in (tmp_path / "seen").iterdir()}
    for stem in ("wide", "tall"):
        kinds = ("detections", "query_P4", "query_P3", "sites_P3", "sites_P2")
        assert {f"{stem}_{kind}.jpg" for kind in kinds} <= written
    content = json.loads((tmp_path / "seen" / "detections.json").read_text())
    assert {Path(entry["file"]).name for entry in content["images"]} == {"wide.jpg", "tall.png"}
    saved = json.loads((run / "run" / "config.json").read_text())
    assert saved["classes"] == ["car", "boat", "tank"]  # the data set's, for pictures without it


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("train.py", [], "name a configuration file"),
        ("train.py", ["configs/none.py"], "neither a run folder nor a configuration file"),
        ("train.py", ["{root}/configs/demo.py", "--train.stps", "3"], "--train.steps"),
        ("train.py", ["{root}/configs/demo.py", "--model.max-level", "9"], "model.max_level 9"),
        ("train.py", ["{root}/configs/coco_querydet_r50.py"], "instances_train2017.json"),
        ("eval.py", ["{root}/configs/demo.py"], "add --weights"),
        ("eval.py", ["{here}"], "no config.json"),
        ("predict.py", ["{run}"], "--images"),
        ("predict.py", ["{run}", "--images", "nowhere.jpg"], "nowhere.jpg: no such picture"),
        ("predict.py", ["{run}", "--images", "{here}/broken.jpg"], "broken.jpg"),
        ("predict.py", ["{run}", "--weights", "{here}/broken.jpg", "--images", "x"], "broken.jpg"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, name, words, message):
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")
    filled = [word.format(root=ROOT, here=tmp_path, run=run / "run") for word in words]
    result = command(name, *filled, cwd=tmp_path, status=2)
    text = result.stderr + result.stdout
    assert message in text and "Traceback" not in text


def test_help_lists_the_fields():
    text = command("train.py", "--help", cwd=ROOT).stdout
    assert "--train.learning-rate" in text and "--run" in text and "--resume" in text


def test_a_reader_that_leaves_is_no_error():
    """As in `python eval.py ... | head`: no traceback, the status of SIGPIPE."""
    program = "from querydet_jax.cli.command_line import run; run(lambda: [print('x' * 99) for _ in range(10**5)])"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=pipe, stderr=pipe) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
