"""Write the files of an evaluation: detections, official result files, recall-precision curves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from querydet_jax.evaluation.coco import save_results
from querydet_jax.evaluation.curves import MEAN, RECALL, Curves, Line
from querydet_jax.evaluation.errors import ErrorReport
from querydet_jax.evaluation.scoring import Scores
from querydet_jax.evaluation.visdrone_files import write_result_files
from querydet_jax.runtime.files import folder_written_aside, write_csv
from querydet_jax.runtime.stores import as_path
from querydet_jax.viz.plots import NEEDS, save_plot
from querydet_jax.viz.text import percent, shorten

_TITLES = {"coco": "COCO evaluation", "visdrone": "official VisDrone evaluation, classes weighted by their images"}

# A plot cannot show more classes than this apart; beyond, name only the best and the worst.
_NAMED = 12


def write_scores(out: str | Path, scores: Mapping[str, Scores]) -> list[str]:
    """Write detections and curves to the folder ``out``.

    Write ``detections_METHOD.json`` (COCO results), for VisDrone also ``visdrone_METHOD/`` (one text file per image;
    replaces an existing folder), and the curves as in ``write_curves``.

    Returns:
      The names of what was written or left out, for a message.
    """
    out, written = as_path(out), []
    for name, of_method in scores.items():
        save_results(out / f"detections_{name}.json", of_method.results)
        if of_method.visdrone is not None:
            with folder_written_aside(out / f"visdrone_{name}") as aside:
                write_result_files(aside, of_method.rows)
            written.append(f"visdrone_{name}/*.txt")
    curves = {name: of_method.curves() for name, of_method in scores.items()}
    protocols = next(iter(curves.values()))
    by_protocol = {key: {name: of_method[key] for name, of_method in curves.items()} for key in protocols}
    return ["detections_*.json", *written, *write_curves(out, by_protocol)]


def write_curves(out: str | Path, curves: Mapping[str, Mapping[str, Curves]]) -> list[str]:
    """Write ``curves_PROTOCOL.csv``, one row per curve, and ``.png``, one row of plots per method.

    Args:
      out: the folder.
      curves: {protocol (coco, visdrone): {method: curves}}.

    Returns:
      The names of what was written or left out, for a message.
    """
    plotted = [_write_curves(as_path(out) / f"curves_{protocol}", protocol, curves[protocol]) for protocol in curves]
    kinds = (".csv", ".png") if all(plotted) else (".csv",)
    written = [f"curves_{protocol}{kind}" for protocol in curves for kind in kinds]
    return written if all(plotted) else [*written, f"no .png of the curves, which {NEEDS}"]


def _write_curves(path: Path, protocol: str, curves: Mapping[str, Curves]) -> bool:
    write_csv(
        path.with_suffix(".csv"),
        [
            {"method": name, "class": line.name, "iou": line.iou, "AP": _rounded_or_none(line.ap)}
            | {f"R{recall}": _rounded_or_none(value) for recall, value in enumerate(line.precision)}
            for name, of_method in curves.items()
            for line in (*of_method.means, *of_method.classes)
        ],
    )
    size = (12.0, 0.5 + 4.9 * len(curves))
    return save_plot(lambda figure: _draw(figure, curves, _TITLES[protocol]), path.with_suffix(".png"), size)


def _draw(figure: Any, curves: Mapping[str, Curves], title: str) -> None:
    from matplotlib import colormaps  # pyright: ignore[reportMissingImports]

    figure.suptitle(title, fontsize=11)
    rows = figure.subplots(len(curves), 2, squeeze=False)
    for (by_class, by_iou), (name, of_method) in zip(rows, curves.items(), strict=True):
        known = sorted((line for line in of_method.classes if not np.isnan(line.ap)), key=lambda line: -line.ap)
        named = known if len(known) <= _NAMED else known[: _NAMED // 2] + known[-_NAMED // 2 :]
        for line in known:
            by_class.plot(100 * RECALL, line.precision, color="0.85", linewidth=0.8)
        for i, line in enumerate(named):
            _plot(by_class, line, shorten(line.name, 18), color=colormaps["tab20"](2 * i % 20 + i // 10))
        some = f", {_NAMED // 2} best and {_NAMED // 2} worst of {len(known)}" if len(named) < len(known) else ""
        _finish(by_class, f"{name}: classes at IoU 0.50{some}", "class, AP50")
        *at, whole = of_method.means
        for i, line in enumerate(at):
            _plot(by_iou, line, line.iou, color=colormaps["viridis"](0.95 * i / (len(at) - 1)))
        _plot(by_iou, whole, whole.iou, color="black", linewidth=2.5, linestyle="--")
        _finish(by_iou, f"{name}: {MEAN} by IoU", "IoU, AP")


def _plot(axes: Any, line: Line, label: str, **style: Any) -> None:
    axes.plot(100 * RECALL, line.precision, label=f"{label}  {percent(line.ap)}", **{"linewidth": 1.6} | style)


def _finish(axes: Any, title: str, legend: str) -> None:
    axes.set(xlabel="recall, %", ylabel="precision, %", xlim=(0, 100), ylim=(0, 101))
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(title=legend, fontsize=8, title_fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _rounded_or_none(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 4)


def draw_errors(figure: Any, report: ErrorReport) -> None:
    """Draw an error report on a matplotlib figure: gains by kind, calibration, confusion."""
    gains, calibration, confusion = figure.subplots(1, 3)
    kinds = list(report.gains)[::-1]
    bars = gains.barh(kinds, [report.gains[kind] for kind in kinds], color="#4c72b0")
    gains.bar_label(bars, [f"+{percent(report.gains[k])} ({report.counts[k]:,})" for k in kinds], padding=3, fontsize=8)
    gains.set(xlabel="AP50 gained if mended (number)", title=f"errors, AP50 {percent(report.ap50)}")
    gains.margins(x=0.35)
    known = [(mean, right) for _, _, count, mean, right in report.calibration if count]
    calibration.plot([0, 1], [0, 1], color="0.7", linestyle="--", linewidth=1)
    calibration.plot([mean for mean, _ in known], [right for _, right in known], marker="o")
    calibration.set(xlabel="mean score", ylabel="share that is right", title="calibration", xlim=(0, 1), ylim=(0, 1))
    share = report.confusion / np.maximum(report.confusion.sum(axis=1, keepdims=True), 1)
    confusion.imshow(share, cmap="Blues", vmin=0, vmax=1)
    labels = [shorten(name, 14) for name in (*report.classes, "background")]
    if len(labels) <= _NAMED:
        confusion.set_xticks(range(len(labels)), labels, rotation=45, ha="right", fontsize=8)
        confusion.set_yticks(range(len(labels)), labels, fontsize=8)
        for (row, column), count in np.ndenumerate(report.confusion):
            dark = "white" if share[row, column] > 0.5 else "black"
            confusion.text(column, row, f"{count:,}", ha="center", va="center", fontsize=8, color=dark)
    confusion.set(xlabel="detected as", ylabel="object", title="confusion at the best thresholds")
