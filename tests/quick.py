"""Compiling fast and badly: most programs of tests run once or twice, and that takes longer to compile than to run.

Every test module is compiled so but those that say ``pytestmark = pytest.mark.compiled_as_used``.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax._src import compiler

# XLA's older way to fuse on CPU, which takes half the time to compile, as long as it is there: jaxlib 0.10 has it, 0.12
# has not.
_OLD_FUSIONS = ("xla_cpu_use_fusion_emitters", False)
_AS_USED = compiler.get_compile_options


@functools.cache
def _has_old_fusions() -> bool:
    try:
        jax.jit(lambda x: x, compiler_options=dict([_OLD_FUSIONS])).lower(jnp.ones(())).compile()
    except jax.errors.JaxRuntimeError:  # no such option
        return False
    return True


def _hurried(*args, **settings):
    options = _AS_USED(*args, **settings)
    debug_options = options.executable_build_options.debug_options
    debug_options.xla_backend_optimization_level = 0
    debug_options.xla_llvm_disable_expensive_passes = True
    if _has_old_fusions():
        options.env_option_overrides = [*options.env_option_overrides, _OLD_FUSIONS]
    return options


@contextlib.contextmanager
def compilation(quick: bool = True) -> Iterator[None]:
    """Of everything meanwhile; with ``quick`` false as in use. On a GPU always as in use: XLA cannot compile all of it
    badly there."""
    quick = quick and jax.default_backend() == "cpu"
    before = compiler.get_compile_options
    _has_old_fusions()  # asked as in use
    compiler.get_compile_options = _hurried if quick else _AS_USED
    try:
        yield
    finally:
        compiler.get_compile_options = before


def environment(flags: str = "") -> dict[str, str]:
    """The same for a process of its own with these ``XLA_FLAGS``."""
    name, value = _OLD_FUSIONS
    old = f" --{name}={str(value).lower()}" if _has_old_fusions() else ""
    return {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": flags + old}
