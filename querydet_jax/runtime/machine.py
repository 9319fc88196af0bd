"""The machine that a measurement was taken on, in words, and where compiled programs are kept."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from querydet_jax.runtime.errors import ConfigError

_log = logging.getLogger("querydet_jax")

_HUGE_PAGES = "glibc.malloc.hugetlb"  # a tunable of glibc 2.35 and newer
_HUGE_PAGES_SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def describe() -> dict[str, str | int]:
    """Return processor, cores, devices and versions, for tables and reports."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "devices": f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind} ({jax.default_backend()})",
        "system": platform.platform(terse=True),
        "huge_pages": huge_pages(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
    }


def one_line() -> str:
    """Return ``describe`` as one line."""
    m = describe()
    return (
        f"{m['processor']}, {m['cores']} cores; {m['devices']}; huge pages {m['huge_pages']}; {m['system']}; "
        f"Python {m['python']}, jax {m['jax']}, jaxlib {m['jaxlib']}, flax {m['flax']}"
    )


def huge_pages() -> str:
    """Tell whether large buffers come in 2 MB pages: on, off, or unknown (not Linux).

    XLA's CPU backend allocates its buffers anew for every call. In 4 kB pages the system takes longer to provide
    them than many layers take to compute. glibc asks for huge pages where ``GLIBC_TUNABLES`` says so.
    """
    mode = _huge_page_mode()
    if mode == "madvise":
        return "on" if f"{_HUGE_PAGES}=1" in os.environ.get("GLIBC_TUNABLES", "") else "off"
    return {"always": "on", "never": "off"}.get(mode, "unknown")


def prepare() -> None:
    """Do what a command does before it computes: ``check_devices``, ``keep_compiled_programs``."""
    check_devices()
    keep_compiled_programs()


def check_devices() -> None:
    """Let jax find its devices.

    Raises:
      ConfigError: ``JAX_PLATFORMS`` or ``JAX_PLATFORM_NAME`` names what jax does not find here.
    """
    try:
        jax.local_devices()
    except (RuntimeError, AssertionError) as error:  # an assertion where the plugin of a known platform is missing
        settings = {name: os.environ.get(name) for name in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME")}
        named = " ".join(f"{name}={value}" for name, value in settings.items() if value)
        reason = (str(error).splitlines() or [""])[0].partition(" (set JAX_PLATFORMS")[0].partition("': ")[2]
        if not reason or "known backend" in reason:
            reason = "no such device"
        jax.config.update("jax_platforms", None)
        jax.config.update("jax_platform_name", "")
        raise ConfigError(
            f"{named or 'jax'}: {reason[:200]}; jax finds only {jax.default_backend()} here: unset it to use that, or "
            "install jax for the device, see https://docs.jax.dev/en/latest/installation.html"
        ) from None
    if jax.default_backend() == "gpu" and jax.__version_info__ < (0, 12):
        _log.warning(
            "jax %s on a GPU: its compiler aborts on some detectors with CSQ; install jax 0.12 (Python 3.12)",
            jax.__version__,
        )


def keep_compiled_programs() -> None:
    """Keep programs that take a second or more to compile in ``~/.cache/querydet_jax``, for later runs.

    A folder that jax has already (``JAX_COMPILATION_CACHE_DIR``) is left as it is; the environment variable
    ``QUERYDET_COMPILE_CACHE=0`` keeps nothing.
    """
    known: Any = jax.config
    if known.jax_compilation_cache_dir or os.environ.get("QUERYDET_COMPILE_CACHE") == "0":
        return
    try:
        folder = compile_cache_folder(os.environ)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # an old folder may have become read-only
            pass
    except (OSError, RuntimeError) as error:
        _log.info("compiled programs are not kept for later runs: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))


def compile_cache_folder(environment: Mapping[str, str]) -> Path:
    """Return the folder for this kind of processor: machines that share a home must not run each other's programs.

    Raises:
      RuntimeError: there is no home directory.
    """
    kind = hashlib.sha256(f"{_processor()} {_cpuinfo('flags')}".encode()).hexdigest()[:12]
    return cache_folder(environment) / kind


def cache_folder(environment: Mapping[str, str]) -> Path:
    """Return the folder for what can be made or fetched again, ``~/.cache/querydet_jax`` unless set otherwise.

    Raises:
      RuntimeError: there is no home directory.
    """
    root = Path(environment.get("XDG_CACHE_HOME", ""))
    if not root.is_absolute():  # such values are to be ignored, says the XDG specification
        home = Path.home()
        if not home.is_absolute():
            raise RuntimeError("HOME is not an absolute path")
        root = home / ".cache"
    return root / "querydet_jax"


def _huge_page_mode() -> str:
    if not _HUGE_PAGES_SWITCH.is_file():
        return ""
    return _HUGE_PAGES_SWITCH.read_text().partition("[")[2].partition("]")[0]


def _processor() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(field: str) -> str:
    """Return a field of the first processor as Linux describes it; "" elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith(field):
                return line.split(":", 1)[1].strip()
    return ""
