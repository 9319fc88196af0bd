"""TPUs, without one: libtpu compiles for a chip that it is told of, and its compiler answers what a program takes."""

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
    """A chip by its maker's figures (cloud.google.com/tpu/docs); one jax device each."""

    peak_tflops: float  # of bfloat16
    hbm_gb_s: float
    hbm_gib: float
    ghz: float  # of its matrix units: the peak over their multiply-adds a cycle
    topology: str  # the smallest that libtpu knows: four chips, one host
    config: str  # megacore: two cores that work as one device


CHIPS: dict[str, Chip] = {
    "v4": Chip(275, 1228, 32, 1.05, "v4:2x2x1", "megacore"),
    "v5e": Chip(197, 819, 16, 1.50, "v5e:2x2", "default"),
    "v5p": Chip(459, 2765, 95, 1.75, "v5p:2x2x1", "megacore"),
    "v6e": Chip(918, 1638, 32, 1.75, "v6e:2x2", "default"),
}


class Program(NamedTuple):
    """A function with the shapes of its arguments: ``whole`` the same on each chip, ``rows`` split over chips by their
    first axis."""

    function: Callable[..., Any]
    whole: Any
    rows: tuple[Any, ...]
    donates: bool = False  # the memory of ``whole`` becomes that of the result


class Figures(NamedTuple):
    """What one chip's program takes.

    Attributes:
      flops: of the optimised program.
      bytes_accessed: XLA's cost analysis: all that operations read and write after fusion, in any memory.
      hbm_bytes: to and from the chip's main memory, see ``hlo.traffic``.
      cycles: the compiler's estimates added up.
      memory_bytes: arguments, results and temporaries at once, and the program itself.
    """

    flops: float
    bytes_accessed: float
    hbm_bytes: float
    cycles: float
    memory_bytes: float


class DoesNotFit(NamedTuple):
    """The compiler's own words where a chip's memory is too small."""

    memory_bytes: float | None
    message: str


class Bound(NamedTuple):
    ms: float
    binds: Literal["compute", "memory"]


def roofline(chip: Chip, flops: float, hbm_bytes: float) -> Bound:
    """No run can be faster than its arithmetic at the chip's peak, nor than its memory traffic at full bandwidth
    (Williams et al. 2009)."""
    compute, memory = flops / (chip.peak_tflops * 1e9), hbm_bytes / (chip.hbm_gb_s * 1e6)
    return Bound(max(compute, memory), "compute" if compute >= memory else "memory")


def require_libtpu() -> str:
    """libtpu's version; from here on this process computes on the CPU.

    Raises:
      ConfigError: it is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("accelerator: needs libtpu; pip install -r requirements-tpu.txt (Linux; no TPU is needed)")
    # A TPU that is there stays untouched, and none is looked for on the network.
    jax.config.update("jax_platforms", "cpu")
    for name, value in {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # its lock is for the chip; compilers can run side by side
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # of the host; which, is of no account
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_LOG_DIR": "disabled",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(name, value)
    return metadata.version("libtpu")


def devices(name: str) -> Devices:
    """The four chips of a topology, to compile for.

    Raises:
      QueryDetError: libtpu refuses, for instance since another process uses it.
    """
    chip = CHIPS[name]
    try:
        return topologies.get_topology_desc(chip.topology, "tpu", chip_config_name=chip.config).devices
    except jax.errors.JaxRuntimeError as error:
        raise QueryDetError(f"libtpu, topology {chip.topology}: {str(error).splitlines()[0]}") from None


def compile_for(program: Program, chips: Devices, axis: str) -> Figures | DoesNotFit:
    """Compile for ``chips``, a mesh of one axis, and ask the compiler."""
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
    assert cost is not None and said is not None and memory is not None, "libtpu answers both"
    moved = traffic(compiled.as_text() or "")
    return Figures(
        cost["flops"],
        cost["bytes accessed"],
        moved.hbm_bytes,
        moved.cycles,
        memory.total + said.generated_code_size_in_bytes,
    )


def out_of_memory(message: str) -> DoesNotFit:
    """What a compiler's RESOURCE_EXHAUSTED says, with the largest size that it names."""
    line = message.splitlines()[0]
    sizes = [float(x) * 1024 ** ("KMGT".index(unit) + 1) for x, unit in re.findall(r"([\d.]+)([KMGT])\b", line)]
    return DoesNotFit(max(sizes, default=None), line)
