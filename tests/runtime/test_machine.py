"""What a report says of huge pages; compiled programs are kept unless the environment says otherwise."""

from __future__ import annotations

import logging

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


def test_a_cache_that_cannot_be_is_no_reason_to_stop(no_cache, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.INFO, "querydet_jax"):
        machine.keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir is None and "programs are not kept" in caplog.text


def test_another_processor_has_other_programs(monkeypatch):
    mine = machine.compile_cache_folder({"XDG_CACHE_HOME": "/x"})
    monkeypatch.setattr(machine, "_cpuinfo", lambda field: "sse2" if field == "flags" else "another")
    assert machine.compile_cache_folder({"XDG_CACHE_HOME": "/x"}) != mine
