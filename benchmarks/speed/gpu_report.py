"""What a borrowed GPU should answer, in runs of a few minutes: run it again and it goes on where it stopped."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from benchmarks.options import RandomNetwork
from benchmarks.report import Column, Report, Row, decimals, ms, share, times
from benchmarks.speed.train_step import TrainStep, train_step
from benchmarks.subjects import laid_out_queries, random_image, random_model, scripted_detector
from benchmarks.timing import interleaved
from querydet_jax.config import InferenceConfig, override
from querydet_jax.inference.compiling import GpuMode
from querydet_jax.inference.detector import Detector
from querydet_jax.inference.pipeline import Detections
from querydet_jax.runtime import machine
from querydet_jax.runtime.errors import ConfigError
from querydet_jax.runtime.files import write_json, written_aside

_PLAIN = {"min_level": 3, "query.enabled": False, "loss.level_weighting": "uniform", "head.box_bias": "zero"}


@dataclass(frozen=True)
class GpuReport(RandomNetwork):
    """A GPU in one report: agreement with the CPU, times, kernels by a profile, training. Resumes; writes Markdown."""

    sizes: tuple[tuple[int, int], ...] = ((800, 1344), (2272, 4000))
    """Heights and widths of the images in px, multiples of 32."""
    batches: tuple[int, ...] = (1, 8)
    """Images per call."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("bfloat16", "float32")
    """Arithmetic of convolutions."""
    modes: tuple[GpuMode, ...] = ("plain", "tuned", "graph")
    """Values of inference.gpu."""
    active: float = 0.03
    """Share of P2's cells that CSQ makes active."""
    agreement_size: tuple[int, int] = (256, 320)
    """Height and width of the image on which the GPU is compared with the CPU."""
    rounds: int = 20
    """Timed rounds."""
    train_config: str = "configs/coco_querydet_r50.py"
    """Card whose training step is timed, in bfloat16 (empty: leave training out)."""
    train_batch: int = 2
    """Images per training step."""
    minutes: float = 8.0
    """Start nothing new after this time; the next run goes on."""


