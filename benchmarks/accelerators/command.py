"""Inference and the training step compiled for TPUs on a machine that has none, with the compiler's figures."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from flax import nnx

from benchmarks.accelerators.chips import (
    CHIPS,
    ChipName,
    Devices,
    DoesNotFit,
    Program,
    compile_for,
    devices,
    require_libtpu,
    roofline,
)
from benchmarks.accelerators.gpu_counts import gpu_counts
from benchmarks.accelerators.gpus import GpuName
from benchmarks.accelerators.programs import inference_program, rooms_needed, train_program
from benchmarks.options import RandomImage
from benchmarks.report import Column, Report, Row, decimals, ms, times
from benchmarks.subjects import laid_out_queries, random_model
from querydet_jax.config import InferenceConfig, override
from querydet_jax.inference.compiling import GpuMode
from querydet_jax.models import DenseDetector
from querydet_jax.runtime.errors import ConfigError
from querydet_jax.training.parallel import AXIS

_GIB = 2.0**30
_OF_MEMORY = ("chip", "program", "buffers", "memory_gib", "fits", "message")
_log = logging.getLogger("querydet_jax")


@dataclass(frozen=True)
class Accelerator(RandomImage):
    """Compile for TPUs or GPUs without one: FLOPs, traffic and bounds on TPUs, launches and host waits on GPUs."""

    chips: tuple[ChipName, ...] = ("v4", "v5e", "v5p", "v6e")
    """TPUs to compile for."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Arithmetic of convolutions."""
    inference: bool = True
    """Compile inference: dense, CSQ with gather, CSQ with tiles."""
    batch: int = 1
    """Images per call of inference."""
    train_batches: tuple[int, ...] = (2,)
    """Images per chip of the training step, a row each."""
    train_chips: Literal[1, 4] = 4
    """Chips that train together; one alone needs no collectives."""
    gpus: tuple[GpuName, ...] = ()
    """GPUs to compile inference for, instead of TPUs."""
    queries: tuple[Literal["dense", "csq"], ...] = ("dense", "csq")
    """With --gpus: values of inference.query, a row each."""
    modes: tuple[GpuMode, ...] = ("plain", "tuned", "graph")
    """With --gpus: values of inference.gpu, a row each."""
    remat: bool = False
    """Compile the training step with train.remat. Its rows show memory only: XLA would count one image's FLOPs."""


def accelerator(arguments: Accelerator) -> None:
    if arguments.gpus:
        gpu_counts(arguments)
        return
    libtpu = require_libtpu()
    if not arguments.inference and not arguments.train_batches:
        raise ConfigError(
            "accelerator: --no-inference and no --train-batches leave nothing to compile; drop one of them"
        )
    build = partial(random_model, arguments.backbone, arguments.classes, arguments.channels, dtype=arguments.dtype)
    rows: list[Row] = []
    for name in arguments.chips:
        chips = devices(name)
        if arguments.inference:
            rows += _inference_rows(arguments, name, chips, build)
        together = chips[: arguments.train_chips]
        rows += [_train_row(arguments, name, together, build, images) for images in arguments.train_batches]
    Report(
        "accelerator",
        f"Compiled ahead of time: {arguments.backbone}, {arguments.channels} channels, {arguments.classes} classes, "
        f"{arguments.height}x{arguments.width}, {arguments.dtype}",
        [
            Column("chip", "TPU"),
            Column("program", "program"),
            Column("buffers", "buffers"),
            Column("gflop", "GFLOP", decimals(0)),
            Column("accessed_gb", "GB accessed", decimals(2)),
            Column("hbm_gb", "GB of HBM", decimals(2)),
            Column("memory_gib", "memory GiB", decimals(2)),
            Column("fits", "fits"),
            Column("bound_ms", "bound ms", ms),
            Column("binds", "binds"),
            Column("bound_speed_up", "over dense", times),
            Column("schedule_ms", "schedule ms", ms),
        ],
        rows,
        notes=[
            "nothing was run: these are the compiler's figures for one chip, not measurements",
            "GB accessed: XLA's cost analysis after fusion; GB of HBM: of that, what does not stay on the chip",
            "bound: the longer of GFLOP at the chip's bfloat16 peak and GB of HBM at its bandwidth",
            "schedule: the sum of the compiler's cycle estimates; it has none for gathers, scatters and sorts",
            "memory: arguments, results, temporaries and program; a chip has "
            + ", ".join(f"{name} {CHIPS[name].hbm_gib:g} GB" for name in arguments.chips),
            "CSQ: one buffer per level, as large as its sites need, instead of the ladder",
            f"libtpu {libtpu}",
        ],
        results={"libtpu": libtpu, "chips": {name: CHIPS[name]._asdict() for name in arguments.chips}},
        left=3,
    ).publish(arguments.out, arguments)


