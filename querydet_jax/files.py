"""Writing files so that they appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """A path beside ``path``, with its suffix, to write to; renamed to ``path`` if the block succeeds.

    The folder is made. If the block fails nothing is left behind, and a former ``path`` stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any, **options: Any) -> None:
    """Write strict JSON (no nan); ``options`` go to ``json.dumps``.

    Raises:
      TypeError, ValueError: a value that JSON cannot hold.
    """
    text = json.dumps(value, allow_nan=False, **options)
    with written_aside(path) as aside:
        aside.write_text(text + "\n")
