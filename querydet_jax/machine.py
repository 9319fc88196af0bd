"""What a measurement was taken on, in words."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import jax


def describe() -> dict[str, str | int]:
    """Processor, cores, devices and versions, for tables and reports."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "devices": f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind} ({jax.default_backend()})",
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
    }


def one_line() -> str:
    m = describe()
    return (
        f"{m['processor']}, {m['cores']} cores; {m['devices']}; {m['system']}; Python {m['python']}, "
        f"jax {m['jax']}, jaxlib {m['jaxlib']}, flax {m['flax']}"
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
