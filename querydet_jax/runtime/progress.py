"""Progress of a loop: a bar on a terminal, a line every 15 seconds in a log."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, NoReturn, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress(
    items: Iterable[Item], description: str, unit: str, *, total: int | None = None, show: bool = True
) -> Iterable[Item]:
    """Yield ``items`` behind a progress bar on standard error; in a file or pipe print a line every 15 seconds."""
    return tqdm(items, desc=description, unit=unit, total=total, disable=not show, leave=sys.stderr.isatty(), **_pace())


def counted(total: int, description: str, unit: str) -> tqdm[NoReturn]:
    """Return a bar, as ``progress`` shows one, that ``update(n)`` moves on; a file or pipe gets its end, too."""
    return tqdm(total=total, desc=description, unit=unit, **_pace())


def _pace() -> dict[str, Any]:
    terminal = sys.stderr.isatty()
    return {"mininterval": 0.2 if terminal else 15.0, "ncols": None if terminal else 80}
