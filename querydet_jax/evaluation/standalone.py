"""Score the result files of any detector against annotation files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from querydet_jax.data.coco_json import Result, read_file, read_results
from querydet_jax.data.readers.folders import SUFFIXES, by_stem, near
from querydet_jax.data.readers.images import read_headers, read_image
from querydet_jax.data.readers.orientation import Header
from querydet_jax.data.readers.visdrone import parse_annotations
from querydet_jax.evaluation.coco import evaluate
from querydet_jax.evaluation.coco_input import GroundTruth
from querydet_jax.evaluation.metrics import CocoMetrics
from querydet_jax.evaluation.visdrone import VisDroneImage, evaluate_visdrone
from querydet_jax.evaluation.visdrone_files import read_result_file
from querydet_jax.evaluation.visdrone_results import VisDroneMetrics
from querydet_jax.runtime.errors import DataError
from querydet_jax.runtime.reading import read_text
from querydet_jax.runtime.stores import as_path

# An image size beyond any box, so that no region or box is cut at the image's edge.
_BOUNDLESS = (1 << 30, 1 << 30)


def score_visdrone(
    results: str | Path,
    annotations: str | Path,
    images: str | Path | None = None,
    *,
    exif: Literal["auto", "apply", "ignore"] = "auto",
) -> VisDroneMetrics:
    """Evaluate VisDrone result files, one per image, by the official protocol.

    The protocol needs only the images' sizes: it cuts boxes and ignored regions at the image's edges before it decides
    which boxes lie in a region. Without images nothing is cut, which only affects boxes that cross an edge.

    Args:
      results: folder of the result files. An image without one counts as without detections, and a note reports it.
      annotations: folder of the official annotation files, or the split's folder that contains ``annotations/``.
      images: folder of the images; None uses ``images/`` beside the annotations if it exists.
      exif: whether the boxes are those of images turned by their EXIF orientation; auto: they are not, as in
        VisDrone's own tools.

    Raises:
      DataError: a folder is missing or empty; a line is malformed; a result file has no annotation file, or an
        annotation file no image.
    """
    results, annotations = as_path(results), as_path(annotations)
    if (annotations / "annotations").is_dir():
        annotations = annotations / "annotations"
    found, truth = _text_files(results, "results"), _text_files(annotations, "annotations")
    for stem, name in found.items():
        if stem not in truth:
            raise DataError(
                f"{results / name}: there is no annotation file {annotations / stem}.txt{near(stem, truth)}; score "
                "results against the annotations of the same split"
            )
    beside = annotations.parent / "images"
    sizes, notes = [_BOUNDLESS] * len(truth), []
    if images is not None or beside.is_dir():
        headers = _headers(as_path(images or beside), annotations, truth)
        sizes = [header.size(upright=exif == "apply") for header in headers]
    else:
        notes.append("no images, so no sizes: ignored regions and boxes are not cut at an image's edge; add --images")
    missing = len(truth) - len(found)
    if missing:
        notes.append(f"no result file for {missing:,} of the {len(truth):,} images: counted as without detections")
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
    """Evaluate COCO results (a JSON list of image_id, category_id, bbox, score) against a COCO annotation file.

    Args:
      max_detections: see ``evaluate``.

    Raises:
      DataError: a file is not readable, or an entry is malformed.
    """
    truth, found, names = read_coco(results, annotations)
    return evaluate(truth, found, max_detections=max_detections, names=names)


def read_coco(results: str | Path, annotations: str | Path) -> tuple[GroundTruth, list[Result], tuple[str, str]]:
    """Read the two files for ``evaluate`` and ``attribute``, and return what messages call them; raise as above."""
    truth, found = read_file(annotations, GroundTruth), read_results(results)
    return truth, found, (str(annotations), f"{results}: results")


def read_pictures(
    truth: GroundTruth, where: str, folder: str | Path
) -> tuple[dict[int, str], Callable[[int], np.ndarray]]:
    """Return {image id: file name} of an annotation file, and a function that reads the picture of an id.

    Args:
      where: the file's name in messages.
      folder: the pictures' folder.

    Raises:
      DataError: there is no such folder, or an image has no file name; the function: a picture cannot be read.
    """
    folder = as_path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give the folder of the images")
    names: dict[int, str] = {}
    for n, image in enumerate(truth.images):
        if not isinstance(image.file_name, str) or not image.file_name:
            raise DataError(f"{where}: images[{n}] has no file_name; add it, or leave out --worst")
        names[image.id] = image.file_name
    return names, lambda i: read_image(folder / names[i], str(folder / names[i]))


def _text_files(folder: Path, kind: str) -> dict[str, str]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give the folder of the {kind}, one text file per image")
    texts = by_stem(folder, (".txt",))
    if not texts:
        raise DataError(f"{folder}: no text files; give the folder of the {kind}, one text file per image")
    return texts


def _headers(folder: Path, annotations: Path, truth: dict[str, str]) -> list[Header]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give the folder of the images")
    names = by_stem(folder, SUFFIXES)
    for stem, name in truth.items():
        if stem not in names:
            raise DataError(
                f"{annotations / name}: there is no image {folder / stem}.jpg{near(stem, names)}; give the images of "
                "the same split"
            )
    return read_headers([folder / names[stem] for stem in truth])
