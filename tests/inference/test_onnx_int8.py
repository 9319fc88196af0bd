"""ONNX files in int8: near float32, the same densely and on sites, every layer between the first and the last ones."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import small_detector as small
from PIL import Image
from test_export import CANVAS, CONFIG, model
from test_onnx import MODELS, needs_onnx, run_export

import querydet_jax as qd
from querydet_jax import Detector
from querydet_jax.config import save_config
from querydet_jax.data.readers.pictures import open_pictures
from querydet_jax.inference.export.onnx_calibration import calibrate
from querydet_jax.inference.export.onnx_detector import OnnxDetections, OnnxDetector
from querydet_jax.inference.export.onnx_int8 import Calibration, Range
from querydet_jax.inference.export.onnx_writer import write_onnx
from querydet_jax.runtime.errors import ConfigError, DataError
from querydet_jax.weights import export_weights

SIZES = np.array([[50, 90]], np.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pictures to calibrate with: of what ``small.pictures`` draws, those with objects."""
    path = tmp_path_factory.mktemp("pictures")
    for i, picture in enumerate(small.pictures(4, *CANVAS)[1:]):
        Image.fromarray(picture).save(path / f"{i}.png")
    return path


@pytest.fixture(scope="module")
def int8(folder: Path) -> Calibration:
    pictures = open_pictures([folder], CONFIG.class_names)
    return calibrate(model(), pictures, CONFIG.data, images=10, source="drawn")


def written(path: Path, int8: Calibration | None, **inference) -> Path:
    detector = Detector(model(), dataclasses.replace(CONFIG.inference, **inference))
    write_onnx(path, detector, CONFIG, canvases=[CANVAS], batch_sizes=[1], int8=int8)
    return path


@pytest.fixture(scope="module")
def dense(int8: Calibration, tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("dense") / "dense.onnx", int8, query="dense")


def graphs(graph) -> Iterator:
    yield graph
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        if attribute.HasField("g"):
            yield from graphs(attribute.g)


def layers(path: Path) -> list[bool]:
    """Of each convolution and product with weights of a file: whether it reads bytes."""
    onnx = importlib.import_module("onnx")
    stored, found = onnx.load(path), []
    weights = {tensor.name for tensor in stored.graph.initializer}
    every = [node for graph in graphs(stored.graph) for node in graph.node]
    weights |= {node.output[0] for node in every if set(node.input) <= weights}  # rearranged when loaded
    made = {name: node.op_type for node in every for name in node.output}
    for node in every:
        if node.op_type in ("Conv", "MatMul") and {node.input[1]} <= weights:
            sides = [made.get(name) == "DequantizeLinear" for name in node.input[:2]]
            found.append(all(sides))
    return found


def share_found(result: OnnxDetections, expected: OnnxDetections) -> float:
    """Of the expected detections, those that the result has too: class, boxes within 3 px, scores within 0.03."""
    near = np.abs(result.boxes[:, :, None] - expected.boxes[:, None]).max(-1) < 3
    near &= np.abs(result.scores[:, :, None] - expected.scores[:, None]) < 0.03
    near &= result.classes[:, :, None] == expected.classes[:, None]
    assert expected.valid.sum() > 20
    return float(near.any(1)[expected.valid].mean())


@needs_onnx
def test_every_layer_between_reads_bytes(dense):
    # The first convolution; class and box predictions of the four levels.
    assert layers(dense).count(False) == 1 + 2 * 4
    # Stages: 4 x 2, and 3 shortcuts. FPN: 4 and 4. Towers of one layer.
    assert layers(dense).count(True) == 11 + 8 + 2 * 4


@needs_onnx
def test_onnx_runtime_fuses_them(dense, tmp_path):
    runtime, onnx = map(importlib.import_module, ("onnxruntime", "onnx"))
    options = runtime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "fused.onnx"), 4
    runtime.InferenceSession(str(dense), options, providers=["CPUExecutionProvider"])
    every = [node.op_type for graph in graphs(onnx.load(tmp_path / "fused.onnx").graph) for node in graph.node]
    assert every.count("QLinearConv") == 27 and every.count("Conv") == 9
    assert every.count("QuantizeLinear") == 1  # behind the first layer


@needs_onnx
def test_near_float32(dense, tmp_path):
    in_int8, in_float32 = OnnxDetector(dense), OnnxDetector(written(tmp_path / "x.onnx", None, query="dense"))
    assert in_int8.manifest["calibration"] == {"images": 3, "source": "drawn"}
    assert (in_int8.manifest["precision"], in_float32.manifest["precision"]) == ("int8", "float32")
    for images in np.split(small.pictures(4, *CANVAS)[1:3], 2):
        result, expected = in_int8(images, SIZES), in_float32(images, SIZES)
        assert share_found(result, expected) > 0.6
    assert dense.stat().st_size < 0.3 * (tmp_path / "x.onnx").stat().st_size


