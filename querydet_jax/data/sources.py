"""Open the data set that a configuration names."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from querydet_jax.config import Config, DataConfig
from querydet_jax.data.classes import check_distinct, match_classes, plain, report_unused, without
from querydet_jax.data.dataset import Dataset
from querydet_jax.data.readers.coco import CocoDataset
from querydet_jax.data.readers.images import Reading
from querydet_jax.data.readers.visdrone import VisDroneDataset
from querydet_jax.data.readers.yolo import YoloDataset, labels_beside, read_names
from querydet_jax.runtime.cache import Cache
from querydet_jax.runtime.errors import DataError
from querydet_jax.runtime.stores import as_path, is_url, through

_log = logging.getLogger("querydet_jax")

# Image folders of the data sets as distributed; {} is the split.
_IMAGES = {"coco": "{}2017", "visdrone": "VisDrone2019-DET-{}", "yolo": "images/{}"}


def open_dataset(data: DataConfig, split: Literal["train", "val"]) -> Dataset:
    """Open one split of the data set that ``data`` names.

    Args:
      data: ``source`` "coco", "visdrone" and "yolo" read the split's folders under ``root`` ("" is
        the current directory); "tfds" reads ``tfds_name`` in the TFDS data directory ``root`` ("" is
        TFDS's default); "shards" reads what ``prepare_shards`` has written to ``root``; "scenes" reads
        generated images under ``root`` ("" is ``datasets``) and draws them first if they are missing.
        Categories in ``ignore_classes`` are left out. With ``cache``, objects of a store are read through it.
      split: "train" or "val".

    Raises:
      ConfigError, DataError: see ``CocoDataset``, ``VisDroneDataset``, ``YoloDataset``, ``read_names``,
        ``TfdsCocoDataset``, ``ShardsDataset`` and ``ScenesDataset``.
      QueryDetError: ``cache`` cannot be written.
    """
    return without(_open(data, split), data.ignore_classes)


def open_split(config: Config, split: Literal["train", "val"], named_by: str = "the configuration") -> Dataset:
    """Open one split with the classes of a configuration, matched by name.

    If ``config.classes`` is empty, the classes are the data set's own, in its order.

    Args:
      named_by: the file that names ``config.classes``, for messages.

    Raises:
      ConfigError, DataError: see ``open_dataset`` and ``match_classes``; two categories share a name; the number of
        classes is not ``model.num_classes``.
    """
    dataset = open_dataset(config.data, split)
    check_distinct(dataset)
    if config.classes:
        dataset = match_classes(dataset, config.classes, named_by)
    check_classes(config, dataset)
    if split == "train":
        report_unused(dataset)
    elif not config.classes:
        _log.info(
            "classes in the order of %s, since the weights name none: %s; give another order with --classes",
            dataset.origin, ", ".join(dataset.classes),
        )  # fmt: skip
    return dataset


def images_folder(data: DataConfig, split: Literal["train", "val"]) -> Path | None:
    """Return the folder that the images' names are relative to; None if ``data`` names none."""
    if data.source not in _IMAGES:
        return None
    named = data.train_images if split == "train" else data.val_images
    folder = as_path(data.root) / (named or _IMAGES[data.source].format(split))
    return folder / "images" if data.source == "visdrone" else folder


def check_classes(config: Config, dataset: Dataset) -> None:
    """Raise DataError if the classes of an opened split are not the model's."""
    if config.classes and tuple(map(plain, config.classes)) != tuple(map(plain, dataset.classes)):
        raise DataError(
            f"{dataset.origin} has the classes {', '.join(dataset.classes)}, the configuration has "
            f"{', '.join(config.classes)}: compare models of the same classes in the same order"
        )
    if len(dataset.classes) != config.model.num_classes:
        raise DataError(
            f"{dataset.origin} has {len(dataset.classes)} categories ({', '.join(dataset.classes[:8])}), "
            f"model.num_classes is {config.model.num_classes}: to train, set it to {len(dataset.classes)}; to evaluate "
            "weights, name the classes they were trained with, in order: --classes NAME NAME ..."
        )


def _open(data: DataConfig, split: Literal["train", "val"]) -> Dataset:
    if data.source == "scenes":
        from querydet_jax.data.scenes.builder import ScenesDataset, scene_config  # slow import

        val_size = data.scenes_val_size if any(data.scenes_val_size) else data.scenes_size
        config = scene_config(data.scenes_train, data.scenes_val, data.scenes_size, val_size, data.scenes_seed)
        return ScenesDataset(data.root or "datasets", split, config)
    reading = Reading.of(data)
    root = as_path(data.root)
    if data.cache and is_url(root):
        root = through(root, Cache.open(data.cache, round(1e9 * data.cache_gb)))
    if data.source == "tfds":
        from querydet_jax.data.readers.tfds_coco import TfdsCocoDataset  # as above

        return TfdsCocoDataset(root if data.root else "", data.tfds_name, split, reading=reading)
    if data.source == "shards":
        from querydet_jax.data.readers.shards import ShardsDataset  # as above

        return ShardsDataset(root, split, reading=reading)
    images, annotations = (
        (data.train_images, data.train_annotations) if split == "train" else (data.val_images, data.val_annotations)
    )
    images = root / (images or _IMAGES[data.source].format(split))
    if data.source == "coco":
        path = root / (annotations or f"annotations/instances_{split}2017.json")
        return CocoDataset(path, images, reading=reading, root=root, outside_root=data.outside_root)
    if data.source == "visdrone":
        return VisDroneDataset(images, patches=data.patches and split == "train", reading=reading)
    labels = root / annotations if annotations else labels_beside(images)
    return YoloDataset(images, labels, read_names(root), reading=reading)