def gpu_report(arguments: GpuReport) -> None:
    if arguments.minutes <= 0:
        raise ConfigError(f"gpu-report --minutes {arguments.minutes}: must be above 0")
    began, folder = time.monotonic(), Path(arguments.out)
    kept = folder / "gpu_report_cases.json"
    # What decides a case is in its name, or here; a file of another machine or network is not continued.
    subject = {key: getattr(arguments, key) for key in ("backbone", "classes", "channels", "active", "train_config")}
    subject |= {"device": jax.local_devices()[0].device_kind, "jax": jax.__version__}
    cases: dict[str, list[Row]] = {}
    if kept.exists():
        found = json.loads(kept.read_text())
        if found["subject"] != subject:
            raise ConfigError(f"{kept}: holds another network, device or jax; give another --out, or remove it")
        cases = found["cases"]
    waiting = []
    for name, measure in _cases(arguments):
        if name in cases:
            continue
        if time.monotonic() - began > 60 * arguments.minutes:
            waiting.append(name)
            continue
        try:
            cases[name] = measure()
        except jax.errors.JaxRuntimeError as error:  # one that does not compile or fit must not cost the others
            cases[name] = [{"part": name, "failed": str(error).splitlines()[0][:200]}]
        write_json(kept, {"subject": subject, "cases": cases})
        jax.clear_caches()
    rows = [row for found in cases.values() for row in found]
    report = Report(
        "gpu_report",
        f"{jax.local_devices()[0].device_kind}: {arguments.backbone}, {arguments.classes} classes, "
        f"{arguments.active:.0%} of P2 active, medians of {arguments.rounds} interleaved rounds",
        [
            Column("part", "part"),
            Column("method", "method"),
            Column("ms", "ms per image", ms),
            Column("speed_up", "over dense", times),
            Column("kernels", "kernels"),
            Column("busy_ms", "busy ms per call", ms),
            Column("score_difference", "score difference", "{:.1e}".format),
            Column("found_again", "found again", share),
            Column("images_per_s", "images/s", decimals(2)),
            Column("of_peak", "of peak", share),
            Column("failed", "failed"),
        ],
        rows,
        notes=[
            "kernels, busy: events on the device in one profiled call, and their time",
            "score difference, found again: detections beside the CPU's; again: same class, every side within 1 px",
            "of peak: share of the rate of a matrix product of the same type",
        ],
        not_run=[f"{name}: no time left; run the same command again" for name in waiting],
        left=2,
    )
    report.publish(folder, arguments)
    head = [column.header for column in report.columns]
    lines = [f"# {report.title}", "", machine.one_line(), "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += [f"| {' | '.join(column.cell(row) for column in report.columns)} |" for row in rows]
    lines += ["", *(f"- {note}" for note in [*report.notes, *(f"not run: {entry}" for entry in report.not_run)])]
    with written_aside(folder / "gpu_report.md") as file:
        file.write_text("\n".join(lines) + "\n")


def _cases(arguments: GpuReport) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
    """Yield names and measurements, what matters most first."""
    for dtype in arguments.dtypes:
        for mode in arguments.modes:
            name = f"agreement {dtype} {mode}"
            yield name, lambda name=name, dtype=dtype, mode=mode: [_agreement(arguments, name, dtype, mode)]
    for size in arguments.sizes:
        for batch in arguments.batches:
            for dtype in arguments.dtypes:
                for mode in arguments.modes:
                    name = f"{size[0]}x{size[1]} batch {batch} {dtype} {mode}"
                    case = (name, size, batch, dtype, mode)
                    yield name, lambda case=case: _timed(arguments, *case)
    if arguments.train_config:
        name = f"training batch {arguments.train_batch}"
        yield name, lambda: [_training(arguments, name)]


def _detector(arguments: GpuReport, method: str, dtype: str, size: tuple[int, int], mode: GpuMode) -> Detector:
    kind = (arguments.backbone, arguments.classes, arguments.channels)
    model = random_model(*kind, dtype=dtype, **(_PLAIN if method == "RetinaNet" else {}))
    query = "csq" if method == "CSQ" else "dense"
    config = override(InferenceConfig(score_threshold=0.0), {"query": query, "gpu": mode})
    return scripted_detector(model, config, laid_out_queries(*size, arguments.active), size)


def _agreement(arguments: GpuReport, name: str, dtype: str, mode: GpuMode) -> Row:
    size = arguments.agreement_size
    found = jax.device_get(_detector(arguments, "CSQ", dtype, size, mode)(np.asarray(random_image(*size))))
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        expected = jax.device_get(_detector(arguments, "CSQ", dtype, size, "plain")(np.asarray(random_image(*size))))
    return {"part": name, "method": "CSQ", **compare(found, expected)}


def compare(found: Detections, expected: Detections) -> dict[str, float]:
    """Return the largest difference of the scores in their order, and the share of ``expected`` found again."""
    difference = float(np.max(np.abs(np.asarray(found.scores) - np.asarray(expected.scores)), initial=0.0))
    near = np.all(np.abs(found.boxes[:, None] - expected.boxes[:, :, None]) <= 1.0, axis=-1)  # [B, D, D']
    same = near & (found.classes[:, None] == expected.classes[:, :, None]) & found.valid[:, None]
    wanted = np.asarray(expected.valid)
    again = float(np.mean(same.any(axis=2)[wanted])) if wanted.any() else 1.0
    return {"score_difference": difference, "found_again": again}


def _timed(arguments: GpuReport, name: str, size: tuple[int, int], batch: int, dtype: str, mode: GpuMode) -> list[Row]:
    methods = ("dense", "RetinaNet", "CSQ")
    detectors = {method: _detector(arguments, method, dtype, size, mode) for method in methods}
    images = random_image(*size, batch)
    calls = {method: (lambda d=d: d(images)) for method, d in detectors.items()}
    measured = {method: float(np.median(x)) for method, x in interleaved(calls, arguments.rounds).items()}
    return [
        {
            "part": name,
            "method": method,
            "ms": taken / batch,
            "speed_up": measured["dense"] / taken,
            **profiled(calls[method]),
        }
        for method, taken in measured.items()
    ]


def profiled(call: Callable[[], Any]) -> dict[str, float | int]:
    """Return the number of events on GPUs in one call, and their time; nothing without a GPU."""
    if jax.default_backend() != "gpu":
        return {}
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        (path,) = Path(folder).rglob("*.xplane.pb")
        planes = [p for p in jax.profiler.ProfileData.from_file(str(path)).planes if p.name.startswith("/device:GPU")]
        events = [e for p in planes for line in p.lines if line.name.startswith("Stream") for e in line.events]
        return {"kernels": len(events), "busy_ms": sum(event.duration_ns for event in events) / 1e6}


def _training(arguments: GpuReport, name: str) -> Row:
    height, width = arguments.sizes[0]
    step = TrainStep(
        out=arguments.out,
        configs=(arguments.train_config,),
        height=height,
        width=width,
        batch=arguments.train_batch,
        dtype="bfloat16",
    )
    train_step(step)
    (row,) = json.loads((Path(step.out) / "train_step.json").read_text())["rows"]
    return {
        "part": name,
        "method": row["config"],
        "ms": row["ms_step"] / step.batch,
        "images_per_s": row["images_per_s"],
        "of_peak": row["of_peak_step"],
    }
