"""Image to detections: dense high resolution, plain RetinaNet, CSQ at several densities of queries."""

from __future__ import annotations

import csv
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from querydet_jax import machine
from querydet_jax.benchmark.queries import density, script_queries
from querydet_jax.benchmark.timing import interleaved
from querydet_jax.config import InferenceConfig, ModelConfig, override
from querydet_jax.detector import Detector
from querydet_jax.evaluation.metrics import text_table
from querydet_jax.files import write_json, written_aside
from querydet_jax.models import build_model
from querydet_jax.ops.anchors import level_shape


@dataclass(frozen=True)
class EndToEnd:
    """Time image to detections with random weights: dense P2..P7, RetinaNet P3..P7, CSQ."""

    backbone: str = "resnet50"
    """Name of the backbone."""
    classes: int = 80
    height: int = 800
    width: int = 1344
    active: tuple[float, ...] = (0.01, 0.03, 0.10)
    """Shares of P2's cells to make active (context included)."""
    rounds: int = 20
    dtype: str = "float32"
    """float32 or bfloat16 convolutions."""
    out: str = "runs/benchmark"
    """Folder for end_to_end.json and end_to_end.csv."""


def end_to_end(arguments: EndToEnd) -> None:
    config = override(
        ModelConfig(),
        {"backbone.name": arguments.backbone, "num_classes": arguments.classes, "dtype": arguments.dtype},
    )
    # At a score threshold of 0 every level brings all its candidates to NMS, the worst case.
    inference = InferenceConfig(score_threshold=0.0)
    model = build_model(config)
    plain = build_model(
        override(
            config,
            {"min_level": 3, "query.enabled": False, "loss.level_weighting": "uniform", "head.box_bias": "zero"},
        )
    )
    rng = np.random.default_rng(0)
    image = jax.device_put(rng.integers(0, 256, (1, arguments.height, arguments.width, 3), dtype=np.uint8))
    start = inference.start_level
    shapes = [level_shape(arguments.height, arguments.width, level) for level in range(start - 1, 1, -1)]

    dense = Detector(model, dataclasses.replace(inference, query="dense"))
    retinanet = Detector(plain, dataclasses.replace(inference, query="dense"))
    detectors = {"dense P2..P7": dense, "RetinaNet P3..P7": retinanet}
    for share in arguments.active:
        fires = density(level_shape(arguments.height, arguments.width, start), shapes, inference.context, share)
        script_queries(model, fires)
        detectors[f"CSQ {share:.0%}"] = Detector(model, inference)
    active = {}
    for name, detector in detectors.items():
        stats = jax.device_get(detector(image)).stats
        active[name] = {
            f"P{level}": float(s.active) / np.prod(level_shape(arguments.height, arguments.width, level))
            for level, s in sorted(stats.items())
        }
    times = interleaved({name: (lambda d=d: d(image)) for name, d in detectors.items()}, arguments.rounds)

    base = np.median(times["dense P2..P7"])
    rows = [
        {
            "method": name,
            "active_P3": active[name].get("P3"),
            "active_P2": active[name].get("P2"),
            "ms_p50": float(np.median(ms)),
            "ms_p90": float(np.percentile(ms, 90)),
            "speed_up": float(base / np.median(ms)),
        }
        for name, ms in times.items()
    ]
    out = Path(arguments.out)
    write_json(
        out / "end_to_end.json",
        {"arguments": dataclasses.asdict(arguments), "machine": machine.describe(), "rows": rows},
        indent=2,
    )
    _write_csv(out / "end_to_end.csv", rows)
    share = lambda x: "-" if x is None else f"{x:.1%}"  # noqa: E731
    print(
        text_table(
            ["method", "active P3", "active P2", "ms p50", "ms p90", "speed-up over dense"],
            [
                [
                    row["method"],
                    share(row["active_P3"]),
                    share(row["active_P2"]),
                    f"{row['ms_p50']:.0f}",
                    f"{row['ms_p90']:.0f}",
                    f"{row['speed_up']:.2f}x",
                ]
                for row in rows
            ],
        )
    )
    print(
        f"\n{arguments.backbone}, {arguments.classes} classes, {arguments.height}x{arguments.width}, batch 1, "
        f"{arguments.dtype}, medians of {arguments.rounds} interleaved rounds\n{machine.one_line()}\n"
        f"wrote {out}/end_to_end.json and .csv"
    )


def _write_csv(path: Path, rows: list[dict[str, object]]) -> None:
    with written_aside(path) as aside, aside.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
