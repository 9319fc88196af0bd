"""Of several hosts one fails: the others are told, and end in seconds with its reason.

They wait for it in a collective that would otherwise end after minutes, with a message of its own. What a host says
travels through the key-value store of jax's coordination service.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

import jax
from jax._src import distributed  # for its key-value store, of which jax makes nothing public

_log = logging.getLogger("querydet_jax")

_FAILED = "querydet_jax/failed/"  # keys: host to what it says, nothing where it only follows
_LOST = "gloo|nccl|connection|unavailable|heartbeat|coordination"  # in what jax reports of a host that is gone
_POLL, _PATIENCE = 0.5, 10.0  # seconds
_leaving = threading.Event()
_unfinished: list[Callable[[], object]] = []


def listen() -> None:
    """Be told of the others' failures from now on. To be called once the hosts have met."""
    watch = threading.Thread(target=_watch, daemon=True)
    watch.start()
    atexit.register(watch.join)
    atexit.register(_leaving.set)  # called before, and both before jax takes its leave


def leave(message: str, status: int) -> NoReturn:
    """End this process because of a failure, of which the other hosts are told, so that they end too.

    Not in the usual way, which would wait for them.
    """
    _leaving.set()
    others = _tell(message)
    if distributed.global_state.process_id == 0:  # which has the service in its process
        deadline = time.monotonic() + _PATIENCE
        while len(others) < jax.process_count() and time.monotonic() < deadline:
            time.sleep(_POLL / 5)
            others = _told()
    _end(status)


def from_elsewhere(error: Exception) -> str | None:
    """One line, where ``error`` is what this host sees of the failure of another, which has said so or is gone."""
    deadline = time.monotonic() + 2 * _POLL
    while time.monotonic() < deadline:
        said = _said(_told())
        if said is not None:
            return said
        time.sleep(_POLL / 5)
    if isinstance(error, jax.errors.JaxRuntimeError) and re.search(_LOST, str(error), re.IGNORECASE):
        return (
            f"another host has gone ({str(error).splitlines()[0][:200]}): start all of them again, a training with "
            "--resume, which goes on from the newest checkpoint"
        )
    return None


@contextlib.contextmanager
def finishing(task: Callable[[], object]) -> Iterator[None]:
    """Within this block ``task``, which waits for something, is done before another host's failure ends this one."""
    _unfinished.append(task)
    try:
        yield
    finally:
        _unfinished.remove(task)


def _watch() -> None:
    """End this process when another has said that it failed, if its main thread does not: it is in a collective."""
    while not _leaving.wait(_POLL):
        said = _said(_told())
        if said is None or _leaving.wait(4 * _POLL):
            continue
        print(f"error: {said}", file=sys.stderr, flush=True)
        for task in list(_unfinished):
            try:
                task()
            except Exception as error:
                _log.error("%s", error)
        _tell("")
        _end(2)


def _tell(message: str) -> dict[int, str]:
    client = distributed.global_state.client
    if client is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # host 0 is gone: there is nobody to tell
            client.key_value_set(f"{_FAILED}{distributed.global_state.process_id}", message, allow_overwrite=True)
    return _told()


def _told() -> dict[int, str]:
    """Host to what it has said."""
    client = distributed.global_state.client
    if client is None:
        return {}
    try:
        return {int(key.rpartition("/")[2]): value for key, value in client.key_value_dir_get(_FAILED)}
    except jax.errors.JaxRuntimeError:  # as above; jax ends this process in its time
        return {}


def _said(told: dict[int, str]) -> str | None:
    me, count = distributed.global_state.process_id, distributed.global_state.num_processes
    return next((f"host {i} of {count}: {told[i]}" for i in sorted(told) if told[i] and i != me), None)


def _end(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
