"""The commands as a user runs them: a shortened demo, and bad input in one line.

Starting a process imports jax again, so only what a process is about starts one: the scripts of the checkout,
the time that `querydet --help` takes, a reader that leaves.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import quick
from PIL import Image
from small_detector import BASE, MODEL
from small_detector import model as small_model

from querydet_jax.cli.main import SUMMARIES, load, main, run_command
from querydet_jax.cli.process import run as run_process
from querydet_jax.cli.train import length_as_given
from querydet_jax.config import Config, override
from querydet_jax.evaluation.runner import detectors_to_compare
from querydet_jax.models import build_model
from querydet_jax.runtime.errors import DataError, Interrupted, Preempted, QueryDetError

ROOT = Path(__file__).parents[2]
SHORT = (
    "--train.steps 4 --train.batch-size 2 --train.log-every 1 --data.scenes-train 4 --data.scenes-val 3 "
    "--data.scenes-size 96 96 --data.scenes-val-size 128 128 --data.train-short 96 --data.train-max 96 "
    "--data.train-canvases 96 96 --data.test-short 128 --data.test-max 128 --data.test-canvases 128 128 "
    "--model.backbone.name resnet10 --train.eval-every 2 --train.eval-images 2 "
    "--train.best-metric dense/AR100"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a shortened demo, trained by the checkout's own script from another folder."""
    folder = tmp_path_factory.mktemp("demo")
    line = [sys.executable, str(ROOT / "train.py"), "demo", "--run", "run", *SHORT.split()]
    environment = {**os.environ, **quick.environment(os.environ["XLA_FLAGS"])}
    trained = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
    assert trained.returncode == 0, trained.stderr[-3000:]
    assert "step 4/4  loss" in trained.stdout and "data wait" in trained.stdout
    assert re.search(r"4 steps in \d+:\d\d, .* of the time waiting for data", trained.stdout)
    assert "trained; evaluate with: python eval.py run" in trained.stdout
    assert re.search(r"eval.py run --weights run/best.safetensors \(dense/AR100 .* the best\)", trained.stdout)
    # One evaluation on the way and one at the end, of two images, logged with the losses.
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "csq/AP50" in line and "dense/ms_per_image" in line] == [2, 4]
    return folder


def call(name: str, *words: object) -> None:
    load(name)([str(word) for word in words], f"querydet {name}")


