"""The exported ONNX file in other runtimes beside JAX, in float32 and int8: agreement first, then times."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import charts
from benchmarks.measuring import Variants, random_detectors
from benchmarks.options import RunOrRandomImage
from benchmarks.report import Column, Report, Row, ms, share, times
from benchmarks.subjects import open_run
from benchmarks.timing import interleaved, percentiles
from querydet_jax.config import Config, DataConfig, override
from querydet_jax.data import eval_batches, open_split
from querydet_jax.data.readers.memory import Frames
from querydet_jax.evaluation.runner import first_images
from querydet_jax.inference.detector import Detector
from querydet_jax.inference.export.onnx_calibration import calibrate
from querydet_jax.inference.export.onnx_detector import OnnxDetections, OnnxDetector
from querydet_jax.inference.export.onnx_int8 import Calibration
from querydet_jax.inference.export.onnx_writer import write_onnx
from querydet_jax.runtime.errors import ConfigError

Images = tuple[np.ndarray, np.ndarray]
"""uint8 ``[1, H, W, 3]`` and int32 ``[1, 2]``, (height, width) of the image on its canvas."""
Call = Callable[[np.ndarray, np.ndarray], Any]

JAX, ONNX_RUNTIME, OPENVINO, OPENVINO_BF16 = "JAX", "ONNX Runtime", "OpenVINO", "OpenVINO bfloat16"
ONNX_RUNTIME_INT8, OPENVINO_INT8 = "ONNX Runtime int8", "OpenVINO int8"
_FLOAT32 = {ONNX_RUNTIME_INT8: ONNX_RUNTIME, OPENVINO_INT8: OPENVINO}
_COMPARED = 8  # images on which detections are compared with JAX's
_NEAR = 0.5  # px
_VARIANTS: Variants = {"dense": {"query": "dense"}, "csq": {"query": "csq"}}


@dataclass(frozen=True)
class Onnx(RunOrRandomImage):
    """JAX, ONNX Runtime and OpenVINO on the CPU: dense and CSQ, with one and more threads."""

    threads: tuple[int, ...] = (1, 2)
    """Threads of ONNX Runtime and OpenVINO. JAX takes all cores."""
    int8: bool = True
    """Also measure files in int8."""
    calibration_images: int = 32
    """With --run and --int8: number of training images to calibrate with."""


def onnx(arguments: Onnx) -> None:
    for package in ("onnx", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"benchmark onnx: needs the package {package}; pip install -r requirements-onnx.txt")
    if arguments.calibration_images < 1:
        raise ConfigError(f"--calibration-images {arguments.calibration_images}: give 1 or more")
    detectors, config, images, calibration = _of_run(arguments) if arguments.run else _of_random_weights(arguments)
    int8 = calibration() if arguments.int8 else None
    with_openvino = importlib.util.find_spec("openvino") is not None
    calls: dict[tuple[str, str, str], Call] = {}
    for method, detector in detectors.items():
        calls[JAX, method, "all"] = lambda pixels, sizes, d=detector: jax.block_until_ready(d(pixels, sizes))
        file, in_int8 = (Path(arguments.out) / f"{method}{suffix}.onnx" for suffix in ("", "_int8"))
        shape: dict[str, Any] = dict(canvases=[images[0][0].shape[1:3]], batch_sizes=[1])
        write_onnx(file, detector, config, **shape)
        if int8 is not None:
            write_onnx(in_int8, detector, config, int8=int8, **shape)
        for threads in arguments.threads:
            calls[ONNX_RUNTIME, method, str(threads)] = OnnxDetector(file, threads=threads)
            if with_openvino:
                calls[OPENVINO, method, str(threads)] = _openvino(file, threads, "f32")
                calls[OPENVINO_BF16, method, str(threads)] = _openvino(file, threads, "bf16")
            if int8 is not None:
                calls[ONNX_RUNTIME_INT8, method, str(threads)] = OnnxDetector(in_int8, threads=threads)
                if with_openvino:
                    calls[OPENVINO_INT8, method, str(threads)] = _openvino(in_int8, threads, "f32")
    agreement = {key: _agreement(calls[JAX, key[1], "all"], call, images[:_COMPARED]) for key, call in calls.items()}
    turns = {" ".join(key): _in_turn(call, images) for key, call in calls.items()}
    measured = interleaved(turns, len(images) if arguments.run else arguments.rounds)
    rows: list[Row] = []
    for key in calls:
        runtime, method, threads = key
        times_of = measured[" ".join(key)]
        dense = measured[" ".join((runtime, "dense", threads))]
        rows.append(
            {
                "runtime": runtime,
                "method": method,
                "threads": threads,
                **percentiles(times_of),
                "speed_up": float(np.median(dense) / np.median(times_of)),
                **agreement[key],
            }
        )
        if runtime in _FLOAT32:
            in_float32 = measured[" ".join((_FLOAT32[runtime], method, threads))]
            rows[-1]["over_float32"] = float(np.median(in_float32) / np.median(times_of))
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("onnx", "onnxruntime")]
    if with_openvino:
        versions.append(f"openvino {importlib.metadata.version('openvino')}")
    Report(
        "onnx",
        f"The same detector in several runtimes: {arguments.in_words()}",
        [
            Column("runtime", "runtime"),
            Column("method", "method"),
            Column("threads", "threads"),
            Column("ms_p50", "ms p50", ms),
            Column("ms_p90", "ms p90", ms),
            Column("speed_up", "speed-up", times),
            Column("over_float32", "over float32", times),
            Column("found", "found", share),
            Column("scores", "scores", "{:.1e}".format),
            Column("boxes", "boxes px", "{:.1e}".format),
        ],
        rows,
        notes=[
            "speed-up: over dense in the same runtime with as many threads; over float32: of int8, with the same "
            "method and as many threads",
            f"found: JAX's detections on the first {_COMPARED} images that the runtime has too, of the same class, "
            f"each side within {_NEAR} px (random weights tie, so the last ones differ); scores, boxes: their largest "
            "differences",
            ", ".join(versions),
            *([f"int8: calibrated on {int8.images} pictures of {int8.source}"] if int8 else []),
        ],
        not_run=[] if with_openvino else ["OpenVINO: needs the package openvino"],
        draw=lambda figure: charts.bars(
            figure,
            [f"{row['runtime']} {row['method']}, {row['threads']}" for row in rows],
            {"ms": [row["ms_p50"] for row in rows]},
            x="ms per image (median)",
            title="Runtimes, methods, threads",
        ),
        left=3,
    ).publish(arguments.out, arguments)


Subject = tuple[dict[str, Detector], Config, list[Images], Callable[[], Calibration]]
"""Dense and CSQ detectors, their configuration, images, and what calibrates files in int8."""


def _of_run(arguments: Onnx) -> Subject:
    """Return the detectors of a run, and its validation images that have the first one's canvas."""
    config, model, dataset = open_run(arguments.run)
    batches = eval_batches(dataset, config.data, batch_size=1, indices=first_images(dataset, arguments.images))
    images = [(batch["images"], batch["sizes"]) for batch in batches]
    images = [pair for pair in images if pair[0].shape == images[0][0].shape]
    detectors = {name: Detector(model, override(config.inference, changes)) for name, changes in _VARIANTS.items()}

    def calibration() -> Calibration:
        training = open_split(config, "train", arguments.run)
        return calibrate(model, training, config.data, images=arguments.calibration_images, source="train")

    return detectors, config, images, calibration


