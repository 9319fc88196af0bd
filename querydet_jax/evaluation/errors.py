"""Attribute what a detector gets wrong, after TIDE (Bolya et al., ECCV 2020), at IoU 0.5.

Letters: D detections, G objects of one image; K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from querydet_jax.data.coco_json import Result, check_content, check_entries
from querydet_jax.evaluation.coco_input import GroundTruth, annotations_of, detections_of, select_ids
from querydet_jax.evaluation.metrics import nan_to_none
from querydet_jax.evaluation.overlap import iou
from querydet_jax.evaluation.thresholds import BestThreshold, best_threshold
from querydet_jax.viz.text import percent, text_table

FOREGROUND, BACKGROUND = 0.5, 0.1  # IoU from which a box is right, and under which it is on background
LIMIT = 100  # detections per image and class, as in COCO's AP50
KINDS = {
    "class": "right place (IoU >= 0.5), wrong class",
    "location": "right class, poor box (IoU 0.1 to 0.5)",
    "both": "wrong class and poor box",
    "duplicate": "a second detection of a found object",
    "background": "no object there (IoU < 0.1)",
    "missed": "an object that no detection of these kinds is about",
}
BINS = 10  # of scores, for calibration
_RECALLS = np.linspace(0.0, 1.0, 101)  # pycocotools', to the last bit


@dataclass(frozen=True, eq=False)
class ErrorReport:
    """What a detector gets wrong.

    Attributes:
      ap50: AP at IoU 0.5, in percent.
      counts: {kind: number}, kinds as in ``KINDS``; for ``missed`` objects, otherwise detections.
      gains: {kind: AP50 gained if its errors alone were mended}. They do not add up.
      classes: names, [K].
      confusion: int [K + 1, K + 1] at each class's best threshold: rows objects, columns detections, the last row and
        column background.
      calibration: per bin of scores (low, high, detections, mean score, share that is right).
      best: {class: best threshold}; a class without right detections has none.
      images: what is wrong in each image.
    """

    ap50: float
    counts: dict[str, int]
    gains: dict[str, float]
    classes: tuple[str, ...]
    confusion: np.ndarray
    calibration: list[tuple[float, float, int, float, float]]
    best: dict[str, BestThreshold]
    images: tuple[ImageErrors, ...]

    def table(self) -> str:
        """Return text tables: errors, thresholds, calibration, confusion."""
        errors = [
            [kind, text, f"{self.counts[kind]:,}", f"+{percent(self.gains[kind])}"] for kind, text in KINDS.items()
        ]
        best = [
            [name, f"{b.score:.3f}", percent(100 * b.f1), percent(100 * b.precision), percent(100 * b.recall)]
            for name, b in self.best.items()
        ]
        bins = [
            [f"{low:.1f}-{high:.1f}", f"{count:,}", percent(100 * mean), percent(100 * right)]
            for low, high, count, mean, right in self.calibration
        ]
        labels = [*self.classes, "background"]
        counts = self.confusion.tolist()
        confusion = [[name, *(f"{n:,}" for n in row)] for name, row in zip(labels, counts, strict=True)]
        return "\n\n".join(
            [
                f"AP50 {percent(self.ap50)}; what mending one kind of error alone would add\n"
                + text_table(["error", "", "number", "AP50"], errors, left=2),
                "best threshold of each class by F1, percent\n"
                + text_table(["class", "score", "F1", "precision", "recall"], best),
                "calibration: share of the detections that are right, percent\n"
                + text_table(["score", "detections", "mean score", "right"], bins),
                "confusion at these thresholds: rows objects, columns detections\n"
                + text_table(["", *labels], confusion),
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain types only."""
        return {
            "ap50": nan_to_none(self.ap50),
            "errors": {k: {"number": self.counts[k], "ap50_gain": nan_to_none(self.gains[k])} for k in KINDS},
            "best_thresholds": {name: vars(best) for name, best in self.best.items()},
            "calibration": [
                {"low": low, "high": high, "detections": n, "mean_score": nan_to_none(s), "right": nan_to_none(r)}
                for low, high, n, s, r in self.calibration
            ],
            "confusion": {"classes": [*self.classes, "background"], "counts": self.confusion.tolist()},
        }


