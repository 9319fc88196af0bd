"""Several processes, one per host, that train or evaluate together (``jax.distributed``).

Each runs the same command. They meet at the address of host 0; from then on ``jax.devices()`` lists the devices of all.
Host 0 alone writes the run's files and prints progress. It sends what it reads from the run's folder to the others,
so they need no access to it.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from querydet_jax.runtime.errors import ConfigError, QueryDetError

_log = logging.getLogger("querydet_jax")

Value = TypeVar("Value")


@dataclass(frozen=True)
class Hosts:
    """Flags that name the processes this one runs with; the default is a single process."""

    coordinator: str = ""
    """HOST:PORT of host 0, the same on all hosts; the port must be free there."""
    count: int = 1
    """Number of hosts."""
    index: int = 0
    """This host's number, 0 to count - 1."""
    auto: bool = False
    """Take the hosts from the system that started them: TPU pod, SLURM, Open MPI or Kubernetes."""
    timeout: int = 300
    """Seconds to wait for all hosts to connect."""


def join(hosts: Hosts, *, preemptible: bool = False) -> None:
    """Connect to the other hosts; call this before anything asks jax for its devices.

    Args:
      preemptible: leave SIGTERM to any of them to ``guards.preemption`` instead of ending the process.

    Raises:
      ConfigError: the flags contradict each other, or ``auto`` knows no hosts.
    """
    check(hosts)
    if not hosts.auto and not hosts.coordinator:
        return
    known: dict[str, Any] = {}
    if hosts.coordinator:
        known = dict(coordinator_address=hosts.coordinator, num_processes=hosts.count, process_id=hosts.index)
        # The flags are complete: without this jax would also ask SLURM, and take one device per process.
        known["cluster_detection_method"] = "deactivate"
    # If a host is missing, jax aborts the process with a long message about an RPC; this line explains it.
    _log.info(
        "waiting up to %d s for %s", hosts.timeout,
        f"{hosts.count} hosts at {hosts.coordinator}" if hosts.coordinator else "the other hosts",
    )  # fmt: skip
    jax.config.update("jax_enable_preemption_service", preemptible)
    try:
        jax.distributed.initialize(**known, initialization_timeout=hosts.timeout)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"--hosts: the hosts could not connect ({str(error).splitlines()[0][:200]}): where --hosts.auto "
            "finds none, give --hosts.coordinator HOST:PORT, --hosts.count and --hosts.index"
        ) from None


def check(hosts: Hosts) -> None:
    """Raise ConfigError if flags contradict each other."""
    if hosts.auto and (hosts.coordinator or hosts.count != 1 or hosts.index != 0):
        raise ConfigError("--hosts.auto finds coordinator, count and index itself: leave these out")
    if (hosts.count != 1 or hosts.index != 0) and not hosts.coordinator:
        raise ConfigError(f"--hosts.count {hosts.count}: add --hosts.coordinator HOST:PORT, the address of host 0")
    if hosts.coordinator:
        host, colon, port = hosts.coordinator.rpartition(":")
        if not host or not colon or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise ConfigError(f"--hosts.coordinator {hosts.coordinator}: must be HOST:PORT, such as 10.0.0.1:9876")
        if hosts.count < 1 or not 0 <= hosts.index < hosts.count:
            raise ConfigError(
                f"--hosts.index {hosts.index}, --hosts.count {hosts.count}: the index counts from 0 to count - 1"
            )
    if hosts.timeout < 1:
        raise ConfigError(f"--hosts.timeout {hosts.timeout}: must be at least 1 second")


def is_first() -> bool:
    """Return whether this host writes and prints."""
    return jax.process_index() == 0


def from_first(compute: Callable[[], Value]) -> Value:
    """Return on every host what ``compute`` returns on the first; raise its QueryDetError on every host, too.

    All hosts must call it. The value travels pickled, so it should hold NumPy arrays rather than jax's.
    """
    if jax.process_count() == 1:
        return compute()
    message = b""
    if is_first():
        try:
            message = pickle.dumps((compute(), None))
        except QueryDetError as error:
            message = pickle.dumps((None, error))
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
    buffer = np.zeros(size, np.uint8)
    buffer[: len(message)] = np.frombuffer(message, np.uint8)
    value, error = pickle.loads(np.asarray(multihost_utils.broadcast_one_to_all(buffer)).tobytes())
    if error is not None:
        raise error
    return value


def on_every(compute: Callable[[], Value]) -> Value:
    """Return ``compute()`` of this host; the first host computes before the others, which find the files it makes.

    Raises:
      QueryDetError: on every host if it fails on any.
    """
    if jax.process_count() == 1:
        return compute()
    if not is_first():
        multihost_utils.sync_global_devices("after the first host")
    value, failure = None, None
    try:
        value = compute()
    except QueryDetError as error:
        failure = str(error)
    if is_first():
        multihost_utils.sync_global_devices("after the first host")
    failures = gather(failure)
    failed = [i for i, message in enumerate(failures) if message is not None]
    if failed:
        raise QueryDetError(f"host {', '.join(map(str, failed))} of {len(failures)}: {failures[failed[0]]}")
    return cast(Value, value)


def gather(value: Value) -> list[Value]:
    """Return every host's ``value``, in the hosts' order. All hosts must call it; see ``from_first``."""
    if jax.process_count() == 1:
        return [value]
    message = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(message)))).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(message)] = message
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]
