"""Inference compiled for a GPU on a machine that has none: what the host launches and waits for."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from flax import nnx

from benchmarks.accelerators.gpus import CARDS, card_sharding, compile_for_gpu, require_cuda_plugin
from benchmarks.accelerators.programs import shipped_program
from benchmarks.report import Column, Report, Row, decimals
from benchmarks.subjects import random_model
from querydet_jax.config import InferenceConfig, override

if TYPE_CHECKING:
    from benchmarks.accelerators.command import Accelerator

_log = logging.getLogger("querydet_jax")


def gpu_counts(arguments: Accelerator) -> None:
    plugin = require_cuda_plugin()
    kind = (arguments.backbone, arguments.classes, arguments.channels)
    model = nnx.eval_shape(lambda: random_model(*kind, dtype=arguments.dtype))
    shape = (arguments.batch, arguments.height, arguments.width)
    rows: list[Row] = []
    for name in arguments.gpus:
        sharding = card_sharding(name)
        for query in arguments.queries:
            for mode in arguments.modes:
                began = time.monotonic()
                # The worst case of NMS, as in the other rows.
                inference = override(InferenceConfig(score_threshold=0.0), {"query": query, "gpu": mode})
                found = compile_for_gpu(shipped_program(model, inference, shape), sharding, mode)
                row: Row = {
                    "gpu": name,
                    "query": query,
                    "mode": mode,
                    **found.launches._asdict(),
                    "sorts": found.sorts.count,
                    "largest_sort": found.sorts.largest,
                    "preparing_mb": found.preparing_bytes / 1e6,
                }
                rows.append(row)
                _log.info("%s; compiled in %.0f s", row, time.monotonic() - began)
    Report(
        "accelerator_gpu",
        f"Compiled ahead of time: {arguments.backbone}, {arguments.channels} channels, {arguments.classes} classes, "
        f"{arguments.height}x{arguments.width}, {arguments.dtype}, batch {arguments.batch}",
        [
            Column("gpu", "GPU"),
            Column("query", "query"),
            Column("mode", "inference.gpu"),
            Column("launches", "launches"),
            Column("convolutions", "of convolutions"),
            Column("host_waits", "host waits"),
            Column("command_buffers", "command buffers"),
            Column("sorts", "sorts"),
            Column("largest_sort", "largest sort"),
            Column("preparing_mb", "MB to prepare weights", decimals(2)),
        ],
        rows,
        notes=[
            "nothing was run: counted in the compiler's texts",
            "launches: kernels, convolutions and copies that the host enqueues one by one, outside of command buffers; "
            "all branches of a conditional, one turn of a loop",
            "host waits: conditionals and loops that the host drives; a loop makes it wait in every turn",
            "largest sort: elements in one row of it; MB to prepare weights: read and written by operations on weights "
            "alone",
            ", ".join(f"{name}: {CARDS[name].name}, {CARDS[name].gb} GB" for name in arguments.gpus),
            plugin,
        ],
        results={"plugin": plugin},
        left=3,
    ).publish(arguments.out, arguments)
