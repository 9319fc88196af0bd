"""Writing files so that they appear whole or not at all."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
from collections.abc import Iterator, Sequence
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


@contextlib.contextmanager
def folder_written_aside(path: str | Path) -> Iterator[Path]:
    """A new folder beside ``path`` to fill; renamed to ``path``, in place of a former one, if the block succeeds.

    If the block fails nothing is left behind, and a former ``path`` stays.
    """
    path = Path(path).resolve()
    aside, former = (path.with_name(f".{path.name}.{os.getpid()}{end}") for end in ("", ".old"))
    try:
        aside.mkdir(parents=True)
        yield aside
        if path.exists():
            os.rename(path, former)
        os.rename(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if former.exists() and not path.exists():  # it ended between the two renames
            os.rename(former, path)
        shutil.rmtree(former, ignore_errors=True)


def write_json(path: str | Path, value: Any, **options: Any) -> None:
    """Write strict JSON (no nan); ``options`` go to ``json.dumps``.

    Raises:
      TypeError, ValueError: a value that JSON cannot hold.
    """
    text = json.dumps(value, allow_nan=False, **options)
    with written_aside(path) as aside:
        aside.write_text(text + "\n")


def write_csv(path: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a table: a header of all keys of all rows, in the order in which they first appear; None is empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with written_aside(path) as aside, aside.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows(rows)