def _of_random_weights(arguments: Onnx) -> Subject:
    model, detectors, image = random_detectors(arguments, _VARIANTS)
    images = [(np.asarray(image), np.asarray([image.shape[1:3]], np.int32))]
    config = Config(name="random", model=model.config)

    def calibration() -> Calibration:
        canvas = images[0][0].shape[1:3]
        data = DataConfig(test_short=min(canvas), test_max=max(canvas), test_canvases=(canvas,))
        return calibrate(model, Frames([images[0][0]], config.class_names), data, images=1, source="the image itself")

    return detectors, config, images, calibration


def _openvino(file: Path, threads: int, precision: str) -> Call:
    openvino: Any = importlib.import_module("openvino")
    hints = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(str(file), "CPU", hints)

    def call(pixels: np.ndarray, sizes: np.ndarray) -> OnnxDetections:
        found = compiled({"images": pixels, "sizes": sizes})
        return OnnxDetections(*(found[name] for name in OnnxDetections._fields[:4]), stats={})

    return call


def _in_turn(call: Call, images: list[Images]) -> Callable[[], Any]:
    """Return a function that takes the next image each time."""
    following: Iterator[Images] = itertools.cycle(images)
    return lambda: call(*next(following))


def _agreement(reference: Call, call: Call, images: list[Images]) -> Row:
    """Look for each detection of the reference: the same class, each side of the box within ``_NEAR`` px."""
    total, score_gaps, box_gaps = 0, [], []
    for pixels, sizes in images:
        wanted, found = (_valid(f(pixels, sizes)) for f in (reference, call))
        for box, score, label in zip(*wanted, strict=True):
            total += 1
            gaps = np.where(found[2] == label, np.abs(found[0] - box).max(axis=1), np.inf)
            if gaps.min(initial=np.inf) <= _NEAR:
                box_gaps.append(float(gaps.min()))
                score_gaps.append(float(abs(found[1][gaps.argmin()] - score)))
    if not total:
        raise ConfigError("benchmark onnx: nothing is detected on the images compared; choose others")
    gaps = {"scores": max(score_gaps), "boxes": max(box_gaps)} if box_gaps else {}
    return {"found": len(box_gaps) / total, **gaps}


def _valid(found: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    valid = np.asarray(found.valid[0])
    boxes, scores, classes = (np.asarray(x[0])[valid] for x in (found.boxes, found.scores, found.classes))
    return boxes, scores, classes
