"""What a data set is: images with boxes, and the COCO form of its ground truth."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Annotation:
    """The boxes of one image, n of them.

    Attributes:
      boxes: float32 [n, 4], (x0, y0, x1, y1) in pixels of the original image, inside it, with
        positive width and height.
      classes: int32 [n], 0..K-1.
      crowd: bool [n], true for a region that holds a group of objects. Training ignores such
        boxes, COCO evaluation neither rewards nor punishes detections in them.
    """

    boxes: np.ndarray
    classes: np.ndarray
    crowd: np.ndarray


class Dataset(abc.ABC):
    """Images and their boxes, by position ``0 <= i < len(dataset)``.

    Objects must be picklable (worker processes hold a copy) and their methods safe to call from
    several threads.
    """

    classes: tuple[str, ...]
    category_ids: tuple[int, ...]  # of class k in annotation and result files

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abc.abstractmethod
    def image_id(self, i: int) -> int:
        """Identifier of image i in annotation and result files."""

    @abc.abstractmethod
    def file_name(self, i: int) -> str:
        """Name of image i for messages and result files."""

    @abc.abstractmethod
    def size(self, i: int) -> tuple[int, int]:
        """(height, width) in pixels of what ``load(i)`` returns, without reading the image."""

    @abc.abstractmethod
    def annotation(self, i: int) -> Annotation:
        """The boxes of image i."""

    @abc.abstractmethod
    def load(self, i: int) -> np.ndarray:
        """Image i, uint8 RGB [H, W, 3].

        Raises:
          DataError: the image is missing, damaged or not of ``size(i)``.
        """

    def coco_ground_truth(self) -> dict[str, Any]:
        """The ground truth as the dictionary that a COCO ``instances_*.json`` holds.

        Annotation ids count from 1: pycocotools takes a match with annotation 0 for no match.
        """
        images, annotations = [], []
        for i in range(len(self)):
            height, width = self.size(i)
            images.append({"id": self.image_id(i), "file_name": self.file_name(i), "height": height, "width": width})
            truth = self.annotation(i)
            for box, k, crowd in zip(truth.boxes.tolist(), truth.classes.tolist(), truth.crowd.tolist(), strict=True):
                x0, y0, x1, y1 = box
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": self.image_id(i),
                        "category_id": self.category_ids[k],
                        "bbox": [x0, y0, x1 - x0, y1 - y0],
                        "area": (x1 - x0) * (y1 - y0),
                        "iscrowd": int(crowd),
                    }
                )
        return {"images": images, "annotations": annotations, "categories": self._coco_categories()}

    def _coco_categories(self) -> list[dict[str, Any]]:
        return [{"id": i, "name": name} for i, name in zip(self.category_ids, self.classes, strict=True)]
