"""Files, folders and checkpoints on a real S3 server, whose connections are cut."""

import os

import numpy as np
import pytest

from querydet_jax.runtime import stores
from querydet_jax.runtime.cache import Cache
from querydet_jax.runtime.checkpoint_store import CheckpointStore, read_checkpoint
from querydet_jax.runtime.files import write_json, written_aside
from querydet_jax.runtime.stores import StoreError, as_path, files_below, local_copy, through


@pytest.fixture
def folder(s3_server, request):
    stores._check_bucket.cache_clear()
    s3_server.cuts = 0
    return as_path(f"s3://bucket/{request.node.name}")


def test_files_folders_and_missing_buckets(folder, tmp_path):
    write_json(folder / "in" / "a.json", {"a": 1})
    assert folder.is_dir() and (folder / "in" / "a.json").is_file() and not (folder / "b").exists()
    assert [path.name for path in folder.iterdir()] == ["in"] and files_below(folder) == ["in/a.json"]
    with local_copy(folder) as copy:
        assert (copy / "in" / "a.json").read_bytes() == b'{"a": 1}\n'
    with pytest.raises(StoreError, match="s3://nobody: there is no such bucket"):
        as_path("s3://nobody/a").read_bytes()
    with pytest.raises(StoreError, match="there is no such bucket"):
        write_json("s3://nobody/a.json", {})


def test_checkpoints(folder):
    store = CheckpointStore(folder / "checkpoints", keep=1)
    for step in (1, 2):
        store.save(step, {"model": {"a": np.full(1000, step, np.float32)}})
    assert store.latest() == 2
    store.close()
    np.testing.assert_array_equal(read_checkpoint(folder, "model")["a"], np.full(1000, 2, np.float32))
    assert {name.split("/")[1] for name in files_below(folder)} == {"2"}


def test_a_cut_connection_is_tried_again(s3_server, folder):
    data = os.urandom(300_000)
    s3_server.cuts, s3_server.after = 1, 100_000
    with written_aside(folder / "a") as aside:
        aside.write_bytes(data)
    assert s3_server.cuts == 0
    s3_server.cuts = 1
    assert (folder / "a").read_bytes() == data and s3_server.cuts == 0


def test_a_cache_asks_once_for_what_does_not_change(s3_server, folder, tmp_path):
    for data in (os.urandom(300_000), os.urandom(300_000)):
        with written_aside(folder / "a") as aside:
            aside.write_bytes(data)
        s3_server.cuts, s3_server.after = 1, 100_000
        root = through(folder, Cache.open(tmp_path / "cache", 500_000))
        assert (root / "a").read_bytes() == data and s3_server.cuts == 0
        s3_server.cuts, s3_server.after = 10**6, 0  # nothing comes through
        assert (root / "a").read_bytes() == data
        s3_server.cuts = 0
    assert len(list((tmp_path / "cache").glob("*/*-*"))) == 1


def test_a_connection_that_is_always_cut_is_one_line_and_leaves_nothing(s3_server, folder, monkeypatch):
    monkeypatch.setattr(stores, "_PAUSES", ())
    monkeypatch.setattr(stores, "_PAUSES_OF_UPLOADS", ())
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    write_json(folder / "whole", {})
    s3_server.cuts, s3_server.after = 10**6, 100_000
    with pytest.raises(StoreError, match=r"half: the store does not answer \(.*\); check the network"):
        with written_aside(folder / "half") as aside:
            aside.write_bytes(os.urandom(300_000))
    s3_server.cuts = 0
    assert files_below(folder) == ["whole"]
