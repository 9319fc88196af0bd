"""ONNX files: ONNX Runtime finds what jax finds, on every rung; and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import small_detector as small
import test_detector_faster_rcnn
import test_detector_fcos
from PIL import Image
from test_export import CANVAS, CONFIG, model

import querydet_jax as qd
from querydet_jax import Detector
from querydet_jax.cli.export import export
from querydet_jax.cli.predict import predict
from querydet_jax.config import save_config
from querydet_jax.inference.export import onnx_detector
from querydet_jax.inference.export.onnx_detector import OnnxDetector, OnnxError
from querydet_jax.inference.export.onnx_writer import write_onnx
from querydet_jax.inference.predictor import of_model
from querydet_jax.runtime.errors import ConfigError, DataError, QueryDetError
from querydet_jax.weights import export_weights

needs_onnx = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnx", "onnxruntime"))), reason="pip install -r requirements-onnx.txt"
)
RUNGS = (0.05, 0.25)
MODELS = {"retinanet": model, "fcos": test_detector_fcos.fcos, "faster_rcnn": test_detector_faster_rcnn.model}
# Each picture alone; then four together, of which none, some and most have objects.
ROWS = {1: [(0, [i]) for i in range(4)] + [(1, [3])], 4: [(0, [0, 0, 0, 0]), (0, [0, 1, 2, 3]), (0, [3, 2, 3, 2])]}
ALONE = """
import sys
import numpy as np
from onnx_detector import OnnxDetector
detect = OnnxDetector("csq.onnx", channels="bgr", threads=1)
np.savez("found.npz", **{**detect(np.load("images.npy")[..., ::-1])._asdict(), "stats": 0})
loaded = {name.split(".")[0] for name in sys.modules}
assert "onnxruntime" in loaded and not loaded & {"jax", "flax", "querydet_jax", "onnx", "PIL"}, loaded
"""


@functools.cache
def detector(name: str = "retinanet", **changes) -> Detector:
    settings = {"capacities": RUNGS, "threshold": 0.65, **changes}
    return Detector(MODELS[name](), dataclasses.replace(CONFIG.inference, **settings))


def compared(in_jax: Detector, path: Path) -> dict[int, set[int]]:
    """Compare a file with the detector that it was written from; return the buffers that ran, by batch size."""
    in_onnx, ran, found = OnnxDetector(path, threads=1), {batch: set() for batch in ROWS}, 0
    for batch, cases in ROWS.items():
        for seed, rows in cases:
            images = small.pictures(4, *CANVAS, seed=seed)[rows]
            sizes = np.array([[64, 96], [50, 96], [64, 70], [64, 96]], np.int32)[rows]
            expected, result = in_jax(images, sizes), in_onnx(images, sizes)
            small.assert_same(result, expected)
            stats = {level: counts._asdict() for level, counts in expected.stats.items()}
            assert jax.tree.map(int, result.stats) == jax.tree.map(int, stats)
            ran[batch].update(int(counts["capacity"]) for counts in result.stats.values())
            found += result.valid.sum()
    assert found > 50
    return ran


def write_other(path: Path, metadata: str | None = None) -> None:
    """Write a graph that is no detector."""
    onnx = importlib.import_module("onnx")
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "other", [x], [y])
    other = onnx.helper.make_model(graph, ir_version=9, opset_imports=[onnx.helper.make_opsetid("", 18)])
    onnx.helper.set_model_props(other, {} if metadata is None else {"querydet_jax": metadata})
    onnx.save(other, path)


@pytest.fixture(scope="module")
def csq(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "csq.onnx"
    scores = np.array([0.5, 0.25, 1], np.float32)
    write_onnx(path, detector(), CONFIG, canvases=[CANVAS], batch_sizes=tuple(ROWS), min_scores=scores)
    return path


@needs_onnx
def test_csq_in_onnx_runtime_is_csq_in_jax(csq):
    """On every rung, for one picture and for four: both buffers, and the dense one."""
    assert compared(detector(), csq) == {1: {0, 32, 96}, 4: {0, 80, 384}}
    weights = sum(x.nbytes for x in jax.tree.leaves(detector().function()[1]))
    assert weights < csq.stat().st_size < 1.1 * weights  # two programs of three rungs share one copy
    stored = OnnxDetector(csq)
    assert stored.classes == CONFIG.classes and stored.canvases == (CANVAS,) and stored.batch_sizes == (1, 4)
    assert stored.min_scores is not None and stored.min_scores.tolist() == [0.5, 0.25, 1]
    assert stored.manifest["inference"]["threshold"] == 0.65 and stored.manifest["preprocessing"]["test_short"] == 64


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "changes",
    [
        {"query": "dense"},
        {"overflow": "cap"},
        {"kernel": "tiles", "tile": 4},
        {"nms": "linear"},
        {"query": "cq", "nms": "gaussian"},
    ],
    ids=lambda changes: "_".join(map(str, changes.values())),
)
def test_other_detectors_and_methods(name, changes, tmp_path):
    levels = {"start_level": 4} if name != "retinanet" else {}  # two sparse levels
    if name == "retinanet" and "tile" in changes:  # tiles around the same cells fill a larger share
        levels = {"capacities": (0.05, 0.5)}
    in_jax = detector(name, **{**levels, **changes})
    write_onnx(tmp_path / "x.onnx", in_jax, CONFIG, canvases=[CANVAS], batch_sizes=tuple(ROWS))
    ran = compared(in_jax, tmp_path / "x.onnx")
    if in_jax.config.query == "csq":
        assert all(len(buffers) >= 3 - (in_jax.config.overflow == "cap") for buffers in ran.values()), ran


@needs_onnx
def test_one_module_is_enough(csq, tmp_path):
    for source in (csq, Path(onnx_detector.__file__)):
        shutil.copy(source, tmp_path)
    images = small.pictures(4, *CANVAS)
    np.save(tmp_path / "images.npy", images)
    subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, '.')\n{ALONE}"], cwd=tmp_path, check=True
    )
    with np.load(tmp_path / "found.npz") as found:
        np.testing.assert_array_equal(found["boxes"], OnnxDetector(csq, threads=1)(images).boxes)


@needs_onnx
def test_predict_from_the_file_is_predict_from_the_run(csq, tmp_path):
    """Also of a picture smaller than its canvas; with the scores of the file."""
    for i, shape in enumerate([(120, 180), (110, 220)]):
        Image.fromarray(small.pictures(2, *shape, seed=i)[1]).save(tmp_path / f"{i}.png")
    run = of_model(model(), CONFIG, tmp_path)
    run.detector = detector()
    expected = list(run.predict(tmp_path, min_score=0.2))
    for result, other in zip(qd.load(csq).predict(tmp_path, min_score=0.2), expected, strict=True):
        assert len(result) == len(other) > 3 and result.path == other.path and result.size == other.size
        np.testing.assert_array_equal(result.classes, other.classes)
        np.testing.assert_allclose(result.scores, other.scores, rtol=0, atol=1e-5)
        np.testing.assert_allclose(result.boxes, other.boxes, rtol=0, atol=1e-3)

    words = [str(csq), "--images", str(tmp_path), "--out", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match="--draw queries: small shows none, because an exported file returns no maps"):
        predict([*words, "--draw", "queries"], "querydet predict")
    predict(words, "querydet predict")
    listed = json.loads((tmp_path / "out" / "detections.json").read_text())
    best = np.array([0.5, 0.25, 1], np.float32)  # those of the file
    assert [len(entry["detections"]) for entry in listed["images"]] == [len(x.at_least(best)) for x in expected]
    assert (tmp_path / "out" / "0_detections.jpg").is_file()


@needs_onnx
def test_what_cannot_be_predicted_from_a_file_is_one_line(csq, tmp_path):
    (tmp_path / "cut.onnx").write_bytes(csq.read_bytes()[:-100])
    (tmp_path / "text.onnx").write_text("not a graph")
    write_other(tmp_path / "newer.onnx", json.dumps({"format": "querydet_jax onnx", "format_version": 2}))
    write_other(tmp_path / "foreign.onnx")
    for words, message in (
        (("cut.onnx",), "cut.onnx: damaged, cut short or not an ONNX file .*; copy it again"),
        (("text.onnx",), "text.onnx: damaged, cut short or not an ONNX file .*; copy it again"),
        (("newer.onnx",), "newer.onnx: format version 2, but this reader supports 1; export it again"),
        (("foreign.onnx",), "foreign.onnx: holds no detector of querydet_jax; give one written by querydet export"),
        (("none.onnx",), "none.onnx: no such file; give one written by querydet export"),
        ((csq, "--inference.threshold", 0.3), "--inference.threshold: fixed in an exported file"),
        ((csq, "--weights", "x.npz"), "--weights x.npz: an exported file holds its own"),
    ):
        words = [str(tmp_path / word if i == 0 else word) for i, word in enumerate(words)]
        with pytest.raises(QueryDetError, match=message) as error:
            predict([*words, "--images", str(tmp_path)], "querydet predict")
        assert "\n" not in str(error.value)
    for name, message in (
        ("text.onnx", "text.onnx: damaged, cut short or not an ONNX file"),
        ("foreign.onnx", "foreign.onnx: holds no detector"),
        ("none.onnx", "none.onnx: no such run folder, exported file or packaged weights"),
    ):
        with pytest.raises(QueryDetError, match=message):
            qd.load(tmp_path / name)
    with pytest.raises(ConfigError, match="inference.threshold: fixed in this file; export again, or load the run"):
        qd.load(csq, {"inference.threshold": 0.3})


def test_without_onnxruntime(tmp_path, monkeypatch):
    (tmp_path / "x.onnx").touch()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(QueryDetError, match="x.onnx: running it needs onnxruntime; pip install onnxruntime"):
        qd.load(tmp_path / "x.onnx")


@needs_onnx
def test_damaged_and_foreign_files_are_refused(csq, tmp_path):
    whole = csq.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.onnx").write_bytes(whole[:length])
        with pytest.raises(OnnxError, match=r"^[^\n]*cut.onnx: [^\n]*$"):
            OnnxDetector(tmp_path / "cut.onnx")
    (tmp_path / "text.onnx").write_text("not a graph")
    with pytest.raises(OnnxError, match=r"text.onnx: damaged, cut short or not an ONNX file [^\n]*$"):
        OnnxDetector(tmp_path / "text.onnx")
    with pytest.raises(OnnxError, match="none.onnx: no such file"):
        OnnxDetector(tmp_path / "none.onnx")

    manifest = OnnxDetector(csq).manifest
    path = tmp_path / "other.onnx"
    for metadata, message in (
        (None, "other.onnx: holds no detector of querydet_jax"),
        ("{", "holds no detector"),
        ({**manifest, "format": "other"}, "holds no detector"),
        ({**manifest, "format_version": 9}, "version 9, but .* supports 1"),
        ({**manifest, "canvases": [[64]]}, "metadata, canvases: .*not a list of .height, width. in px"),
        ({**manifest, "min_scores": [1]}, "min_scores: not a score per class"),
        (manifest, "its inputs and outputs are not a detector's, but x, y"),
    ):
        write_other(path, metadata if isinstance(metadata, str | None) else json.dumps(metadata))
        with pytest.raises(OnnxError, match=message):
            OnnxDetector(path)


@needs_onnx
def test_other_input_is_refused(csq):
    detect = OnnxDetector(csq)
    for shape in ((3, *CANVAS), (1, 96, 64), (0, *CANVAS)):
        with pytest.raises(OnnxError, match="csq.onnx: .* but exported for 1, 4 images of 64x96; pad"):
            detect(np.zeros((*shape, 3), np.uint8))
    with pytest.raises(OnnxError, match="must be uint8"):
        detect(np.zeros((1, *CANVAS, 3), np.float32))
    for sizes, message in {
        ((0, 96),): r"sizes\[0\] is \[0, 96\], on a canvas of 64x96",
        ((64.0, 96.0),): r"sizes are float64 \[1, 2\]",
        ((1,), (1, 2)): "sizes are not an array",
    }.items():
        with pytest.raises(OnnxError, match=message):
            detect(np.zeros((1, *CANVAS, 3), np.uint8), sizes)
    with pytest.raises(OnnxError, match="channels 'grb'"):
        OnnxDetector(csq, channels="grb")


def test_what_cannot_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    for changes, message in (
        ({"batch_sizes": ()}, "batch_sizes .*at least one"),
        ({"batch_sizes": (0,)}, "batch_sizes .0,.: must be at least 1"),
        ({"canvases": [CANVAS, CANVAS]}, "canvases .*each once"),
    ):
        with pytest.raises(ConfigError, match=message):
            write_onnx(tmp_path / "x", detector(), CONFIG, **{"canvases": [CANVAS], "batch_sizes": (1,), **changes})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install -r requirements-onnx.txt"):
        write_onnx(tmp_path / "x", detector(), CONFIG, canvases=[CANVAS], batch_sizes=(1,))


def run_export(*words: object) -> None:
    export([str(word) for word in words], "querydet export")


def test_options_that_do_not_fit_are_refused(tmp_path):
    save_config(CONFIG, tmp_path / "config.json")
    export_weights(model(), tmp_path / "model.npz")
    source = (tmp_path / "config.json", "--weights", tmp_path / "model.npz")
    for words, message in (
        (("--format", "onnx", "--platforms", "cpu"), "--platforms: an ONNX file is for no platform"),
        (("--out", "x.onnx"), "--out x.onnx: an artifact is a zip archive; add --format onnx"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_export(*source, *words)


@needs_onnx
@pytest.mark.slow
def test_export_command(tmp_path, capsys):
    save_config(CONFIG, tmp_path / "config.json")
    export_weights(model(), tmp_path / "model.npz")
    run_export(
        tmp_path / "config.json", "--weights", tmp_path / "model.npz", "--format", "onnx", "--out", tmp_path / "x.onnx"
    )
    assert "x.onnx: " in (said := capsys.readouterr().out) and "2 programs" in said and "for ONNX Runtime" in said
    stored = OnnxDetector(tmp_path / "x.onnx", threads=1)
    assert stored.canvases == (CANVAS, CANVAS[::-1])
    for canvas in stored.canvases:
        images = small.pictures(2, *canvas)[1:]
        small.assert_same(stored(images), Detector(model(), CONFIG.inference)(images))
