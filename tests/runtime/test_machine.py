"""What a report says of huge pages; compiled programs are kept unless the environment says otherwise."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import jax
import pytest

from querydet_jax.runtime import machine


@pytest.mark.parametrize(
    ("mode", "tunables", "expected"),
    [
        ("madvise", "glibc.malloc.hugetlb=1", "on"),
        ("madvise", "", "off"),
        ("always", "", "on"),
        ("never", "", "off"),
        ("", "", "unknown"),
    ],
)
def test_what_a_report_says(monkeypatch, mode, tunables, expected):
    monkeypatch.setattr(machine, "_huge_page_mode", lambda: mode)
    monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    assert machine.huge_pages() == expected
    assert f"huge pages {expected}" in machine.one_line()


@pytest.fixture
def no_cache():
    """jax without the folder of the test suite."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_compiled_programs_are_kept_unless_told_otherwise(no_cache, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("QUERYDET_COMPILE_CACHE", "0")
    machine.keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir is None and not list(tmp_path.iterdir())

    monkeypatch.delenv("QUERYDET_COMPILE_CACHE")
    machine.keep_compiled_programs()
    folder = tmp_path / "querydet_jax" / machine.compile_cache_folder({"XDG_CACHE_HOME": ""}).name
    assert jax.config.jax_compilation_cache_dir == str(folder) and folder.is_dir()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    machine.keep_compiled_programs()  # jax has a folder already
    assert jax.config.jax_compilation_cache_dir == str(folder)


def test_a_relative_cache_folder_is_none(no_cache, monkeypatch, tmp_path):
    """It would differ from one working folder to the next."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "cache", "./cache"):
        assert machine.compile_cache_folder({"XDG_CACHE_HOME": value}).parents[1] == tmp_path / ".cache"


@pytest.mark.parametrize(
    "place", ["no home", "HOME=home", "HOME=/proc/none", "XDG_CACHE_HOME=FILE", "XDG_CACHE_HOME=/proc"]
)
def test_a_cache_that_cannot_be_is_no_reason_to_stop(no_cache, monkeypatch, tmp_path, caplog, place):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    if place == "no home":  # as for a user without an entry in /etc/passwd
        monkeypatch.setattr("os.path.expanduser", lambda path: path)
    else:
        name, _, value = place.partition("=")
        monkeypatch.setenv(name, value.replace("FILE", str(tmp_path / "file")))
    with caplog.at_level(logging.INFO, "querydet_jax"):
        machine.keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir is None and caplog.text.count("programs are not kept") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_platform_that_is_not_here_is_one_line():
    """In one process: after a failure jax is as before."""
    script = """if True:
        import os, jax
        from jax.extend.backend import clear_backends
        from querydet_jax.runtime import machine
        from querydet_jax.runtime.errors import ConfigError
        for name in ("nonsense", "cuda", "cpu,", "rocm,nonsense"):
            os.environ["JAX_PLATFORMS"] = name
            jax.config.update("jax_platforms", name)
            try:
                machine.prepare()
            except ConfigError as error:
                print(error)
            clear_backends()
    """
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env={**os.environ, "HOME": "/proc"}
    )
    lines = ran.stdout.splitlines()
    assert len(lines) == 4, ran.stderr[-2000:]
    for name, line in zip(("nonsense", "cuda", "cpu,", "rocm,nonsense"), lines, strict=True):
        assert line.startswith(
            f"JAX_PLATFORMS={name}: no such device; jax finds only cpu here: unset it to use that, or"
        )


def test_another_processor_has_other_programs(monkeypatch):
    mine = machine.compile_cache_folder({"XDG_CACHE_HOME": "/x"})
    monkeypatch.setattr(machine, "_cpuinfo", lambda field: "sse2" if field == "flags" else "another")
    assert machine.compile_cache_folder({"XDG_CACHE_HOME": "/x"}) != mine
