"""Write plots with matplotlib, an optional dependency."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from querydet_jax.runtime.files import written_aside

NEEDS = "needs matplotlib (pip install -r requirements-plots.txt)"
Draw = Callable[[Any], None]
"""A function that draws on a matplotlib ``Figure``."""


def save_plot(draw: Draw, path: str | Path, size: tuple[float, float] = (8.0, 4.8)) -> bool:
    """Draw on a figure of ``size`` (width, height) in inches and write it; without matplotlib, return False."""
    try:
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    draw(figure)
    with written_aside(path) as aside:
        figure.savefig(aside)
    return True
