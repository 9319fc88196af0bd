"""Measure a data set, and collect the results as plain values for tables, files and plots.

Letters: I images, N boxes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from querydet_jax.analysis.anchors import best_anchor_iou
from querydet_jax.analysis.queries import (
    CONTEXTS,
    Demand,
    demand,
    held,
    query_shares,
    sparse_levels,
    suggested_capacities,
)
from querydet_jax.analysis.views import Truth, View, inference_view, read_truth, training_view, unfit_for_training
from querydet_jax.config import Config, ModelConfig
from querydet_jax.data import Dataset
from querydet_jax.evaluation.metrics import DEFAULT_BINS, SizeBin
from querydet_jax.models.loss_terms import query_scale_range

# Leave out the bin that overlaps others, so that shares add up.
BINS = tuple(entry for entry in DEFAULT_BINS if entry != SizeBin(0, 16))
HELD = (0.5, 0.99)  # shares of the images that the suggested capacities hold
FINEST = (3, 2)  # finest levels for which anchors are compared: RetinaNet's and QueryDet's


@dataclass(frozen=True)
class Findings:
    """Measurements by image and by box.

    Attributes:
      config, split: the configuration and the split measured.
      names: names of the images, [I].
      classes: class names.
      exif: how many pictures have an EXIF orientation, and what is done about it; empty if none has.
      truth: the boxes.
      view: the images as resized for training or inference, depending on the split.
      best: {finest level: IoU of each box with its best anchor on that level or a coarser one, float32 [N]}; empty
        for a detector without anchors.
      shares: {level: share of its cells that are query targets in ``view``, [I]}; empty without a query head.
      fits: positions of the images that fit an inference canvas.
      demands: {sparse level: its cost for these images at inference}; empty without a query head or such images.
    """

    config: Config
    split: str
    names: tuple[str, ...]
    classes: tuple[str, ...]
    exif: str
    truth: Truth
    view: View
    best: dict[int, np.ndarray]
    shares: dict[int, np.ndarray]
    fits: np.ndarray
    demands: dict[int, Demand]


def measure(dataset: Dataset, config: Config, split: Literal["train", "val"]) -> Findings:
    """Measure one split of a data set as ``config`` would use it. Reads annotations, no images."""
    truth = read_truth(dataset)
    inference = inference_view(truth, config.data)
    view = training_view(truth, config.data, config.train.seed) if split == "train" else inference
    sparse = sparse_levels(config)
    fits = np.flatnonzero(inference.canvas >= 0)
    return Findings(
        config,
        split,
        tuple(dataset.file_name(i) for i in range(len(dataset))),
        dataset.classes,
        dataset.exif_note,
        truth,
        view,
        _best_ious(truth, view, config.model) if config.model.detector != "fcos" else {},
        query_shares(truth, view, config.model, (config.inference.start_level, *sparse)) if sparse else {},
        fits,
        demand(truth, inference, fits, config, BINS) if sparse and len(fits) else {},
    )


def _best_ious(truth: Truth, view: View, model: ModelConfig) -> dict[int, np.ndarray]:
    levels = tuple(range(min(FINEST), model.max_level + 1))
    iou = best_anchor_iou(view.boxes, view.inputs[truth.image], model.anchors, levels)
    return {finest: iou[:, levels.index(finest) :].max(axis=1) for finest in FINEST}


def sides(boxes: np.ndarray) -> np.ndarray:
    """Return sqrt(area) in px of boxes [N,4]."""
    extent = boxes[:, 2:] - boxes[:, :2]
    return np.sqrt(extent[:, 0] * extent[:, 1])


def results(found: Findings) -> dict[str, Any]:
    """Return counts and shares (0..1) for tables and the JSON file; None where there is nothing to count."""
    return {
        "config": found.config.name,
        "split": found.split,
        "rule": found.view.rule,
        "exif": found.exif,
        "images": _images(found),
        "boxes_an_image": _boxes_per_image(found),
        "classes": _classes(found),
        "sizes": _sizes(found),
        "anchors": _anchors(found) if found.best else None,
        "queries": _queries(found) if found.shares else None,
        "inference": _inference(found) if found.demands else None,
    }


def image_rows(found: Findings) -> list[dict[str, Any]]:
    """Return one row per image, for the CSV file."""
    truth, context = found.truth, found.config.inference.context
    place = dict(zip(found.fits.tolist(), range(len(found.fits)), strict=True))
    rows = []
    for i, name in enumerate(found.names):
        row = {
            "image": name,
            "height": int(truth.sizes[i, 0]),
            "width": int(truth.sizes[i, 1]),
            "input_height": int(found.view.inputs[i, 0]),
            "input_width": int(found.view.inputs[i, 1]),
            "objects": int(truth.counts[i]),
            "crowd": int(truth.crowd[i]),
        }
        row |= {f"query_share_P{level}": round(float(share[i]), 6) for level, share in found.shares.items()}
        for level, asked in found.demands.items():
            known = i in place
            if context in CONTEXTS:
                row[f"active_share_P{level}"] = round(float(asked.active[place[i], context]), 6) if known else None
            row[f"room_share_P{level}"] = round(float(asked.room[place[i]]), 6) if known else None
        rows.append(row)
    return rows


def _images(found: Findings) -> dict[str, Any]:
    truth, view = found.truth, found.view
    on_none = int((view.canvas < 0).sum())
    sizes, counts = np.unique(truth.sizes, axis=0, return_counts=True)
    canvases = []
    for position, (height, width) in enumerate(view.canvases):
        here = view.shapes[view.canvas == position].astype(np.int64)
        filled = float(here.prod(axis=1).mean() / (height * width)) if len(here) else None
        canvases.append({"height": height, "width": width, "images": len(here), "filled": filled})
    return {
        "number": len(truth.sizes),
        "without_objects": int((truth.counts == 0).sum()),
        "objects": len(truth.boxes),
        "crowd": int(truth.crowd.sum()),
        "ignored": truth.ignored,
        "sizes": [
            {"height": h, "width": w, "images": int(counts[i])}
            for i, (h, w) in sorted(enumerate(sizes.tolist()), key=lambda item: -counts[item[0]])
        ],
        "canvases": canvases,
        "on_no_canvas": on_none,
        # Training may draw a size that fits no canvas.
        "may_fit_no_canvas": unfit_for_training(truth, found.config.data) if found.split == "train" else on_none,
    }


def _boxes_per_image(found: Findings) -> dict[str, Any]:
    counts, limit = found.truth.counts, found.config.data.max_boxes
    return {
        "mean": float(counts.mean()),
        "median": float(np.median(counts)),
        "p95": float(np.percentile(counts, 95)),
        "max": int(counts.max()),
        "max_boxes": limit,
        "images_over": int((counts > limit).sum()),
        "boxes_over": int(np.maximum(counts - limit, 0).sum()),
    }


def _classes(found: Findings) -> list[dict[str, Any]]:
    truth, size = found.truth, sides(found.truth.boxes)
    rows = []
    for k, name in enumerate(found.classes):
        mine = truth.classes == k
        rows.append(
            {
                "class": name,
                "objects": int(mine.sum()),
                "images": len(np.unique(truth.image[mine])),
                "median_size": float(np.median(size[mine])) if mine.any() else None,
            }
        )
    return sorted(rows, key=lambda row: -row["objects"])


def _sizes(found: Findings) -> list[dict[str, Any]]:
    original, resized = sides(found.truth.boxes), sides(found.view.boxes)
    return [
        {"bin": entry.key, "original": int(_in(entry, original).sum()), "input": int(_in(entry, resized).sum())}
        for entry in BINS
    ]


def _anchors(found: Findings) -> list[dict[str, Any]]:
    """Count objects by size in the network input and by the matcher's label of their best anchor.

    ``below`` is background, ``between`` ignored, ``above`` foreground.
    """
    loss, size = found.config.model.loss, sides(found.view.boxes)
    rows = []
    for key, mine in [*((entry.key, _in(entry, size)) for entry in BINS), ("all", np.ones(len(size), bool))]:
        row: dict[str, Any] = {"bin": key, "objects": int(mine.sum())}
        for finest, best in found.best.items():
            edges = [-np.inf, loss.iou_background, loss.iou_foreground, np.inf]
            counts = np.histogram(best[mine], edges)[0]
            parts = zip(("below", "between", "above"), counts.tolist(), strict=True)
            row[levels_name(found.config, finest)] = dict(parts)
        rows.append(row)
    return rows


def levels_name(config: Config, finest: int) -> str:
    return f"P{finest}..P{config.model.max_level}"


def _queries(found: Findings) -> list[dict[str, Any]]:
    size = sides(found.view.boxes)
    rows = []
    for level, shares in found.shares.items():
        low, high = query_scale_range(found.config.model, level)
        small = int(((size >= low) & (size < high)).sum())
        rows.append({"level": f"P{level}", "below_px": high, "small_objects": small, **_summary(shares)})
    return rows


def _inference(found: Findings) -> dict[str, Any]:
    inference, demands = found.config.inference, found.demands
    suggested = suggested_capacities(demands, HELD)
    return {
        "images": len(found.fits),
        "left_out": len(found.truth.sizes) - len(found.fits),
        "context": inference.context,
        "active": [
            {"level": f"P{level}", "context": context, **_summary(asked.active[:, context])}
            for level, asked in demands.items()
            for context in CONTEXTS
        ],
        "room": [{"level": f"P{level}", **_summary(asked.room)} for level, asked in demands.items()],
        "reached": [
            {
                "bin": entry.key,
                "objects": int(next(iter(demands.values())).totals[row]),
                **{f"P{level}": int(asked.hits[row]) for level, asked in demands.items()},
            }
            for row, entry in enumerate(BINS)
        ],
        "capacities": {
            "suggested": [{"capacity": capacity, "held": held(demands, capacity)} for capacity in suggested],
            "configured": [{"capacity": c, "held": held(demands, c)} for c in inference.capacities],
        },
    }


def _in(entry: SizeBin, size: np.ndarray) -> np.ndarray:
    return (size >= entry.low) & (size < entry.high)


def _summary(shares: np.ndarray) -> dict[str, float]:
    return {
        "mean": float(shares.mean()),
        "median": float(np.median(shares)),
        "p90": float(np.percentile(shares, 90)),
        "p99": float(np.percentile(shares, 99)),
        "max": float(shares.max()),
    }