def attribute(
    ground_truth: Mapping[str, Any] | GroundTruth,
    results: Sequence[Mapping[str, Any] | Result],
    *,
    image_ids: Sequence[int] | None = None,
    names: tuple[str, str] = ("ground truth", "results"),
) -> ErrorReport:
    """Attribute the errors of COCO results. Arguments and errors as in ``evaluate``.

    Matching is COCO's at IoU 0.5 and up to 100 detections per image and class; detections in crowds do not count. A
    wrong detection is, in this order, ``location``, ``class``, ``duplicate``, ``background`` or ``both``.
    """
    content = check_content(ground_truth, GroundTruth, names[0])
    entries = check_entries(results, Result, names[1])
    truth, found = annotations_of(content, names[0]), detections_of(entries, content, names[1])
    images = select_ids({image.id for image in content.images}, image_ids, "image_ids")
    pairs = zip(images, _by_image(truth, images), _by_image(found, images), strict=True)
    labels = {category.id: category.name or str(category.id) for category in content.categories}
    number = {identifier: k for k, identifier in enumerate(sorted(labels))}
    parts = tuple(ImageErrors(i, objects, detections, number) for i, objects, detections in pairs)
    flat = _Flat(parts, len(labels))
    classes = tuple(labels[identifier] for identifier in sorted(labels))
    best = {name: b for k, name in enumerate(classes) if (b := _best_threshold(flat, k)) is not None}
    thresholds = np.array([best[name].score if name in best else np.inf for name in classes])
    return ErrorReport(
        ap50=flat.ap50(),
        counts={kind: int(flat.missed.sum()) if kind == "missed" else int((flat.kind == kind).sum()) for kind in KINDS},
        gains={kind: flat.ap50(mended=kind) - flat.ap50() for kind in KINDS},
        classes=classes,
        confusion=sum((p.confusion(thresholds) for p in parts), np.zeros((len(classes) + 1,) * 2, np.int64)),
        calibration=_calibration(flat),
        best=best,
        images=parts,
    )


def _by_image(items: list[dict[str, Any]], images: Sequence[int]) -> list[list[dict[str, Any]]]:
    groups: dict[int, list[dict[str, Any]]] = {i: [] for i in images}
    for item in items:
        if item["image_id"] in groups:
            groups[item["image_id"]].append(item)
    return list(groups.values())


class ImageErrors:
    """One image, its detections matched and explained.

    Attributes:
      image_id: the image's id in the ground truth.
      boxes: of the detections [D,4], x, y, width, height in px, best first.
      scores, classes, kind, target: of the detections [D]; kind is "right", "ignored" or a kind of error, target the
        object that a location or class error is about, -1 for others.
      objects: boxes of the objects that count [G,4]; owners: their classes [G]; matched, missed: bool [G], whether a
        right detection has found it, and whether no detection is about it.
      iou: [D,G].
    """

    def __init__(self, image_id: int, truth: list[dict[str, Any]], found: list[dict[str, Any]], number: dict[int, int]):
        self.image_id = image_id
        objects = [t for t in truth if not t["iscrowd"]]
        crowds = [t for t in truth if t["iscrowd"]]
        found = _limited(found)
        self.scores = np.array([d["score"] for d in found])
        self.classes = np.array([number[d["category_id"]] for d in found], np.int64)
        self.owners = np.array([number[t["category_id"]] for t in objects], np.int64)
        self.boxes, self.objects, groups = (
            np.array([item["bbox"] for item in items], np.float64).reshape(-1, 4) for items in (found, objects, crowds)
        )
        self.iou = iou(self.boxes, self.objects)
        crowded = np.array([number[t["category_id"]] for t in crowds], np.int64)
        in_crowd = iou(self.boxes, groups, np.ones(len(groups), bool)) >= FOREGROUND
        self.matched = np.zeros(len(objects), bool)
        self.kind = np.full(len(found), "", dtype="<U10")
        self.target = np.full(len(found), -1)
        for d, k in enumerate(self.classes):
            free = (self.owners == k) & ~self.matched & (self.iou[d] >= FOREGROUND)
            if free.any():
                self.matched[np.flatnonzero(free)[np.argmax(self.iou[d][free])]] = True
                self.kind[d] = "right"
            elif (in_crowd[d] & (crowded == k)).any():
                self.kind[d] = "ignored"
        for d in np.flatnonzero(self.kind == ""):
            self.kind[d], self.target[d] = self._explained(int(d))
        mended = set(self.target[self.target >= 0].tolist())
        self.missed = np.array([not m and g not in mended for g, m in enumerate(self.matched)], bool)

    def _explained(self, d: int) -> tuple[str, int]:
        same = self.owners == self.classes[d]
        own, other = np.where(same, self.iou[d], 0.0), np.where(same, 0.0, self.iou[d])
        if own.max(initial=0) < FOREGROUND and own.max(initial=0) >= BACKGROUND:
            return "location", int(np.argmax(own))
        if other.max(initial=0) >= FOREGROUND:
            return "class", int(np.argmax(other))
        if own.max(initial=0) >= FOREGROUND:
            return "duplicate", -1
        return ("background" if other.max(initial=0) < BACKGROUND else "both"), -1

    def confusion(self, thresholds: np.ndarray) -> np.ndarray:
        """Count pairs of object and detection, matched by IoU whatever their class, the best score first."""
        out = np.zeros((len(thresholds) + 1,) * 2, np.int64)
        free = np.ones(len(self.owners), bool)
        for d in np.flatnonzero(self.scores >= thresholds[self.classes]) if len(self.scores) else ():
            if self.kind[d] == "ignored":
                continue
            able = free & (self.iou[d] >= FOREGROUND)
            # Of several objects, one of the detection's own class.
            rank = np.where(able, self.iou[d] + (self.owners == self.classes[d]), -1.0)
            g = int(np.argmax(rank)) if able.any() else -1
            if g >= 0:
                free[g] = False
            out[self.owners[g] if g >= 0 else -1, self.classes[d]] += 1
        np.add.at(out[:, -1], self.owners[free], 1)
        return out


