"""Times of several compiled functions in one process, in turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from querydet_jax.runtime.progress import progress


def interleaved(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Return milliseconds ``[rounds]`` of each function.

    Each runs once untimed, to compile. Then they run in turn, and each round starts with another one, so that a drift
    of the machine's speed affects all alike.
    """
    for function in functions.values():
        jax.block_until_ready(function())
    names = list(functions)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in progress(range(rounds), "timing", "round", total=rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            begun = time.perf_counter()
            jax.block_until_ready(functions[name]())
            times[name].append((time.perf_counter() - begun) * 1e3)
    return {name: np.asarray(values) for name, values in times.items()}


def percentiles(ms: np.ndarray) -> dict[str, float]:
    """Return ``ms_p50``, ``ms_p90`` and ``ms_p99`` of times ``[rounds]``."""
    return {f"ms_p{p}": float(np.percentile(ms, p)) for p in (50, 90, 99)}
