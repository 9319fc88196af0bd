"""Image to detections: dense high resolution, the plain detector, and the query methods at several densities."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from benchmarks import charts
from benchmarks.measuring import accuracy_columns, evaluate, evaluation_rows, speed_columns, timed_rows
from benchmarks.options import RunOrRandomNetwork
from benchmarks.paper import numbers as paper
from benchmarks.report import Column, Report, Row, times
from benchmarks.subjects import laid_out_queries, open_run, random_image, random_model, scripted_detector
from querydet_jax.config import InferenceConfig, load_config, override
from querydet_jax.config.loading import config_path
from querydet_jax.inference.detector import Detector
from querydet_jax.models import DenseDetector

DENSE = "dense P2..P7"

# The paper's table and row, by detector and by the first word of a method.
_PUBLISHED = {
    "retinanet": {
        "dense": (5, paper.DENSE),
        "RetinaNet": (1, "RetinaNet"),
        "CSQ": (5, "CSQ"),
        "CQ": (5, "CQ"),
        "CCQ": (5, "CCQ"),
    },
    "fcos": {"dense": (8, "QueryDet (FCOS)"), "FCOS": (8, "FCOS"), "CSQ": (8, "QueryDet (FCOS), CSQ")},
    "faster_rcnn": {"dense": (9, paper.DENSE), "CSQ": (9, "CSQ")},
}


@dataclass(frozen=True)
class EndToEnd(RunOrRandomNetwork):
    """Image to detections: dense P2..P7, RetinaNet P3..P7, CSQ, CQ and CCQ."""

    plain_run: str = ""
    """With --run: run folder of a plain RetinaNet or FCOS (P3..P7), trained on the same data."""
    sizes: tuple[tuple[int, int], ...] = ((800, 1344),)
    """Without --run: heights and widths of the image in px, multiples of 32."""
    batch: int = 1
    """Without --run: images per call, all with the same queries; milliseconds are per image."""
    active: tuple[float, ...] = (0.01, 0.03, 0.10)
    """Without --run: shares of P2's cells that CSQ makes active, context included."""
    crops_at: float = 0.03
    """Without --run: share at which CQ and CCQ run as well (0: leave them out)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Without --run: arithmetic of convolutions."""
    kernel: Literal["gather", "tiles"] = "gather"
    """Without --run: sparse convolution of CSQ."""


def end_to_end(arguments: EndToEnd) -> None:
    rows, not_run = _of_run(arguments) if arguments.run else _of_random_weights(arguments)
    detector = load_config(config_path(arguments.run)).model.detector if arguments.run else "retinanet"
    for row in rows:
        number, name = _PUBLISHED.get(detector, {}).get(row["method"].split()[0], (None, ""))
        row["paper_speed_up"] = paper.columns(number, name)["paper_speed_up"]
    arithmetic = "" if arguments.run else f", {arguments.dtype}, {arguments.kernel}"
    Report(
        "end_to_end",
        f"Image to detections: {arguments.in_words(arguments.batch)}{arithmetic}",
        [
            Column("method", "method"),
            *([Column("size", "size")] if not arguments.run else []),
            *accuracy_columns(bool(arguments.run)),
            *speed_columns(rows),
            Column("paper_speed_up", "paper", times),
        ],
        rows,
        notes=["speed-up: over the dense heads on P2..P7; paper: COCO val2017, ResNet-50, RTX 2080Ti"],
        not_run=not_run,
        draw=lambda figure: charts.bars(
            figure,
            [f"{row['method']} {row.get('size', '')}".strip() for row in rows],
            {"ms": [row["ms_p50"] for row in rows]},
            x="ms per image (median)",
            title="Image to detections",
        ),
    ).publish(arguments.out, arguments)


def _of_run(arguments: EndToEnd) -> tuple[list[Row], list[str]]:
    config, model, dataset = open_run(arguments.run)
    names = {DENSE: "dense", "CSQ": "csq", "CQ": "cq", "CCQ": "ccq"}
    detectors = {name: Detector(model, override(config.inference, {"query": query})) for name, query in names.items()}
    not_run = []
    if arguments.plain_run:
        plain_config, plain, _ = open_run(arguments.plain_run)
        detectors[_plain_name(plain)] = Detector(plain, override(plain_config.inference, {"query": "dense"}))
    else:
        not_run.append(f"{_plain_name(model)}: needs --plain-run RUN, trained on the same data")
    return evaluation_rows(evaluate(detectors, dataset, config, arguments.images)), not_run


def _plain_name(model: DenseDetector) -> str:
    return f"{type(model).__name__} P3..P7"


def _of_random_weights(arguments: EndToEnd) -> tuple[list[Row], list[str]]:
    kind = (arguments.backbone, arguments.classes, arguments.channels)
    model = random_model(*kind, dtype=arguments.dtype)
    plain = random_model(
        *kind,
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
        measured = timed_rows(detectors, random_image(height, width, arguments.batch), arguments.rounds)
        rows += [{"method": row.pop("method"), "size": f"{height}x{width}", **row} for row in measured]
    return rows, ["accuracy: needs --run RUN, a trained model and its data"]


def _detectors(
    arguments: EndToEnd, model: DenseDetector, plain: DenseDetector, shape: tuple[int, int]
) -> dict[str, Detector]:
    # The worst case of NMS: at a score threshold of 0 every level passes on all its candidates.
    base = override(InferenceConfig(score_threshold=0.0), {"kernel": arguments.kernel})
    dense = dataclasses.replace(base, query="dense")
    found = {DENSE: Detector(model, dense), _plain_name(plain): Detector(plain, dense)}
    for share in arguments.active:
        queries = laid_out_queries(*shape, share)
        found[f"CSQ {share:.0%}"] = scripted_detector(model, base, queries, shape)
    if arguments.crops_at:
        queries = laid_out_queries(*shape, arguments.crops_at)
        for query in ("cq", "ccq"):
            name = f"{query.upper()} {arguments.crops_at:.0%}"
            found[name] = scripted_detector(model, override(base, {"query": query}), queries, shape)
    return found
