"""Cascade Sparse Query a second time: plain NumPy, float64, loops, straight from its definition.

The sparse computation is stated as a dense one in which every layer is zeroed outside the active
cells, then read at the keys. Shape letters: B batch, h w map, C channels, O outputs, A anchors,
K classes, M candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Convs = Sequence[tuple[np.ndarray, np.ndarray]]
"""(kernel [3, 3, C, O], bias [O]) in a row, ReLU between them."""


def sigmoid(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return 1.0 / (1.0 + np.exp(-np.asarray(x, np.float64)))


def conv3x3(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Cross-correlation with one cell of zeros around each image."""
    _, height, width, _ = x.shape
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    out = np.zeros((*x.shape[:3], kernel.shape[-1])) + np.asarray(bias, np.float64)
    for i in range(3):
        for j in range(3):
            out += padded[:, i : i + height, j : j + width] @ np.asarray(kernel[i, j], np.float64)
    return out


def run_stack(x: np.ndarray, convs: Convs, mask: np.ndarray) -> np.ndarray:
    """h_0 = f M; h_{k+1} = relu(conv(h_k) + b) M, no ReLU on the last."""
    keep = mask[..., None]
    x = np.where(keep, x, 0.0)
    for layer, (kernel, bias) in enumerate(convs):
        x = conv3x3(x, kernel, bias)
        if layer < len(convs) - 1:
            x = np.maximum(x, 0.0)
        x = np.where(keep, x, 0.0)
    return x


