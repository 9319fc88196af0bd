"""Checkpoints on disk: complete or absent, also when the disk is full."""

from __future__ import annotations

import contextlib
import logging
import re
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
