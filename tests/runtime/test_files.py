"""Files that cannot be written whole."""

from __future__ import annotations

import contextlib
import json
import os
import struct

import numpy as np
import pytest
from full_disk import no_file_longer_than

from querydet_jax.runtime.errors import QueryDetError
from querydet_jax.runtime.files import LineFile, folder_written_aside, write_json, written_aside
from querydet_jax.training.guards import FiniteLoss
from querydet_jax.training.tensorboard import TensorBoardFile


def test_a_full_disk_costs_lines_and_one_warning(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste')  # as a crash of the machine leaves it
    lines = LineFile(path)
    lines.write('{"step": 2}')
    with no_file_longer_than(30):
        lines.write('{"step": 3}')
        lines.write('{"step": 4}')
    lines.write('{"step": 5}')
    lines.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 5]
    assert caplog.text.count("metrics.jsonl: cannot be written") == 1


def test_files_are_whole_or_not_there(tmp_path):
    path = tmp_path / "config.json"
    write_json(path, {"a": 1})
    with no_file_longer_than(4), pytest.raises(QueryDetError, match=r"config.json: cannot be written \(File too large"):
        write_json(path, {"a": "b" * 100})
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"] and json.loads(path.read_text()) == {"a": 1}


@pytest.mark.parametrize("name", [".config.{pid}.json", "config.json", ".config.json.{pid}", ".config.json.{pid}.old"])
def test_nothing_is_written_through_a_link(tmp_path, name):
    """Neither one of a name to be foreseen for a temporary file or folder, nor one in the place of the file."""
    victim, path = tmp_path / "victim", tmp_path / "out" / "config.json"
    victim.write_text("precious")
    path.parent.mkdir()
    (path.parent / name.format(pid=os.getpid())).symlink_to(victim)
    write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1} and not path.is_symlink()
    path.unlink()
    with folder_written_aside(path) as aside:
        (aside / "a").write_text("b")
    assert (path / "a").read_text() == "b" and victim.read_text() == "precious"


def test_temporary_names_are_random_private_and_gone_afterwards(tmp_path):
    path, seen = tmp_path / "a.json", set()
    for fails in (False, True):
        with contextlib.suppress(KeyError), written_aside(path) as aside:
            seen.add(aside.parent)
            assert aside.name == path.name and aside.parent.stat().st_mode & 0o777 == 0o700
            aside.write_text(str(fails))
            if fails:
                raise KeyError
    assert len(seen) == 2 and list(tmp_path.iterdir()) == [path] and path.read_text() == "False"
    assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0o22)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "below a file"])
def test_what_cannot_be_a_log_is_one_line(tmp_path, kind):
    path = tmp_path / "metrics.jsonl"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":  # without an end
        path.symlink_to("/dev/zero")
    else:
        path.write_text("")
        path = path / "metrics.jsonl"
    with pytest.raises(QueryDetError, match="metrics.jsonl: cannot be written"):
        LineFile(path)


def test_no_room_for_the_batch_of_a_loss_that_is_not_finite(tmp_path):
    """The line still names the loss and the images."""

    class Here:
        def unreplicate(self, tree):
            return tree

        def latest(self) -> int:
            return 3

    guard = FiniteLoss(tmp_path, Here(), Here())  # pyright: ignore[reportArgumentType]
    batch = {"images": np.random.default_rng(0).integers(0, 256, (1, 99, 99, 3), dtype=np.uint8)}
    guard.started(5, {"loss": np.float32("nan")}, batch, np.array([7]))
    with (
        no_file_longer_than(64),
        pytest.raises(QueryDetError, match=r"the loss is nan at step 5 \(images \[7\];.*File too"),
    ):
        guard.check()
    assert not list(tmp_path.iterdir())


def test_tensorboard_files_are_given_up(tmp_path, caplog):
    pytest.importorskip("tensorboardX", reason="requirements-tensorboard.txt")
    board = TensorBoardFile(tmp_path / "tensorboard")
    board.add(1, {"loss": 1.0})
    (path,) = (tmp_path / "tensorboard").iterdir()
    written = path.stat().st_size
    with no_file_longer_than(written + 10):
        board.add(2, {"loss": 1.0, "lr": 0.1})
        board.add(3, {"loss": 1.0})
        board.close()
    assert caplog.text.count("no more TensorBoard files of this run (File too large)") == 1
    board = TensorBoardFile(path)  # a file in place of the folder
    board.add(1, {"loss": 1.0})
    board.close()
    assert caplog.text.count("no more TensorBoard files of this run (File exists)") == 1


def test_tensorboard_files_hold_the_scalars(tmp_path):
    pytest.importorskip("tensorboardX", reason="requirements-tensorboard.txt")
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportMissingImports]

    board = TensorBoardFile(tmp_path)
    board.add(7, {"loss": 1.5, "dense/AP": 30.0})
    board.close()
    (path,) = tmp_path.iterdir()
    raw, found = path.read_bytes(), []
    while raw:  # u64 length, its crc32, the event, its crc32
        (length,) = struct.unpack("<Q", raw[:8])
        event = Event.FromString(raw[12 : 12 + length])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        raw = raw[16 + length :]
    assert found == [(7, "loss", 1.5), (7, "dense/AP", 30.0)]
