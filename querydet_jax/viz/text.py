"""Text tables and numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from querydet_jax.runtime.names import printable


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Align columns two spaces apart, with a rule under the header; left-align the first ``left`` columns."""
    rows = [[printable(cell) for cell in row] for row in rows]  # names of classes come from files
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def percent(value: float, decimals: int = 2) -> str:
    """Format a number with the given decimals, nan as ``-``."""
    return "-" if math.isnan(value) else f"{value:.{decimals}f}"


def score_text(scores: ArrayLike) -> str:
    """Return a score, or scores by class ``[K]``, in a few characters: ``0.30``; ``0.21..0.43 by class``."""
    low, high = (f"{float(end(scores)):.2f}" for end in (np.min, np.max))
    return low if low == high else f"{low}..{high} by class"


def shorten(text: str, width: int) -> str:
    """Cut ``text`` to ``width`` characters; two dots mark the cut."""
    return text if len(text) <= width else text[: width - 2] + ".."
