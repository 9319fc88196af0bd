"""`querydet score`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from querydet_jax.cli.main import SUMMARIES
from querydet_jax.evaluation.coco import evaluate
from querydet_jax.evaluation.curves import Curves
from querydet_jax.evaluation.errors import ErrorReport, attribute
from querydet_jax.evaluation.judges import Judge
from querydet_jax.evaluation.metrics import CocoMetrics
from querydet_jax.evaluation.output import draw_errors, write_curves
from querydet_jax.evaluation.standalone import read_coco, read_pictures, score_visdrone
from querydet_jax.evaluation.visdrone_results import VisDroneMetrics
from querydet_jax.evaluation.worst import PAGE, check_apart, find_worst, write_worst
from querydet_jax.runtime.errors import ConfigError
from querydet_jax.runtime.files import write_json
from querydet_jax.runtime.stores import as_path
from querydet_jax.viz.plots import save_plot

_Out = Annotated[str, tyro.conf.arg(metavar="FOLDER")]


def score(words: Sequence[str], program: str) -> None:
    """Score the result files of any detector."""
    tyro.extras.subcommand_cli_from_dict(
        {"visdrone": _visdrone, "coco": _coco},
        args=list(words),
        prog=program,
        description=SUMMARIES["score"],
    )


def _visdrone(
    results: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RESULT_FOLDER")],
    annotations: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ANNOTATION_FOLDER")],
    images: Annotated[str, tyro.conf.arg(metavar="FOLDER")] = "",
    exif: Literal["auto", "apply", "ignore"] = "auto",
    out: _Out = "",
) -> None:
    """Score VisDrone's text files by the official protocol.

    Args:
      results: Folder of the results, one text file per image, x,y,w,h,score,category,-1,-1 per line.
      annotations: Folder of the official annotation files, or the split's folder.
      images: Folder of the images, read for their sizes alone (default: images/ beside the annotations).
      exif: Whether these sizes are those of images turned by their EXIF orientation, as data.exif.
      out: Write report.json and the recall-precision curves to this folder.
    """
    metrics = score_visdrone(results, annotations, images or None, exif=exif)
    _publish(metrics, "visdrone", metrics.recall_precision(), out, results)


def _coco(
    results: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RESULTS_JSON")],
    annotations: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ANNOTATIONS_JSON")],
    max_detections: tuple[int, ...] = (1, 10, 100),
    errors: bool = False,
    judge: Judge = "pycocotools",
    worst: int = 0,
    images: Annotated[str, tyro.conf.arg(metavar="FOLDER")] = "",
    out: _Out = "",
) -> None:
    """Score COCO results by COCO's protocol.

    Args:
      results: A list of image_id, category_id, bbox [x, y, w, h], score.
      annotations: The annotation file with images, annotations, categories.
      max_detections: Limits of detections per image and class; AP takes the largest.
      errors: Also attribute what is wrong, by TIDE: kinds of error, best thresholds, calibration, confusion.
      worst: Also draw the N pictures with the gravest errors of each kind: OUT/worst/index.html; needs --images, --out.
      images: Folder of the pictures, for --worst.
      judge: Who computes the metrics; hotcoco (pip install -r requirements-hotcoco.txt) gives the same ones sooner.
      out: Write report.json and plots to this folder: recall-precision curves, errors.
    """
    if worst < 0:
        raise ConfigError(f"--worst {worst}: give 0 or more")
    if worst and not (images and out):
        raise ConfigError(f"--worst {worst}: add --images FOLDER, where the pictures are, and --out FOLDER")
    truth, found, names = read_coco(results, annotations)
    pictures = read_pictures(truth, names[0], images) if worst else None
    if pictures is not None:
        check_apart(as_path(out), as_path(images))
    metrics = evaluate(truth, found, max_detections=max_detections, names=names, judge=judge)
    explained = attribute(truth, found, names=names) if errors or worst else None
    _publish(metrics, "coco", metrics.curves, out, results, explained if errors else None)
    if pictures is not None and explained is not None:
        count = write_worst(as_path(out), find_worst(truth, found, explained, worst), *pictures)
        print(f"wrote {out}/{PAGE} with {count} pictures")


def _publish(
    metrics: CocoMetrics | VisDroneMetrics,
    protocol: str,
    curves: Curves,
    out: str,
    results: str,
    errors: ErrorReport | None = None,
) -> None:
    print(metrics.table())
    if errors is not None:
        print(f"\n{errors.table()}")
    if out:
        explained = {} if errors is None else {"errors": errors.to_dict()}
        write_json(as_path(out) / "report.json", metrics.to_dict() | explained, indent=2)
        written = write_curves(out, {protocol: {Path(results).stem: curves}})
        if errors is not None and save_plot(
            partial(draw_errors, report=errors), as_path(out) / "errors.png", (14, 4.4)
        ):
            written.append("errors.png")
        print(f"\nwrote to {out}: {', '.join(['report.json', *written])}")