def _inference_rows(arguments: Accelerator, name: str, chips: Devices, build: Callable[[], DenseDetector]) -> list[Row]:
    model = nnx.eval_shape(build)
    shape = (arguments.batch, arguments.height, arguments.width)
    queries = laid_out_queries(arguments.height, arguments.width, arguments.active)
    rows: list[Row] = []
    for method, changes in {
        "dense": {"query": "dense"},
        "CSQ, gather": {"kernel": "gather"},
        "CSQ, tiles": {"kernel": "tiles"},
    }.items():
        # The worst case of NMS: at a score threshold of 0 every level passes on all its candidates.
        inference = override(InferenceConfig(score_threshold=0.0), changes)
        rooms = {} if inference.query == "dense" else rooms_needed(model, inference, shape, queries)
        buffers = ", ".join(f"P{level} {room}" for level, room in rooms.items()) or None
        program = inference_program(model, inference, shape, rooms)
        rows.append(_row(name, f"{method}, {_images(arguments.batch)}", buffers, program, chips[:1]))
    for row in rows:
        if "bound_ms" in row and "bound_ms" in rows[0]:
            row["bound_speed_up"] = rows[0]["bound_ms"] / row["bound_ms"]
    return rows


def _train_row(
    arguments: Accelerator, name: str, chips: Devices, build: Callable[[], DenseDetector], images: int
) -> Row:
    shape = (images, arguments.height, arguments.width)
    how = (" with remat" if arguments.remat else "") + (" on one chip" if len(chips) == 1 else "")
    program = train_program(build, chips, shape, remat=arguments.remat)
    row = _row(name, f"training step{how}, {_images(images)}", None, program, chips)
    if arguments.remat:  # XLA counts one turn of its loops over images
        row = {key: value for key, value in row.items() if key in _OF_MEMORY}
    return row


def _images(count: int) -> str:
    return f"{count} image{'s' if count > 1 else ''}"


def _row(name: str, label: str, buffers: str | None, program: Program, chips: Devices) -> Row:
    began = time.monotonic()
    figures = compile_for(program, chips, AXIS)
    row: Row = {"chip": name, "program": label, "buffers": buffers}
    if isinstance(figures, DoesNotFit):
        size = figures.memory_bytes
        row |= {"memory_gib": size and size / _GIB, "fits": "no", "message": figures.message}
    else:
        bound = roofline(CHIPS[name], figures.flops, figures.hbm_bytes)
        row |= {
            "gflop": figures.flops / 1e9,
            "accessed_gb": figures.bytes_accessed / 1e9,
            "hbm_gb": figures.hbm_bytes / 1e9,
            "memory_gib": figures.memory_bytes / _GIB,
            "fits": "yes",
            "bound_ms": bound.ms,
            "binds": bound.binds,
            "schedule_ms": figures.cycles / (CHIPS[name].ghz * 1e6),
        }
    # A table takes an hour: log each row as it comes.
    values = ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
    )
    _log.info("%s; compiled in %.0f s", values, time.monotonic() - began)
    return row
