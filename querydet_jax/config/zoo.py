"""Find the weights that come with the package by name: the folders in ``querydet_jax/zoo``."""

from __future__ import annotations

import logging
import os
from pathlib import Path

_log = logging.getLogger("querydet_jax")

ZOO = Path(__file__).parents[1] / "zoo"
CARD, WEIGHTS, CONFIG = "card.json", "weights.safetensors", "config.json"  # files of such a folder


def zoo_names() -> list[str]:
    """Return the names of all packaged weights, sorted."""
    return sorted(path.parent.name for path in ZOO.glob(f"*/{CARD}"))


def zoo_folder(source: str | os.PathLike[str]) -> Path | None:
    """Return the folder of packaged weights, or None if ``source`` is not a name of any.

    A name means the packaged weights wherever a program runs: a file or folder that happens to have this name is
    ``./NAME``, or a ``Path``.
    """
    if not isinstance(source, str) or source not in zoo_names():
        return None
    if Path(source).exists():
        _log.info("%s: the weights of the package; ./%s is what has this name here", source, source)
    return ZOO / source


def is_packaged(folder: Path) -> bool:
    """Return whether a folder holds packaged weights; a run folder has no card."""
    return (folder / CARD).is_file()
