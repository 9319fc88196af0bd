"""TensorBoard files."""

from __future__ import annotations

import contextlib
import logging
import time
from pathlib import Path
from typing import Any

from querydet_jax.runtime.files import reason

_log = logging.getLogger("querydet_jax")


class TensorBoardFile:
    """Scalars by step, appended to a file in ``folder``.

    Once the file cannot be written, a warning says so and nothing more is written. This uses tensorboardX's file
    rather than its SummaryWriter, whose thread dies on a full disk and then blocks the caller for ever.

    Raises:
      ImportError: tensorboardX is not installed.
    """

    def __init__(self, folder: Path):
        from tensorboardX.event_file_writer import EventsWriter  # pyright: ignore[reportMissingImports]

        self.folder = folder
        self._file: Any = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = EventsWriter(str(folder / "events"))
        except OSError as error:
            self._give_up(error)

    def add(self, step: int, values: dict[str, float]) -> None:
        if self._file is None:
            return
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportMissingImports]
        from tensorboardX.summary import scalar  # pyright: ignore[reportMissingImports]

        try:
            for name, value in values.items():
                self._file.write_event(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))
            self._file.flush()
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # `add` has flushed
                self._file.close()

    def _give_up(self, error: OSError) -> None:
        _log.warning("%s: no more TensorBoard files of this run (%s)", self.folder, reason(error))
        self.close()
        self._file = None
