"""Plain-text tables and numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Aligned columns two blanks apart under a rule; the first ``left`` columns flush left, the rest right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def percent(value: float, decimals: int = 2) -> str:
    """``-`` for nan."""
    return "-" if math.isnan(value) else f"{value:.{decimals}f}"


def shorten(text: str, width: int) -> str:
    """``text``, or where it is longer than ``width`` its beginning and two dots."""
    return text if len(text) <= width else text[: width - 2] + ".."
