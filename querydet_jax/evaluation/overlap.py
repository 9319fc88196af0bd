"""Intersection over union as pycocotools computes it."""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask


def iou(boxes: np.ndarray, objects: np.ndarray, crowd: np.ndarray | None = None) -> np.ndarray:
    """Return the IoU ``[D, G]`` of boxes ``[D, 4]`` and objects ``[G, 4]``, (x, y, width, height) in px.

    Args:
      crowd: bool ``[G]``; a box's IoU with a crowd is the share of the box in it. None: there are none.
    """
    if not len(boxes) or not len(objects):
        return np.zeros((len(boxes), len(objects)))
    crowd = np.zeros(len(objects), bool) if crowd is None else crowd
    found: Any = np.ascontiguousarray(boxes, np.float64)
    truth: Any = np.ascontiguousarray(objects, np.float64)
    return np.asarray(mask.iou(found, truth, crowd.astype(int).tolist()))


def xywh(boxes: np.ndarray) -> np.ndarray:
    """Convert (x0, y0, x1, y1) to (x, y, width, height), float64 ``[n, 4]``."""
    boxes = np.asarray(boxes, np.float64)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
