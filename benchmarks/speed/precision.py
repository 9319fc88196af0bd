"""Inference in float32 and bfloat16: speed, accuracy, and how far the detections agree."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import nnx
from pycocotools import mask as coco_mask

from benchmarks import charts
from benchmarks.measuring import accuracy_columns, evaluate, evaluation_rows, speed_columns, timed_rows
from benchmarks.options import RunOrRandomImage
from benchmarks.report import Column, Report, Row, decimals, share
from benchmarks.subjects import laid_out_queries, open_run, random_image, random_model, scripted_detector
from querydet_jax.config import InferenceConfig, override
from querydet_jax.inference.detector import Detector
from querydet_jax.models import DenseDetector, build_model


@dataclass(frozen=True)
class Precision(RunOrRandomImage):
    """float32 and bfloat16 inference, dense and CSQ: speed, accuracy, agreement of detections."""

    min_score: float = 0.3
    """With --run: compare detections above this score."""


def precision(arguments: Precision) -> None:
    rows = _of_run(arguments) if arguments.run else _of_random_weights(arguments)
    Report(
        "precision",
        f"float32 and bfloat16 convolutions: {arguments.in_words()}",
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
            "speed-up: over dense float32; boxes and scores are float32 in all rows",
            *(
                [
                    f"found again: float32 detections above {arguments.min_score} that bfloat16 also finds (same "
                    "class, IoU at least 0.9); score change: the mean absolute difference of their scores"
                ]
                if arguments.run
                else []
            ),
        ],
        not_run=[] if arguments.run else ["accuracy and agreement: need --run RUN, a trained model and its data"],
        draw=lambda figure: charts.bars(
            figure,
            [row["method"] for row in rows],
            {"ms": [row["ms_p50"] for row in rows]},
            x="ms per image (median)",
            title="float32 and bfloat16",
        ),
    ).publish(arguments.out, arguments)


def in_bfloat16(model: DenseDetector) -> DenseDetector:
    """Return a model with the same weights and convolutions in bfloat16."""
    twin = build_model(dataclasses.replace(model.config, dtype="bfloat16"))
    nnx.update(twin, nnx.state(model))
    return twin


def _of_random_weights(arguments: Precision) -> list[Row]:
    shape = (arguments.height, arguments.width)
    model = random_model(arguments.backbone, arguments.classes, arguments.channels)
    queries = laid_out_queries(*shape, arguments.active)
    base = InferenceConfig(score_threshold=0.0)
    detectors = {
        f"{query} {dtype}": scripted_detector(network, override(base, {"query": query}), queries, shape)
        for dtype, network in (("float32", model), ("bfloat16", in_bfloat16(model)))
        for query in ("dense", "csq")
    }
    return timed_rows(detectors, random_image(*shape), arguments.rounds)


def _of_run(arguments: Precision) -> list[Row]:
    config, model, dataset = open_run(arguments.run)
    detectors = {
        f"{query} {dtype}": Detector(network, override(config.inference, {"query": query}))
        for dtype, network in (("float32", model), ("bfloat16", in_bfloat16(model)))
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


def agreement(
    reference: list[dict[str, Any]], other: list[dict[str, Any]], min_score: float
) -> tuple[float | None, float | None]:
    """Compare the ``reference`` detections above ``min_score`` with ``other`` ones.

    Args:
      reference, other: COCO results. A detection is found again if the best-overlapping one of the same image and
        class has an IoU of at least 0.9.

    Returns:
      the share found again, and the mean absolute difference of their scores; None where there are none.
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
    return len(changes) / total if total else None, float(np.mean(changes)) if changes else None
