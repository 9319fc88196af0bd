"""Checkpoints in an object store, on fsspec's file system in memory."""

import numpy as np
import pytest

from querydet_jax.runtime import checkpoint_store, stores
from querydet_jax.runtime.checkpoint_store import CheckpointStore, newest_step, read_checkpoint
from querydet_jax.runtime.errors import ConfigError, QueryDetError, WeightsError
from querydet_jax.runtime.run_lock import run_lock
from querydet_jax.runtime.stores import StoreError, as_path, files_below


@pytest.fixture
def run(memory_store):
    return as_path("s3://bucket/run")


def _items(value):
    return {"model": {"a": np.full(3, value, np.float32)}, "train": {"normalizer": np.float32(value)}}


def test_steps_are_complete_or_unfinished_and_old_ones_go(run):
    store = CheckpointStore(run / "checkpoints", keep=2)
    assert store.latest() is None and newest_step(run) is None
    for step in (1, 2, 3):
        store.save(step, _items(step))
    assert store.latest() == 3 and newest_step(run) == 3
    assert {name.split("/")[0] for name in files_below(run / "checkpoints")} == {"2", "3"}
    np.testing.assert_array_equal(store.read(3, "train")["normalizer"], np.float32(3))

    (run / "checkpoints" / "3" / "checksums.sha256").unlink()  # as if killed before the last upload
    assert store.latest() == 2
    np.testing.assert_array_equal(read_checkpoint(str(run), "model")["a"], np.full(3, 2, np.float32))
    store.remove_unfinished()
    assert {name.split("/")[0] for name in files_below(run / "checkpoints")} == {"2"}
    store.close()


def test_damage_and_absence_are_one_line(run):
    with pytest.raises(WeightsError, match="s3://bucket/run: no such folder"):
        read_checkpoint("s3://bucket/run", "model")
    store = CheckpointStore(run / "checkpoints", keep=1)
    store.save(5, _items(1))
    store.close()
    name = next(name for name in files_below(run / "checkpoints" / "5") if name.startswith("model/"))
    (run / "checkpoints" / "5" / name).unlink()
    with pytest.raises(WeightsError, match=f"{name} is missing"):
        read_checkpoint(run / "checkpoints" / "5", "model")


def test_a_failed_upload_leaves_nothing_that_looks_complete(run, monkeypatch):
    store = CheckpointStore(run / "checkpoints", keep=1)
    store.save(1, _items(1))
    store.wait()
    upload, count = stores.upload, 0

    def third_fails(local, to):
        nonlocal count
        count += local.is_file()
        if count == 3:
            raise StoreError(5, "the store does not answer (cut)", str(to))
        upload(local, to)

    monkeypatch.setattr(checkpoint_store.stores, "upload", third_fails)
    store.save(2, _items(2))
    with pytest.raises(QueryDetError, match=r"2 could not be uploaded \(the store does not answer \(cut\)\): mend"):
        store.wait()
    monkeypatch.setattr(checkpoint_store.stores, "upload", upload)
    assert store.latest() == 1
    store.close()


def test_a_second_training_on_this_machine_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with run_lock(run), pytest.raises(ConfigError, match="s3://bucket/run: in use by another training"), run_lock(run):
        pass
    with run_lock(run):
        assert not files_below(run)
