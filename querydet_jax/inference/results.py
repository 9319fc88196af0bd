"""Run a detector over images: detections in pixels of the original, and what the query cascade did."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import jax
import numpy as np

from querydet_jax.config import DataConfig
from querydet_jax.data import Dataset, eval_batches
from querydet_jax.data.transforms import rescale_to_original
from querydet_jax.inference.detector import Detector
from querydet_jax.inference.export.exported import Exported
from querydet_jax.inference.pipeline import QueryTrace
from querydet_jax.inference.prediction import Prediction


def run_on_images(
    detector: Detector | Exported,
    dataset: Dataset,
    data: DataConfig,
    indices: Sequence[int] | None = None,
    *,
    batch_size: int = 1,
    maps: bool = True,
    on_broken: Callable[[str], None] | None = None,
) -> Iterator[Prediction]:
    """Run a detector over the images of a data set and yield a result per image.

    With one image per batch, results follow the order of the images; larger batches hold images of one canvas.

    Args:
      indices: positions of the images; None: all.
      maps: also return the maps of the cascade, which takes a second pass.
      on_broken: called with a message for each image that fits no canvas or cannot be read; None raises.

    Raises:
      DataError: an image is broken, without ``on_broken``.
    """
    position = {dataset.image_id(i): i for i in range(len(dataset))}
    batches = eval_batches(dataset, data, batch_size=batch_size, indices=indices, on_broken=on_broken, in_order=True)
    try:
        for batch in batches:
            result, full = jax.device_get(detector(batch["images"], batch["sizes"])), None
            if maps and isinstance(detector, Detector) and detector.config.query != "dense":
                full = jax.device_get(detector.trace(batch["images"], batch["sizes"]))
            for row in np.flatnonzero(batch["valid"]):
                i = position[int(batch["image_ids"][row])]
                load = cache(partial(dataset.load, i))
                yield prediction(detector, result, full, batch, row, index=i, class_names=dataset.classes, load=load)
    finally:
        batches.close()


def prediction(
    detector: Callable[..., Any],
    result: Any,
    trace: QueryTrace | None,
    batch: dict[str, np.ndarray],
    row: int | np.integer,
    **known: Any,
) -> Prediction:
    """Return what was found in one image.

    Args:
      result, batch, row: see ``in_original``.
      trace: the cascade's maps of the batch, on the host, if they were asked for.
      known: the other fields of ``Prediction``: index, class_names, load and so on.
    """
    net, original = (tuple(batch[key][row].tolist()) for key in ("sizes", "original_sizes"))
    boxes, scores, classes = in_original(result, batch, row)
    return Prediction(
        size=original,
        boxes=boxes,
        scores=scores,
        classes=classes,
        queries=trace and QueryTrace(*({level: x[row] for level, x in levels.items()} for levels in trace)),
        scale=max(original[0] / net[0], original[1] / net[1]),
        threshold=detector.config.threshold if isinstance(detector, Detector) else 0.0,
        **known,
    )


def in_original(
    result: Any, batch: dict[str, np.ndarray], row: int | np.integer
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return one image's boxes, scores and classes in px of the original.

    Args:
      result: of a detector on ``batch``, on the host.
      batch: of ``eval_batches``.
      row: of the image.
    """
    net, original = (tuple(batch[key][row].tolist()) for key in ("sizes", "original_sizes"))
    return rescale_to_original(
        result.boxes[row], result.scores[row], result.classes[row], result.valid[row], net, original
    )
