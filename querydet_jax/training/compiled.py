"""The step's compiled programs, one per canvas: their memory is checked before they run, recompilations are counted."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax

from querydet_jax.runtime.errors import ConfigError
from querydet_jax.runtime.files import reason
from querydet_jax.runtime.hosts import is_first
from querydet_jax.training.parallel import Step
from querydet_jax.training.step import Batch, Metrics, TrainState

_log = logging.getLogger("querydet_jax")

_COMPILED = "/jax/core/compile/backend_compile_duration"  # also if the persistent cache had the program
_GIB = 2**30
_REMEDY = "lower train.batch_size, raise train.accumulate, or set train.remat or model.dtype bfloat16"


@dataclass(frozen=True)
class Memory:
    """Bytes that a compiled program needs on each device, as the compiler reports them."""

    arguments: int  # state and batch
    outputs: int
    reused: int  # outputs that reuse arguments: the donated state
    temporaries: int

    @property
    def total(self) -> int:
        return self.arguments + self.outputs - self.reused + self.temporaries

    @classmethod
    def of(cls, program: jax.stages.Compiled) -> Memory | None:
        """Return a program's memory; None on a backend that does not report it."""
        report: Any = program.memory_analysis()
        if report is None:
            return None
        return cls(
            report.argument_size_in_bytes,
            report.output_size_in_bytes,
            report.alias_size_in_bytes,
            report.temp_size_in_bytes,
        )


class CompileWatch:
    """Counts what is compiled in this process while it is open.

    Attributes:
      programs: number of programs compiled.
      seconds: time spent compiling them.
      recompilations: programs compiled by a task that had run before.
    """

    def __init__(self):
        self.programs, self.seconds, self.recompilations = 0, 0.0, 0
        self._known: set[str] = set()
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == _COMPILED:
            self.programs += 1
            self.seconds += duration_secs

    @contextlib.contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Run a task; from the second time on, programs it compiles count as recompilations and are logged."""
        before = self.programs
        yield
        more = self.programs - before
        if what in self._known and more:
            self.recompilations += more
            _log.warning("%s compiled %d programs again: its shapes or types have changed", what, more)
        self._known.add(what)

    def summary(self) -> str:
        """Return the counts in words."""
        return f"{self.programs} programs compiled in {self.seconds:.0f} s, {self.recompilations} of them again"

    def close(self) -> None:
        """Stop counting."""
        jax.monitoring.unregister_event_duration_listener(self._heard)


class Programs:
    """A replicated step, compiled ahead for every shape of batch.

    The log reports a shape's memory before its first step. Starting a step must not move anything between host and
    device implicitly.

    Attributes:
      memory: memory of each shape's step, by its name in the log.
    """

    def __init__(self, step: Step, watch: CompileWatch):
        self._step, self._watch = step, watch
        self.memory: dict[str, Memory | None] = {}

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Run a step.

        Raises:
          ConfigError: the step needs more memory than the device has.
        """
        height, width = batch["images"].shape[-3:-1]
        name = f"the step on {height}x{width}"
        with self._watch.during(name), out_of_memory_explained(name):
            if name not in self.memory:
                self.memory[name] = self._compile(name, state, batch)
            with jax.transfer_guard("disallow"):
                return self._step(state, batch)

    def _compile(self, name: str, state: TrainState, batch: Batch) -> Memory | None:
        begun = time.perf_counter()
        # The call that follows finds this program.
        lower: Any = self._step.lower  # pyright: ignore[reportFunctionMemberAccess]
        memory = Memory.of(lower(state, batch).compile())
        seconds = time.perf_counter() - begun
        limit = device_memory()
        if is_first():
            needs = "this backend does not report its memory"
            if memory is not None:
                of = f" of {limit / _GIB:.1f}" if limit else ""
                temporary = f"{memory.temporaries / _GIB:.2f} of it temporary"
                needs = f"needs {memory.total / _GIB:.2f} GiB per device{of}, {temporary}"
            _log.info("%s: compiled in %.0f s; %s", name, seconds, needs)
        if memory is not None and limit and memory.total > limit:
            message = f"{name} needs {memory.total / _GIB:.1f} GiB on each device, which has {limit / _GIB:.1f}: "
            if _backend() != "cpu":
                raise ConfigError(message + _REMEDY)
            _log.warning("%sit may be slow, or killed; %s", message, _REMEDY)  # the machine may have swap
        return memory


@contextlib.contextmanager
def out_of_memory_explained(name: str) -> Iterator[None]:
    """Raise ConfigError if a program or its compilation runs out of device memory."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ConfigError(f"{name} does not fit into the device's memory ({reason(error)}): {_REMEDY}") from error


def device_memory() -> int | None:
    """Return the bytes that programs may use on a device: what the runtime manages; on CPU an equal share of memory."""
    stats = jax.local_devices()[0].memory_stats()
    if stats is not None:
        return stats.get("bytes_limit")
    if _backend() == "cpu" and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // jax.local_device_count()
    return None


def _backend() -> str:
    return jax.default_backend()
