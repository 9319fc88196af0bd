"""`benchmark.py`: a subcommand a benchmark."""

from __future__ import annotations

from typing import Annotated, Any

import tyro

from querydet_jax.benchmark.end_to_end import EndToEnd, end_to_end

_COMMANDS = {EndToEnd: end_to_end}


def main() -> None:
    """Run the benchmark that the command line names."""
    subcommands: Any = tyro.extras.subcommand_type_from_defaults({"end-to-end": EndToEnd()})
    kind: Any = Annotated[subcommands, tyro.conf.ConsolidateSubcommandArgs]
    arguments = tyro.cli(kind, description=__doc__)
    _COMMANDS[type(arguments)](arguments)
