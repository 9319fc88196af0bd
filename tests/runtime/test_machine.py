"""Huge pages: asked for only where that changes something. Compiled programs: kept where nobody says otherwise."""

from __future__ import annotations

import logging

import jax
import pytest

from querydet_jax.runtime import machine

GLIBC = ("glibc", "2.36")


def test_the_tunable_is_added():
    found = machine.huge_page_environment({"PATH": "x"}, "madvise", GLIBC)
    assert found == {"PATH": "x", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    found = machine.huge_page_environment({"GLIBC_TUNABLES": "glibc.malloc.check=1"}, "madvise", GLIBC)
    assert found == {"GLIBC_TUNABLES": "glibc.malloc.check=1:glibc.malloc.hugetlb=1"}


@pytest.mark.parametrize(
    ("environment", "mode", "libc"),
    [
        ({}, "always", GLIBC),
        ({}, "never", GLIBC),
        ({}, "", ("", "")),
        ({}, "madvise", ("glibc", "2.31")),
        ({}, "madvise", ("", "")),
        ({"QUERYDET_HUGE_PAGES": "0"}, "madvise", GLIBC),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, "madvise", GLIBC),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, "madvise", GLIBC),
    ],
)
def test_where_there_is_nothing_to_gain(environment, mode, libc):
    assert machine.huge_page_environment(environment, mode, libc) is None


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


def test_a_command_that_has_them_does_not_start_again(monkeypatch):
    monkeypatch.setenv("QUERYDET_HUGE_PAGES", "0")
    monkeypatch.setattr(machine.os, "execve", lambda *_: pytest.fail("started again"))
    machine.restart_with_huge_pages()


def test_a_command_starts_again_as_it_was_called(monkeypatch):
    called = []
    monkeypatch.setattr(machine, "_huge_page_mode", lambda: "madvise")
    monkeypatch.setattr(machine.platform, "libc_ver", lambda: GLIBC)
    monkeypatch.setattr(machine.os, "execve", lambda *arguments: called.append(arguments))
    monkeypatch.setattr(machine.sys, "orig_argv", ["python", "-W", "error", "train.py", "x"])
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.delenv("QUERYDET_HUGE_PAGES", raising=False)
    machine.restart_with_huge_pages()
    ((program, words, environment),) = called
    assert program == machine.sys.executable and words == ["python", "-W", "error", "train.py", "x"]
    assert environment["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"


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
