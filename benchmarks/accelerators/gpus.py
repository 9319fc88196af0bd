"""GPUs that are absent: XLA compiles for a card by its description, and its texts say what the host will launch."""

from __future__ import annotations

import importlib.util
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.accelerators.chips import Program
from benchmarks.accelerators.launches import Launches, Sorts, launches, preparing_bytes, sorts
from querydet_jax.inference import compiling
from querydet_jax.runtime.errors import ConfigError, QueryDetError

GpuName = Literal["h100", "h200"]
_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")


class Card(NamedTuple):
    """A card by its maker's data sheet (nvidia.com, SXM); both are of compute capability 9.0."""

    name: str
    gb: int
    gb_s: int


CARDS: dict[str, Card] = {"h100": Card("NVIDIA H100", 80, 3350), "h200": Card("NVIDIA H200", 141, 4800)}

# Limits of compute capability 9.0 from the appendix of NVIDIA's CUDA programming guide; cores, clock and cache from the
# data sheets.
_DESCRIPTION = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  l2_cache_size: 52428800
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
  device_address_bits: 64
  ecc_enabled: true
  device_vendor: "NVIDIA Corporation"
  name: "{name}"
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""


class GpuFigures(NamedTuple):
    """What one program asks of the host, how it sorts, and its traffic that only prepares weights."""

    launches: Launches
    sorts: Sorts
    preparing_bytes: int


def require_cuda_plugin() -> str:
    """Make this process compute on the CPU and return the version of jax's plugin for CUDA.

    Raises:
      ConfigError: there is none, or jax is older than 0.12, whose compiler aborts on CSQ.
    """
    plugin = next((name for name in _PLUGINS if importlib.util.find_spec(name) is not None), None)
    remedy = "pip install -r requirements-gpu-counts.txt with Python 3.12 or newer (Linux; needs no GPU)"
    if plugin is None:
        raise ConfigError(f"accelerator --gpus: needs jax's plugin for CUDA; {remedy}")
    if jax.__version_info__ < (0, 12):
        raise ConfigError(f"accelerator --gpus: needs jax 0.12, this is {jax.__version__}; {remedy}")
    jax.config.update("jax_platforms", "cpu")  # leave a GPU of this machine alone
    return f"{plugin} {metadata.version(plugin)}"


def card_sharding(name: str) -> NamedSharding:
    """Return the placement on a card that is not here, to compile for.

    Raises:
      QueryDetError: the plugin refuses.
    """
    card = CARDS[name]
    text = _DESCRIPTION.format(name=card.name, bandwidth=card.gb_s * 10**9, memory=card.gb * 10**9)
    try:
        found = topologies.get_topology_desc("", "cuda", topology="1x1x1", target_config=text)
    except jax.errors.JaxRuntimeError as error:
        raise QueryDetError(f"jax's plugin for CUDA, {card.name}: {str(error).splitlines()[0]}") from None
    return NamedSharding(Mesh(found.devices, ("card",)), PartitionSpec())


def compile_for_gpu(program: Program, sharding: NamedSharding, mode: compiling.GpuMode) -> GpuFigures:
    """Compile as ``Detector`` does on a GPU with ``inference.gpu`` ``mode``, and count."""

    def placed(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    whole = sharding if mode == "plain" else compiling.any_layout(sharding)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), program.whole)
    compiled = jax.jit(program.function, in_shardings=(whole, *(sharding for _ in program.rows)))
    lowered = compiled.lower(shapes, *placed(program.rows))
    with tempfile.TemporaryDirectory(prefix="querydet_jax_thunks_") as folder:
        options: dict[str, Any] = {
            **compiling.compiler_options(mode),
            "xla_dump_to": folder,
            # Kernels need not be fast, since none will run; the thunks are the same.
            "xla_backend_optimization_level": 0,
            "xla_gpu_disable_gpuasm_optimizations": True,
        }
        text = lowered.compile(compiler_options=options).as_text() or ""
        # Of a program so small that the passes leave it alone there is no second text.
        texts = sorted(Path(folder).glob("*.thunk_sequence*.txt"), key=lambda path: len(path.name))
        thunks = texts[-1]
        return GpuFigures(launches(thunks.read_text()), sorts(text), preparing_bytes(text))
