"""Checkpoints on disk: complete or absent, also when the disk is full."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from full_disk import disk, no_file_longer_than

from querydet_jax.runtime.checkpoint_store import FOLDER, CheckpointStore, read_checkpoint
from querydet_jax.runtime.errors import QueryDetError, WeightsError

ITEMS: dict[str, Any] = {
    "model": {"a.weight": np.random.default_rng(0).random((200, 500), np.float32), "b": np.float32(3)},
    "train": {"list": [np.arange(3), np.ones((2, 2), np.float32)]},
}
SIZE = 400_000  # bytes of a checkpoint


@contextlib.contextmanager
def opened(folder: Path, keep: int = 3) -> Iterator[CheckpointStore]:
    with contextlib.closing(CheckpointStore(folder / FOLDER, keep)) as store:
        yield store


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / FOLDER).iterdir())


def test_reads_what_was_saved_and_keeps_the_newest(tmp_path):
    with opened(tmp_path, keep=2) as store:
        assert store.latest() is None
        for step in (8, 9, 10, 10):
            store.save(step, {"model": {"step": np.int32(step)}, **ITEMS} if step != 10 else ITEMS)
        assert store.latest() == 10
        read = store.read(10, "model")
        np.testing.assert_array_equal(read["a.weight"], ITEMS["model"]["a.weight"])
        assert read["b"] == 3 and read["b"].dtype == np.float32
        first, second = store.read(10, "train")["list"]
        assert first.tolist() == [0, 1, 2] and second.shape == (2, 2)
    assert names(tmp_path) == ["10", "9"]
    assert set(read_checkpoint(tmp_path, "train")) == {"list"}


def test_damage_names_the_folder_and_the_remedy(tmp_path):
    """What a crash of the machine can leave, and a kill cannot: orbax renames a finished folder."""
    with opened(tmp_path) as store:
        store.save(1, ITEMS)
        store.save(2, ITEMS)
        store.wait()
        for file in (tmp_path / FOLDER / "2").rglob("*ocdbt*"):
            if file.is_file():
                file.write_bytes(b"")
        with pytest.raises(WeightsError, match=r"checkpoints/2: .*'model' cannot be read .* delete this step's folder"):
            store.read(2, "model")
    with pytest.raises(WeightsError, match=r"checkpoints/2: .* cannot be read"):
        read_checkpoint(tmp_path, "model")
    assert set(read_checkpoint(tmp_path / FOLDER / "1", "model")) == {"a.weight", "b"}


def test_no_checkpoint_is_an_error(tmp_path):
    with pytest.raises(WeightsError, match="nowhere: no such folder"):
        read_checkpoint(tmp_path / "nowhere", "model")
    with pytest.raises(WeightsError, match="holds no checkpoint; give a run folder"):
        read_checkpoint(tmp_path, "model")
    (tmp_path / FOLDER / "5.orbax-checkpoint-tmp").mkdir(parents=True)  # as a killed run leaves it
    with pytest.raises(WeightsError, match="holds no finished checkpoint"):
        read_checkpoint(tmp_path, "model")
    with opened(tmp_path) as store:
        store.remove_unfinished()
    assert not names(tmp_path)


def test_a_failed_write_is_one_line_and_leaves_what_was_there(tmp_path, caplog):
    with opened(tmp_path, keep=1) as store:
        store.save(4, ITEMS)
        store.wait()
        with (
            caplog.at_level(logging.ERROR),
            no_file_longer_than(1 << 14),
            pytest.raises(QueryDetError, match=r"checkpoint 8 could not .* \(File too large\), the last .* is 4: "),
        ):
            store.save(8, ITEMS)
            while True:
                store.check()
        assert names(tmp_path) == ["4"]
        store.save(8, ITEMS)
    assert names(tmp_path) == ["8"]
    assert not [record for record in caplog.records if record.exc_info]


def test_a_full_disk(tmp_path):
    """A real one, with room for two checkpoints and a half."""
    with disk(tmp_path / "run", int(2.5 * SIZE)):
        store = CheckpointStore(tmp_path / "run" / FOLDER, 3)
        store.save(1, ITEMS)
        store.save(2, ITEMS)
        store.save(3, ITEMS)
        with pytest.raises(QueryDetError) as error:
            store.close()
        assert names(tmp_path / "run") == ["1", "2"]
        start, megabytes, end = re.split(r"(\d+\.?\d*) MB", str(error.value))
        assert start == (
            f"{tmp_path}/run/checkpoints: checkpoint 3 could not be written (No space left on device), the last good "
            "one is 2: free space there (a checkpoint takes "
        )
        assert float(megabytes) == 1  # the least it says
        assert end == "; train.keep_checkpoints says how many are kept), then add --resume to go on from it"


@pytest.mark.parametrize("saved", [[], [1], [1, 2]])
def test_a_folder_removed_meanwhile_is_made_again(tmp_path, saved):
    """So that what has been trained is not lost."""
    with opened(tmp_path / "run") as store:
        for step in saved:
            store.save(step, ITEMS)
        store.wait()
        shutil.rmtree(tmp_path / "run")
        store.check()
        store.save(3, ITEMS)
        assert store.latest() == 3
    assert names(tmp_path / "run") == ["3"] and set(read_checkpoint(tmp_path / "run", "model")) == {"a.weight", "b"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with the complete steps 1 and 2."""
    folder = tmp_path_factory.mktemp("saved")
    with opened(folder) as store:
        store.save(1, ITEMS)
        store.save(2, ITEMS)
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_a_flipped_bit_in_any_file_is_noticed(copy):
    """In the numbers, in orbax's own files, in the checksums; not in what belongs to another item."""
    step = copy / FOLDER / "2"
    files = [path for path in step.rglob("*") if path.is_file()]
    assert {"checksums.sha256", "_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt"} < {path.name for path in files}
    for path in files:
        before, name = path.read_bytes(), path.relative_to(step).as_posix()
        flip(path)
        if name.startswith("train/"):
            assert set(read_checkpoint(copy, "model")) == {"a.weight", "b"}
        else:
            with pytest.raises(WeightsError) as error:
                read_checkpoint(copy, "model")
            assert f"{step}: " in str(error.value) and f"({name} is damaged" in str(error.value)
            assert str(error.value).endswith("delete this step's folder to fall back to the one before")
        path.write_bytes(before)
    assert set(read_checkpoint(copy, "model")) == {"a.weight", "b"}


