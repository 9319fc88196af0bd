"""Two trainings never share a run folder; a dead one holds nothing."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from querydet_jax.runtime import run_lock as module
from querydet_jax.runtime.errors import ConfigError, QueryDetError
from querydet_jax.runtime.run_lock import FILE, run_lock

ROOT = Path(__file__).parents[2]
HOLD = "import sys, time, pathlib\nfrom querydet_jax.runtime.run_lock import run_lock\n" + (
    "with run_lock(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"
)


def test_a_second_training_names_the_first_and_a_killed_one_keeps_nothing(tmp_path):
    run = tmp_path / "run"
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=rf"run: in use .*\(host .+, process {other.pid}, since .+\): wait"):
            with run_lock(run):
                pass
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert str(other.pid) in (run / FILE).read_text()  # it could not clean up
    for _ in range(2):  # and again once this one has let go
        with run_lock(run):
            assert f"process {os.getpid()}," in (run / FILE).read_text()
            with pytest.raises(ConfigError, match=f"process {os.getpid()}"), run_lock(run):
                pass
    assert (run / FILE).read_text() == ""


@pytest.mark.parametrize("text", ["", "host here, process OURS, since ever\n", "host x, process 1\n", "\0\xff"])
def test_what_a_lock_file_says_keeps_nobody_out(tmp_path, text):
    """Only the system's lock does: a process number may have been given to another process."""
    (tmp_path / FILE).write_text(text.replace("OURS", str(os.getpid())), encoding="latin-1")
    with run_lock(tmp_path):
        pass


@pytest.mark.parametrize("kind", ["folder", "link", "pipe", "run is a file"])
def test_what_cannot_be_a_lock_is_one_line(tmp_path, kind):
    run, victim = tmp_path / "run", tmp_path / "victim"
    victim.write_text("precious")
    if kind == "run is a file":
        run.write_text("")
    else:
        run.mkdir()
        {"folder": Path.mkdir, "pipe": os.mkfifo, "link": lambda path: path.symlink_to(victim)}[kind](run / FILE)
    with pytest.raises(QueryDetError, match="cannot be written") as error, run_lock(run):
        pass
    assert "\n" not in str(error.value) and victim.read_text() == "precious"


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def none(file: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(module, "lock", none)
    with run_lock(tmp_path):
        assert "this file system has no locks" in caplog.text
