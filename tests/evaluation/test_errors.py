"""Error attribution: AP50 equals pycocotools', and every kind of error is found where one was made."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from querydet_jax.evaluation.coco import evaluate
from querydet_jax.evaluation.errors import KINDS, attribute


def truth(*objects: tuple[int, list[float]], crowd: tuple[int, ...] = (), images: int = 1) -> dict[str, Any]:
    return {
        "images": [{"id": i} for i in range(1, images + 1)],
        "categories": [{"id": 4, "name": "car"}, {"id": 9, "name": "boat"}],
        "annotations": [
            {"id": n, "image_id": 1, "category_id": c, "bbox": box, "iscrowd": int(n in crowd)}
            for n, (c, box) in enumerate(objects)
        ],
    }


def found(*detections: tuple[int, list[float], float]) -> list[dict[str, Any]]:
    return [{"image_id": 1, "category_id": c, "bbox": box, "score": s} for c, box, s in detections]


BOX, NEAR, FAR = [10, 10, 20, 20], [10, 18, 20, 20], [100, 100, 20, 20]


@pytest.mark.parametrize(
    ("objects", "detections", "kind"),
    [
        ([(4, BOX)], [(9, BOX, 0.9)], "class"),
        ([(4, BOX)], [(4, NEAR, 0.9)], "location"),
        ([(4, BOX)], [(9, NEAR, 0.9)], "both"),
        ([(4, BOX)], [(4, BOX, 0.9), (4, BOX, 0.8)], "duplicate"),
        ([(4, BOX)], [(4, BOX, 0.9), (4, FAR, 0.95)], "background"),
        ([(4, BOX), (4, FAR)], [(4, BOX, 0.9)], "missed"),
    ],
)
def test_each_kind_of_error(objects, detections, kind):
    report = attribute(truth(*objects), found(*detections))
    # A wrong class in the wrong place says nothing of the object, which counts as missed as well.
    expected = {kind, "missed"} if kind == "both" else {kind}
    assert {k for k, n in report.counts.items() if n} == expected and report.counts[kind] == 1
    # Mending the only error gives all; one behind a right detection costs nothing at 101 recalls.
    if kind != "both":
        expected_gain = 0 if kind == "duplicate" else 100 - report.ap50
        assert report.gains[kind] == pytest.approx(expected_gain, abs=1e-9)
    assert kind in report.table() and set(report.to_dict()["errors"]) == set(KINDS)


def test_detections_in_crowds_are_no_errors():
    content = truth((4, BOX), (4, [90, 90, 50, 50]), crowd=(1,))
    report = attribute(content, found((4, BOX, 0.9), (4, FAR, 0.95)))
    assert not any(report.counts.values()) and report.ap50 == pytest.approx(100)


@pytest.mark.parametrize("seed", range(6))
def test_ap50_equals_pycocotools(seed):
    rng = np.random.default_rng(seed)
    content = truth(images=12)
    results = []
    for i in range(1, 13):
        for _ in range(rng.integers(0, 9)):
            box = [*rng.uniform(0, 60, 2), *rng.uniform(5, 30, 2)]
            n = len(content["annotations"])
            crowd = int(rng.random() < 0.1)
            entry = {"id": n, "image_id": i, "category_id": int(rng.choice([4, 9])), "bbox": box, "iscrowd": crowd}
            content["annotations"].append(entry)
            for _ in range(rng.integers(0, 4)):
                moved = [v + rng.normal(0, 2) for v in box[:2]] + [max(v + rng.normal(0, 2), 1) for v in box[2:]]
                label = entry["category_id"] if rng.random() < 0.8 else 13 - entry["category_id"]
                results.append({"image_id": i, "category_id": label, "bbox": moved, "score": float(rng.random())})
        for _ in range(rng.integers(0, 130 if i == 1 else 5)):
            box = [*rng.uniform(0, 60, 2), *rng.uniform(5, 30, 2)]
            results.append({"image_id": i, "category_id": 4, "bbox": box, "score": float(rng.random() * 0.5)})
    report, metrics = attribute(content, results), evaluate(content, results)
    assert report.ap50 == pytest.approx(metrics.metrics["AP50"], abs=1e-9)
    # Two ways to the same thresholds: pycocotools' matches, and those of the attribution.
    assert report.best == metrics.best and len(report.best) == 2
    assert sum(report.counts[k] for k in KINDS if k != "missed") > 10 and report.counts["missed"] > 0
    assert all(gain >= -1e-9 for gain in report.gains.values())
    objects = sum(not e["iscrowd"] for e in content["annotations"])
    assert report.confusion[:-1].sum() == objects  # every object is in one row
    assert sum(row[2] for row in report.calibration) <= len(results)


def test_best_thresholds_and_calibration():
    detections = [(4, BOX, 0.8), (4, FAR, 0.6), (4, [50, 50, 9, 9], 0.3), (9, FAR, 0.65)]
    report = attribute(truth((4, BOX), (4, FAR), (9, [0, 0, 5, 5])), found(*detections))
    car = report.best["car"]
    assert (car.score, car.f1, car.precision, car.recall) == (0.6, 1.0, 1.0, 1.0)
    assert "boat" not in report.best
    assert evaluate(truth((4, BOX), (4, FAR), (9, [0, 0, 5, 5])), found(*detections)).best == {"car": car, "boat": None}
    rows = {round(low, 1): (n, right) for low, _, n, _, right in report.calibration if n}
    assert rows == {0.8: (1, 1.0), 0.6: (2, 0.5), 0.3: (1, 0.0)}
    assert report.confusion.tolist() == [[2, 0, 0], [0, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize("content", [truth(), truth((4, BOX))])
def test_nothing_found_or_nothing_there(content):
    report = attribute(content, [])
    assert report.counts["missed"] == len(content["annotations"]) and not report.best
    assert np.isnan(report.ap50) == (not content["annotations"]) and "AP50" in report.table()
