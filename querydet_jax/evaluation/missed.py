"""Where small objects are lost: at the query, in the heads, or in NMS. Letters: n objects, D detections, M boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from querydet_jax.config import DataConfig
from querydet_jax.data import Dataset, eval_batches
from querydet_jax.data.transforms import resize_boxes
from querydet_jax.evaluation.overlap import iou, xywh
from querydet_jax.evaluation.query import centre_is_key
from querydet_jax.inference.detector import Detector
from querydet_jax.viz.text import percent, text_table

BINS = ((0.0, 8.0), (8.0, 16.0), (16.0, 32.0))
"""Ranges of sqrt(area) in px of the network input."""
STAGES = {
    "found": "a detection of its class, IoU >= 0.5, at least at the score",
    "no key": "its centre is a key on no sparse level, and no candidate has IoU >= 0.5: lower the threshold",
    "no box": "there is a key, but no candidate of its class has IoU >= 0.5: train longer",
    "low score": "there is such a candidate, under the score",
    "NMS": "there is such a candidate, and NMS or the limit of detections dropped it",
}
IOU = 0.5


class MissedObjects:
    """Counts of objects by size and by the stage that lost them, summed over images.

    Attributes:
      score: detections below it do not count.
      counts: int64 [bins, stages].
    """

    def __init__(self, score: float):
        self.score = score
        self.counts = np.zeros((len(BINS), len(STAGES)), np.int64)

    def add(
        self,
        boxes: np.ndarray,
        classes: np.ndarray,
        keys: dict[int, np.ndarray],
        candidates: tuple[np.ndarray, np.ndarray, np.ndarray],
        detections: tuple[np.ndarray, np.ndarray, np.ndarray],
    ) -> None:
        """Count the objects of one image.

        Args:
          boxes: objects float32 [n,4] xyxy px of the network input; classes: int [n].
          keys: {level: bool [h,w]} of the sparse levels; empty for dense inference.
          candidates: boxes [M,4], scores [M] (-inf: absent) and classes [M] before NMS.
          detections: the same [D] after NMS, valid ones only.
        """
        if not len(boxes):
            return
        keyed = np.full(len(boxes), not keys)
        for level, cells in keys.items():
            keyed |= centre_is_key(boxes, cells, 2**level)
        found = self._best(boxes, classes, detections) >= self.score
        best = self._best(boxes, classes, candidates)
        lost = np.where(best >= self.score, "NMS", np.where(best > -np.inf, "low score", "no box"))
        stage = np.where(found, "found", np.where((best == -np.inf) & ~keyed, "no key", lost))
        size = np.sqrt(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1))
        for row, (low, high) in enumerate(BINS):
            mine = (size >= low) & (size < high)
            self.counts[row] += [int((stage[mine] == name).sum()) for name in STAGES]

    def merge(self, other: MissedObjects) -> None:
        self.counts += other.counts

    def table(self) -> str:
        """Return a text table: percent of the objects of each size, by stage."""
        totals = self.counts.sum(axis=1)
        rows = [
            [f"{low:g}-{high:g} px", f"{total:,}", *(percent(100 * n / total) if total else "-" for n in counts)]
            for (low, high), total, counts in zip(BINS, totals.tolist(), self.counts.tolist(), strict=True)
        ]
        legend = "\n".join(f"  {name}: {text}" for name, text in STAGES.items())
        return f"{text_table(['size', 'objects', *STAGES], rows)}\n{legend}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain types only."""
        rows = zip(BINS, self.counts.tolist(), strict=True)
        sizes = {f"{low:g}_{high:g}": dict(zip(STAGES, counts, strict=True)) for (low, high), counts in rows}
        return {"min_score": self.score, "objects": sizes}

    @staticmethod
    def _best(boxes: np.ndarray, classes: np.ndarray, found: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
        """Return the best score of a box of each object's class with IoU 0.5, [n]; -inf: there is none."""
        others, scores, labels = found
        if not len(others):
            return np.full(len(boxes), -np.inf)
        able = (iou(xywh(boxes), xywh(others)) >= IOU) & (classes[:, None] == labels[None])
        return np.where(able, scores[None], -np.inf).max(axis=1)


def count_missed(
    detector: Detector,
    dataset: Dataset,
    data: DataConfig,
    *,
    score: float,
    batch_size: int = 1,
    indices: Sequence[int] | None = None,
) -> MissedObjects:
    """Run a detector over a data set and count where its objects under 32 px are lost. Crowds do not count.

    Args:
      score: detections below it do not count.
      batch_size: images per batch.
      indices: positions of the images; None: all.

    Raises:
      DataError: an image cannot be read.
    """
    counts = MissedObjects(score)
    position = {dataset.image_id(i): i for i in range(len(dataset))}
    batches = eval_batches(dataset, data, batch_size=batch_size, indices=indices)
    try:
        for batch in batches:
            images, sizes = jax.device_put((batch["images"], batch["sizes"]))
            found, candidates = jax.device_get((detector(images, sizes), detector.candidates(images, sizes)))
            keys = {} if detector.config.query == "dense" else jax.device_get(detector.trace(images, sizes)).keys
            for row in np.flatnonzero(batch["valid"]):
                truth = dataset.annotation(position[int(batch["image_ids"][row])])
                net, original = (tuple(batch[key][row].tolist()) for key in ("sizes", "original_sizes"))
                valid = found.valid[row]
                counts.add(
                    resize_boxes(truth.boxes[~truth.crowd], original, net),
                    truth.classes[~truth.crowd],
                    {level: cells[row] for level, cells in keys.items()},
                    (candidates.boxes[row], candidates.scores[row], candidates.classes[row]),
                    (found.boxes[row][valid], found.scores[row][valid], found.classes[row][valid]),
                )
    finally:
        batches.close()
    return counts
