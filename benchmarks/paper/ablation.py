"""Tables 1 and 3 of the paper: trained runs side by side, marked with the parts of QueryDet that each has."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from benchmarks import charts
from benchmarks.measuring import accuracy_columns, evaluate, evaluation_rows, speed_columns
from benchmarks.options import Options
from benchmarks.paper import numbers as paper
from benchmarks.report import Column, Report, Row, decimals
from querydet_jax.config import Config, ModelConfig, load_config, override
from querydet_jax.config.loading import config_path
from querydet_jax.data import open_split
from querydet_jax.data.sources import check_classes
from querydet_jax.inference.detector import Detector
from querydet_jax.inference.runs import open_model
from querydet_jax.models.loss_terms import level_weights
from querydet_jax.runtime.errors import ConfigError


@dataclass(frozen=True)
class _Runs(Options):
    runs: tuple[str, ...] = ()
    """Run folders of train.py (required), all of one data set and input size."""
    base: str = ""
    """Run whose dense heads are the base of the speed-ups (default: the first with P2)."""
    images: int = 0
    """Number of validation images, from the first (0: all)."""


@dataclass(frozen=True)
class Table1(_Runs):
    """Table 1: RetinaNet and QueryDet, dense and with CSQ, of trained runs."""


@dataclass(frozen=True)
class Table3(_Runs):
    """Table 3: the gain from high resolution, re-balanced losses, the query head and CSQ, of trained runs."""


def table1(arguments: Table1) -> None:
    _ablation("table1", "Table 1, RetinaNet and QueryDet", arguments)


def table3(arguments: Table3) -> None:
    _ablation("table3", "Table 3, the parts of QueryDet", arguments)


def parts(model: ModelConfig, query: str) -> dict[str, bool]:
    """Return the check marks of Table 3.

    ``HR``: high resolution (P2). ``RB``: losses re-balanced over levels (QueryDet eq. 4). ``QH``: trained with a query
    head. ``CSQ``: cascade sparse query at inference.
    """
    balanced = len(set(level_weights(model))) > 1
    return {"HR": model.min_level == 2, "RB": balanced, "QH": model.query.enabled, "CSQ": query == "csq"}


def _ablation(name: str, title: str, arguments: _Runs) -> None:
    configs = {run: load_config(config_path(run)) for run in arguments.runs}
    if not configs:
        raise ConfigError(f"--runs: {name} needs trained models; name one or more run folders of train.py")
    _check_alike(configs)
    base = arguments.base or next(
        (run for run, config in configs.items() if config.model.min_level == 2), next(iter(configs))
    )
    if base not in configs:
        raise ConfigError(f"--base {base}: is not one of --runs {' '.join(configs)}")
    dataset = open_split(configs[base], "val", base)
    short = {run: Path(run).name for run in configs}
    if len(set(short.values())) < len(short):
        short = {run: run for run in configs}
    detectors, marks, kinds = {}, {}, {}
    # The base goes first: it is what speed-ups are over.
    for run in sorted(configs, key=lambda run: run != base):
        config = configs[run]
        model = open_model(config, run)
        check_classes(config, dataset)
        for query in ("dense", "csq") if config.model.query.enabled else ("dense",):
            row = f"{short[run]} {query}"
            detectors[row] = Detector(model, override(config.inference, {"query": query}))
            marks[row], kinds[row] = parts(config.model, query), config.model.detector
    rows: list[Row] = []
    for row in evaluation_rows(evaluate(detectors, dataset, configs[base], arguments.images)):
        mine = marks[row["method"]]
        checks = {part: "x" if has else "" for part, has in mine.items()}
        rows.append({"method": row["method"], **checks, **row, **paper.ablation(kinds[row["method"]], **mine)})
    rows.sort(key=lambda row: [row[part] for part in ("CSQ", "QH", "HR", "RB")])
    Report(
        name,
        f"{title}: {arguments.images or 'all'} validation images, methods in turn, medians",
        [
            Column("method", "method"),
            *(Column(part, part) for part in ("HR", "RB", "QH", "CSQ")),
            *accuracy_columns(True),
            *speed_columns(rows),
            Column("paper_AP", "paper AP", decimals(2)),
            Column("paper_APs", "paper APs", decimals(2)),
            Column("paper_FPS", "paper FPS", decimals(2)),
        ],
        rows,
        notes=[
            f"speed-up: over the dense heads of {base}",
            "HR: with P2; RB: losses re-balanced over levels; QH: trained with a query head",
            "paper: COCO val2017, ResNet-50, RTX 2080Ti; Table 8 for an FCOS run",
        ],
        draw=lambda figure: charts.lines(
            figure,
            {row["method"]: ([row["fps"]], [row["AP"]]) for row in rows},
            x="images per second",
            y="AP",
            title=title,
        ),
    ).publish(arguments.out, arguments)


def _check_alike(configs: dict[str, Config]) -> None:
    """Raise ConfigError unless all runs are evaluated on the same data and input size."""
    fields = [field.name for field in dataclasses.fields(next(iter(configs.values())).data)]
    evaluated = [name for name in fields if name.startswith(("val_", "test_")) or name in ("source", "root")]
    (first, reference), *others = configs.items()
    for run, config in others:
        for name in evaluated:
            if getattr(config.data, name) != getattr(reference.data, name):
                raise ConfigError(
                    f"--runs {run}: data.{name} is {getattr(config.data, name)}, that of {first} "
                    f"{getattr(reference.data, name)}; compare runs of one data set and input size"
                )
