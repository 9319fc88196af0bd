"""ROIAlign and Faster R-CNN's second stage a second time: plain NumPy, float64, loops over sampling points."""

from __future__ import annotations

import math
from typing import Any

import cascade_oracle
import numpy as np


def bilinear(feature: np.ndarray, y: float, x: float) -> np.ndarray | float:
    """``feature [h, w, C]`` between cell middles; 0 more than a cell outside, the border's value up to there."""
    height, width = feature.shape[:2]
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    down, across = y - top, x - left
    return (1 - down) * ((1 - across) * feature[top, left] + across * feature[top, right]) + down * (
        (1 - across) * feature[bottom, left] + across * feature[bottom, right]
    )


def roi_align(feature: np.ndarray, box: np.ndarray, level: int, size: int) -> np.ndarray:
    """``[S, S, C]`` of one box, in px, on its level ``feature [h, w, C]``."""
    left, top, right, bottom = np.asarray(box, np.float64) / 2**level - 0.5
    rows, columns = math.ceil((bottom - top) / size), math.ceil((right - left) / size)
    out = np.zeros((size, size, feature.shape[-1]))
    for p in range(size):
        for q in range(size):
            for i in range(rows):
                for j in range(columns):
                    y = top + (bottom - top) / size * (p + (i + 0.5) / rows)
                    x = left + (right - left) / size * (q + (j + 0.5) / columns)
                    out[p, q] += bilinear(feature, y, x)
    return out / max(rows * columns, 1)


def box_level(box: np.ndarray, min_level: int, max_level: int) -> int:
    scale = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
    return min(max(math.floor(4 + math.log2(scale / 224 + 1e-8)), min_level), max_level)


def clip(box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.clip(box, 0, [size[1], size[0], size[1], size[0]])


def anchor(level: int, y: int, x: int, number: int) -> tuple[float, float, float, float]:
    """Centre (x, y), width and height: one size of 8 strides, ratios h/w 1/2, 1, 2."""
    size, ratio = 8 * 2**level, (0.5, 1.0, 2.0)[number]
    return x * 2**level, y * 2**level, size / math.sqrt(ratio), size * math.sqrt(ratio)


def rpn_candidates(model: Any, image: tuple[int, int]):
    """For ``cascade_oracle.detect``: objectness and deltas from the trunk, the best anchors, decoded and clipped."""

    def branch(conv: Any, trunk: np.ndarray) -> np.ndarray:
        return trunk @ np.asarray(conv.kernel[...], np.float64)[0, 0] + np.asarray(conv.bias[...], np.float64)

    def candidates(trunk: np.ndarray, keys: np.ndarray, level: int, *, topk: int, score_threshold: float):
        trunk = np.maximum(trunk, 0.0)
        scores, deltas = branch(model.head.objectness, trunk)[keys].reshape(-1), branch(model.head.deltas, trunk)
        cells = np.argwhere(keys)
        boxes, kept = [], []
        for flat in np.argsort(-scores, kind="stable")[:topk]:
            (y, x), number = cells[flat // 3], flat % 3
            box = cascade_oracle.decode(anchor(level, y, x, number), deltas[y, x, 4 * number : 4 * number + 4])
            box = clip(np.asarray(box), image)
            if (box[2:] > box[:2]).all():
                boxes.append(box)
                kept.append(scores[flat])
        return cascade_oracle.Candidates(np.reshape(boxes, (-1, 4)), np.asarray(kept), np.full(len(kept), level))

    return candidates


def second_stage(
    model: Any, features: dict[int, np.ndarray], boxes: np.ndarray, image: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Scores ``[P, K]`` and boxes ``[P, K, 4]`` of an image's proposals; ``features [h, w, C]`` by level."""
    head, config = model.box_head, model.config.faster_rcnn

    def linear(layer: Any, x: np.ndarray) -> np.ndarray:
        kernel = np.asarray(layer.kernel[...], np.float64)
        return np.tensordot(x, kernel, 3) + np.asarray(layer.bias[...], np.float64)

    scores, moved = [], []
    for box in boxes:
        level = box_level(box, min(features), 5)
        x = roi_align(features[level], box, level, config.roi_size)
        for layer in (head.fc1, head.fc2):
            x = np.maximum(linear(layer, x), 0.0).reshape(1, 1, -1)
        logits, deltas = linear(head.cls_score, x), linear(head.bbox_pred, x).reshape(-1, 4) / [10, 10, 5, 5]
        odds = np.exp(logits - logits.max())
        scores.append((odds / odds.sum())[:-1])
        place = (*(box[:2] + box[2:]) / 2, *(box[2:] - box[:2]))
        moved.append([clip(np.asarray(cascade_oracle.decode(place, row)), image) for row in deltas])
    return np.asarray(scores), np.asarray(moved)
