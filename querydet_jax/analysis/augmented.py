"""Draw training images as the network sees them: resized, cropped and augmented."""

from __future__ import annotations

import numpy as np

from querydet_jax.config import Config
from querydet_jax.data import Dataset, train_batches
from querydet_jax.viz.draw import contact_sheet, draw_detections

_COLUMNS = 4


def augmented_sheet(dataset: Dataset, config: Config, count: int) -> np.ndarray:
    """Return a sheet of the first ``count`` training images of a run, with their boxes, uint8 RGB ``[H, W, 3]``.

    Raises:
      ConfigError, DataError: see ``train_batches``.
    """
    panels = []
    batches = train_batches(dataset, config.data, batch_size=1, seed=config.train.seed)
    try:
        for _ in range(count):
            batch = next(batches)
            h, w = batch["sizes"][0]
            kept = batch["classes"][0] >= 0
            drawn = draw_detections(
                batch["images"][0, :h, :w], batch["boxes"][0][kept], batch["classes"][0][kept], names=dataset.classes
            )
            panels.append((f"image {batch['image_ids'][0]}", drawn))
    finally:
        batches.close()
    return contact_sheet(panels, columns=_COLUMNS)
