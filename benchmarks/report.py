"""A benchmark's result, printed as a table and written as json, csv and a plot."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from querydet_jax.runtime import machine
from querydet_jax.runtime.files import write_csv, write_json
from querydet_jax.viz.plots import NEEDS, Draw, save_plot
from querydet_jax.viz.text import text_table

Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """A column of the printed table: the row's entry ``key`` through ``format``, "-" where there is none."""

    key: str
    header: str
    format: Callable[[Any], str] = str

    def cell(self, row: Row) -> str:
        value = row.get(self.key)
        return "-" if value is None else self.format(value)


@dataclass
class Report:
    """A benchmark's result.

    Attributes:
      name: stem of the files.
      title: one line: what was measured.
      columns: columns of the printed table, the first ``left`` of them flush left. The files hold all entries of a row.
      rows: numbers, strings, or None for what was not measured.
      notes: what a reader of the table must know.
      not_run: what was left out, and what it needs: "AP: needs --run RUN".
      results: further values for the json file.
      draw: draws the plot.
    """

    name: str
    title: str
    columns: Sequence[Column]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    draw: Draw | None = None
    left: int = 1

    def table(self) -> str:
        header = [column.header for column in self.columns]
        return text_table(header, [[column.cell(row) for column in self.columns] for row in self.rows], self.left)

    def publish(self, folder: str | Path, arguments: Any) -> None:
        """Print the table with machine and versions, and write ``folder/NAME.json``, ``.csv`` and ``.png``.

        Args:
          arguments: the command's options, a dataclass, for the json file.
        """
        folder = Path(folder)
        plotted = save_plot(self.draw, folder / f"{self.name}.png") if self.draw is not None else False
        not_run = list(self.not_run)
        if self.draw is not None and not plotted:
            not_run.append(f"plot: {NEEDS}")
        write_json(
            folder / f"{self.name}.json",
            {
                "title": self.title,
                "arguments": dataclasses.asdict(arguments),
                "machine": machine.describe(),
                "rows": self.rows,
                **self.results,
                "notes": self.notes,
                "not_run": not_run,
            },
            indent=2,
        )
        write_csv(folder / f"{self.name}.csv", self.rows)
        files = [f"{folder}/{self.name}.json", ".csv"] + ([".png"] if plotted else [])
        lines = [
            self.title,
            "",
            self.table(),
            "",
            *self.notes,
            *(f"not run: {entry}" for entry in not_run),
            machine.one_line(),
            f"wrote {', '.join(files)}",
        ]
        print("\n".join(lines), flush=True)


def share(value: float) -> str:
    return f"{value:.1%}"


def times(value: float) -> str:
    return f"{value:.2f}x"


def ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def decimals(digits: int) -> Callable[[float], str]:
    return f"{{:,.{digits}f}}".format
