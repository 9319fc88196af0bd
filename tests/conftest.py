"""Settings of every test: two virtual CPU devices, rank promotion raises, full-precision products."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before jax starts.
os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2").strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import pytest  # noqa: E402
import quick  # noqa: E402

os.environ["XLA_FLAGS"] = f"{os.environ['XLA_FLAGS']} {quick.OLD_FUSIONS}".strip()  # read when the first device is used
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
# Many tests compile the same training step; one of them pays. A folder of this run's own, which its worker
# processes and the commands that tests start share: a cache that outlives it could hide what a compiler update changes.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="querydet_jax_test_cache_")
    os.environ["XDG_CACHE_HOME"] = _CACHE.name
jax.config.update("jax_compilation_cache_dir", os.environ["XDG_CACHE_HOME"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 2.0)


@pytest.fixture(scope="module", autouse=True)
def _free_compiled_programs() -> Iterator[None]:
    """Drop compiled programs before they exhaust the memory mappings that Linux allows a process (65,530): every
    program on CPU takes several, and a process without any left is aborted."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module", autouse=True)
def _compile_quickly(request: pytest.FixtureRequest) -> None:
    quick.compile_quickly(request.node.get_closest_marker("compiled_as_used") is None)


@pytest.fixture
def memory_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Addresses ``s3://bucket/...`` in this process's memory, instead of a store."""
    from fsspec.implementations.memory import MemoryFileSystem

    from querydet_jax.runtime import stores

    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", ["", "/bucket"])
    memory = MemoryFileSystem(skip_instance_cache=True)
    monkeypatch.setattr(stores, "_file_system", lambda scheme: memory)
    monkeypatch.setattr(stores, "_check_driver", lambda scheme: None)
    stores._check_bucket.cache_clear()
    yield
    stores._check_bucket.cache_clear()


@pytest.fixture(scope="module")
def s3_server() -> Iterator[Any]:
    """``s3://bucket`` on a real S3 server, the ``CuttingProxy`` before it; skips where one cannot be made."""
    from s3_server import serve

    with serve() as proxy:
        yield proxy