def test_train_then_eval(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(run)
    call("eval", "run", "--pictures", 2, "--inference.max-detections", 150, "--worst", 1)
    printed = capsys.readouterr().out
    assert "dense" in printed and "csq" in printed and "speed-up" in printed
    report = json.loads((run / "run" / "report.json").read_text())
    assert set(report["methods"]) == {"dense", "csq"}
    for method in report["methods"].values():
        assert method["num_images"] == 3 and method["ms_per_image"] > 0
        assert {"AP", "AP50", "APs", "AP_0_16", "AR100", "AR150"} <= set(method["metrics"])
        assert set(method["best_thresholds"]) == {"car", "boat", "tank"}
    assert (report["step"], report["weights"], report["images"]) == (4, "run", "all")
    assert report["speed_up"]["dense"] == 1.0 and report["machine"]["jax"]
    assert report["config"]["train"]["steps"] == 4
    pictures = sorted((run / "run" / "pictures").iterdir())
    assert len(pictures) == 2
    with Image.open(pictures[0]) as picture:
        assert min(picture.size) > 400
    page = (run / "run" / "worst" / "index.html").read_text()
    assert "worst/index.html (" in printed and len(list((run / "run" / "worst").glob("*.png"))) == page.count("<img")
    assert page.count('src="missed_1_') == 1  # after four steps of training
    assert isinstance(json.loads((run / "run" / "detections_csq.json").read_text()), list)
    curves = (run / "run" / "curves_coco.csv").read_text().splitlines()
    assert curves[0].startswith("method,class,iou,AP,R0,R1,") and len(curves) == 1 + 2 * (11 + 3)
    assert not list((run / "run").glob("*visdrone*"))


@pytest.mark.slow
def test_eval_in_windows_is_predict_and_score(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    (tmp_path / "val").mkdir()
    names = ("car", "boat", "tank")
    truth = {"images": [], "annotations": [], "categories": [{"id": k + 1, "name": n} for k, n in enumerate(names)]}
    for n, (height, width) in enumerate(((200, 300), (300, 160)), start=1):
        coarse = Image.fromarray(rng.integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8))
        coarse.resize((width, height)).save(tmp_path / "val" / f"{n}.png")
        truth["images"].append({"id": n, "file_name": f"{n}.png", "height": height, "width": width})
        for k in range(3):
            box = {"image_id": n, "category_id": k + 1, "bbox": [40 * k, 30, 20, 16], "area": 320, "iscrowd": 0}
            truth["annotations"].append({"id": 10 * n + k, **box})
    (tmp_path / "val.json").write_text(json.dumps(truth))
    tiled = ["--tiles", 2, "--overlap", 0.25, "--inference.query", "csq", "--inference.score-threshold", 0.0]
    coco = [
        "--data.source",
        "coco",
        "--data.root",
        ".",
        "--data.val-annotations",
        "val.json",
        "--data.val-images",
        "val",
    ]
    call("eval", run / "run", *coco, *tiled, "--methods", "csq", "--out", "evaluated", "--pictures", 1)
    assert "in windows: --tiles 2 --overlap 0.25" in capsys.readouterr().out
    report = json.loads((tmp_path / "evaluated" / "report.json").read_text())
    assert (report["tiles"], report["overlap"]) == (2, 0.25) and "images, " in report["timing"]
    assert len(list((tmp_path / "evaluated" / "pictures").iterdir())) == 1
    call(
        "predict", run / "run", "--images", "val", *tiled,
        "--min-score", 0, "--draw", "none", "--save-json", "found.json",
    )  # fmt: skip
    call("score", "coco", "found.json", "val.json", "--out", "scored")
    scored = json.loads((tmp_path / "scored" / "report.json").read_text())["metrics"]
    assert json.loads((tmp_path / "found.json").read_text())
    for name in ("AP", "AP50", "APs", "AR1", "AR10", "AR100"):
        assert report["methods"]["csq"]["metrics"][name] == pytest.approx(scored[name], abs=1e-9)


@pytest.mark.parametrize(
    ("configured", "asked", "expected"),
    [
        ("csq", (), ["dense", "csq"]),
        ("dense", (), ["dense", "csq"]),
        ("cq", (), ["dense", "cq"]),
        ("cq", ("ccq", "dense"), ["dense", "ccq"]),
    ],
)
def test_what_eval_compares(configured: str, asked: tuple[str, ...], expected: list[str]) -> None:
    config = Config(model=MODEL, inference=override(BASE, {"query": configured}))
    detectors = detectors_to_compare(small_model(), config, asked)
    assert [detector.config.query for detector in detectors.values()] == list(detectors) == expected
    with pytest.raises(DataError, match="--methods sparse: is not one of dense, csq, cq, ccq"):
        detectors_to_compare(small_model(), config, ("sparse",))


def test_what_eval_compares_with_group_norm() -> None:
    """The dense detector alone: training asks before its first step, and would otherwise not start."""
    model = override(MODEL, {"head.norm": "group", "head.channels": 32})
    config = Config(model=model, inference=override(BASE, {"query": "dense"}))
    assert list(detectors_to_compare(build_model(model), config)) == ["dense"]


def test_predict_on_a_folder_of_either_orientation(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    # 1000x600 becomes 128x77: the vertical and horizontal scales differ, and there is no padding below.
    for name, shape in (("wide.jpg", (60, 100, 3)), ("tall.png", (1000, 600, 3))):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / "pictures" / name)
    monkeypatch.chdir(tmp_path)
    best = run / "run" / "best.safetensors"
    call("predict", run / "run", "--weights", best, "--images", "pictures", "--out", "seen", "--draw", "queries")
    printed = capsys.readouterr().out
    assert "wide.jpg" in printed and "tall.png" in printed
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
        ("train", [], "name a card, a configuration file or a run folder first"),
        ("train", ["configs/none.py"], "neither a card, a configuration file nor a run folder"),
        ("train", ["hituav_querydte"], "did you mean hituav_querydet?"),
        ("train", ["demo", "--model.max-level", "9"], "model.max_level 9"),
        ("train", ["coco_querydet_r50"], "instances_train2017.json"),
        ("train", ["demo", "--train.best-metric", "csq/AP"], "set train.eval_every above 0"),
        (
            "train",
            ["{run}", "--train.best-metric", "", "--train.patience", "2"],
            "train.patience 2: needs train.best_m",
        ),
        ("train", ["{run}", "--run", "new", "--train.best-metric", "csq/AP500"], "did you mean csq/AP50? Evaluations"),
        ("train", ["demo", "--train.steps", "9", "--train.epochs=2"], "both say how long to train; give one"),
        ("report", ["demo", "--curves"], "demo.py is no run; give the folder that `querydet train` wrote"),
        ("report", ["{here}", "--curves"], "no config.json"),
        ("eval", ["demo"], "add --weights"),
        ("eval", ["{run}", "--images", "-1"], "--images -1: give 0 or more"),
        ("eval", ["{run}", "--pictures", "-2"], "--pictures -2: give 0 or more"),
        ("eval", ["{run}", "--worst", "-1"], "--worst -1: give 0 or more"),
        ("eval", ["{run}", "--tiles", "1"], "--tiles '1': give auto, off, or the number of windows"),
        ("eval", ["{run}", "--overlap", "0.3"], "--overlap 0.3: is for windows; set --tiles"),
        ("eval", ["{run}", "--tiles", "auto", "--missed"], "--missed: is of whole images; leave out --tiles"),
        ("eval", ["{here}"], "no config.json"),
        ("predict", ["{run}"], "--images"),
        ("predict", ["{run}", "--images", "nowhere.jpg"], "nowhere.jpg: no such picture"),
        ("predict", ["{run}", "--images", "{here}/broken.jpg"], "broken.jpg"),
        ("predict", ["{run}", "--weights", "{here}/broken.jpg", "--images", "x"], "broken.jpg"),
        ("predict", ["--artifact", "x.zip", "--images", "x"], "--artifact: name the file in place of a run"),
        ("cards", ["uav"], "`querydet cards` lists the cards"),
        ("cards", ["hituav"], "packaged weights, not a card"),
        ("cards", ["{run}"], "a run, not a card"),
    ],
)
def test_bad_input_is_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: list[str], message: str
) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(QueryDetError) as error:
        call(name, *(word.format(here=tmp_path, run=run / "run") for word in words))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_steps_on_the_command_line_replace_a_cards_epochs() -> None:
    config = override(Config(), {"train.epochs": 3})
    assert length_as_given(config, ["--train.steps", "7"]).train.epochs == 0
    assert length_as_given(config, ["--train.seed", "7"]) == config
    assert length_as_given(config, ["--train.epochs", "3"]) == config


