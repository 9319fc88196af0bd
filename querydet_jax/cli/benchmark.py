"""`querydet benchmark`: the benchmarks are in the checkout, not in the wheel."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from querydet_jax.runtime import machine
from querydet_jax.runtime.errors import QueryDetError


def benchmark(words: Sequence[str], program: str) -> None:
    """Measure speed and reproduce the paper's tables."""
    checkout = Path(__file__).parents[2]
    if not (checkout / "benchmarks" / "main.py").is_file():
        raise QueryDetError(
            f"{program}: the benchmarks are not part of the installed package; run python benchmark.py in a checkout"
        )
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    from benchmarks.main import main

    machine.keep_compiled_programs()
    main(words, program)