def children(parents: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The 2x2 children (2y + i, 2x + j) of every parent, those outside the map dropped."""
    out = np.zeros((parents.shape[0], *shape), bool)
    for b, y, x in np.argwhere(parents):
        for i in (0, 1):
            for j in (0, 1):
                if 2 * y + i < shape[0] and 2 * x + j < shape[1]:
                    out[b, 2 * y + i, 2 * x + j] = True
    return out


def squares(keys: np.ndarray, radius: int) -> np.ndarray:
    """Union of the (2r+1) x (2r+1) squares around the keys, clipped to their own image."""
    out = np.zeros_like(keys)
    for b, y, x in np.argwhere(keys):
        out[b, max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1] = True
    return out


class Level(NamedTuple):
    fired: np.ndarray  # bool, map of the level above
    keys: np.ndarray  # bool [B, h, w]
    active: np.ndarray  # bool [B, h, w]
    outputs: list[np.ndarray]  # [B, h, w, O] a head, meaningful at the keys
    query: np.ndarray | None  # logits [B, h, w], -inf outside the keys; None on the last level


def cascade(
    start: np.ndarray,
    features: Sequence[np.ndarray],
    heads: Sequence[Convs],
    query: Convs,
    *,
    threshold: float,
    context: int,
) -> list[Level]:
    """``start [B, h, w]`` query logits; ``features [B, h, w, C]`` of the finer levels, coarsest first.

    Raises:
      AssertionError: a probability lies so near the threshold that rounding could move it across.
    """
    levels, logits = [], np.asarray(start, np.float64)
    for position, x in enumerate(features):
        probability = sigmoid(logits)
        close = np.abs(probability - threshold) < 1e-5
        assert not (close & (probability != threshold)).any(), "choose another threshold or seed"
        fired = probability > threshold
        keys = children(fired, x.shape[1:3])
        active = squares(keys, context)
        last = position == len(features) - 1
        levels.append(
            Level(
                fired,
                keys,
                active,
                [run_stack(x, head, active) for head in heads],
                None if last else np.where(keys, run_stack(x, query, active)[..., 0], -np.inf),
            )
        )
        if not last:
            logits = levels[-1].query
    return levels


class Candidates(NamedTuple):
    boxes: np.ndarray  # [M, 4]
    scores: np.ndarray
    classes: np.ndarray


def candidates(
    cls: np.ndarray, box: np.ndarray, keys: np.ndarray, level: int, *, topk: int, score_threshold: float
) -> Candidates:
    """One image's best boxes on a level: ``cls [h, w, A * K]``, ``box [h, w, A * 4]``, ``keys [h, w]``."""
    anchors_per_cell = box.shape[-1] // 4
    num_classes = cls.shape[-1] // anchors_per_cell
    cells = np.argwhere(keys)
    logits = cls[keys].reshape(-1)  # (cell, anchor, class)
    order = np.argsort(-logits, kind="stable")[: min(topk, len(cells) * anchors_per_cell)]
    scores = sigmoid(logits[order])
    order, scores = order[scores > score_threshold], scores[scores > score_threshold]
    boxes = np.zeros((len(order), 4))
    for row, flat in enumerate(order):
        cell, anchor = flat // num_classes // anchors_per_cell, flat // num_classes % anchors_per_cell
        y, x = cells[cell]
        boxes[row] = decode(anchor_box(level, y, x, anchor), box[y, x, 4 * anchor : 4 * anchor + 4])
    return Candidates(boxes, scores, order % num_classes)


def point_candidates(
    cls: np.ndarray, box: np.ndarray, keys: np.ndarray, level: int, *, topk: int, score_threshold: float
) -> Candidates:
    """The same for FCOS: ``cls [h, w, K]``, ``box [h, w, 5]``, distances in strides and the centerness logit."""
    num_classes, stride = cls.shape[-1], 2**level
    cells = np.argwhere(keys)
    scores = np.sqrt(sigmoid(cls[keys]) * sigmoid(box[keys][:, 4:])).reshape(-1)  # (cell, class)
    order = np.argsort(-scores, kind="stable")[:topk]
    order = order[scores[order] > score_threshold]
    boxes = np.zeros((len(order), 4))
    for row, flat in enumerate(order):
        y, x = cells[flat // num_classes]
        left, top, right, bottom = np.maximum(box[y, x, :4], 0) * stride
        boxes[row] = (
            (x + 0.5) * stride - left,
            (y + 0.5) * stride - top,
            (x + 0.5) * stride + right,
            (y + 0.5) * stride + bottom,
        )
    return Candidates(boxes, scores[order], order % num_classes)


def anchor_box(level: int, y: int, x: int, anchor: int) -> tuple[float, float, float, float]:
    """Centre (x, y), width and height: three sizes an octave from 4 strides, ratios h/w 1/2, 1, 2."""
    stride = 2**level
    size, ratio = 4 * stride * 2 ** (anchor // 3 / 3), (0.5, 1.0, 2.0)[anchor % 3]
    return x * stride, y * stride, size / math.sqrt(ratio), size * math.sqrt(ratio)


def decode(anchor: tuple[float, float, float, float], deltas: np.ndarray) -> tuple[float, float, float, float]:
    x, y, width, height = anchor
    x, y = x + deltas[0] * width, y + deltas[1] * height
    limit = math.log(1000 / 16)
    width, height = width * math.exp(min(deltas[2], limit)), height * math.exp(min(deltas[3], limit))
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def iou(a: np.ndarray, b: np.ndarray) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    overlap = width * height
    return overlap / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap)


def suppress(parts: Sequence[Candidates], *, nms_iou: float, max_detections: int) -> Candidates:
    """Class-wise NMS over the levels of one image, best first."""
    boxes, scores, classes = (np.concatenate(field) for field in zip(*parts, strict=True))
    kept: list[int] = []
    for i in np.argsort(-scores, kind="stable"):
        if len(kept) == max_detections:
            break
        if all(classes[i] != classes[j] or iou(boxes[i], boxes[j]) <= nms_iou for j in kept):
            kept.append(i)
    return Candidates(boxes[kept], scores[kept], classes[kept])


def detect(
    features: dict[int, np.ndarray],
    heads: Sequence[Convs],
    query: Convs | None,
    *,
    start_level: int,
    threshold: float,
    context: int,
    topk: int,
    score_threshold: float,
    nms_iou: float,
    max_detections: int,
    candidates: Callable[..., Candidates] = candidates,
) -> tuple[list[Candidates], dict[int, list[int]]]:
    """From a pyramid to detections; without ``query`` heads run everywhere. ``candidates``: the detector's.

    Returns:
      one ``Candidates`` an image, best first; and [queries, keys, active] by sparse level.
    """
    everywhere = {level: np.ones(x.shape[:3], bool) for level, x in features.items()}
    found, counts = [], {}
    if query is not None:
        below = range(start_level - 1, min(features) - 1, -1)
        start = run_stack(features[start_level], query, everywhere[start_level])[..., 0]
        maps = [features[level] for level in below]
        for level, result in zip(
            below, cascade(start, maps, heads, query, threshold=threshold, context=context), strict=True
        ):
            found.append((level, result.outputs, result.keys))
            counts[level] = [int(result.fired.sum()), int(result.keys.sum()), int(result.active.sum())]
    for level in sorted(set(features) - set(counts)):
        outputs = [run_stack(features[level], head, everywhere[level]) for head in heads]
        found.append((level, outputs, everywhere[level]))
    detections = []
    for b in range(len(everywhere[max(features)])):
        parts = [
            candidates(*(output[b] for output in outputs), keys[b], level, topk=topk, score_threshold=score_threshold)
            for level, outputs, keys in found
        ]
        detections.append(suppress(parts, nms_iou=nms_iou, max_detections=max_detections))
    return detections, counts
