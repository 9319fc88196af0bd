"""A real S3 server on loopback (moto's), reached through a proxy that can cut connections.

Needs requirements-s3.txt and `pip install moto[s3] flask flask-cors`; skipped without.
"""

import os
import socket
import threading

import numpy as np
import pytest

from querydet_jax.runtime import stores
from querydet_jax.runtime.cache import Cache
from querydet_jax.runtime.checkpoint_store import CheckpointStore, read_checkpoint
from querydet_jax.runtime.files import write_json, written_aside
from querydet_jax.runtime.stores import StoreError, as_path, files_below, local_copy, through

_WHY = "needs requirements-s3.txt and moto[s3], flask, flask-cors"
s3fs = pytest.importorskip("s3fs", reason=_WHY)
moto_server = pytest.importorskip("moto.server", reason=_WHY)


class CuttingProxy:
    """Passes TCP connections on; cuts the next ``cuts`` of them after ``after`` bytes in one direction."""

    def __init__(self, port: int):
        self.cuts, self.after, self._target = 0, 1000, port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                here, _ = self._listener.accept()
            except OSError:
                return
            there = socket.create_connection(("127.0.0.1", self._target))
            for a, b in ((here, there), (there, here)):
                threading.Thread(target=self._pass_on, args=(a, b), daemon=True).start()

    def _pass_on(self, a, b):
        passed = 0
        try:
            while data := a.recv(65536):
                passed += len(data)
                if self.cuts > 0 and passed > self.after:
                    self.cuts -= 1
                    break
                b.sendall(data)
        except OSError:
            pass  # the other direction was cut
        finally:
            for side in (a, b):
                try:
                    side.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass

    def close(self):
        self._listener.close()


@pytest.fixture(scope="module")
def server():
    import boto3  # pyright: ignore[reportMissingImports]

    server = moto_server.ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    _, port = server.get_host_and_port()
    proxy = CuttingProxy(port)
    before = dict(os.environ)
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    boto3.client("s3").create_bucket(Bucket="bucket")
    stores._file_system.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()
    yield proxy
    stores._file_system.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()
    os.environ.clear()
    os.environ.update(before)
    proxy.close()
    server.stop()


@pytest.fixture
def folder(server, request):
    stores._check_bucket.cache_clear()
    server.cuts = 0
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


def test_a_cut_connection_is_tried_again(server, folder):
    data = os.urandom(300_000)
    server.cuts, server.after = 1, 100_000
    with written_aside(folder / "a") as aside:
        aside.write_bytes(data)
    assert server.cuts == 0
    server.cuts = 1
    assert (folder / "a").read_bytes() == data and server.cuts == 0


def test_a_cache_asks_once_for_what_does_not_change(server, folder, tmp_path):
    for data in (os.urandom(300_000), os.urandom(300_000)):
        with written_aside(folder / "a") as aside:
            aside.write_bytes(data)
        server.cuts, server.after = 1, 100_000
        root = through(folder, Cache.open(tmp_path / "cache", 500_000))
        assert (root / "a").read_bytes() == data and server.cuts == 0
        server.cuts, server.after = 10**6, 0  # nothing comes through
        assert (root / "a").read_bytes() == data
        server.cuts = 0
    assert len(list((tmp_path / "cache").glob("*/*-*"))) == 1


def test_a_connection_that_is_always_cut_is_one_line_and_leaves_nothing(server, folder, monkeypatch):
    monkeypatch.setattr(stores, "_PAUSES", ())
    monkeypatch.setattr(stores, "_PAUSES_OF_UPLOADS", ())
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    write_json(folder / "whole", {})
    server.cuts, server.after = 10**6, 100_000
    with pytest.raises(StoreError, match=r"half: the store does not answer \(.*\); check the network"):
        with written_aside(folder / "half") as aside:
            aside.write_bytes(os.urandom(300_000))
    server.cuts = 0
    assert files_below(folder) == ["whole"]
