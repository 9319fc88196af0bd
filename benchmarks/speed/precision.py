"""bfloat16 beside float32 inference: speed, and what it does to the detections."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import nnx
from pycocotools import mask as coco_mask

from benchmarks import plots
from benchmarks.report import Column, Report, Row, decimals, share
from benchmarks.subject import (
    Subject,
    accuracy_columns,
    evaluate,
    evaluation_rows,
    laid_out_queries,
    open_run,
    random_image,
    random_model,
    scripted_detector,
    speed_columns,
    timed_rows,
)
from querydet_jax.config import InferenceConfig, override
from querydet_jax.inference.detector import Detector
from querydet_jax.models import DenseDetector, build_model


@dataclass(frozen=True)
class Precision(Subject):
    """float32 against bfloat16 inference, dense and CSQ: speed, accuracy, agreement of detections."""

    min_score: float = 0.3
    """With --run: detections above this score are compared."""


def precision(arguments: Precision) -> None:
    rows = _of_run(arguments) if arguments.run else _of_random_weights(arguments)
    Report(
        "precision",
        f"float32 and bfloat16 convolutions: {arguments.about()}",
        [
            Column("method", "method"),
            *accuracy_columns(bool(arguments.run)),
            *speed_columns(rows),
            *(
                [
                    Column("found_again", "found again", share),
                    Column("score_change", "score change", decimals(4)),
                ]
                if arguments.run
                else []
            ),
        ],
        rows,
        notes=[
            "speed-up is over dense float32; boxes and scores are float32 in all",
            *(
                [
                    f"found again: float32 detections above {arguments.min_score} that bfloat16 has, too (same class, "
                    "IoU at least 0.9); score change: their mean absolute difference"
                ]
                if arguments.run
                else []
            ),
        ],
        not_run=[] if arguments.run else ["accuracy and agreement: need --run RUN, a trained model and its data"],
        draw=lambda figure: plots.bars(
            figure,
            [row["method"] for row in rows],
            {"ms": [row["ms_p50"] for row in rows]},
            x="ms an image (median)",
            title="float32 and bfloat16",
        ),
    ).publish(arguments.out, arguments)


def in_bfloat16(model: DenseDetector) -> DenseDetector:
    """The same weights with convolutions in bfloat16."""
    twin = build_model(dataclasses.replace(model.config, dtype="bfloat16"))
    nnx.update(twin, nnx.state(model))
    return twin


def _of_random_weights(arguments: Precision) -> list[Row]:
    shape = (arguments.height, arguments.width)
    model = random_model(arguments.backbone, arguments.classes, arguments.channels)
    queries = laid_out_queries(*shape, arguments.active)
    base = InferenceConfig(score_threshold=0.0)
    detectors = {
        f"{query} {dtype}": scripted_detector(subject, override(base, {"query": query}), queries, shape)
        for dtype, subject in (("float32", model), ("bfloat16", in_bfloat16(model)))
        for query in ("dense", "csq")
    }
    return timed_rows(detectors, random_image(*shape), arguments.rounds)


def _of_run(arguments: Precision) -> list[Row]:
    config, model, dataset = open_run(arguments.run)
    detectors = {
        f"{query} {dtype}": Detector(subject, override(config.inference, {"query": query}))
        for dtype, subject in (("float32", model), ("bfloat16", in_bfloat16(model)))
        for query in ("dense", "csq")
    }
    runs = evaluate(detectors, dataset, config, arguments.images)
    rows = evaluation_rows(runs)
    for row in rows:
        query, dtype = row["method"].split()
        if dtype == "bfloat16":
            reference, other = runs[f"{query} float32"].scores.results, runs[row["method"]].scores.results
            row["found_again"], row["score_change"] = agreement(reference, other, arguments.min_score)
    return rows


def agreement(reference: list[dict[str, Any]], other: list[dict[str, Any]], min_score: float) -> tuple[float, float]:
    """Share of the ``reference`` detections above ``min_score`` that ``other`` has, too; how far their scores differ.

    Args:
      reference, other: COCO results. One is found again by the best-overlapping of the same image and class, if
        their IoU is at least 0.9.

    Returns:
      the share, and the mean absolute difference of the scores of those found again; nan where there are none.
    """
    groups: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for result in other:
        groups[result["image_id"], result["category_id"]].append(result)
    wanted: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for result in reference:
        if result["score"] > min_score:
            wanted[result["image_id"], result["category_id"]].append(result)
    total, changes = sum(map(len, wanted.values())), []
    for group, results in wanted.items():
        candidates = groups.get(group)
        if not candidates:
            continue
        ours, theirs = ([entry["bbox"] for entry in entries] for entries in (results, candidates))
        iou = np.asarray(coco_mask.iou(ours, theirs, [0] * len(candidates)))
        for row, result in enumerate(results):
            best = int(np.argmax(iou[row]))
            if iou[row, best] >= 0.9:
                changes.append(abs(candidates[best]["score"] - result["score"]))
    if not total:
        return float("nan"), float("nan")
    return len(changes) / total, float(np.mean(changes)) if changes else float("nan")
