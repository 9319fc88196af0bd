"""From configuration to data set."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from querydet_jax.config import DataConfig
from querydet_jax.data.coco import CocoDataset
from querydet_jax.data.dataset import Dataset


def open_dataset(data: DataConfig, split: Literal["train", "val"]) -> Dataset:
    """Open the data set that ``data`` names.

    Args:
      data: ``source`` "coco" reads the split's annotation file and image folder under ``root`` (""
        is the current directory); "scenes" reads generated pictures under ``root`` ("" is
        ``datasets``), drawing them first if they are not there.
      split: which half.

    Raises:
      ConfigError, DataError: see ``CocoDataset`` and ``ScenesDataset``.
    """
    if data.source == "coco":
        root = Path(data.root)
        if split == "train":
            return CocoDataset(root / data.train_annotations, root / data.train_images)
        return CocoDataset(root / data.val_annotations, root / data.val_images)
    from querydet_jax.data.scenes_builder import ScenesDataset, scene_config  # slow to import, and rarely needed

    val_size = data.scenes_val_size if any(data.scenes_val_size) else data.scenes_size
    config = scene_config(data.scenes_train, data.scenes_val, data.scenes_size, val_size, data.scenes_seed)
    return ScenesDataset(data.root or "datasets", split, config)
