"""Files that the system does not let be written whole."""

from __future__ import annotations

import errno
import json
import os

import numpy as np
import pytest
from little_room import no_file_longer_than

from querydet_jax.runtime.errors import QueryDetError
from querydet_jax.runtime.files import Lines, write_json
from querydet_jax.training import tensorboard as board_module
from querydet_jax.training.guards import LossGuard
from querydet_jax.training.tensorboard import Board


def test_lines_wait_for_room(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste')  # as a crash of the machine leaves it
    lines = Lines(path)
    lines.write('{"step": 2}')
    with no_file_longer_than(30):
        lines.write('{"step": 3}')
        lines.write('{"step": 4}')
    assert path.stat().st_size == 30
    lines.write('{"step": 5}')
    lines.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]
    assert caplog.text.count("metrics.jsonl: cannot be written (File too large)") == 1


def test_files_are_whole_or_not_there(tmp_path):
    path = tmp_path / "config.json"
    write_json(path, {"a": 1})
    with no_file_longer_than(4), pytest.raises(QueryDetError, match=r"config.json: cannot be written \(File too large"):
        write_json(path, {"a": "b" * 100})
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"] and json.loads(path.read_text()) == {"a": 1}


def test_no_room_for_the_batch_of_a_loss_that_is_not_finite(tmp_path):
    """What was wrong with the loss is still said."""

    class Here:
        def unreplicate(self, tree):
            return tree

        def latest(self) -> int:
            return 3

    guard = LossGuard(tmp_path, Here(), Here())  # pyright: ignore[reportArgumentType]
    batch = {"images": np.random.default_rng(0).integers(0, 256, (1, 99, 99, 3), dtype=np.uint8)}
    guard.watch(5, {"loss": np.float32("nan")}, batch, np.array([7]))
    with (
        no_file_longer_than(64),
        pytest.raises(QueryDetError, match=r"the loss is nan at step 5 \(images \[7\];.*File too"),
    ):
        guard.check()
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_files_are_given_up(tmp_path, caplog):
    """Their writer is a thread that dies of it, and would be waited for."""
    pytest.importorskip("tensorboardX", reason="requirements-tensorboard.txt")
    board = Board(tmp_path / "tensorboard")
    board.add(1, {"loss": 1.0})
    (path,) = (tmp_path / "tensorboard").iterdir()
    with no_file_longer_than(path.stat().st_size + 10):
        for step in range(2, 10_000):
            board.add(step, {"loss": 1.0, "lr": 0.1})
            if caplog.records:
                break
        board.close()
    assert caplog.text.count("no more TensorBoard files of this run") == 1


def test_tensorboard_files_that_cannot_be_begun(tmp_path, caplog, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(board_module, "_summary_writer", lambda: full)
    board = Board(tmp_path)
    board.add(1, {"loss": 1.0})
    board.close()
    assert caplog.text.count("no more TensorBoard files of this run (No space left on device)") == 1
