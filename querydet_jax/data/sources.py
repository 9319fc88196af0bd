"""Open the data set that a configuration names."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from querydet_jax.config import Config, DataConfig
from querydet_jax.data.dataset import Dataset
from querydet_jax.data.readers.coco import CocoDataset
from querydet_jax.data.readers.visdrone import VisDroneDataset
from querydet_jax.data.readers.yolo import YoloDataset, labels_beside, read_names
from querydet_jax.runtime.errors import DataError

# Image folders of the data sets as distributed; {} is the split.
_IMAGES = {"coco": "{}2017", "visdrone": "VisDrone2019-DET-{}", "yolo": "images/{}"}


def open_dataset(data: DataConfig, split: Literal["train", "val"]) -> Dataset:
    """Open one split of the data set that ``data`` names.

    Args:
      data: ``source`` "coco", "visdrone" and "yolo" read the split's folders under ``root`` ("" is
        the current directory); "tfds" reads ``tfds_name`` in the TFDS data directory ``root`` ("" is
        TFDS's default); "scenes" reads generated images under ``root`` ("" is ``datasets``) and
        draws them first if they are missing.
      split: "train" or "val".

    Raises:
      ConfigError, DataError: see ``CocoDataset``, ``VisDroneDataset``, ``YoloDataset``, ``read_names``,
        ``TfdsCocoDataset`` and ``ScenesDataset``.
    """
    if data.source == "scenes":
        from querydet_jax.data.scenes.builder import ScenesDataset, scene_config  # slow import

        val_size = data.scenes_val_size if any(data.scenes_val_size) else data.scenes_size
        config = scene_config(data.scenes_train, data.scenes_val, data.scenes_size, val_size, data.scenes_seed)
        return ScenesDataset(data.root or "datasets", split, config)
    if data.source == "tfds":
        from querydet_jax.data.readers.tfds_coco import TfdsCocoDataset  # as above

        return TfdsCocoDataset(data.root, data.tfds_name, split)
    root = Path(data.root)
    images, annotations = (
        (data.train_images, data.train_annotations) if split == "train" else (data.val_images, data.val_annotations)
    )
    images = root / (images or _IMAGES[data.source].format(split))
    if data.source == "coco":
        return CocoDataset(root / (annotations or f"annotations/instances_{split}2017.json"), images)
    if data.source == "visdrone":
        return VisDroneDataset(images, patches=data.patches and split == "train")
    return YoloDataset(images, root / annotations if annotations else labels_beside(images), read_names(root))


def check_classes(config: Config, dataset: Dataset) -> None:
    """Raise DataError if the data set's categories differ from the model's classes."""
    if len(dataset.classes) != config.model.num_classes:
        raise DataError(
            f"the data set has {len(dataset.classes)} categories ({', '.join(dataset.classes[:8])}), "
            f"model.num_classes is {config.model.num_classes}: set it to {len(dataset.classes)}"
        )
    if config.classes and tuple(config.classes) != tuple(dataset.classes):
        raise DataError(
            f"the data set's categories ({', '.join(dataset.classes)}) are not the configuration's classes "
            f"({', '.join(config.classes)}): correct `classes`, or leave it empty to take the data set's"
        )
