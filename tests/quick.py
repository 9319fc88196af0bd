"""Compile fast and badly: most programs of tests run once or twice, and that takes longer to compile than to run.

Every test module is compiled so, except those that say ``pytestmark = pytest.mark.compiled_as_used``.
"""

from __future__ import annotations

import importlib.metadata

import jax

# XLA's older way to fuse on CPU takes half the time to compile. jaxlib 0.10 has it; 0.12 aborts on the flag. A process
# reads it once, so it holds for every module, marked or not.
OLD_FUSIONS = "--xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib").startswith("0.10.") else ""


def compile_quickly(quick: bool) -> None:
    """Compile from now on quickly, or as in use; on a GPU always as in use: XLA cannot compile it all badly."""
    jax.config.update("jax_disable_most_optimizations", quick and jax.default_backend() == "cpu")


def environment(flags: str = "") -> dict[str, str]:
    """Return the environment that compiles quickly in a process of its own, with ``flags`` in ``XLA_FLAGS``."""
    return {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": f"{flags} {OLD_FUSIONS}".strip()}
