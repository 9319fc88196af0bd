"""A TensorFlow Datasets builder for generated scenes, stored once as ArrayRecord for random access.

TensorFlow is not needed: images are stored and read as PNG bytes.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from querydet_jax.data.dataset import Annotation, Dataset
from querydet_jax.data.readers.images import read_image
from querydet_jax.data.readers.records import Records, quiet
from querydet_jax.data.scenes.layouts import CLASSES, draw_scene
from querydet_jax.runtime.errors import ConfigError, DataError
from querydet_jax.runtime.progress import progress
from querydet_jax.runtime.stores import as_path, is_url

_log = logging.getLogger("querydet_jax")

# Part of each image's seed, so no image is in two splits, however many each has.
_SPLITS = {"train": 0, "val": 1}


@dataclass
class SceneConfig(tfds.core.BuilderConfig):
    """Number, size and seed of the images. Its name is the folder's name, so settings do not share folders."""

    train: int = 0
    val: int = 0
    train_size: tuple[int, int] = (0, 0)  # (height, width)
    val_size: tuple[int, int] = (0, 0)
    seed: int = 0


def scene_config(
    train: int, val: int, train_size: tuple[int, int], val_size: tuple[int, int], seed: int
) -> SceneConfig:
    """Return the builder configuration for ``train`` and ``val`` images of the given sizes (height, width).

    Raises:
      ConfigError: a value is too small.
    """
    if train < 1 or val < 1 or seed < 0 or min(*train_size, *val_size) < 32:
        raise ConfigError(
            f"data.scenes_train {train}, scenes_val {val}, scenes_size {train_size}, scenes_val_size {val_size}, "
            f"scenes_seed {seed}: need at least one image per split, 32 pixels per side, seed >= 0"
        )
    parts = [f"{split}{n}-{h}x{w}" for split, n, (h, w) in (("train", train, train_size), ("val", val, val_size))]
    return SceneConfig(
        name="-".join([*parts, f"seed{seed}"]),
        train=train,
        val=val,
        train_size=train_size,
        val_size=val_size,
        seed=seed,
    )


class QuerydetScenes(tfds.core.GeneratorBasedBuilder):
    """Aerial-looking pictures of small cars, boats and tanks (see ``scenes.draw_scene``)."""

    # Raise this whenever draw_scene changes, so that folders of the old version are not reused.
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            disable_shuffling=True,  # record i is image i
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                    "boxes": tfds.features.Tensor(shape=(None, 4), dtype=np.float32),  # xyxy px
                    "classes": tfds.features.Sequence(tfds.features.ClassLabel(names=list(CLASSES))),
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        config = self.builder_config
        assert isinstance(config, SceneConfig)
        return {
            split: self._generate_examples(split, count)
            for split, count in (("train", config.train), ("val", config.val))
        }

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        config = self.builder_config
        assert isinstance(config, SceneConfig)
        size = getattr(config, f"{split}_size")
        for i in progress(range(count), f"drawing {split} scenes", " scenes"):
            image, boxes, classes = draw_scene((config.seed, _SPLITS[split], i), size)
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG", compress_level=1)  # higher levels do not shrink noisy images
            yield i, {"image": buffer.getvalue(), "boxes": boxes, "classes": classes.tolist()}


class ScenesDataset(Dataset):
    """A split of the generated scenes, prepared under ``root`` if it is missing.

    Image ids and category ids start at 1.

    Raises:
      DataError: the folder cannot be written or read.
    """

    classes = CLASSES
    category_ids = tuple(range(1, len(CLASSES) + 1))

    def __init__(self, root: str | Path, split: str, config: SceneConfig):
        self._split, self._count = split, getattr(config, split)
        self._size = getattr(config, f"{split}_size")
        if is_url(root):
            raise ConfigError(f"{root}: scenes are drawn on this machine; set data.root to a folder here")
        self._folder = prepare(as_path(root), config)
        self._records = Records(self._folder, split)
        try:
            self._annotations = [_annotation(record) for record in self._records]
        except Exception as error:  # several libraries, each with its own errors for damaged files
            raise self._unreadable(error) from None
        if len(self._annotations) != self._count:
            raise self._unreadable(f"{len(self._annotations)} images instead of {self._count}")

    def _unreadable(self, reason: object) -> DataError:
        first = (str(reason).splitlines() or [type(reason).__name__])[0]
        return DataError(f"{self._folder}: damaged generated scenes ({first}); delete the folder to draw them again")

    def __len__(self) -> int:
        return self._count

    def image_id(self, i: int) -> int:
        return i + 1

    def file_name(self, i: int) -> str:
        return f"{self._split}_{i:06d}.png"

    def size(self, i: int) -> tuple[int, int]:
        return self._size

    def annotation(self, i: int) -> Annotation:
        return self._annotations[i]

    def encoded(self, i: int) -> bytes:
        try:
            return self._records[i]["image"]
        except Exception as error:  # as above
            raise self._unreadable(error) from None

    def load(self, i: int) -> np.ndarray:
        return read_image(self.encoded(i), f"{self._folder} {self.file_name(i)}", self._size)


def prepare(root: Path, config: SceneConfig) -> Path:
    """Return the folder of the scenes; draw them first if they are missing.

    tensorflow_datasets writes to a folder named ``incomplete.*`` and renames it at the end, so an
    interrupted preparation is never mistaken for a finished one.

    Raises:
      DataError: the folder cannot be written.
    """
    try:
        with quiet():
            builder = QuerydetScenes(config=config, data_dir=root)
            folder = Path(builder.data_dir)
            if folder.is_dir():
                return folder
            _log.info("drawing %d + %d scenes into %s", config.train, config.val, folder)
            try:
                builder.download_and_prepare(
                    file_format="array_record",
                    download_config=tfds.download.DownloadConfig(try_download_gcs=False),
                )
            except OSError:
                if not folder.is_dir():  # otherwise another process has finished it meanwhile
                    raise
            return folder
    except OSError as error:
        raise DataError(
            f"{root}: generated scenes cannot be written ({error.strerror or error}); set data.root to a writable "
            "folder with space for them"
        ) from None


def _annotation(record: dict[str, Any]) -> Annotation:
    boxes = np.asarray(record["boxes"], np.float32).reshape(-1, 4)
    classes = np.asarray(record["classes"], np.int32).reshape(-1)
    return Annotation(boxes, classes, np.zeros(len(boxes), bool))