def _limited(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return detections by descending score, the first ``LIMIT`` of each class."""
    kept, counts = [], {}
    for d in sorted(found, key=lambda d: -d["score"]):
        counts[d["category_id"]] = counts.get(d["category_id"], 0) + 1
        if counts[d["category_id"]] <= LIMIT:
            kept.append(d)
    return kept


class _Flat:
    """The detections and objects of all images in flat arrays."""

    def __init__(self, parts: Sequence[ImageErrors], num_classes: int):
        def joined(name: str, kind: Any) -> np.ndarray:
            return np.concatenate([np.zeros(0, kind), *(getattr(p, name) for p in parts)])

        self.num_classes = num_classes
        self.scores, self.classes = joined("scores", np.float64), joined("classes", np.int64)
        self.kind, self.owners = joined("kind", "<U10"), joined("owners", np.int64)
        self.matched, self.missed = joined("matched", bool), joined("missed", bool)
        starts = np.cumsum([0, *(len(p.owners) for p in parts)])[:-1]
        shifted = [np.where(p.target >= 0, p.target + start, -1) for p, start in zip(parts, starts, strict=True)]
        self.target = np.concatenate([np.zeros(0, np.int64), *shifted])

    def ap50(self, mended: str = "") -> float:
        """Return AP50 in percent; with ``mended``, as if the errors of that kind had not been made."""
        right, counted, classes = self.kind == "right", self.kind != "ignored", self.classes
        objects = self.owners[~self.missed] if mended == "missed" else self.owners
        wrong = self.kind == mended
        if mended in ("class", "location"):
            # The best detection of an object that is not found becomes right, under its class; others go.
            order = np.argsort(-self.scores, kind="stable")
            mine = order[wrong[order] & ~self.matched[self.target[order]]]
            _, first = np.unique(self.target[mine], return_index=True)
            saved = mine[first]
            right, classes = right.copy(), classes.copy()
            right[saved], classes[saved] = True, self.owners[self.target[saved]]
            wrong = wrong & ~right
        counted = counted & ~wrong
        aps = [
            _average_precision(self.scores[mine], right[mine], int((objects == k).sum()))
            for k in range(self.num_classes)
            for mine in [counted & (classes == k)]
        ]
        known = [ap for ap in aps if not np.isnan(ap)]
        return 100 * float(np.mean(known)) if known else float("nan")


def _average_precision(scores: np.ndarray, right: np.ndarray, objects: int) -> float:
    """Return COCO's interpolated AP over 101 recalls, 0..1; nan without objects."""
    if not objects:
        return float("nan")
    order = np.argsort(-scores, kind="mergesort")
    hits = np.cumsum(right[order])
    recall, precision = hits / objects, hits / np.arange(1, len(hits) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(recall, _RECALLS, side="left")
    return float(np.append(precision, 0.0)[np.minimum(at, len(precision))].mean())


def _best_threshold(flat: _Flat, k: int) -> BestThreshold | None:
    mine = (flat.classes == k) & (flat.kind != "ignored")
    return best_threshold(flat.scores[mine], flat.kind[mine] == "right", int((flat.owners == k).sum()))


def _calibration(flat: _Flat) -> list[tuple[float, float, int, float, float]]:
    counted = flat.kind != "ignored"
    scores, right = flat.scores[counted], flat.kind[counted] == "right"
    place = np.clip((scores * BINS).astype(np.int64), 0, BINS - 1)
    rows = []
    for i in range(BINS):
        mine = place == i
        n = int(mine.sum())
        nothing = float("nan")
        means = (float(scores[mine].mean()), float(right[mine].mean())) if n else (nothing, nothing)
        rows.append((i / BINS, (i + 1) / BINS, n, *means))
    return rows
