"""How a run of several hosts ends when one of them fails.

A host that fails must not end as usual: at the end of a program jax waits for the others (300 s), which wait for this
one in a collective, and then aborts them all. It leaves at once instead. Its connections break, and the collective
raises on the others, in milliseconds on CPU; where collectives do not notice, jax's heartbeat ends them after 100 s.
"""

from __future__ import annotations

import os
import re
import sys
from typing import NoReturn

import jax

_LOST = "gloo|nccl|connection|unavailable|heartbeat|coordination"  # in what jax reports of a host that is gone


def leave(status: int) -> NoReturn:
    """End this process without waiting for the other hosts."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def lost_host(error: Exception) -> str | None:
    """Return one line if ``error`` is what this host sees of another's failure, else None."""
    if isinstance(error, jax.errors.JaxRuntimeError) and re.search(_LOST, str(error), re.IGNORECASE):
        return (
            f"another host has failed, and its own output says why ({str(error).splitlines()[0][:200]}): start all "
            "hosts again, a training with --resume, which goes on from the newest checkpoint"
        )
    return None
