"""Pictures of the cascade at work: detections, query heat maps, active cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from querydet_jax.viz.draw import contact_sheet, draw_detections, draw_heatmap, draw_sites

_LARGEST = 2400  # px, longer side of the maps: drawing them on 45 megapixels takes half a minute and 4 GB


class Trace(Protocol):
    """Maps by level of one image: query probability ``[h, w]``, keys and active cells bool ``[h, w]``."""

    @property
    def probability(self) -> Mapping[int, Any]: ...
    @property
    def keys(self) -> Mapping[int, Any]: ...
    @property
    def active(self) -> Mapping[int, Any]: ...


class Result(Protocol):
    """What is drawn: `querydet_jax.inference.prediction.Prediction`."""

    @property
    def image(self) -> np.ndarray: ...
    @property
    def boxes(self) -> np.ndarray: ...
    @property
    def scores(self) -> np.ndarray: ...
    @property
    def classes(self) -> np.ndarray: ...
    @property
    def scale(self) -> float: ...
    @property
    def queries(self) -> Trace | None: ...


def cascade_pictures(
    result: Result,
    names: Sequence[str],
    threshold: float,
    *,
    min_score: ArrayLike = 0.3,
    truth: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Draw a result, title to picture: ``detections`` and, if it has maps, ``query_P4``.., ``sites_P3``.. by level
    (the latter shrunk to 2,400 px).

    Args:
      threshold: the query threshold, marked in the heat maps.
      min_score: draw detections with at least this score, or that of their class ``[K]``.
      truth: ground-truth boxes ``[n, 4]`` xyxy px to draw as well.
    """
    out = {
        "detections": draw_detections(
            result.image, result.boxes, result.classes, result.scores, names, min_score=min_score, truth=truth
        )
    }
    if result.queries is None:
        return out
    image, scale = _shrunk(result.image), result.scale
    scale *= max(image.shape) / max(result.image.shape)
    # In the order of the cascade: where a level fires, then what the next finer level computes.
    for level, probability in sorted(result.queries.probability.items(), reverse=True):
        out[f"query_P{level}"] = draw_heatmap(
            image,
            probability,
            2**level * scale,
            title=f"query probability on P{level}",
            threshold=threshold,
        )
        out[f"sites_P{level - 1}"] = draw_sites(
            image,
            result.queries.active[level - 1],
            result.queries.keys[level - 1],
            2 ** (level - 1) * scale,
            title=f"computed on P{level - 1}",
        )
    return out


def _shrunk(image: np.ndarray) -> np.ndarray:
    """Return a picture of at most ``_LARGEST`` px for the maps, whose cells stay visible there."""
    height, width = image.shape[:2]
    if max(height, width) <= _LARGEST:
        return image
    factor = _LARGEST / max(height, width)
    shape = max(1, round(width * factor)), max(1, round(height * factor))
    return np.asarray(Image.fromarray(image).resize(shape, Image.Resampling.BOX, reducing_gap=2.0))


def overview(image: np.ndarray, pictures: Mapping[str, np.ndarray]) -> np.ndarray:
    """Lay out one sheet: the picture and its detections on the left, each step of the cascade in a row beside them."""
    steps = [("", picture) for title, picture in pictures.items() if title != "detections"]
    left = [("picture", image), ("detections", pictures["detections"])]
    if not steps:
        return contact_sheet(left, columns=2)
    blank = ("", np.zeros_like(image))
    rows = [steps[i : i + 2] for i in range(0, len(steps), 2)]
    left += [blank] * (len(rows) - len(left))
    rows += [[blank, blank]] * (len(left) - len(rows))
    return contact_sheet([panel for first, row in zip(left, rows, strict=True) for panel in (first, *row)], columns=3)
