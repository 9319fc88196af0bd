"""A real S3 server on loopback (moto's), reached through a proxy that can cut connections."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator

import pytest

from querydet_jax.runtime import stores


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


@contextlib.contextmanager
def serve() -> Iterator[CuttingProxy]:
    """Serve an empty ``s3://bucket``, which this process's environment names until the block ends."""
    why = "needs requirements-s3.txt and moto[s3], flask, flask-cors"
    s3fs, moto_server = (pytest.importorskip(name, reason=why) for name in ("s3fs", "moto.server"))
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
