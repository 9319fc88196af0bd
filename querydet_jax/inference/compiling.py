"""How a detector is compiled: the type and layout of its weights, and what a GPU's host launches one by one.

At batch 1 a GPU waits for its host more than it computes. XLA can put launches, conditionals and loops into command
buffers (CUDA graphs), which the host launches once and does not look into.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout

PyTree = Any
GpuMode = Literal["plain", "tuned", "graph"]
"""``InferenceConfig.gpu``."""

# What jax 0.12 lets into command buffers by itself. An option replaces the list, so that it is repeated here.
_COMMANDS = "COLLECTIVES_KERNEL,CONDITIONAL,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,FUSION"


def compiler_options(mode: GpuMode) -> dict[str, str | bool]:
    """Return XLA's options for one program: unlike flags in ``XLA_FLAGS``, unknown ones are an error and no abort.

    Other versions than jax 0.12 know other options; they get none.
    """
    if mode == "plain" or jax.__version_info__[:2] != (0, 12):
        return {}
    options: dict[str, str | bool] = {"xla_gpu_enable_command_buffer": f"{_COMMANDS},WHILE"}
    if mode == "graph":
        # As cuDNN's fusions instead of calls: only those fit into command buffers.
        options["xla_gpu_experimental_enable_conv_fusion"] = True
    return options


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def any_layout(sharding: Any = None) -> Format:
    """Return the format of weights whose layout the compiler chooses, so that no program transposes them."""
    return Format(Layout.AUTO, sharding)


def cast_kernels(state: PyTree, dtype: jnp.dtype) -> PyTree:
    """Return a detector's weights with kernels of the type that they are computed in.

    Each program would cast them first, in each call: in bfloat16 that reads and writes more than the pictures. Biases
    stay: some are added in float32. Without values (``nnx.eval_shape``) only the types change.
    """

    def cast(path: tuple[Any, ...], x: Any) -> Any:
        if "kernel" not in (getattr(key, "key", None) for key in path) or x.dtype == dtype:
            return x
        return jax.ShapeDtypeStruct(x.shape, dtype) if isinstance(x, jax.ShapeDtypeStruct) else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, state)