@needs_onnx
@pytest.mark.parametrize("kernel", ["gather", pytest.param("tiles", marks=pytest.mark.slow)])
def test_on_sites_it_is_what_it_is_densely(kernel, dense, int8, tmp_path):
    """Where every cell is a key, CSQ computes all that dense heads do, with the same ranges, on sites."""
    everywhere = {"threshold": 0.0, "capacities": (1.0,), "kernel": kernel, "tile": 4}
    sparse = OnnxDetector(written(tmp_path / "csq.onnx", int8, **everywhere))
    for images in np.split(small.pictures(4, *CANVAS), 4):
        result = sparse(images)
        assert all(counts["capacity"] > 0 for counts in result.stats.values())
        small.assert_same(result, OnnxDetector(dense)(images))
    assert layers(tmp_path / "csq.onnx").count(True) > 20


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("fcos", 0.6), ("faster_rcnn", 0.25)])  # it ranks proposals at random
def test_other_detectors(name, least, folder, tmp_path):
    """Several programs in one file; of Faster R-CNN, the second stage stays in float32."""
    pictures = open_pictures([folder], CONFIG.class_names)
    int8 = calibrate(MODELS[name](), pictures, CONFIG.data, images=3, source="drawn")
    files = []
    for calibration in (None, int8):
        files.append(tmp_path / f"{calibration is None}.onnx")
        detector = Detector(MODELS[name](), dataclasses.replace(CONFIG.inference, capacities=(0.25,), threshold=0.5))
        write_onnx(files[-1], detector, CONFIG, canvases=[CANVAS], batch_sizes=[1, 4], int8=calibration)
    in_float32, in_int8 = map(OnnxDetector, files)
    images = small.pictures(4, *CANVAS)
    assert share_found(in_int8(images), in_float32(images)) > least
    assert share_found(in_int8(images[1:2]), in_float32(images[1:2])) > least
    assert layers(files[1]).count(True) > 20


@needs_onnx
def test_export_command(folder, tmp_path, capsys):
    save_config(CONFIG, tmp_path / "config.json")
    export_weights(model(), tmp_path / "model.npz")
    words = (tmp_path / "config.json", "--weights", tmp_path / "model.npz", "--format", "onnx", "--batch-sizes", 1)
    words = (*words, "--no-both-orientations", "--precision", "int8", "--out", tmp_path / "x.onnx")
    run_export(*words, "--calibration", folder, "--calibration-images", 2)
    assert f"int8 by 2 pictures of {folder}" in capsys.readouterr().out
    (result,) = qd.load(tmp_path / "x.onnx").predict(folder / "2.png", min_score=0.2)
    assert len(result)


def test_options_that_do_not_fit_are_refused(tmp_path):
    save_config(CONFIG, tmp_path / "config.json")
    source, int8 = tmp_path / "config.json", ("--precision", "int8")
    for words, message in (
        (("--format", "onnx", "--calibration", "x"), "--calibration: is for int8; add --precision int8"),
        (("--format", "onnx", *int8), "--precision int8: needs --calibration: pictures, or a folder"),
        (int8, "--precision int8: is for ONNX files, not for artifact; add --format onnx"),
        (("--format", "web", *int8), "--precision int8: is for ONNX files, not for web"),
        (
            ("--format", "onnx", *int8, "--calibration", "x", "--calibration-images", 0),
            "--calibration-images 0: give 1 or more",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            run_export(source, *words)


@needs_onnx
def test_what_cannot_be_calibrated_is_refused(folder, tmp_path):
    pictures = open_pictures([folder], CONFIG.class_names)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no pictures directly in this folder"):
        open_pictures([tmp_path / "empty"], CONFIG.class_names)
    half = qd.build_model(dataclasses.replace(CONFIG.model, dtype="bfloat16"))
    with pytest.raises(ConfigError, match="model.dtype bfloat16: int8 is made from float32; add --model.dtype float32"):
        calibrate(half, pictures, CONFIG.data, images=1, source="x")


def test_bytes_stand_for_ranges():
    assert Range(0.0, 6.0).zero == 0 and 255 * Range(0.0, 6.0).scale <= 6
    assert Range(-1.0, 1.0).zero in (127, 128)
    assert Range(-2.0, 0.0).zero == 255
    nothing = Range(0.0, 0.0)
    assert nothing.zero == 0 and nothing.scale > 0
