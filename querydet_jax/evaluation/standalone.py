"""Scores of result files, of whatever detector, against annotation files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from querydet_jax.data.readers.folders import SUFFIXES, by_stem, image_sizes, read_text
from querydet_jax.data.readers.visdrone import parse_annotations
from querydet_jax.evaluation.coco import evaluate
from querydet_jax.evaluation.metrics import CocoMetrics
from querydet_jax.evaluation.visdrone import VisDroneImage, evaluate_visdrone
from querydet_jax.evaluation.visdrone_files import read_result_file
from querydet_jax.evaluation.visdrone_results import VisDroneMetrics
from querydet_jax.runtime.errors import DataError

# Beyond any box: regions and boxes are then cut at no edge.
_BOUNDLESS = (1 << 30, 1 << 30)


def score_visdrone(results: str | Path, annotations: str | Path, images: str | Path | None = None) -> VisDroneMetrics:
    """Evaluate VisDrone's text files of results, one an image, by the official protocol.

    Of the images the protocol needs the sizes alone: it cuts boxes and ignored regions at the image's edges before it
    tells which boxes lie in a region. Without images nothing is cut, a difference for what reaches over an edge only.

    Args:
      results: folder of the files. An image without one has no detections, which the notes then say.
      annotations: the official annotation files' folder, or the split's folder with ``annotations/`` in it.
      images: folder of the images; None: ``images/`` beside the annotations, if there is one.

    Raises:
      DataError: a folder missing or without files; a bad line, by file and number; a result file, or with
        ``images`` an annotation file, of no image.
    """
    results, annotations = Path(results), Path(annotations)
    if (annotations / "annotations").is_dir():
        annotations = annotations / "annotations"
    found, truth = _texts(results, "results"), _texts(annotations, "annotations")
    for stem, name in found.items():
        if stem not in truth:
            raise DataError(
                f"{results / name}: there is no annotation file {annotations / stem}.txt; score the results of a split "
                "against its annotations"
            )
    beside = annotations.parent / "images"
    sizes, notes = [_BOUNDLESS] * len(truth), []
    if images is not None or beside.is_dir():
        sizes = _sizes(Path(images or beside), annotations, truth)
    else:
        notes.append("no images, so no sizes: ignored regions and boxes are not cut at an image's edge; add --images")
    missing = len(truth) - len(found)
    if missing:
        notes.append(f"no result file of {missing:,} of the {len(truth):,} images: taken as without detections")
    parts = [
        VisDroneImage(
            stem,
            size,
            parse_annotations(read_text(annotations / name), str(annotations / name)),
            read_result_file(results / found[stem]) if stem in found else np.zeros((0, 8)),
        )
        for (stem, name), size in zip(truth.items(), sizes, strict=True)
    ]
    metrics = evaluate_visdrone(parts)
    return dataclasses.replace(metrics, notes=(*metrics.notes, *notes))


def score_coco(
    results: str | Path, annotations: str | Path, max_detections: Sequence[int] = (1, 10, 100)
) -> CocoMetrics:
    """Evaluate COCO results (a json list of image_id, category_id, bbox, score) against a COCO annotation file.

    Args:
      max_detections: see ``evaluate``.

    Raises:
      DataError: a file that is not readable; a bad entry, by its number or id.
    """
    truth, found = _json(Path(annotations)), _json(Path(results))
    if not isinstance(found, list):
        raise DataError(f"{results}: not a list of detections; give COCO results, as eval.py writes them")
    try:
        return evaluate(truth, found, max_detections=max_detections)
    except DataError as error:
        raise DataError(f"{results} against {annotations}: {error}") from None


def _texts(folder: Path, kind: str) -> dict[str, str]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give the folder of the {kind}, a text file an image")
    texts = by_stem(folder, (".txt",))
    if not texts:
        raise DataError(f"{folder}: no text files; give the folder of the {kind}, a text file an image")
    return texts


def _sizes(folder: Path, annotations: Path, truth: dict[str, str]) -> list[tuple[int, int]]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give the folder of the images")
    names = by_stem(folder, SUFFIXES)
    for stem, name in truth.items():
        if stem not in names:
            raise DataError(
                f"{annotations / name}: there is no image {folder / stem}.jpg; give the images of the same split"
            )
    return image_sizes([folder / names[stem] for stem in truth], upright=False)


def _json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not readable as JSON ({error}); restore the file") from None
