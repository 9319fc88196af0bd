"""The pictures with the gravest errors of each kind, drawn, and a page that shows them."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from querydet_jax.data.coco_json import Result, check_content, check_entries
from querydet_jax.evaluation.coco_input import GroundTruth
from querydet_jax.evaluation.errors import BACKGROUND, KINDS, ErrorReport, ImageErrors, attribute
from querydet_jax.inference.min_scores import DEFAULT
from querydet_jax.runtime.errors import ConfigError
from querydet_jax.runtime.files import folder_written_aside, writing
from querydet_jax.runtime.names import one_line, result_stems
from querydet_jax.viz.draw import save_image
from querydet_jax.viz.faults import Fault, draw_faults

PAGE = "worst/index.html"


@dataclass(frozen=True, eq=False)
class Worst:
    """The images with the gravest errors.

    Attributes:
      images: {kind of error: images, the worst first}.
      counts: {kind: number of its errors in all images}.
      classes: names, [K].
      thresholds: detections below these scores were left out, [K].
    """

    images: dict[str, list[ImageErrors]]
    counts: dict[str, int]
    classes: tuple[str, ...]
    thresholds: np.ndarray


def find_worst(
    ground_truth: Mapping[str, Any] | GroundTruth,
    results: Sequence[Mapping[str, Any] | Result],
    report: ErrorReport,
    count: int,
    *,
    image_ids: Sequence[int] | None = None,
) -> Worst:
    """Find the ``count`` images with the gravest errors of each kind: by the sum of the scores of the detections at
    fault, or by the number of objects missed. Only detections that reach their class's best threshold are looked at.

    Args:
      ground_truth, results, image_ids: those that ``report`` is about.
    """
    content, entries = (
        check_content(ground_truth, GroundTruth, "ground truth"),
        check_entries(results, Result, "results"),
    )
    least = np.array([report.best[name].score if name in report.best else DEFAULT for name in report.classes])
    of_id = dict(zip(sorted(category.id for category in content.categories), least.tolist(), strict=True))
    kept = [entry for entry in entries if entry.score >= of_id.get(entry.category_id, DEFAULT)]
    seen = attribute(content, kept, image_ids=image_ids)
    images = {}
    for kind in KINDS:
        weights = np.array([_gravity(image, kind) for image in seen.images])
        order = np.argsort(-weights, kind="stable")[:count]
        images[kind] = [seen.images[i] for i in order.tolist() if weights[i] > 0]
    return Worst(images, seen.counts, report.classes, least)


def check_apart(out: Path, images: Path | None) -> None:
    """Raise ConfigError if the pictures lie where ``write_worst`` writes."""
    folder = (out / PAGE).parent.resolve()
    if images is not None and images.resolve().is_relative_to(folder):
        raise ConfigError(f"--out {out}: --worst replaces {folder}, where the pictures are; choose another folder")


def write_worst(out: Path, worst: Worst, file_names: Mapping[int, str], load: Callable[[int], np.ndarray]) -> int:
    """Draw the images and write ``PAGE``, which shows them without network or scripts; its folder is replaced.

    Args:
      file_names: {image id: the image's name}.
      load: returns the image of an id, uint8 RGB [H,W,3].

    Returns:
      The number of pictures.

    Raises:
      DataError: an image cannot be read.
      QueryDetError: the folder cannot be written.
    """
    page = out / PAGE
    ids = sorted({image.image_id for images in worst.images.values() for image in images})
    stems = dict(zip(ids, result_stems([file_names[i] for i in ids]), strict=True))
    with writing(page.parent), folder_written_aside(page.parent) as aside:
        sections, total = [], 0
        for kind, images in worst.images.items():
            figures = []
            for n, image in enumerate(images, start=1):
                name = f"{kind}_{n}_{stems[image.image_id]}.png"
                faults, others = faults_of(image, kind, worst.classes)
                picture = draw_faults(load(image.image_id), faults, _xyxy(image.objects), others)
                save_image(aside / name, picture)
                figures.append(_figure(name, file_names[image.image_id], faults, picture.shape))
            total += len(figures)
            sections.append((kind, worst.counts[kind], figures))
        (aside / page.name).write_text(_page(sections, worst), encoding="utf-8")
    return total


def faults_of(image: ImageErrors, kind: str, classes: Sequence[str]) -> tuple[list[Fault], np.ndarray]:
    """Return an image's errors of one kind, the gravest first, and the boxes [n,4] xyxy of its other detections."""
    boxes, objects = _xyxy(image.boxes), _xyxy(image.objects)
    if kind == "missed":
        lost = np.flatnonzero(image.missed)
        sizes = image.objects[:, 2:]
        lost = lost[np.argsort(-sizes[lost].prod(axis=1), kind="stable")]
        faults = []
        for g in lost.tolist():
            name, (w, h) = classes[int(image.owners[g])], sizes[g].tolist()
            faults.append(Fault(objects[g], True, name, f"{name} of {w:.0f} x {h:.0f} px, not detected"))
        return faults, boxes
    mine = image.kind == kind
    return [_fault(image, int(d), classes) for d in np.flatnonzero(mine)], boxes[~mine]


def _fault(image: ImageErrors, d: int, classes: Sequence[str]) -> Fault:
    boxes, objects, kind = _xyxy(image.boxes), _xyxy(image.objects), str(image.kind[d])
    label = f"{classes[int(image.classes[d])]} {image.scores[d]:.2f}"
    if kind == "duplicate":
        same = np.where(image.owners == image.classes[d], image.iou[d], 0.0)
        g = int(np.argmax(same))
        first = np.flatnonzero((image.kind == "right") & (image.iou[:, g] >= 0.5))
        scores = [s for s in image.scores[first].tolist() if s >= image.scores[d]]
        known = f", found with {scores[0]:.2f}" if scores else ", already found"
        return Fault(boxes[d], False, label, f"{label}: a second box{known}", (objects[g], ""))
    g = int(image.target[d])
    if g < 0 and image.iou.shape[1] and kind == "both":
        g = int(np.argmax(np.where(image.owners == image.classes[d], 0.0, image.iou[d])))
    if g < 0:
        most = float(image.iou[d].max(initial=0.0))
        text = "no object here" if most == 0 else f"no object here (IoU < {BACKGROUND:g})"
        return Fault(boxes[d], False, label, f"{label}: {text}")
    name, overlap = classes[int(image.owners[g])], f"IoU {image.iou[d, g]:.2f}"
    text = {"class": f"is {name}", "location": f"poor box, {overlap}", "both": f"poor box on {name}, {overlap}"}[kind]
    return Fault(boxes[d], False, label, f"{label}: {text}", (objects[g], name))


def _gravity(image: ImageErrors, kind: str) -> float:
    return float(image.missed.sum()) if kind == "missed" else float(image.scores[image.kind == kind].sum())


def _xyxy(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def _figure(name: str, file_name: str, faults: Sequence[Fault], shape: tuple[int, ...]) -> str:
    first = "; ".join(fault.text for fault in faults[:4])
    more = f"; and {len(faults) - 4} more" if len(faults) > 4 else ""
    text = html.escape(one_line(f"{first}{more}"))
    return (
        f'<figure><a href="{quote(name)}"><img src="{quote(name)}" alt="{text}" width="{shape[1]}" '
        f'height="{shape[0]}" loading="lazy"></a><figcaption><b>{html.escape(one_line(file_name))}</b> {text}'
        "</figcaption></figure>"
    )


def _page(sections: Sequence[tuple[str, int, list[str]]], worst: Worst) -> str:
    thresholds = ", ".join(f"{name} {score:.2f}" for name, score in zip(worst.classes, worst.thresholds, strict=True))
    links = "".join(f'<li><a href="#{kind}">{kind}</a> {count:,}</li>' for kind, count, _ in sections)
    parts = [
        f'<section id="{kind}"><h2>{kind} <small>{count:,}: {html.escape(KINDS[kind])}</small></h2>'
        + ("".join(figures) or "<p>None.</p>")
        + "</section>"
        for kind, count, figures in sections
    ]
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>The worst pictures by kind of error</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 1320px; margin: 0 auto; padding: 1rem }}
ul {{ list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .3rem 1.4rem }}
h2 {{ border-top: 1px solid; padding-top: .8rem }}
small {{ font-weight: normal; font-size: 1rem }}
figure {{ margin: 0 0 1.6rem }}
img {{ max-width: 100%; height: auto; display: block }}
figcaption {{ padding-top: .3rem }}
</style></head><body>
<h1>The worst pictures by kind of error</h1>
<p>Detections from each class's best score on ({html.escape(one_line(thresholds))}), IoU 0.5. Solid orange: the box at
fault; dashed orange: an object that was missed; dashed white: ground truth; blue: other detections. Each kind begins
with the picture whose errors have the largest scores together, or in which the most objects were missed.</p>
<nav><ul>{links}</ul></nav>
{"".join(parts)}
</body></html>
"""
