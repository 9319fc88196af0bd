"""Pictures of a detector at work: detections, query heat maps, active cells, for files and reports."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from querydet_jax.config import DataConfig
from querydet_jax.data import Dataset, eval_batches
from querydet_jax.data.transforms import rescale_to_original
from querydet_jax.inference.detector import Detector, QueryTrace
from querydet_jax.inference.export.artifact import Artifact
from querydet_jax.viz.draw import contact_sheet, draw_detections, draw_heatmap, draw_sites


@dataclass(frozen=True)
class Seen:
    """One image through a detector.

    Attributes:
      index: position in the data set.
      image: uint8 RGB ``[H, W, 3]``, as stored.
      boxes, scores, classes: detections in px of ``image``.
      scale: pixels of ``image`` a pixel of the network input; down and across differ by rounding, and this
        is the larger, by which the maps cover the image.
      trace: maps of this image alone (``[h, w]``), None for dense inference.
    """

    index: int
    image: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    scale: float
    trace: QueryTrace | None


def look(
    detector: Detector | Artifact,
    dataset: Dataset,
    data: DataConfig,
    indices: Sequence[int] | None = None,
    *,
    batch_size: int = 1,
) -> Iterator[Seen]:
    """Run a detector over images, with what the query cascade did (an artifact has no program for that)."""
    position = {dataset.image_id(i): i for i in range(len(dataset))}
    batches = eval_batches(dataset, data, batch_size=batch_size, indices=indices)
    try:
        for batch in batches:
            result, full = jax.device_get(detector(batch["images"], batch["sizes"])), None
            if isinstance(detector, Detector) and detector.config.query != "dense":
                full = jax.device_get(detector.trace(batch["images"], batch["sizes"]))
            for row in np.flatnonzero(batch["valid"]):
                i = position[int(batch["image_ids"][row])]
                net, original = (tuple(batch[key][row].tolist()) for key in ("sizes", "original_sizes"))
                boxes, scores, classes = rescale_to_original(
                    result.boxes[row], result.scores[row], result.classes[row], result.valid[row], net, original
                )
                trace = full and QueryTrace(*({level: x[row] for level, x in maps.items()} for maps in full))
                scale = max(original[0] / net[0], original[1] / net[1])
                yield Seen(i, dataset.load(i), boxes, scores, classes, scale, trace)
    finally:
        batches.close()


def pictures_of(
    seen: Seen, names: Sequence[str], threshold: float, *, min_score: float = 0.3, truth: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Title to picture: ``detections``, ``query_P4``.. and ``sites_P3``.. where there was a cascade."""
    out = {
        "detections": draw_detections(
            seen.image, seen.boxes, seen.classes, seen.scores, names, min_score=min_score, truth=truth
        )
    }
    if seen.trace is None:
        return out
    # In the order of the cascade: where a level fires, then what that makes the next finer one compute.
    for level, probability in sorted(seen.trace.probability.items(), reverse=True):
        out[f"query_P{level}"] = draw_heatmap(
            seen.image,
            probability,
            2**level * seen.scale,
            title=f"query probability on P{level}",
            threshold=threshold,
        )
        out[f"sites_P{level - 1}"] = draw_sites(
            seen.image,
            seen.trace.active[level - 1],
            seen.trace.keys[level - 1],
            2 ** (level - 1) * seen.scale,
            title=f"computed on P{level - 1}",
        )
    return out


def overview(seen: Seen, pictures: dict[str, np.ndarray]) -> np.ndarray:
    """One sheet: the picture and its detections on the left, each step of the cascade in a row beside them."""
    steps = [("", picture) for title, picture in pictures.items() if title != "detections"]
    left = [("picture", seen.image), ("detections", pictures["detections"])]
    if not steps:
        return contact_sheet(left, columns=2)
    blank = ("", np.zeros_like(seen.image))
    rows = [steps[i : i + 2] for i in range(0, len(steps), 2)]
    left += [blank] * (len(rows) - len(left))
    rows += [[blank, blank]] * (len(left) - len(rows))
    return contact_sheet([panel for first, row in zip(left, rows, strict=True) for panel in (first, *row)], columns=3)
