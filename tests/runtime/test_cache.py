"""Copies of objects in a store: fetched once, compared once, never half, never more than the limit."""

import errno
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from querydet_jax.config import Config, override
from querydet_jax.runtime import stores
from querydet_jax.runtime.cache import Cache
from querydet_jax.runtime.errors import ConfigError, QueryDetError
from querydet_jax.runtime.stores import NoSuchObject, StoreError, as_path, local_copy, through, with_file


class Counted:
    """A file system that counts what is asked of it."""

    def __init__(self, inner):
        self.inner, self.asked = inner, []

    def __getattr__(self, name):
        def ask(path, *arguments, **options):
            self.asked.append((name, path.rpartition("/")[2]))
            return getattr(self.inner, name)(path, *arguments, **options)

        return ask


@pytest.fixture
def store(memory_store, monkeypatch):
    memory = stores._file_system("s3")
    memory.pipe({f"/bucket/{name}": name.encode() * 100 for name in "abcde"})
    counted = Counted(memory)
    monkeypatch.setattr(stores, "_file_system", lambda scheme: counted)
    return counted


def opened(tmp_path, limit=0):
    return through(as_path("s3://bucket"), Cache.open(tmp_path / "cache", limit))


def copies(tmp_path):
    return sorted(path.read_bytes()[:1].decode() for path in (tmp_path / "cache").glob("*/*-*"))


def test_an_object_is_fetched_once_and_compared_once_per_opening(store, tmp_path):
    root = opened(tmp_path)
    for _ in range(3):
        assert (root / "a").read_bytes() == b"a" * 100 and (root / "a").open().read() == "a" * 100
    assert store.asked == [("info", "a"), ("get_file", "a")]
    store.asked.clear()
    root = opened(tmp_path)
    assert with_file(root / "a", Path.read_bytes) == b"a" * 100 == (root / "a").read_bytes()
    with local_copy(root / "a") as copy:
        assert copy.name == "a" and copy.read_bytes() == b"a" * 100
    assert store.asked[:1] == [("info", "a")] and "get_file" not in {name for name, _ in store.asked}


def test_a_changed_object_is_not_served_from_its_old_copy(store, tmp_path):
    root = opened(tmp_path)
    assert (root / "a").read_bytes() == b"a" * 100
    store.inner.pipe("/bucket/a", b"A" * 100)  # of the same size
    assert (root / "a").read_bytes() == b"a" * 100  # a run that is under way keeps what it has begun with
    assert (opened(tmp_path) / "a").read_bytes() == b"A" * 100
    assert copies(tmp_path) == ["A"]
    store.inner.rm("/bucket/a")
    with pytest.raises(NoSuchObject, match="s3://bucket/a: there is no such object"):
        (opened(tmp_path) / "a").read_bytes()


def test_above_the_limit_what_was_not_used_for_longest_goes(store, tmp_path):
    root = opened(tmp_path, 300)
    for name in "abca":
        (root / name).read_bytes()
        time.sleep(0.01)
    (root / "d").read_bytes()
    assert copies(tmp_path) == ["a", "d"]  # nine tenths of the limit are left
    (root / "e").read_bytes()
    assert copies(tmp_path) == ["a", "d", "e"] and (tmp_path / "cache" / "locks" / "size").read_text() == "300"
    store.asked.clear()
    assert (root / "b").read_bytes() == b"b" * 100 and ("get_file", "b") in store.asked
    store.inner.pipe("/bucket/f", b"f" * 301)
    with pytest.raises(ConfigError, match=r"bucket/f: 3.01e-07 GB, more than data.cache_gb 3e-07; raise it"):
        (root / "f").read_bytes()


def test_a_cache_of_another_limit_or_without_its_count_is_counted_anew(store, tmp_path):
    for name in "abcd":
        (opened(tmp_path) / name).read_bytes()
    (tmp_path / "cache" / "locks" / "size").write_text("damaged")
    (opened(tmp_path, 300) / "e").read_bytes()
    assert len(copies(tmp_path)) == 2 and "e" in copies(tmp_path)


