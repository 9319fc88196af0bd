"""Image to detections: dense high resolution, plain RetinaNet, and the query methods at several densities."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from querydet_jax.benchmark import plots
from querydet_jax.benchmark.report import Column, Report, Row
from querydet_jax.benchmark.subject import (
    Subject,
    accuracy_columns,
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
from querydet_jax.detector import Detector
from querydet_jax.evaluation.runner import evaluate_detectors
from querydet_jax.models import DenseDetector

DENSE, PLAIN = "dense P2..P7", "RetinaNet P3..P7"


@dataclass(frozen=True)
class EndToEnd:
    """Image to detections: dense P2..P7, RetinaNet P3..P7, CSQ, CQ, CCQ."""

    run: str = ""
    """A run folder of train.py: its model on its validation images. Empty: random weights, speed only."""
    plain_run: str = ""
    """With --run: the run folder of a plain RetinaNet (P3..P7) on the same data."""
    images: int = 100
    """With --run: the first so many images (0: all)."""
    backbone: str = "resnet50"
    """Without --run: the backbone's name."""
    classes: int = 80
    """Without --run: number of classes."""
    sizes: tuple[tuple[int, int], ...] = ((800, 1344),)
    """Without --run: heights and widths of the image, multiples of 32."""
    active: tuple[float, ...] = (0.01, 0.03, 0.10)
    """Without --run: shares of P2's cells to make active (context included) for CSQ."""
    crops_at: float = 0.03
    """Without --run: the share at which CQ and CCQ run, too; 0: leave them out."""
    rounds: int = 20
    """Without --run: timed rounds."""
    dtype: str = "float32"
    """Without --run: float32 or bfloat16 convolutions."""
    kernel: str = "gather"
    """Without --run: gather or tiles, the sparse convolution of CSQ."""
    out: str = "runs/benchmark"
    """Folder for the json, csv and plot."""


def end_to_end(arguments: EndToEnd) -> None:
    rows, title, not_run = _of_run(arguments) if arguments.run else _of_random_weights(arguments)
    Report(
        "end_to_end",
        f"Image to detections: {title}",
        [
            Column("method", "method"),
            *([Column("size", "size")] if not arguments.run else []),
            *accuracy_columns(bool(arguments.run)),
            *speed_columns(rows),
        ],
        rows,
        notes=["speed-up is over the dense heads on P2..P7"],
        not_run=not_run,
        draw=lambda figure: plots.bars(
            figure,
            [f"{row['method']} {row.get('size', '')}".strip() for row in rows],
            {"ms": [row["ms_p50"] for row in rows]},
            x="ms an image (median)",
            title="Image to detections",
        ),
    ).publish(arguments.out, arguments)


def _of_run(arguments: EndToEnd) -> tuple[list[Row], str, list[str]]:
    config, model, dataset = open_run(arguments.run)
    names = {DENSE: "dense", "CSQ": "csq", "CQ": "cq", "CCQ": "ccq"}
    detectors = {name: Detector(model, override(config.inference, {"query": query})) for name, query in names.items()}
    not_run = []
    if arguments.plain_run:
        plain_config, plain, _ = open_run(arguments.plain_run)
        detectors[PLAIN] = Detector(plain, override(plain_config.inference, {"query": "dense"}))
    else:
        not_run.append(f"{PLAIN}: needs --plain-run RUN, a plain RetinaNet trained on the same data")
    indices = list(range(min(arguments.images, len(dataset)))) if arguments.images else None
    runs = evaluate_detectors(detectors, dataset, config.data, batch_size=config.inference.batch_size, indices=indices)
    about = Subject(run=arguments.run, images=arguments.images).about()
    return evaluation_rows(runs), about, not_run


def _of_random_weights(arguments: EndToEnd) -> tuple[list[Row], str, list[str]]:
    subject = Subject(backbone=arguments.backbone, classes=arguments.classes, rounds=arguments.rounds)
    model = random_model(subject, dtype=arguments.dtype)
    plain = random_model(
        subject,
        **{
            "dtype": arguments.dtype,
            "min_level": 3,
            "query.enabled": False,
            "loss.level_weighting": "uniform",
            "head.box_bias": "zero",
        },
    )
    rows: list[Row] = []
    for height, width in arguments.sizes:
        detectors = _detectors(arguments, model, plain, (height, width))
        measured = timed_rows(detectors, random_image(height, width), arguments.rounds)
        rows += [{"method": row.pop("method"), "size": f"{height}x{width}", **row} for row in measured]
    title = (
        f"random weights, {arguments.backbone}, {arguments.classes} classes, batch 1, {arguments.dtype}, "
        f"medians of {arguments.rounds} interleaved rounds"
    )
    return rows, title, ["accuracy: needs --run RUN, a trained model and its data"]


def _detectors(
    arguments: EndToEnd, model: DenseDetector, plain: DenseDetector, shape: tuple[int, int]
) -> dict[str, Detector]:
    # At a score threshold of 0 every level brings all its candidates to NMS, the worst case.
    base = override(InferenceConfig(score_threshold=0.0), {"kernel": arguments.kernel})
    dense = dataclasses.replace(base, query="dense")
    found = {DENSE: Detector(model, dense), PLAIN: Detector(plain, dense)}
    for share in arguments.active:
        queries = laid_out_queries(*shape, share)
        found[f"CSQ {share:.0%}"] = scripted_detector(model, base, queries, shape)
    if arguments.crops_at:
        queries = laid_out_queries(*shape, arguments.crops_at)
        for query in ("cq", "ccq"):
            name = f"{query.upper()} {arguments.crops_at:.0%}"
            found[name] = scripted_detector(model, override(base, {"query": query}), queries, shape)
    return found
