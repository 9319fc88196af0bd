"""The data set interface: images with boxes, and their ground truth in COCO form."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from querydet_jax.runtime.errors import DataError


@dataclass(frozen=True)
class Annotation:
    """The n boxes of one image.

    Attributes:
      boxes: float32 [n, 4], (x0, y0, x1, y1) in pixels of the original image, inside it, with
        positive width and height.
      classes: int32 [n], 0..K-1.
      crowd: bool [n], true for a region that holds a group of objects. Training ignores crowd
        boxes; COCO evaluation counts a detection in one neither as true nor as false.
    """

    boxes: np.ndarray
    classes: np.ndarray
    crowd: np.ndarray


class Dataset(abc.ABC):
    """Images and their boxes, indexed by ``0 <= i < len(dataset)``.

    Instances must be picklable, because each worker process holds a copy, and thread-safe.
    """

    classes: tuple[str, ...]
    # Category id of class k in annotation and result files; None: these files lack the class.
    category_ids: tuple[int | None, ...]
    origin: str = "the data set"  # file or folder that names the classes, for messages
    exif: Literal["apply", "ignore"] = "apply"  # whether boxes are drawn on pictures turned by their EXIF orientation
    exif_note: str = ""  # how many pictures have an EXIF orientation, and what is done about it; empty if none has

    @abc.abstractmethod
    def __len__(self) -> int:
        """Return the number of images."""

    @abc.abstractmethod
    def image_id(self, i: int) -> int:
        """Return the id of image i in annotation and result files."""

    @abc.abstractmethod
    def file_name(self, i: int) -> str:
        """Return the name of image i for messages and result files."""

    @abc.abstractmethod
    def size(self, i: int) -> tuple[int, int]:
        """Return (height, width) in pixels of ``load(i)``, without reading the image."""

    @abc.abstractmethod
    def annotation(self, i: int) -> Annotation:
        """Return the boxes of image i."""

    @abc.abstractmethod
    def load(self, i: int) -> np.ndarray:
        """Return image i as uint8 RGB [H, W, 3].

        Raises:
          DataError: the image is missing or damaged, or its size is not ``size(i)``.
        """

    def encoded(self, i: int) -> bytes:
        """Return the file of image i as it is stored.

        Raises:
          DataError: the file is missing or damaged, or there is none, because images are made by ``load``.
        """
        raise DataError(f"{self.origin}: image {self.file_name(i)} is no file of its own, so it cannot be copied")

    def check_image(self, i: int) -> None:
        """Raise DataError if image i is missing or its header shows what ``load`` would raise; decode nothing.

        Opening the data set has read all headers where this does nothing.
        """
        return

    def official_truth(self, i: int) -> np.ndarray | None:
        """Return the ground truth of image i for VisDrone's official evaluation, int32 [n, 8] as in its text files.

        Return None for a data set without official VisDrone truth.
        """
        return None

    def coco_ground_truth(self) -> dict[str, Any]:
        """Return the ground truth as the dictionary stored in a COCO ``instances_*.json``.

        Annotation ids start at 1, because pycocotools reads a match with annotation 0 as no match.
        """
        images, annotations = [], []
        for i in range(len(self)):
            height, width = self.size(i)
            images.append({"id": self.image_id(i), "file_name": self.file_name(i), "height": height, "width": width})
            truth = self.annotation(i)
            boxes, areas = self._truth_boxes(i)
            for box, area, k, crowd in zip(
                boxes.tolist(), areas.tolist(), truth.classes.tolist(), truth.crowd.tolist(), strict=True
            ):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": self.image_id(i),
                        "category_id": self.category_ids[k],
                        "bbox": box,
                        "area": area,
                        "iscrowd": int(crowd),
                    }
                )
        return {"images": images, "annotations": annotations, "categories": self._coco_categories()}

    def _truth_boxes(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the ground-truth boxes of ``annotation(i)``, [n, 4] (x, y, width, height), and their areas [n]."""
        boxes = self.annotation(i).boxes.astype(np.float64)
        sides = boxes[:, 2:] - boxes[:, :2]
        return np.concatenate([boxes[:, :2], sides], axis=1), np.prod(sides, axis=1)

    def _coco_categories(self) -> list[dict[str, Any]]:
        return [{"id": i, "name": name} for i, name in zip(self.category_ids, self.classes, strict=True)]
