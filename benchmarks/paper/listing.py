"""Every table and figure of the paper: the commands that give each row, and what is known without data."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flax import nnx

from benchmarks.flops import inference_gflop
from benchmarks.measuring import timed_rows
from benchmarks.options import Options
from benchmarks.paper import numbers as paper
from benchmarks.report import Column, Report, Row, decimals, ms, times
from benchmarks.subjects import laid_out_queries, random_image, scripted_detector
from querydet_jax.config import Card, Config, InferenceConfig, LossConfig, ModelConfig, load_card, load_config, override
from querydet_jax.inference.detector import Detector
from querydet_jax.models import DenseDetector, build_model
from querydet_jax.models.base import SIZE_DIVISOR
from querydet_jax.runtime.errors import ConfigError


@dataclass(frozen=True)
class Paper(Options):
    """Every row of the paper's tables: card, commands, needs, the paper's numbers; FLOPs and speed on request."""

    tables: tuple[int, ...] = ()
    """Tables to list, of 1 to 9 (default: all, and the figures)."""
    flops: bool = False
    """Count the FLOPs from one image to detections."""
    speed: bool = False
    """Time one image with random weights (minutes per table on a CPU)."""
    size: tuple[int, int] = (0, 0)
    """Height and width of that image in px, multiples of 32 (0 0: the card's first test canvas)."""
    active: float = 0.03
    """Share of P2's cells that the cascade from P4 makes active, context 2 included."""
    rounds: int = 5
    """Timed rounds."""
    configs: str = "configs"
    """Folder of the cards."""


@dataclass(frozen=True)
class _Experiment:
    """An experiment file: its configuration and its card."""

    config: Config
    card: Card


def list_paper(arguments: Paper) -> None:
    chosen = _chosen(arguments)
    experiments, absent = _experiments(Path(arguments.configs), [row.card for _, _, row in chosen])
    figures = [] if arguments.tables else _figures(experiments)
    rows: list[Row] = []
    for number, table, row in chosen:
        found = experiments.get(row.card)
        rows.append(
            {
                "table": f"Table {number}",
                "row": row.name,
                "card": row.card,
                "evaluate": evaluate_command(row),
                "train": None if found is None else found.card.command,
                "needs": None if found is None else found.card.needs,
                **{f"paper_{column}": table.value(row, column) for column in (*paper.COCO, *paper.VISDRONE)},
                "paper_speed_up": table.speed_up(row),
            }
        )
    _add_computed(rows, chosen, experiments, arguments)
    Report(
        "paper",
        "The paper's tables and figures" + _computed_with(arguments),
        _columns(arguments),
        [*rows, *figures],
        notes=_notes(arguments, chosen, figures, experiments),
        not_run=[
            *absent,
            *([] if arguments.flops else ["FLOPs: --flops counts them"]),
            *([] if arguments.speed else ["speed: --speed times every row on this machine"]),
        ],
        left=4,
    ).publish(arguments.out, arguments)


def evaluate_command(row: paper.PaperRow) -> str:
    """Return the command that gives the row, once its card is trained."""
    return f"python eval.py runs/{row.card} {_flags(row)}"


def _chosen(arguments: Paper) -> list[tuple[int, paper.Table, paper.PaperRow]]:
    unknown = [number for number in arguments.tables if number not in paper.TABLES]
    if unknown:
        raise ConfigError(f"--tables {unknown[0]}: the paper has Tables {min(paper.TABLES)} to {max(paper.TABLES)}")
    if any(side % SIZE_DIVISOR or side < 0 for side in arguments.size) or (0 in arguments.size and any(arguments.size)):
        raise ConfigError(f"--size {arguments.size}: give a height and a width, multiples of {SIZE_DIVISOR}, or 0 0")
    return [found for found in paper.rows() if not arguments.tables or found[0] in arguments.tables]


def _experiments(folder: Path, names: list[str]) -> tuple[dict[str, _Experiment], list[str]]:
    """Return the experiments found, by name, and a line for each that is absent."""
    found, absent = {}, []
    for name in dict.fromkeys(names):
        path = folder / f"{name}.py"
        if path.is_file():
            found[name] = _Experiment(load_config(path), load_card(path))
        else:
            absent.append(f"{name}: {path} is absent; --configs names the folder of the cards")
    return found, absent


def _figures(experiments: dict[str, _Experiment]) -> list[Row]:
    rows = []
    for number, (title, name, words) in paper.FIGURES.items():
        found = experiments.get(name)
        rows.append(
            {
                "table": f"Figure {number}",
                "row": title,
                "card": name or None,
                "evaluate": f"python benchmark.py {words}",
                "train": None if found is None else found.card.command,
                "needs": None if found is None else found.card.needs,
            }
        )
    return rows


# What needs no data -------------------------------------------------------------------------------


def _structure(config: ModelConfig) -> ModelConfig:
    """Return the configuration without the fields that only training reads."""
    return dataclasses.replace(config, loss=LossConfig(), query=dataclasses.replace(config.query, levels=()))


@functools.cache
def _shapes(structure: ModelConfig) -> DenseDetector:
    return nnx.eval_shape(lambda: build_model(structure))


@functools.cache
def _gflop(structure: ModelConfig, inference: InferenceConfig, size: tuple[int, int], active: float) -> float:
    return inference_gflop(_shapes(structure), inference, size, laid_out_queries(*size, active))


def _inference(experiment: _Experiment, row: paper.PaperRow) -> InferenceConfig:
    # The worst case of NMS: at a score threshold of 0 every level passes on all its candidates.
    return override(experiment.config.inference, {"query": row.query, **row.changes, "score_threshold": 0.0})


def _add_computed(
    rows: list[Row],
    chosen: list[tuple[int, paper.Table, paper.PaperRow]],
    experiments: dict[str, _Experiment],
    arguments: Paper,
) -> None:
    """Add parameters, and FLOPs and times if asked for, to the rows whose card was found."""
    groups: dict[Any, list[tuple[Row, paper.PaperRow, _Experiment]]] = {}
    for entry, (number, _, row) in zip(rows, chosen, strict=True):
        found = experiments.get(row.card)
        if found is None:
            continue
        structure = _structure(found.config.model)
        parameters = nnx.to_flat_state(nnx.state(_shapes(structure), nnx.Param))
        entry["parameters"] = sum(math.prod(x.shape) for _, x in parameters)
        size = arguments.size if any(arguments.size) else found.config.data.test_canvases[0]
        if arguments.flops:
            entry["gflop"] = _gflop(structure, _inference(found, row), size, arguments.active)
        groups.setdefault((number, row.over or row.name, size), []).append((entry, row, found))
    if arguments.speed:
        for (_, over, size), members in groups.items():
            _add_times(members, over, size, arguments)


def _add_times(
    members: list[tuple[Row, paper.PaperRow, _Experiment]], over: str, size: tuple[int, int], arguments: Paper
) -> None:
    """Time rows in turn and add milliseconds, and speed-ups over the row ``over`` if it is among them."""
    queries = laid_out_queries(*size, arguments.active)
    models: dict[ModelConfig, DenseDetector] = {}
    detectors: dict[Any, Detector] = {}  # rows that compute the same are timed once
    for _, row, experiment in sorted(members, key=lambda member: member[1].name != over):
        structure, inference = _structure(experiment.config.model), _inference(experiment, row)
        if structure not in models:
            models[structure] = build_model(structure)
        if (structure, inference) not in detectors:
            detectors[structure, inference] = scripted_detector(models[structure], inference, queries, size)
    measured = {row["method"]: row for row in timed_rows(detectors, random_image(*size), arguments.rounds)}
    keys = ("ms_p50", "ms_p90", *(["speed_up"] if any(row.name == over for _, row, _ in members) else []))
    for entry, row, experiment in members:
        found = measured[_structure(experiment.config.model), _inference(experiment, row)]
        entry |= {key: found[key] for key in keys}


# What is printed ------------------------------------------------------------------------------------


def _flags(row: paper.PaperRow) -> str:
    changes = [f"--inference.{name.replace('_', '-')} {value}" for name, value in row.changes.items()]
    return " ".join([f"--methods {row.query}", *changes])


def _columns(arguments: Paper) -> list[Column]:
    return [
        Column("table", "table"),
        Column("row", "row"),
        Column("card", "card"),
        Column("evaluate", "EVALUATE", _arguments),
        Column("parameters", "parameters", lambda count: f"{count / 1e6:.1f} M"),
        *([Column("gflop", "GFLOP", decimals(0))] if arguments.flops else []),
        *([Column("ms_p50", "ms p50", ms), Column("speed_up", "speed-up", times)] if arguments.speed else []),
        Column("paper_AP", "paper AP", decimals(2)),
        Column("paper_APs", "APs", decimals(2)),
        Column("paper_FPS", "FPS", decimals(2)),
        Column("paper_speed_up", "speed-up", times),
    ]


def _arguments(command: str) -> str:
    """Return what follows the run in a command of ``evaluate_command``."""
    program, _, rest = command.partition(" runs/")
    return rest.partition(" ")[2] if program == "python eval.py" else "below"


def _computed_with(arguments: Paper) -> str:
    if not (arguments.flops or arguments.speed):
        return ""
    size = "x".join(map(str, arguments.size)) if any(arguments.size) else "each card's test size"
    timing = f", medians of {arguments.rounds} interleaved rounds" if arguments.speed else ""
    return f": random weights, {size}, batch 1, about {arguments.active:.0%} of P2 active with CSQ{timing}"


def _notes(
    arguments: Paper,
    chosen: list[tuple[int, paper.Table, paper.PaperRow]],
    figures: list[Row],
    experiments: dict[str, _Experiment],
) -> list[str]:
    tables = {number: table for number, table, _ in chosen}
    lines = [
        "paper: RTX 2080Ti; speed-up over the same model's dense heads on P2..P7. "
        "parameters: including frozen ones, without norms",
        *(["GFLOP: XLA's count, two per multiply-add; CQ and CSQ with padding"] if arguments.flops else []),
        "evaluate: python eval.py runs/CARD EVALUATE, once the card is trained. A whole table or figure:",
        *(f"  Table {n}: python benchmark.py {table.at_once}" for n, table in tables.items() if table.at_once),
        *(f"  {row['table']}: {row['evaluate']}" for row in figures),
    ]
    cards = [experiment.card for experiment in experiments.values()]
    for needs in dict.fromkeys(card.needs for card in cards):
        lines.append(f"train (needs {needs}; on a pod, the same on every host with --hosts.auto):")
        lines += [f"  {card.command}" for card in cards if card.needs == needs]
    return lines