@pytest.mark.parametrize("damage", ["missing", "longer", "empty", "no checksums", "half of them", "a pipe", "swapped"])
def test_other_damage_is_noticed_too(copy, damage):
    shutil.rmtree(copy / FOLDER / "1")
    step = copy / FOLDER / "2"
    largest = max(step.glob("model/**/*"), key=lambda path: path.stat().st_size * path.is_file())
    checksums = step / "checksums.sha256"
    if damage == "missing":
        largest.unlink()
    elif damage == "longer":
        largest.write_bytes(largest.read_bytes() + b"\0")
    elif damage == "empty":
        largest.write_bytes(b"")
    elif damage == "no checksums":
        checksums.write_bytes(b"")
    elif damage == "a pipe":
        checksums.unlink()
        os.mkfifo(checksums)
    elif damage == "half of them":
        checksums.write_text("".join(checksums.read_text().splitlines(keepends=True)[3:]))
    else:
        shutil.copy(step / "model" / "manifest.ocdbt", largest)
    with pytest.raises(
        WeightsError, match=r"\((model/.*|checksums.sha256) is (missing|damaged).*; no older one is left"
    ):
        read_checkpoint(copy, "model")


def test_checkpoints_without_checksums_are_read_as_before(copy, caplog):
    """Those of version 0.1.0; a file that a file browser adds is no damage."""
    (copy / FOLDER / "2" / "model" / ".DS_Store").write_text("")
    assert set(read_checkpoint(copy, "model")) == {"a.weight", "b"} and not caplog.messages
    (copy / FOLDER / "2" / "checksums.sha256").unlink()
    (copy / FOLDER / "2" / "_CHECKPOINT_METADATA").rename(copy / "gone")
    assert set(read_checkpoint(copy, "train")) == {"list"}
    assert "has no checksums.sha256, so damage would not be noticed" in caplog.text


STRAYS = {
    "empty folder": lambda path: path.mkdir(),
    "folder of empty folders": lambda path: (path / "model").mkdir(parents=True),
    "folder of something else": lambda path: (path.mkdir(), (path / "notes.txt").write_text("")),
    "file": lambda path: path.write_text(""),
    "link to a checkpoint": lambda path: path.symlink_to(path.parent / "1"),
    "link to nothing": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("name", ["999999", "007", "\N{SUPERSCRIPT TWO}", "\N{ARABIC-INDIC DIGIT NINE}", "9" * 30])
@pytest.mark.parametrize("kind", STRAYS)
def test_a_stray_among_checkpoints_hides_none(copy, kind, name):
    """Neither for reading nor for the choice of which old one to delete."""
    STRAYS[kind](copy / FOLDER / name)
    assert set(read_checkpoint(copy, "model")) == {"a.weight", "b"}
    store = CheckpointStore(copy / FOLDER, keep=2)
    assert store.latest() == 2
    store.close()


@pytest.mark.parametrize("kind", STRAYS)
def test_a_stray_in_the_place_of_a_checkpoint_is_moved_aside(copy, kind, caplog):
    STRAYS[kind](copy / FOLDER / "3")
    with opened(copy, keep=2) as store:
        assert store.latest() == 2 and "checkpoints: passed over 3: a link, or no checkpoint" in caplog.text
        store.save(3, ITEMS)
        assert store.latest() == 3 and store.read(3, "model")["b"] == 3
    left, two, three = sorted(names(copy), key=len, reverse=True)
    assert left.startswith("3.stray-") and {two, three} == {"2", "3"}


def test_a_failed_write_leaves_nothing_of_its_event_loop(tmp_path, monkeypatch):
    """A full disk printed thirty tracebacks. Other errors that nobody catches are printed as before."""
    printed: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    many: dict[str, Any] = {"model": {str(i): np.random.default_rng(i).random((200, 500)) for i in range(20)}}
    for _ in range(2):
        with (
            no_file_longer_than(1 << 10),
            pytest.raises(QueryDetError, match="File too large"),
            opened(tmp_path) as store,
        ):
            store.save(1, many)
    time.sleep(0.1)
    assert not printed
    other: Any = types.SimpleNamespace(exc_value=RuntimeError("another"))
    sys.unraisablehook(other)
    assert printed == [other]
