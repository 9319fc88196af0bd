"""hotcoco computes the same arrays as pycocotools, bit for bit."""

from __future__ import annotations

import importlib
import sys

import numpy as np
import pytest

from querydet_jax.evaluation import coco
from querydet_jax.evaluation.judges import Judged, check_judge, run_judge
from querydet_jax.runtime.errors import ConfigError


def case(seed: int, ids: tuple[int, ...]) -> tuple[dict, list[dict]]:
    """Objects and detections with crowds, ties, repeated boxes and empty ones, on images with these ids."""
    rng = np.random.default_rng(seed)
    labels, annotations, results = (-7, 0, 5), [], []
    for image in ids:
        for _ in range(rng.integers(0, 9)):
            box = [
                float(v) for v in np.round([*rng.uniform(0, 50, 2), *rng.uniform(0, 60, 2)], int(rng.integers(0, 9)))
            ]
            entry = {"image_id": image, "category_id": int(rng.choice(labels)), "bbox": box}
            annotations.append({"id": len(annotations), **entry, "iscrowd": int(rng.random() < 0.2)})
            if rng.random() < 0.4:
                annotations[-1]["area"] = float(rng.choice([0, 256, 1024, 9216, 100.5]))
            for _ in range(rng.integers(0, 4)):
                moved = (np.array(box) + rng.normal(0, 2 * (rng.random() < 0.7), 4)).clip(0).tolist()
                results.append({**entry, "bbox": moved, "score": float(rng.choice([rng.random(), 0.5]))})
        for _ in range(rng.integers(0, 120)):
            box = [*rng.uniform(0, 50, 2).tolist(), *rng.uniform(0, 40, 2).tolist()]
            score = float(np.round(rng.random(), 1))
            results.append({"image_id": image, "category_id": int(rng.choice(labels)), "bbox": box, "score": score})
    categories = [{"id": i, "name": f"class {i}"} for i in labels]
    return {"images": [{"id": i} for i in ids], "categories": categories, "annotations": annotations}, results


@pytest.mark.parametrize("ids", [(), (1, 2, 3, 4), (0, -3, 2**62)])
def test_hotcoco_gives_the_same_arrays(monkeypatch, ids):
    pytest.importorskip("hotcoco", reason="pip install -r requirements-hotcoco.txt")
    judged: list[Judged] = []

    def kept(*arguments):
        judged.append(run_judge(*arguments))
        return judged[-1]

    monkeypatch.setattr(coco, "run_judge", kept)
    for seed in range(4):
        truth, found = case(seed, ids)
        both = [coco.evaluate(truth, found, recall_at=(20, 200), judge=judge) for judge in ("pycocotools", "hotcoco")]
        ours, theirs = judged[-2:]
        np.testing.assert_array_equal(ours.precision, theirs.precision)
        np.testing.assert_array_equal(ours.recall, theirs.recall)
        assert both[0].to_dict() == both[1].to_dict()
        assert bool(ids) == any(best is not None for best in both[0].best.values())


def test_a_judge_that_is_not_there_is_one_line(monkeypatch):
    with pytest.raises(ConfigError, match="judge 'detectron': choose pycocotools or hotcoco"):
        check_judge("detectron")
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    with pytest.raises(ImportError):
        importlib.import_module("hotcoco")
    truth, found = case(0, (1,))
    with pytest.raises(ConfigError, match=r"judge hotcoco: needs hotcoco; pip install -r requirements-hotcoco.txt"):
        coco.evaluate(truth, found, judge="hotcoco")
