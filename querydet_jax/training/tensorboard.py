"""TensorBoard files, where tensorboardX is installed."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

from querydet_jax.runtime.files import reason

_log = logging.getLogger("querydet_jax")


class Board:
    """Scalars of a run by step, in ``folder``; nothing without tensorboardX.

    It writes in a thread, which a full disk ends. Who went on to add scalars would soon wait for that thread, for
    ever, and with it the training: then no more are added.
    """

    def __init__(self, folder: Path):
        self.folder, self._writer = folder, None
        others = set(threading.enumerate())
        try:
            # A queue that is never full before the thread is missed.
            self._writer: Any = _summary_writer()(str(folder), write_to_disk=True, max_queue=10_000)
        except ImportError:
            return
        except OSError as error:
            self._give_up(reason(error))
        self._threads = set(threading.enumerate()) - others

    def add(self, step: int, values: dict[str, float]) -> None:
        if self._writer is not None and not all(thread.is_alive() for thread in self._threads):
            self._give_up("its thread has ended; most often the disk is full")
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.add(0, {})  # looks whether it can be closed
        try:
            if self._writer is not None:
                self._writer.close()
        except OSError as error:
            self._give_up(reason(error))

    def _give_up(self, why: str) -> None:
        _log.warning("%s: no more TensorBoard files of this run (%s)", self.folder, why)
        self._writer = None


def _summary_writer() -> Any:
    from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]

    return SummaryWriter
