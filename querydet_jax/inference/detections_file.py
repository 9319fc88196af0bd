"""``detections.json``: what was found in each picture, complete after every picture."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path, PurePath
from types import TracebackType
from typing import Any

from querydet_jax.inference.prediction import Prediction
from querydet_jax.runtime.files import writing, written_aside
from querydet_jax.runtime.stores import is_url


class DetectionsFile:
    """Writes detections picture by picture; after each, the file is complete JSON.

    The file holds ``facts``, ``images`` (see ``entry``) and ``broken``, a message for each picture that could not be
    used. A former file stays until the first picture is added. In a store it appears at the end.

    Raises:
      QueryDetError: it cannot be written.
    """

    def __init__(self, path: Path, facts: dict[str, Any]):
        self.path, self.broken, self._held = path, [], contextlib.ExitStack()
        self._head = json.dumps(facts, allow_nan=False)[:-1] + ', "images": [\n'
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            here = self._held.enter_context(written_aside(path)) if is_url(path) else path
            here.touch()
            self._file = self._held.enter_context(here.open("r+b", buffering=0))  # changes nothing yet
        self._end, self._tail = -1, b""  # where the next picture goes, and what is there

    def __enter__(self) -> DetectionsFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None):
        with self._held:
            if kind is None:
                self._write("")

    def add(self, entry: dict[str, Any]) -> None:
        """Append a picture."""
        comma = ",\n" if self._end > len(self._head) else ""
        self._write(comma + json.dumps(entry, allow_nan=False))

    def _write(self, text: str) -> None:
        with writing(self.path):
            if self._end < 0:
                self._file.truncate(0)
                self._end, text = 0, self._head + text
            tail = f'\n], "broken": {json.dumps(self.broken, indent=1)}}}\n'.encode()
            try:
                self._put(text.encode() + tail)
            except OSError:
                with contextlib.suppress(OSError):
                    self._put(self._tail)  # its room is there
                raise
            self._end, self._tail = self._end + len(text), tail

    def _put(self, data: bytes) -> None:
        """Write at the end of the pictures; the file only grows."""
        self._file.seek(self._end)
        if self._file.write(data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def entry(file: str, found: Prediction) -> dict[str, Any]:
    """Return a picture's entry: file, height, width, and its detections."""
    return {
        "file": file,
        "height": found.size[0],
        "width": found.size[1],
        "detections": [
            {"class": name, "class_id": int(k), "score": float(s), "box_xyxy": [round(float(v), 2) for v in b]}
            for b, s, k, name in zip(found.boxes, found.scores, found.classes, found.names, strict=True)
        ],
    }


def coco_ids(files: Sequence[str]) -> list[int]:
    """Return an image id per file: its name where all are different numbers, as in COCO, otherwise 1, 2, ..."""
    stems = [PurePath(file).stem for file in files]
    numbers = [int(stem) for stem in stems if stem.isascii() and stem.isdecimal() and len(stem) < 16]
    return numbers if len(set(numbers)) == len(files) else list(range(1, len(files) + 1))
