"""Several processes, a host each, that train or evaluate together (``jax.distributed``).

Each runs the same command. They meet at the first one's address; from then on ``jax.devices()`` are those of all.
Files of a run are written, and progress printed, by the first host alone; what it reads of the run's folder it
sends to the others, which so need not see it.
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

from querydet_jax.runtime import host_failures
from querydet_jax.runtime.errors import ConfigError, QueryDetError

_log = logging.getLogger("querydet_jax")

Value = TypeVar("Value")


@dataclass(frozen=True)
class Hosts:
    """Flags that say with which other processes this one runs. By default alone."""

    coordinator: str = ""
    """Several hosts: HOST:PORT of host 0, the same on all; the port must be free there."""
    count: int = 1
    """Number of hosts."""
    index: int = 0
    """Which of them this is: 0 to count - 1."""
    auto: bool = False
    """Several hosts, found out from the system that started them: TPU pod, SLURM, Open MPI, Kubernetes."""
    timeout: int = 300
    """Seconds to wait until all hosts have come."""


def join(hosts: Hosts, *, preemptible: bool = False) -> None:
    """Wait for the other hosts. To be called before anything else asks jax for its devices.

    Args:
      preemptible: SIGTERM to any of them is for ``guards.preemption`` and does not end the process.

    Raises:
      ConfigError: flags that contradict each other, or no system that ``auto`` knows.
    """
    check(hosts)
    if not hosts.auto and not hosts.coordinator:
        return
    known: dict[str, Any] = {}
    if hosts.coordinator:
        known = dict(coordinator_address=hosts.coordinator, num_processes=hosts.count, process_id=hosts.index)
        # What was said in full is not looked up; jax would also take one device a process from SLURM.
        known["cluster_detection_method"] = "deactivate"
    # If they do not come, jax ends the process itself, with a long message about an RPC; this line explains it.
    _log.info(
        "waiting up to %d s for %s", hosts.timeout,
        f"{hosts.count} hosts at {hosts.coordinator}" if hosts.coordinator else "the other hosts",
    )  # fmt: skip
    jax.config.update("jax_enable_preemption_service", preemptible)
    try:
        jax.distributed.initialize(**known, initialization_timeout=hosts.timeout)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"--hosts: the hosts did not find together ({str(error).splitlines()[0][:200]}): where --hosts.auto knows "
            "nothing of them, give --hosts.coordinator HOST:PORT, --hosts.count and --hosts.index"
        ) from None
    host_failures.listen()


def check(hosts: Hosts) -> None:
    """Raise ConfigError where flags contradict each other."""
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
    """Whether this host writes and prints."""
    return jax.process_index() == 0


def from_first(compute: Callable[[], Value]) -> Value:
    """What ``compute`` returns on the first host, on every host. A QueryDetError is raised on every host.

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
    """``compute()`` on every host: on the first one, then on the others, which find the files that it made.

    Raises:
      QueryDetError: on every host, where it fails on any.
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
    """Every host's ``value``, in order of the hosts, on every host. All must call it; see ``from_first``."""
    if jax.process_count() == 1:
        return [value]
    message = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(message)))).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(message)] = message
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]
