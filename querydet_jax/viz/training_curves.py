"""Draw a run's losses, learning rate and evaluations from its ``metrics.jsonl``."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from querydet_jax.runtime.errors import DataError
from querydet_jax.runtime.files import writing
from querydet_jax.viz.plots import save_plot

# Terms of the loss in the order of the progress line; a detector has some of them.
LOSS_TERMS = ("rpn_cls", "rpn_box", "cls", "box", "centerness", "query")

_SIZE = (15.0, 5.0)  # inches
_COLOURS = ("#3366aa", "#cc6633", "#559944", "#884499", "#c44e52", "#777777", "#e8b04b", "#2a9d8f")
_METRICS = ("visdrone_AP", "visdrone_AP50", "AP", "AP50", "APs")
_STYLES = ("--", "-", ":", "-.")  # by detector; the first one is dense
_WINDOWS = 25  # a smoothed point is the mean of one of so many parts of the run

Rows = dict[int, dict[str, float]]


def save_curves(metrics: Path, path: Path, best_metric: str = "") -> bool:
    """Draw the curves of a run; without matplotlib, return False.

    Args:
      metrics: the run's ``metrics.jsonl``.
      path: the picture to write.
      best_metric: the metric of the evaluations whose largest value is marked.

    Raises:
      DataError: ``metrics`` is missing or has no line of a step.
      QueryDetError: the picture cannot be written.
    """
    losses, evaluations = read_metrics(metrics)
    if not losses and not evaluations:
        raise DataError(f"{metrics}: no line of a step; train first")
    draw = partial(_draw, losses=losses, evaluations=evaluations, best_metric=best_metric)
    with writing(path):
        return save_plot(draw, path, _SIZE)


def read_metrics(path: Path) -> tuple[Rows, Rows]:
    """Return {step: values} of the logged steps and of the evaluations, by step; null is nan.

    Of lines of the same step, which a resumed run repeats, the last one holds. Damaged lines are left out.

    Raises:
      DataError: there is no such file.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; give the folder of a run that has begun to train")
    losses, evaluations = Rows(), Rows()
    for line in path.read_bytes().splitlines():
        try:
            values = json.loads(line)
            step = values.pop("step")
            numbers = {name: float("nan") if x is None else float(x) for name, x in values.items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue
        if type(step) is int:
            (losses if "loss" in numbers else evaluations)[step] = numbers
    return dict(sorted(losses.items())), dict(sorted(evaluations.items()))


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Return the centred mean of ``window`` values (fewer at the ends), nan left out, float64 [n]."""
    known = np.isfinite(values)
    ones = np.ones(window)
    half = window // 2

    def sums(x: np.ndarray) -> np.ndarray:
        return np.convolve(x, ones)[half : half + len(x)]

    with np.errstate(invalid="ignore", divide="ignore"):
        return sums(np.where(known, values, 0.0)) / sums(known.astype(np.float64))


def _draw(figure: Any, losses: Rows, evaluations: Rows, best_metric: str) -> None:
    loss, rate, metrics = figure.subplots(1, 3, width_ratios=(4, 2, 4))
    _draw_losses(loss, losses)
    _draw_rate(rate, losses)
    _draw_metrics(metrics, evaluations, best_metric)
    steps = [*losses, *evaluations]
    for axes in (loss, rate, metrics):
        axes.set_xlabel("step")
        axes.set_xlim(0, 1.03 * max(steps))
        axes.grid(alpha=0.3)
        axes.title.set_fontsize(10)


def _draw_losses(axes: Any, losses: Rows) -> None:
    steps = np.array(list(losses))
    window = max(1, len(steps) // _WINDOWS)
    names = [name for name in ("loss", *LOSS_TERMS) if any(name in row for row in losses.values())]
    for name, colour in zip(names, ("black", *_COLOURS), strict=False):
        values = np.array([row.get(name, np.nan) for row in losses.values()])
        values[values <= 0] = np.nan  # the axis is logarithmic
        if window > 1:
            axes.plot(steps, values, color=colour, alpha=0.2, linewidth=0.8)
        axes.plot(steps, smoothed(values, window), color=colour, linewidth=1.6, label="sum" if name == "loss" else name)
    if names:
        axes.set_yscale("log", subs=(2, 5))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.legend(fontsize=8)
    axes.set_title("training loss by term" + (f", mean of {window} logged steps" if window > 1 else ""))


def _draw_rate(axes: Any, losses: Rows) -> None:
    axes.plot(list(losses), [row.get("lr", np.nan) for row in losses.values()], color=_COLOURS[0])
    axes.set_ylim(bottom=0)
    axes.set_title("learning rate")


def _draw_metrics(axes: Any, evaluations: Rows, best_metric: str) -> None:
    given = dict.fromkeys(name for row in evaluations.values() for name in row if "/" in name)
    detectors = list(dict.fromkeys(name.split("/")[0] for name in given))
    shown = [name for metric in _METRICS for name in given if name.split("/")[1] == metric]
    if best_metric in given and best_metric not in shown:
        shown.append(best_metric)
    metrics = list(dict.fromkeys(name.split("/")[1] for name in shown))
    steps = np.array(list(evaluations))
    for name in shown:
        detector, metric = name.split("/")
        colour = _COLOURS[metrics.index(metric) % len(_COLOURS)]
        style = _STYLES[detectors.index(detector) % len(_STYLES)]
        values = np.array([row.get(name, np.nan) for row in evaluations.values()])
        axes.plot(steps, values, style, color=colour, marker="o", markersize=3, label=name)
        if name == best_metric and np.isfinite(values).any():
            at = int(np.nanargmax(values))
            label = f"best: {values[at]:.2f} at step {steps[at]}"
            axes.plot(steps[at], values[at], "*", color=colour, markersize=14, label=label)
    if shown:
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4)
    axes.set_title("evaluations" if evaluations else "no evaluations yet")