def test_a_copy_is_whole_or_not_there(store, tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "_PAUSES", ())
    root = opened(tmp_path)
    real = store.inner.get_file

    def cut(path, to):
        Path(to).write_bytes(b"a" * 50)
        raise ConnectionResetError("cut")

    monkeypatch.setattr(store.inner, "get_file", cut)
    with pytest.raises(StoreError, match=r"a: the store does not answer \(cut\)"):
        (root / "a").read_bytes()
    monkeypatch.setattr(store.inner, "get_file", lambda path, to: Path(to).write_bytes(b"a" * 50))
    with pytest.raises(StoreError, match="s3://bucket/a: changed, or was cut, while it was read"):
        (root / "a").read_bytes()

    def full(path, to):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store.inner, "get_file", full)
    with pytest.raises(QueryDetError, match=r"cache: cannot be written \(No space left on device\): free space"):
        (root / "a").read_bytes()
    assert copies(tmp_path) == []
    monkeypatch.setattr(store.inner, "get_file", real)
    assert (root / "a").read_bytes() == b"a" * 100
    (copy,) = (tmp_path / "cache").glob("*/*-*")
    copy.write_bytes(b"")  # as a machine that lost its power may leave it
    os.utime(copy, (time.time(), time.time()))
    assert (root / "a").read_bytes() == b"a" * 100


def test_what_killed_processes_have_left_goes(store, tmp_path):
    root = opened(tmp_path, 300)
    (root / "a").read_bytes()
    (copy,) = (tmp_path / "cache").glob("*/*-*")
    for name in (copy.parent / ".querydet-x", tmp_path / "cache" / "other" / ".querydet-y"):
        name.mkdir(parents=True)
        (name / "half").write_bytes(b"half")
        os.utime(name, (0, 0))
    for name in "bcd":
        (root / name).read_bytes()
    assert not list((tmp_path / "cache").glob("*/.querydet*"))


def test_threads_that_want_the_same_object_fetch_it_once(store, tmp_path):
    root = opened(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda name: (root / name).read_bytes(), "ab" * 20)) == {b"a" * 100, b"b" * 100}
    assert sorted(store.asked) == [("get_file", "a"), ("get_file", "b"), ("info", "a"), ("info", "b")]


def test_a_copy_that_another_process_removes_is_fetched_again(store, tmp_path):
    times = []

    def read(copy):
        times.append(copy)
        if len(times) == 1:
            copy.unlink()
        return copy.read_bytes()

    assert with_file(opened(tmp_path) / "a", read) == b"a" * 100 and len(times) == 2


PROCESS = """
import sys
from fsspec.implementations.local import LocalFileSystem
from querydet_jax.runtime import stores
from querydet_jax.runtime.cache import Cache

local, folder, cache, limit = LocalFileSystem(), sys.argv[1], sys.argv[2], int(sys.argv[3])

class Store:
    def info(self, path): return local.info(f"{folder}/{path}")
    def get_file(self, path, to): return local.get_file(f"{folder}/{path}", to)

stores._file_system, stores._check_driver = lambda scheme: Store(), lambda scheme: None
root = stores.through(stores.as_path("s3://bucket"), Cache.open(cache, limit))
for turn in range(100):
    name = f"{(turn * int(sys.argv[4])) % 10}"
    assert (root / name).read_bytes() == name.encode() * 100, name
"""


def test_several_processes_share_a_cache(tmp_path):
    (tmp_path / "bucket").mkdir()
    for name in range(10):
        (tmp_path / "bucket" / f"{name}").write_bytes(f"{name}".encode() * 100)
    words = [sys.executable, "-c", PROCESS, tmp_path, tmp_path / "cache", "500"]
    processes = [subprocess.Popen([*map(str, words), str(step)]) for step in (1, 3)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*/*-*")) <= 500


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data.cache_gb": 1.0}, "data.cache_gb 1: needs data.cache"),
        ({"data.cache_gb": -1.0}, "data.cache_gb -1.0: must be at least 0"),
        ({"data.cache": "c"}, r"data.cache c: data.root \(empty\) is on this machine"),
        ({"data.cache": "s3://b/c", "data.root": "s3://b"}, "data.cache s3://b/c: must be a folder on this machine"),
    ],
)
def test_options_that_mean_nothing_are_one_line(changes, said):
    with pytest.raises(ConfigError, match=said):
        override(Config(), changes)


def test_files_that_need_a_cache_say_so(store, tmp_path):
    with pytest.raises(ConfigError, match="s3://bucket/a: is read from a store through copies on this machine alone; "):
        with_file(as_path("s3://bucket/a"), Path.read_bytes)
    assert with_file(tmp_path, Path.exists)
    with pytest.raises(ConfigError, match="data.cache_gb 5e-07: s3://bucket is read at random and takes 6e-07 GB"):
        stores.check_cache(opened(tmp_path, 500), 600)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(QueryDetError, match=r"cache: cannot be written \(File exists\)"):
        Cache.open(tmp_path / "cache", 0)
