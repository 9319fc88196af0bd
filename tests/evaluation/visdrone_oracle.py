"""The VisDrone protocol in plain loops: the reference for the vectorised evaluation.

For every class, threshold and limit, match again with loops over images, detections and objects, on a pixel map of the
ignored regions. Only the overlaps of one detection with the objects of its image and class are vectorised.
"""

from __future__ import annotations

import numpy as np

LIMITS = (1, 10, 100, 500)


def evaluate_by_loops(images, low=0.0, high=np.inf):
    """Compute the metrics of VisDroneMetrics in percent, for objects with ``low <= sqrt(w*h) < high``.

    Returns:
      Weighted and plain means by name, and the AP of each class (nan without objects).
    """
    kept = [drop_in_regions(image) for image in images]
    thresholds = np.linspace(0.5, 0.95, 10)
    ap = np.zeros((10, 10))
    ar = np.zeros((10, 10, 4))
    weights = np.zeros(10)
    for k in range(10):
        counted = [sum(row[5] == k + 1 and low <= side(row) < high for row in truth) for truth, _ in kept]
        weights[k] = sum(count > 0 for count in counted)
        for i, threshold in enumerate(thresholds):
            for j, limit in enumerate(LIMITS):
                results = []
                for truth, detections in kept:
                    first = detections[:limit]
                    of_class = first[first[:, 5] == k + 1]
                    results += match(truth[truth[:, 5] == k + 1], of_class, threshold, low, high)
                ap[k, i], ar[k, i, j] = score(results, sum(counted))  # ap of the last limit stays
    names = {"AP": ap.mean(1), "AP50": ap[:, 0], "AP75": ap[:, 5]}
    names |= {f"AR{limit}": ar[:, :, j].mean(1) for j, limit in enumerate(LIMITS)}
    metrics = {name: mean(values, weights) for name, values in names.items()}
    metrics |= {f"{name}_mean": mean(values, weights > 0) for name, values in names.items()}
    return metrics, np.where(weights > 0, ap.mean(1), np.nan)


def drop_in_regions(image):
    height, width = image.size
    truth, detections = image.truth.astype(np.float32), image.detections.astype(np.float32)
    regions = [row for row in image.truth.astype(int) if row[5] == 0]
    truth = truth[truth[:, 5] != 0]
    if not regions:
        return truth, detections
    painted = np.zeros((height, width), int)
    for region in regions:
        x, y, w, h = (max(int(v), 1) for v in region[:4])
        painted[y - 1 : min(y + h, height), x - 1 : min(x + w, width)] = 1
    integral = painted.cumsum(0).cumsum(1)

    def outside(box):
        x, y, w, h = (max(int(np.round(v)), 1) for v in box)
        x, y = max(1, min(width - 1, x)), max(1, min(height - 1, y))
        right, bottom = min(width, x + w), max(1, min(height, y + h))
        inside = (
            integral[y - 1, x - 1]
            + integral[bottom - 1, right - 1]
            - integral[y - 1, right - 1]
            - integral[bottom - 1, x - 1]
        )
        return inside / (w * h) < 0.5

    return tuple(rows[[i for i, row in enumerate(rows) if outside(row[:4])]] for rows in (truth, detections))


def match(truth, detections, threshold, low, high):
    """Return (score, outcome) of each detection: 1 matched, 0 not, -1 does not count."""
    ignored = truth[:, 4] == 0
    inside = np.array([low <= side(row) < high for row in truth], bool)
    taken = np.zeros(len(truth), bool)
    results = []
    for box in detections[np.argsort(detections[:, 4], kind="stable")[::-1]]:
        outcome = 0
        if len(truth):
            iou, share = overlaps(box, truth)
        # Objects that count, then those outside the size bin, then ignored ones.
        for wanted, gives in ((inside & ~ignored, 1), (~inside & ~ignored, -1)):
            best, found = threshold, -1
            for g in np.flatnonzero(wanted & ~taken) if outcome == 0 else []:
                if iou[g] >= best:
                    best, found = iou[g], g
            if found >= 0:
                taken[found] = True
                outcome = gives
        for g in np.flatnonzero(ignored) if outcome == 0 else []:
            if share[g] >= threshold:
                outcome = -1
        if outcome == 0 and not low <= side(box) < high:
            outcome = -1
        results.append((box[4], outcome))
    return results


def side(row):
    return np.sqrt(float(row[2]) * float(row[3]))


def overlaps(box, truth):
    """Return the intersection over the union, and over the box's own area, float32 [n] each."""
    end, truth_end = box[:2] + box[2:4], truth[:, :2] + truth[:, 2:4]
    sides = np.maximum(np.minimum(end, truth_end) - np.maximum(box[:2], truth[:, :2]), 0)
    common = sides[:, 0] * sides[:, 1]
    area = np.prod(end - box[:2])
    union = area + np.prod(truth_end - truth[:, :2], axis=1) - common
    floor = np.float32(1e-6)
    return common / np.maximum(union, floor), common / np.maximum(area, floor)


def score(results, objects):
    """Return AP and the recall reached, in percent."""
    order = np.argsort(np.array([s for s, _ in results], np.float32), kind="stable")[::-1]
    outcomes = np.array([o for _, o in results], int)[order]
    true, false = np.cumsum(outcomes == 1), np.cumsum(outcomes == 0)
    recall = np.concatenate([[0], true / max(objects, 1), [1]])
    precision = np.concatenate([[0], true / np.maximum(true + false, 1), [0]])
    for i in range(len(precision) - 2, -1, -1):
        precision[i] = max(precision[i], precision[i + 1])
    moved = np.flatnonzero(recall[1:] != recall[:-1])
    area = ((recall[moved + 1] - recall[moved]) * precision[moved + 1]).sum()
    return 100 * area, 100 * (recall[-2] if len(results) else 0.0)


def mean(values, weights):
    return float(np.average(values, weights=weights)) if weights.any() else float("nan")
