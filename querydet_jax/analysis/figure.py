"""Draw the report as six plots on a matplotlib figure."""

from __future__ import annotations

from typing import Any

import numpy as np

from querydet_jax.analysis.findings import BINS, FINEST, Findings, levels_name, sides
from querydet_jax.analysis.queries import CONTEXTS
from querydet_jax.viz.text import shorten

SIZE = (15.0, 8.6)  # inches
_CLASSES = 15
_OUTCOMES = {"below": "#c44e52", "between": "#e8b04b", "above": "#4c9a6a"}
_LEVELS = ("#3366aa", "#cc6633", "#559944", "#884499", "#777777")


def draw(figure: Any, found: Findings, results: dict[str, Any]) -> None:
    """Draw classes, boxes per image and sizes, then best anchors, active cells and buffers."""
    images = results["images"]
    figure.suptitle(
        f"{results['config']}, {results['split']}: {images['number']:,} images, {images['objects']:,} objects; "
        f"{results['rule']}",
        fontsize=11,
    )
    (classes, boxes, sizes), (anchors, active, buffers) = figure.subplots(2, 3)
    _classes(classes, results["classes"])
    _boxes(boxes, found)
    _sizes(sizes, found)
    _anchors(anchors, found, results["anchors"])
    _active(active, found)
    _buffers(buffers, found, results)
    for axes in (classes, boxes, sizes, anchors, active, buffers):
        axes.title.set_fontsize(10)
        axes.set_axisbelow(True)


def _classes(axes: Any, rows: list[dict[str, Any]]) -> None:
    shown = rows[:_CLASSES]
    names = [shorten(row["class"], 18) for row in shown]
    places = np.arange(len(shown))
    counts = [row["objects"] for row in shown]
    axes.barh(places, counts, color=_LEVELS[0])
    axes.set_yticks(places, names, fontsize=8)
    axes.invert_yaxis()
    for place, count in zip(places, counts, strict=True):
        axes.annotate(f" {count:,}", (count, place), va="center", fontsize=8)
    axes.margins(x=0.18)
    rest = f", {_CLASSES} most frequent of {len(rows)}" if len(rows) > _CLASSES else ""
    axes.set(title=f"classes{rest}", xlabel="objects")
    axes.grid(axis="x", alpha=0.3)


def _boxes(axes: Any, found: Findings) -> None:
    counts, limit = found.truth.counts, found.config.data.max_boxes
    most = int(counts.max())
    step = max(1, -(-(most + 1) // 60))
    axes.hist(counts, bins=np.arange(0, most + step + 1, step) - 0.5, color=_LEVELS[0])
    if limit <= 1.5 * most:
        axes.axvline(limit, color="black", linestyle="--", linewidth=1, label=f"data.max_boxes {limit}")
        axes.legend(fontsize=8)
    axes.set(title="boxes per image", xlabel="boxes" + (f", {step} per bar" if step > 1 else ""), ylabel="images")
    axes.grid(alpha=0.3)


def _sizes(axes: Any, found: Findings) -> None:
    original, resized = sides(found.truth.boxes), sides(found.view.boxes)
    both = np.concatenate([original, resized])
    if len(both):
        edges = np.geomspace(max(both.min() * 0.99, 0.5), both.max() * 1.01, 50)
        axes.hist(original, edges, histtype="step", color="0.5", linewidth=1.5, label="in the image")
        axes.hist(resized, edges, color=_LEVELS[0], alpha=0.6, label="in the network input")
        axes.set_xscale("log")
        ticks = [tick for tick in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048) if edges[0] <= tick <= edges[-1]]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.legend(fontsize=8)
    axes.set(title="size of objects", xlabel="sqrt(area), px", ylabel="objects")
    axes.grid(alpha=0.3)


def _anchors(axes: Any, found: Findings, rows: list[dict[str, Any]] | None) -> None:
    """Draw two stacked bars per size bin: the share of its objects by the IoU of their best anchor."""
    if rows is None:
        _draw_empty(axes, "IoU with the best anchor", f"{found.config.model.detector} has no anchors")
        return
    loss = found.config.model.loss
    names = [levels_name(found.config, finest) for finest in FINEST]
    labels = dict(
        below=f"below {loss.iou_background:g}",
        between=f"{loss.iou_background:g} to {loss.iou_foreground:g}",
        above=f"{loss.iou_foreground:g} or more",
    )
    rows = [row for row in rows if row["objects"]]
    for number, name in enumerate(names):
        start = np.zeros(len(rows))
        for part, colour in _OUTCOMES.items():
            share = np.array([100 * row[name][part] / row["objects"] for row in rows])
            label = labels[part] if number == 0 else None
            places = np.arange(len(rows)) + (-0.21 if number == 0 else 0.21)
            axes.bar(
                places, share, 0.38, bottom=start, color=colour, label=label, hatch="//" * number, edgecolor="white"
            )
            start += share
    label_of = {entry.key: entry.label.removesuffix(" px") for entry in BINS} | {"all": "all"}
    axes.set_xticks(range(len(rows)), [label_of[row["bin"]] for row in rows])
    axes.set(
        title=f"IoU with the best anchor: {names[0]} left, {names[1]} right (hatched)",
        xlabel="sqrt(area) in the network input, px",
        ylabel="% of the objects",
        ylim=(0, 100),
    )
    if rows:
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)


def _active(axes: Any, found: Findings) -> None:
    if not found.demands:
        _draw_empty(axes, "active cells")
        return
    for (level, asked), colour in zip(found.demands.items(), _LEVELS, strict=False):
        for percentile, style in ((50, "-"), (90, "--"), (99, ":")):
            values = 100 * np.percentile(asked.active, percentile, axis=0)
            name = "median" if percentile == 50 else f"{percentile} % of images below"
            axes.plot(CONTEXTS, values, style, marker="o", markersize=3, color=colour, label=f"P{level}, {name}")
    axes.axvline(found.config.inference.context, color="black", linewidth=0.8, alpha=0.5)
    axes.set(
        title="active cells with perfect queries (line: configured)",
        xlabel="context",
        ylabel="% of the level's cells",
    )
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    axes.grid(alpha=0.3)


def _buffers(axes: Any, found: Findings, results: dict[str, Any]) -> None:
    if not found.demands:
        _draw_empty(axes, "buffers")
        return
    capacities = results["inference"]["capacities"]
    ends = [row["capacity"] for rows in capacities.values() for row in rows]
    end = 102 * max(*ends, *(asked.room.max() for asked in found.demands.values()))
    for (level, asked), colour in zip(found.demands.items(), _LEVELS, strict=False):
        room = np.concatenate([[0], np.sort(100 * asked.room), [end]])
        held = 100 * np.minimum(np.arange(len(room)) / (len(room) - 2), 1)
        axes.step(room, held, where="post", color=colour, label=f"P{level}")
    for name, style in (("suggested", "-"), ("configured", "--")):
        for number, row in enumerate(capacities[name]):
            label = f"capacities, {name}" if number == 0 else None
            axes.axvline(100 * row["capacity"], color="black", linestyle=style, linewidth=1, label=label)
    axes.set(
        title=f"perfect queries: images that a buffer holds at context {found.config.inference.context}",
        xlabel="size of the buffer, % of the level's cells",
        ylabel="% of the images",
        ylim=(0, 101),
    )
    axes.set_xlim(0, end)
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(alpha=0.3)


def _draw_empty(axes: Any, title: str, reason: str = "no queries") -> None:
    axes.set(title=title, xticks=[], yticks=[])
    axes.text(0.5, 0.5, reason, ha="center", va="center", transform=axes.transAxes)
