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

    def official_truth(self, i: int) -> np.ndarray | None:
        """The ground truth of image i for VisDrone's official evaluation, int32 [n, 8] as in its text files.

        None in a data set that is not evaluated so.
        """
        return None

    def coco_ground_truth(self) -> dict[str, Any]:
        """The ground truth as the dictionary that a COCO ``instances_*.json`` holds.

        Annotation ids count from 1: pycocotools takes a match with annotation 0 for no match.
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
        """Of the boxes of ``annotation(i)``, what the ground truth states: [n, 4] (x, y, width, height), areas [n]."""
        boxes = self.annotation(i).boxes.astype(np.float64)
        sides = boxes[:, 2:] - boxes[:, :2]
        return np.concatenate([boxes[:, :2], sides], axis=1), np.prod(sides, axis=1)

    def _coco_categories(self) -> list[dict[str, Any]]:
        return [{"id": i, "name": name} for i, name in zip(self.category_ids, self.classes, strict=True)]
