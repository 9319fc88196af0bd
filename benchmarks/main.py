"""Measure QueryDet: one command per table, figure or question. Each writes json, csv and a plot to --out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro

from benchmarks.accelerators.command import Accelerator, accelerator
from benchmarks.paper.ablation import Table1, Table3, table1, table3
from benchmarks.paper.figure2 import Figure2, figure2
from benchmarks.paper.figure4 import Figure4, figure4
from benchmarks.paper.listing import Paper, list_paper
from benchmarks.paper.tables import Table4, Table5, Table6, table4, table5, table6
from benchmarks.speed.capacities import Capacities, capacities
from benchmarks.speed.end_to_end import EndToEnd, end_to_end
from benchmarks.speed.gpu_report import GpuReport, gpu_report
from benchmarks.speed.loader import Loader, loader
from benchmarks.speed.many import Many, many
from benchmarks.speed.precision import Precision, precision
from benchmarks.speed.runtimes import Onnx, onnx
from benchmarks.speed.static_vs_dynamic import StaticVsDynamic, static_vs_dynamic
from benchmarks.speed.train_step import TrainStep, train_step
from querydet_jax.runtime import machine

COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "accelerator": (Accelerator, accelerator),
    "capacities": (Capacities, capacities),
    "end-to-end": (EndToEnd, end_to_end),
    "figure2": (Figure2, figure2),
    "figure4": (Figure4, figure4),
    "gpu-report": (GpuReport, gpu_report),
    "loader": (Loader, loader),
    "many": (Many, many),
    "paper": (Paper, list_paper),
    "onnx": (Onnx, onnx),
    "precision": (Precision, precision),
    "static-vs-dynamic": (StaticVsDynamic, static_vs_dynamic),
    "table1": (Table1, table1),
    "table3": (Table3, table3),
    "table4": (Table4, table4),
    "table5": (Table5, table5),
    "table6": (Table6, table6),
    "train-step": (TrainStep, train_step),
}


def main(words: Sequence[str] | None = None, program: str = "benchmark.py") -> None:
    """Run the benchmark that the command line names."""
    subcommands: Any = tyro.extras.subcommand_type_from_defaults(
        {name: kind() for name, (kind, _) in COMMANDS.items()},
        {name: (kind.__doc__ or "") for name, (kind, _) in COMMANDS.items()},
    )
    kind: Any = Annotated[subcommands, tyro.conf.ConsolidateSubcommandArgs]
    arguments = tyro.cli(kind, args=words, prog=program, description=__doc__)
    if not isinstance(arguments, Accelerator):  # that one compiles for devices that are not here
        machine.check_devices()
    run = {kind: function for kind, function in COMMANDS.values()}[type(arguments)]
    run(arguments)