def test_an_unknown_field_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command("train", ["demo", "--train.stps", "3"])
    assert ended.value.code == 2 and "--train.steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        (QueryDetError("x.json: bad"), 2, "error: x.json: bad"),
        (Preempted("stopped by SIGTERM"), 143, "stopped by SIGTERM"),
        (Interrupted("stopped by Ctrl-C"), 130, "stopped by Ctrl-C"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            OSError(28, "No space left", "run/x"),
            2,
            "error: run/x cannot be written (No space left)",
        ),
        (
            OSError(36, "File name too long", "x" * 5000),
            2,
            f"error: {'x' * 200}: File name too long; correct the path, or its permissions",
        ),
        (
            PermissionError(13, "Permission denied", Path("data/val")),
            2,
            "error: data/val: Permission denied; correct the path, or its permissions",
        ),
    ],
)
def test_how_a_command_ends(raised: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise raised

    with pytest.raises(SystemExit) as ended:
        run_process(command)
    assert ended.value.code == status and capsys.readouterr().err == line + "\n"


def test_what_bad_input_does_not_explain_keeps_its_traceback() -> None:
    def command() -> None:
        raise FileNotFoundError(2, "No such file or directory", "x")

    with pytest.raises(FileNotFoundError):
        run_process(command)


@pytest.mark.parametrize("name", [name for name in SUMMARIES if name != "benchmark"])
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        call(name, "--help")
    except SystemExit as ended:
        assert not ended.code
    assert f"querydet {name}" in capsys.readouterr().out


def test_help_lists_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        call("train", "--help")
    text = capsys.readouterr().out
    assert "--train.learning-rate" in text and "--run" in text and "--resume" in text


def test_cards_are_listed_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    call("cards")
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == len(list((ROOT / "configs").glob("*.py"))) and any(x.startswith("demo ") for x in listed)
    call("cards", "demo")
    printed = capsys.readouterr().out
    assert "# command: make demo" in printed
    assert json.loads(printed[printed.index("\n{") :])["train"]["steps"] == 500


def test_the_console_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for words, status, text in (
        (["querydet", "--version"], None, "querydet 0."),
        (["querydet", "trian"], 2, "no such command; did you mean train?"),
        (["querydet", "cards", "demo"], None, '"name": "demo"'),
    ):
        monkeypatch.setattr(sys, "argv", words)
        if status is None:
            main()
        else:
            with pytest.raises(SystemExit) as ended:
                main()
            assert ended.value.code == status
        captured = capsys.readouterr()
        assert text in captured.out + captured.err


def test_help_waits_for_no_heavy_import() -> None:
    program = (
        "import sys; sys.argv = ['querydet', '--help']; from querydet_jax.cli.main import main; main();"
        "assert not {'jax', 'flax', 'numpy', 'tyro'} & set(sys.modules), sorted(sys.modules)"
    )
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        helped = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
        times.append(time.perf_counter() - begun)
        assert helped.returncode == 0 and "usage: querydet COMMAND" in helped.stdout, helped.stderr
    assert min(times) < 1.0


def test_a_reader_that_leaves_is_no_error() -> None:
    """As in `querydet eval ... | head`: no traceback, the status of SIGPIPE."""
    program = "from querydet_jax.cli.process import run; run(lambda: [print('x' * 99) for _ in range(10**5)])"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=pipe, stderr=pipe) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
