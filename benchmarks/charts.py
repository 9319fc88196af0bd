"""The two kinds of chart that benchmarks draw on a matplotlib figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Series = dict[str, tuple[Sequence[float], Sequence[float]]]
"""x and y values by label."""


def lines(figure: Any, series: Series, *, x: str, y: str, title: str, log_x: bool = False, log_y: bool = False) -> None:
    """Draw one line with markers per series."""
    axes = figure.subplots()
    for label, (xs, ys) in series.items():
        axes.plot(xs, ys, marker="o", markersize=4, label=label)
    if log_x:
        axes.set_xscale("log")
    if log_y:
        axes.set_yscale("log")
    _finish(axes, x, y, title, legend=len(series) > 1)


def bars(figure: Any, labels: Sequence[str], parts: dict[str, Sequence[float]], *, x: str, title: str) -> None:
    """Draw one horizontal bar per label, the first on top, with ``parts`` stacked."""
    axes = figure.subplots()
    start = [0.0] * len(labels)
    for name, values in parts.items():
        axes.barh(labels, values, left=start, label=name)
        start = [a + b for a, b in zip(start, values, strict=True)]
    axes.invert_yaxis()
    for row, total in enumerate(start):
        axes.annotate(f" {total:,.0f}", (total, row), va="center")
    axes.margins(x=0.1)
    _finish(axes, x, "", title, legend=len(parts) > 1)


def _finish(axes: Any, x: str, y: str, title: str, *, legend: bool) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    if legend:
        axes.legend(fontsize=8)
