"""TPUs that are absent: libtpu compiles for a chip by its name and reports what a program takes."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable
from importlib import metadata
from typing import Any, Literal, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.accelerators.hlo import traffic
from querydet_jax.runtime.errors import ConfigError, QueryDetError
from querydet_jax.training.compiled import Memory

Devices = list[Any]  # of jax.Device, which type checkers take for a variable
ChipName = Literal["v4", "v5e", "v5p", "v6e"]


class Chip(NamedTuple):
    """A chip by its maker's figures (cloud.google.com/tpu/docs); one jax device per chip."""

    peak_tflops: float  # of bfloat16
    hbm_gb_s: float
    hbm_gib: float
    ghz: float  # of its matrix units: the peak over their multiply-adds per cycle
    topology: str  # the smallest that libtpu knows: four chips on one host
    config: str  # megacore: two cores as one device


CHIPS: dict[str, Chip] = {
    "v4": Chip(275, 1228, 32, 1.05, "v4:2x2x1", "megacore"),
    "v5e": Chip(197, 819, 16, 1.50, "v5e:2x2", "default"),
    "v5p": Chip(459, 2765, 95, 1.75, "v5p:2x2x1", "megacore"),
    "v6e": Chip(918, 1638, 32, 1.75, "v6e:2x2", "default"),
}


class Program(NamedTuple):
    """A function with the shapes of its arguments.

    ``whole`` is the same on each chip; ``rows`` are split over chips along their first axis.
    """

    function: Callable[..., Any]
    whole: Any
    rows: tuple[Any, ...]
    donates: bool = False  # the result takes the memory of ``whole``


class Figures(NamedTuple):
    """What one chip's program takes.

    Attributes:
      flops: FLOPs of the optimised program.
      bytes_accessed: bytes that operations read and write after fusion, in any memory (XLA's cost analysis).
      hbm_bytes: bytes to and from the chip's main memory (``hlo.traffic``).
      cycles: the sum of the compiler's estimates.
      memory_bytes: arguments, results, temporaries and the program itself.
    """

    flops: float
    bytes_accessed: float
    hbm_bytes: float
    cycles: float
    memory_bytes: float


class DoesNotFit(NamedTuple):
    """The compiler's message where a chip's memory is too small."""

    memory_bytes: float | None
    message: str


class Bound(NamedTuple):
    ms: float
    binds: Literal["compute", "memory"]


def roofline(chip: Chip, flops: float, hbm_bytes: float) -> Bound:
    """Return the longer of arithmetic at the chip's peak and traffic at full bandwidth (Williams et al. 2009)."""
    compute, memory = flops / (chip.peak_tflops * 1e9), hbm_bytes / (chip.hbm_gb_s * 1e6)
    return Bound(max(compute, memory), "compute" if compute >= memory else "memory")


def require_libtpu() -> str:
    """Make this process compute on the CPU and return libtpu's version.

    Raises:
      ConfigError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("accelerator: needs libtpu; pip install -r requirements-tpu.txt (Linux; needs no TPU)")
    # Leave a TPU of this machine alone, and look for none on the network.
    jax.config.update("jax_platforms", "cpu")
    for name, value in {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # its lock protects the chip; compilers can run side by side
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # a host's; any will do
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_LOG_DIR": "disabled",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(name, value)
    return metadata.version("libtpu")


def devices(name: str) -> Devices:
    """Return the four chips of a topology, to compile for.

    Raises:
      QueryDetError: libtpu refuses, for example because another process uses it.
    """
    chip = CHIPS[name]
    try:
        return topologies.get_topology_desc(chip.topology, "tpu", chip_config_name=chip.config).devices
    except jax.errors.JaxRuntimeError as error:
        raise QueryDetError(f"libtpu, topology {chip.topology}: {str(error).splitlines()[0]}") from None


def compile_for(program: Program, chips: Devices, axis: str) -> Figures | DoesNotFit:
    """Compile for ``chips``, a mesh with one axis, and return the compiler's figures."""
    mesh = Mesh(chips, (axis,))

    def placed(tree: Any, spec: PartitionSpec) -> Any:
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    whole, rows = placed(program.whole, PartitionSpec()), placed(program.rows, PartitionSpec(axis))
    lowered = jax.jit(program.function, donate_argnums=0 if program.donates else ()).lower(whole, *rows)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return out_of_memory(str(error))
    cost, said, memory = compiled.cost_analysis(), compiled.memory_analysis(), Memory.of(compiled)
    assert cost is not None and said is not None and memory is not None, "libtpu reports all three"
    moved = traffic(compiled.as_text() or "")
    return Figures(
        cost["flops"],
        cost["bytes accessed"],
        moved.hbm_bytes,
        moved.cycles,
        memory.total + said.generated_code_size_in_bytes,
    )


def out_of_memory(message: str) -> DoesNotFit:
    """Parse a compiler's RESOURCE_EXHAUSTED message for the largest size it names."""
    line = message.splitlines()[0]
    sizes = [float(x) * 1024 ** ("KMGT".index(unit) + 1) for x, unit in re.findall(r"([\d.]+)([KMGT])\b", line)]
    return DoesNotFit(max(sizes, default=None), line)
