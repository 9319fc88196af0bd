"""One training per run folder."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

from querydet_jax.runtime.errors import ConfigError
from querydet_jax.runtime.files import reason, writing
from querydet_jax.runtime.locks import HELD, NO_LOCKS, lock
from querydet_jax.runtime.machine import cache_folder
from querydet_jax.runtime.stores import is_url

FILE = "training.lock"  # in a run's folder

_log = logging.getLogger("querydet_jax")


@contextlib.contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold the run folder, which is created, so that no other process trains in it meanwhile.

    The system's lock on ``RUN/training.lock`` decides, and ends with the process, however that ends. The file's text,
    the holder's host, process and start, is only for messages. On a file system without locks a warning says so. An
    object store has none: for a URL the file is in this machine's cache folder, and a training on another machine is
    not noticed.

    Raises:
      ConfigError: another process holds it.
      QueryDetError: the file cannot be written.
    """
    path = run / FILE
    if is_url(run):
        with writing(run):
            run.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
        path = cache_folder(os.environ) / "locks" / name
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path):
        # Not through a link; not waiting for the other end of a pipe.
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        file = os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)
    with file:
        try:
            lock(file.fileno())
        except OSError as error:
            if error.errno in HELD:
                raise ConfigError(
                    f"{run}: in use by another training ({_holder(file.read(200))}): wait until it ends, stop it, or "
                    "choose another --run"
                ) from None
            if error.errno not in NO_LOCKS:
                raise ConfigError(f"{path}: cannot be locked ({reason(error)}); remove it if it is no file") from None
            _log.warning("%s: this file system has no locks, so a second training here would not be noticed", run)
        with writing(path):
            file.truncate()
            began = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"host {platform.node()}, process {os.getpid()}, since {began}\n".encode())
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                file.truncate(0)


def _holder(text: bytes) -> str:
    line = text.decode(errors="replace").partition("\n")[0]
    return line if line and line.isprintable() else "not known which"
