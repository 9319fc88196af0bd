"""Tables 4, 5 and 6 of the paper: start level, query method, context size."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks import charts
from benchmarks.measuring import Variants, accuracy_columns, measure, speed_columns
from benchmarks.options import RunOrRandomImage
from benchmarks.paper import numbers as paper
from benchmarks.report import Column, Report, decimals, times
from querydet_jax.config import load_config
from querydet_jax.config.loading import config_path


@dataclass(frozen=True)
class Table4(RunOrRandomImage):
    """Table 4: the pyramid level where queries start, P3 to P6."""

    start_levels: tuple[int, ...] = (6, 5, 4, 3)
    """Start levels. With random weights a coarse start keeps all children of its cells."""


@dataclass(frozen=True)
class Table5(RunOrRandomImage):
    """Table 5: the query methods CQ (crops), CCQ (complete convolution) and CSQ (cascade)."""


@dataclass(frozen=True)
class Table6(RunOrRandomImage):
    """Table 6: the context around each key, 1x1 (radius 0) to 11x11 (radius 5)."""

    contexts: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    """Context radii in cells."""


def table4(arguments: Table4) -> None:
    variants = {f"P{level}": {"query": "csq", "start_level": level} for level in arguments.start_levels}
    note = "a query head finds nothing on levels it was not trained on (model.query.levels)"
    _table("table4", "Table 4, start layer of the query", arguments, variants, 4, note)


def table5(arguments: Table5) -> None:
    variants = {name.upper(): {"query": name} for name in ("cq", "ccq", "csq")}
    _table("table5", "Table 5, query method", arguments, variants, 5)


def table6(arguments: Table6) -> None:
    variants = {f"{2 * c + 1}x{2 * c + 1}": {"query": "csq", "context": c} for c in arguments.contexts}
    _table("table6", "Table 6, context around a key", arguments, variants, 6)


def _table(
    name: str, title: str, arguments: RunOrRandomImage, variants: Variants, published: int | None, *notes: str
) -> None:
    rows = measure(arguments, {paper.DENSE: {"query": "dense"}, **variants})
    if arguments.run and load_config(config_path(arguments.run)).model.detector != "retinanet":
        published = None  # in the paper these tables are of RetinaNet alone
    for row in rows:
        row |= paper.columns(published, row["method"])
    Report(
        name,
        f"{title}: {arguments.in_words()}",
        [
            Column("method", "method"),
            *accuracy_columns(bool(arguments.run)),
            *speed_columns(rows),
            Column("paper_AP", "paper AP", decimals(2)),
            Column("paper_APs", "paper APs", decimals(2)),
            Column("paper_speed_up", "paper speed-up", times),
        ],
        rows,
        notes=["paper: RetinaNet, COCO val2017, ResNet-50, RTX 2080Ti; dense is its row without query", *notes],
        not_run=[] if arguments.run else ["accuracy: needs --run RUN, a trained model and its data"],
        draw=lambda figure: charts.bars(
            figure,
            [row["method"] for row in rows],
            {"speed-up over dense": [row["speed_up"] for row in rows]},
            x="speed-up over dense",
            title=title,
        ),
    ).publish(arguments.out, arguments)
