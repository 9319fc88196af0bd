"""Time QueryDet, part by part or image to detections: one subcommand a table or figure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import tyro

from querydet_jax.benchmark.ablation import Table1, Table3, table1, table3
from querydet_jax.benchmark.accelerator import Accelerator, accelerator
from querydet_jax.benchmark.capacities import Capacities, capacities
from querydet_jax.benchmark.end_to_end import EndToEnd, end_to_end
from querydet_jax.benchmark.figure2 import Figure2, figure2
from querydet_jax.benchmark.figure4 import Figure4, figure4
from querydet_jax.benchmark.listing import Paper, list_paper
from querydet_jax.benchmark.nms import Nms, nms
from querydet_jax.benchmark.precision import Precision, precision
from querydet_jax.benchmark.static_vs_dynamic import StaticVsDynamic, static_vs_dynamic
from querydet_jax.benchmark.tables import Table4, Table5, Table6, table4, table5, table6
from querydet_jax.benchmark.train_step import TrainStep, train_step

COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "accelerator": (Accelerator, accelerator),
    "capacities": (Capacities, capacities),
    "end-to-end": (EndToEnd, end_to_end),
    "figure2": (Figure2, figure2),
    "figure4": (Figure4, figure4),
    "nms": (Nms, nms),
    "paper": (Paper, list_paper),
    "precision": (Precision, precision),
    "static-vs-dynamic": (StaticVsDynamic, static_vs_dynamic),
    "table1": (Table1, table1),
    "table3": (Table3, table3),
    "table4": (Table4, table4),
    "table5": (Table5, table5),
    "table6": (Table6, table6),
    "train-step": (TrainStep, train_step),
}


def main() -> None:
    """Run the benchmark that the command line names."""
    subcommands: Any = tyro.extras.subcommand_type_from_defaults(
        {name: kind() for name, (kind, _) in COMMANDS.items()},
        {name: (kind.__doc__ or "") for name, (kind, _) in COMMANDS.items()},
    )
    kind: Any = Annotated[subcommands, tyro.conf.ConsolidateSubcommandArgs]
    arguments = tyro.cli(kind, description=__doc__)
    run = {kind: function for kind, function in COMMANDS.values()}[type(arguments)]
    run(arguments)
