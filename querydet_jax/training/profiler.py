"""A trace of a few steps, for TensorBoard's profiler (xprof) and for ui.perfetto.dev."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax

# The first steps compile, and those after them find the loader's buffers full.
_SKIPPED, _TRACED = 3, 4


class StepTrace:
    """Writes to ``folder`` a trace of steps 4 to 7 after the start, or of the last steps of a shorter run.

    Call ``begin`` before a step and ``end`` after it; without a folder both do nothing.
    """

    def __init__(self, folder: Path | None, start: int, steps: int):
        self.folder = folder
        self.first = max(start, min(start + _SKIPPED, steps - _TRACED))
        self.last = min(self.first + _TRACED, steps) - 1
        self._running = False

    def begin(self, step: int) -> jax.profiler.StepTraceAnnotation:
        """Return a context that names the step in the trace; enter it around the step."""
        if self.folder is not None and step == self.first:
            jax.profiler.start_trace(self.folder, create_perfetto_trace=True)
            self._running = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step + 1)

    def end(self, step: int, wait: Callable[[], None]) -> bool:
        """Return whether the trace is now complete; ``wait`` must return when the devices have finished the step."""
        if not self._running or step < self.last:
            return False
        wait()
        self._stop()
        return True

    def close(self) -> None:
        """End a trace under way, when a run ends early."""
        if self._running:
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._running = False
