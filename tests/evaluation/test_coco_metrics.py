from __future__ import annotations

import contextlib
import copy
import io
import json
import math
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from querydet_jax.data.dataset import Annotation, Dataset
from querydet_jax.data.transforms import rescale_to_original
from querydet_jax.evaluation import (
    ImageDetections,
    SizeBin,
    evaluate,
    save_results,
    to_coco_results,
)
from querydet_jax.evaluation.scoring import score
from querydet_jax.runtime.errors import DataError

HEADLINE = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]


def ground_truth(annotations, num_images=1, names=("car", "person")):
    return {
        "images": [{"id": i + 1, "width": 640, "height": 480} for i in range(num_images)],
        "categories": [{"id": 10 * (k + 1), "name": name} for k, name in enumerate(names)],
        "annotations": [{"id": i, **annotation} for i, annotation in enumerate(annotations)],
    }


def annotation(box, category=10, image=1, **more):
    return {"image_id": image, "category_id": category, "bbox": list(box), **more}


def result(box, score=0.9, category=10, image=1):
    return {"image_id": image, "category_id": category, "bbox": list(box), "score": score}


def random_case(seed, num_images=6, num_classes=3):
    """Ground truth of all sizes with crowds, and noisy, missing and false detections."""
    rng = np.random.default_rng(seed)
    annotations, results = [], []
    for image in range(1, num_images + 1):
        for _ in range(int(rng.integers(0, 12))):
            w, h = 2 ** rng.uniform(2, 8, size=2)
            x, y = rng.uniform(0, 300, size=2)
            category = 10 * int(rng.integers(1, num_classes + 1))
            annotations.append(
                annotation(
                    (x, y, w, h), category, image, area=w * h * rng.uniform(0.6, 1), iscrowd=int(rng.random() < 0.1)
                )
            )
            for _ in range(int(rng.integers(0, 3))):
                moved = np.array([x, y, w, h]) * (1 + rng.normal(0, 0.05, size=4))
                results.append(result(moved.tolist(), float(rng.random()), category, image))
        for _ in range(8):
            box = [*rng.uniform(0, 300, size=2), *rng.uniform(4, 100, size=2)]
            results.append(result(box, float(rng.random()), 10 * int(rng.integers(1, num_classes + 1)), image))
    truth = ground_truth(annotations, num_images, names=[f"class{k}" for k in range(num_classes)])
    for i, item in enumerate(truth["annotations"]):
        item["id"] = i + 1  # an id of 0 would trigger the bug of pycocotools that evaluate() avoids
    return truth, results


def plain_coco(truth, results):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(truth)
        coco.createIndex()
        run = COCOeval(coco, coco.loadRes(copy.deepcopy(results)), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run.stats


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_headline_equals_pycocotools(seed):
    truth, results = random_case(seed)
    metrics = evaluate(truth, results).metrics
    expected = plain_coco(truth, results)
    assert list(metrics)[:12] == HEADLINE
    for name, value in zip(HEADLINE, expected, strict=True):
        if value == -1:
            assert math.isnan(metrics[name])
        else:
            np.testing.assert_allclose(metrics[name] / 100, value, rtol=0, atol=1e-12, err_msg=name)


def test_perfect_detections_score_100_and_print_nothing(capsys):
    boxes = [(10, 10, 6, 6), (50, 50, 40, 40), (100, 100, 200, 200)]
    found = evaluate(ground_truth([annotation(b) for b in boxes]), [result(b) for b in boxes])
    for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR10", "AR100", "ARs"):
        assert found.metrics[name] == pytest.approx(100), name
    # With one detection per image, a third of the three objects is found.
    assert found.metrics["AR1"] == pytest.approx(100 / 3)
    assert found.per_class["car"]["AP"] == pytest.approx(100)
    assert found.per_class["car"]["objects"] == 3
    assert math.isnan(found.per_class["person"]["AP"]) and found.per_class["person"]["objects"] == 0
    assert capsys.readouterr().out == ""


def test_half_found_scores_51_of_101_recall_points():
    found = evaluate(
        ground_truth([annotation((10, 10, 20, 20)), annotation((100, 10, 20, 20))]), [result((10, 10, 20, 20))]
    )
    assert found.metrics["AP"] == pytest.approx(100 * 51 / 101)
    assert found.metrics["AR100"] == pytest.approx(50)


def test_loose_box_counts_up_to_its_iou():
    # IoU 0.6 matches at thresholds 0.50 and 0.55 of ten; at 0.60 it depends on rounding.
    found = evaluate(ground_truth([annotation((0, 0, 100, 100))]), [result((0, 0, 100, 59))])
    assert found.metrics["AP50"] == pytest.approx(100)
    assert found.metrics["AP75"] == 0
    assert found.metrics["AP"] == pytest.approx(20)


def test_wrong_class_finds_nothing():
    found = evaluate(ground_truth([annotation((10, 10, 20, 20))]), [result((10, 10, 20, 20), category=20)])
    assert found.metrics["AP"] == 0
    assert found.metrics["AR100"] == 0


def test_duplicate_is_a_false_positive():
    truth = ground_truth([annotation((10, 10, 20, 20)), annotation((100, 10, 20, 20))])
    results = [result((10, 10, 20, 20), 0.9), result((10, 10, 20, 20), 0.8), result((100, 10, 20, 20), 0.7)]
    # Recall up to 0.5 at precision 1 (51 points), the rest at 2/3 (50 points).
    assert evaluate(truth, results).metrics["AP"] == pytest.approx(100 * (51 + 50 * 2 / 3) / 101)


def test_detections_in_a_crowd_are_ignored():
    truth = ground_truth([annotation((10, 10, 20, 20)), annotation((200, 200, 100, 100), iscrowd=1)])
    results = [result((210, 210, 30, 30), 0.95), result((250, 250, 30, 30), 0.93), result((10, 10, 20, 20), 0.9)]
    found = evaluate(truth, results)
    assert found.metrics["AP"] == pytest.approx(100)
    assert found.objects["all"] == 1
    results[0]["bbox"] = [400, 10, 30, 30]
    assert evaluate(truth, results).metrics["AP"] == pytest.approx(50)


def test_annotation_numbered_zero_is_found():
    truth = ground_truth([annotation((10, 10, 20, 20))])
    assert truth["annotations"][0]["id"] == 0
    assert evaluate(truth, [result((10, 10, 20, 20))]).metrics["AP"] == pytest.approx(100)


def test_size_bins_are_half_open_and_use_annotation_area():
    sides = [4, 8, 16, 32, 96]
    boxes = [(100 * i, 10, side, side) for i, side in enumerate(sides)]
    truth = ground_truth([annotation(b) for b in boxes])
    found = evaluate(truth, [result(b) for b in boxes if b[2] != 16])
    keys = ("0_8", "8_16", "16_32", "32_96", "96_inf", "0_16")
    assert [found.objects[k] for k in keys] == [1, 1, 1, 1, 1, 2]
    assert [found.metrics[f"AP_{k}"] for k in keys] == pytest.approx([100, 100, 0, 100, 100, 100])
    assert [found.metrics[f"AR_{k}"] for k in keys] == pytest.approx([100, 100, 0, 100, 100, 100])
    # The largest box has a segment of 36 px^2, so it counts as 6 px.
    truth["annotations"][4]["area"] = 36.0
    assert evaluate(truth, []).objects["0_8"] == 2


def test_own_bins_and_limits():
    boxes = [(20 * i, 20 * j, 10, 10) for i in range(20) for j in range(10)]
    truth = ground_truth([annotation(b) for b in boxes])
    results = [result(b, 1 - i / 1000) for i, b in enumerate(boxes)]
    found = evaluate(truth, results, max_detections=(500, 1, 100), size_bins=[(0, 12.5)])
    assert list(found.metrics)[6:9] == ["AR1", "AR100", "AR500"]
    assert list(found.metrics)[12:] == ["AP_0_12.5", "AR_0_12.5"]
    # The headline uses the largest limit; pycocotools' summary would use 100.
    assert found.metrics["AP"] == pytest.approx(100)
    assert found.metrics["AR100"] == pytest.approx(50)
    assert found.metrics["AP_0_12.5"] == pytest.approx(100)
    for bad in ((), (0,), (1, 2.5), ("1",), (None,), 100, (1, -1)):
        with pytest.raises(DataError, match="max_detections: .*expected"):
            evaluate(truth, results, max_detections=bad)  # type: ignore[arg-type]
    for bad in ((8, 8), (float("nan"), 8), ("a", 8), (0,), None, (0, 10**400)):
        with pytest.raises(DataError, match="size_bins: "):
            evaluate(truth, results, size_bins=[bad])  # type: ignore[list-item]


def test_recall_at_a_further_limit_changes_nothing_else():
    truth, results = random_case(1)
    many = [(20 * i, 20 * j, 10, 10) for i in range(20) for j in range(10)]
    truth["annotations"] += [annotation(b, image=2, id=1000 + i) for i, b in enumerate(many)]
    results += [result(b, 1 - i / 1000, image=2) for i, b in enumerate(many)]
    before, after = evaluate(truth, results).to_dict(), evaluate(truth, results, recall_at=(200, 100)).to_dict()
    assert list(after["metrics"])[6:10] == ["AR1", "AR10", "AR100", "AR200"]
    assert after["metrics"].pop("AR200") > before["metrics"]["AR100"]
    assert after == before
    with pytest.raises(DataError, match="recall_at"):
        evaluate(truth, results, recall_at=(0,))


class Crowded(Dataset):
    """One image with 200 boxes of 10x10."""

    classes, category_ids, origin = ("car",), (1,), "crowded"
    boxes = np.array([(20 * i, 20 * j, 20 * i + 10, 20 * j + 10) for i in range(20) for j in range(10)], np.float32)

    def __len__(self):
        return 1

    def image_id(self, i):
        return 5

    def file_name(self, i):
        return "a.png"

    def size(self, i):
        return 400, 400

    def annotation(self, i):
        return Annotation(self.boxes, np.zeros(200, np.int32), np.zeros(200, bool))

    def load(self, i):
        raise NotImplementedError


@pytest.mark.parametrize(("most", "more"), [(50, {}), (100, {}), (150, {"AR150": 75}), (500, {"AR500": 100})])
def test_recall_at_the_detectors_own_limit(most, more):
    found = [ImageDetections(5, Crowded.boxes, np.linspace(1, 0.1, 200), np.zeros(200, int))]
    scores = score(Crowded(), found, max_detections=most)
    assert scores.headline()["AP"] == pytest.approx(100 * 51 / 101)  # COCO's, at 100 detections
    recalls = {name: value for name, value in scores.headline().items() if name.startswith("AR")}
    assert recalls == pytest.approx({"AR100": 50} | more)
    assert {name: scores.named()[name] for name in more} == pytest.approx(more)
    assert all(name in scores.table() for name in more)


def test_subsets_of_images_and_categories():
    truth = ground_truth(
        [annotation((10, 10, 20, 20)), annotation((10, 10, 20, 20), image=2), annotation((50, 50, 9, 9), 20)],
        num_images=2,
    )
    results = [result((10, 10, 20, 20))]
    assert evaluate(truth, results, image_ids=[1], category_ids=[10]).metrics["AP"] == pytest.approx(100)
    assert evaluate(truth, results, image_ids=[1]).metrics["AP"] == pytest.approx(50)
    assert list(evaluate(truth, results, category_ids=[20]).per_class) == ["person"]
    with pytest.raises(DataError, match="image_ids: 7"):
        evaluate(truth, results, image_ids=[7])
    for bad in (7, [[1]], ["1"], [None], [1.5]):
        with pytest.raises(DataError, match="category_ids: "):
            evaluate(truth, results, category_ids=bad)  # type: ignore[arg-type]


def test_no_results_is_zero_not_a_crash():
    found = evaluate(ground_truth([annotation((10, 10, 20, 20))]), [])
    assert found.metrics["AP"] == 0 and found.metrics["AR100"] == 0 and found.metrics["APs"] == 0
    assert math.isnan(found.metrics["APl"])
    assert "no detections" in found.table()


@pytest.mark.parametrize("images", [0, 2])
def test_no_ground_truth_is_nan_with_a_note_and_null_in_json(images):
    truth = ground_truth([], num_images=images)
    found = evaluate(truth, [result((1, 1, 5, 5))] if images else [])
    assert all(math.isnan(value) for value in found.metrics.values())
    assert "every metric is undefined" in found.table()
    plain = json.loads(found.to_json())
    assert plain["metrics"]["AP"] is None and plain["metrics"]["AP_0_8"] is None
    assert plain["per_class"]["car"]["AP"] is None
    assert "NaN" not in found.to_json()


def test_inputs_are_not_modified():
    truth, results = random_case(3)
    for item in truth["annotations"]:
        del item["area"], item["iscrowd"]
    before = copy.deepcopy((truth, results))
    found = evaluate(truth, results)
    assert (truth, results) == before
    for item in truth["annotations"]:
        item |= {"area": item["bbox"][2] * item["bbox"][3], "iscrowd": 0}
    assert evaluate(truth, results).to_dict() == found.to_dict()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (result((1, 1, 5, 5), image=77), "image id 77"),
        (result((1, 1, 5, 5), category=99), "category id 99"),
        (result((1, 1, float("nan"), 5)), r"results\[1\] has bbox"),
        (result((1, 1, 5)), r"results\[1\] has bbox"),
        (result((1, 1, -5, 5)), r"results\[1\] has bbox"),
        (result((1, 1, 5, 5), score=float("inf")), r"results\[1\] has score inf; give a finite number"),
        ({"image_id": 1, "category_id": 10, "bbox": [1, 1, 5, 5]}, r"results\[1\] has no 'score'; add it"),
    ],
)
def test_bad_results_are_named(bad, message):
    with pytest.raises(DataError, match=message) as error:
        evaluate(ground_truth([annotation((10, 10, 20, 20))]), [result((1, 1, 5, 5)), bad])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": None}, "ground truth: has no list 'images'"),
        ({"categories": [{"name": "car"}]}, r"categories\[0\] has no 'id'"),
        ({"categories": [{"id": 10}, {"id": 10}]}, r"categories\[1\] has the same id 10 as categories\[0\]"),
        ({"annotations": {}}, "has no list 'annotations'"),
        (
            {"annotations": [annotation((1, 1, 5, 5), image=5, id=3)]},
            r"annotations\[0\] has image_id 5, which no image",
        ),
        ({"annotations": [{"id": 4, "image_id": 1, "category_id": 10}]}, r"annotations\[0\] has no 'bbox'"),
    ],
)
def test_bad_ground_truth_is_named(change, message):
    with pytest.raises(DataError, match=message):
        evaluate(ground_truth([]) | change, [])


@pytest.mark.parametrize("box", [(0, 0, 1e9, 1e9), (0, 0, 100_001, 100_000), (-5e8, 0, 1e8, 101)])
def test_boxes_too_large_for_coco_are_refused(box):
    # pycocotools leaves them out of every metric: such a detection would be no false positive.
    truth, good = ground_truth([annotation((10, 10, 20, 20))]), result((10, 10, 20, 20))
    with pytest.raises(DataError, match=r"results\[1\] has bbox .* of more than 1e\+10 px\^2, which COCO"):
        evaluate(truth, [good, result(box)])
    with pytest.raises(DataError, match=r"annotations\[0\] has bbox .* of more than 1e\+10 px\^2"):
        evaluate(ground_truth([annotation(box)]), [good])
    for area in (1.1e10, -1, float("nan"), float("inf"), None, "9"):
        with pytest.raises(DataError, match=r"annotations\[0\] \(id 0\) has area .*; give a finite number from 0 to"):
            evaluate(ground_truth([annotation((1, 1, 2, 2), area=area)]), [good])


@pytest.mark.parametrize("only", [{"iscrowd": 1}, {"iscrowd": True}])
def test_crowds_alone_are_no_objects(only):
    found = evaluate(ground_truth([annotation((10, 10, 20, 20), **only)]), [result((10, 10, 20, 20))])
    assert found.objects["all"] == 0 and all(map(math.isnan, found.metrics.values()))
    assert "every metric is undefined" in found.table()


def test_numbers_of_other_libraries_are_taken():
    truth, results = random_case(2)
    expected = evaluate(truth, results).to_dict()
    as_arrays: list[Any] = [
        {
            "image_id": np.int64(entry["image_id"]),
            "category_id": np.float32(entry["category_id"]),
            "bbox": np.array(entry["bbox"]) if i % 2 else [np.float64(v) for v in entry["bbox"]],
            "score": np.float64(entry["score"]),
        }
        for i, entry in enumerate(results)
    ]
    assert evaluate(truth, as_arrays).to_dict() == expected
    assert evaluate(truth, tuple(as_arrays), image_ids=np.arange(1, 7)).to_dict() == expected  # type: ignore[arg-type]


def test_detections_to_results():
    detections = [
        ImageDetections(
            7, np.array([[1, 2, 4.5, 8]], np.float32), np.array([0.5], np.float32), np.array([1], np.int32)
        ),
        ImageDetections(8, np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32)),
    ]
    assert to_coco_results(detections, [10, 20]) == [
        {"image_id": 7, "category_id": 20, "bbox": [1.0, 2.0, 3.5, 6.0], "score": 0.5}
    ]
    with pytest.raises(DataError, match="image 7: classes 1..1"):
        to_coco_results(detections, [10])
    for bad in (["10", 20], [[1], 2], [True, 2], [1.5, 2]):
        with pytest.raises(DataError, match="category_ids: .*expected an integer id"):
            to_coco_results(detections, bad)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="image 9"):
        ImageDetections(9, np.zeros((2, 4)), np.zeros(3), np.zeros(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": [[1, 2, np.nan, 4]]}, "image 9: boxes .* not finite"),
        ({"boxes": [[1, 2, 3, np.inf]]}, "image 9: boxes .* not finite"),
        ({"boxes": [[5, 2, 3, 4]]}, "image 9: boxes .* end before they begin"),
        ({"boxes": [[1, 2, 3, None]]}, "image 9: boxes .* not finite"),
        ({"boxes": None}, r"image 9: boxes, scores, classes of shapes"),
        ({"boxes": [[1, 2, 3, "x"]]}, "image 9: boxes are not an array of numbers"),
        ({"boxes": [[1, 2], [3]]}, "image 9: boxes are not an array of numbers"),
        ({"boxes": [[1, 2, 3, 10**400]]}, "image 9: boxes are not an array of numbers"),
        ({"scores": [-np.inf]}, "image 9: scores .* not finite"),
        ({"scores": [[]]}, "image 9: boxes, scores, classes of shapes"),
        ({"classes": [0.5]}, "image 9: classes .* not whole"),
        ({"classes": [np.nan]}, "image 9: classes .* not whole"),
        ({"classes": ["car"]}, "image 9: classes are not an array of numbers"),
        ({"image_id": "9"}, "image '9': is not an integer id"),
        ({"image_id": None}, "image None: is not an integer id"),
        ({"image_id": True}, "image True: is not an integer id"),
    ],
)
def test_bad_detections_are_named(change, message):
    with pytest.raises(DataError, match=message) as error:
        ImageDetections(**{"image_id": 9, "boxes": [[1, 2, 3, 4]], "scores": [0.5], "classes": [0]} | change)
    assert "\n" not in str(error.value)


def test_rescale_by_hand():
    # A network input of 50x100 (height x width) from an original of 100x300 scales x by 3 and y by 2.
    boxes = np.array(
        [
            [10, 5, 20, 10],  # scaled
            [-4, -4, 110, 60],  # clipped to the whole image
            [101, 5, 105, 10],  # in the padding: nothing left
            [10, 5, 10, 10],  # no width
            [1, 1, 2, 2],  # a padded entry
        ],
        np.float32,
    )
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    valid = np.array([True, True, True, True, False])
    out = rescale_to_original(boxes, scores, np.array([3, 1, 2, 0, 0]), valid, (50, 100), (100, 300))
    np.testing.assert_array_equal(out[0], [[30, 10, 60, 20], [0, 0, 300, 100]])
    np.testing.assert_allclose(out[1], [0.9, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(out[2], [3, 1])
    assert out[0].dtype == out[1].dtype == np.float32
    assert len(ImageDetections(1, *out).boxes) == 2
    with pytest.raises(DataError, match="valid"):
        rescale_to_original(boxes, scores, scores, valid.astype(int), (50, 100), (100, 300))
    with pytest.raises(DataError, match="net_size"):
        rescale_to_original(boxes, scores, scores, valid, (0, 100), (100, 300))


def test_save_results_is_whole_or_absent(tmp_path):
    path = tmp_path / "new" / "results.json"
    save_results(path, [result((1, 2, 3, 4), score=np.float32(0.5))])  # type: ignore[arg-type]
    assert json.loads(path.read_text())[0]["score"] == 0.5
    before = path.read_text()
    endless: list[object] = []
    endless.append(endless)
    good = result((1, 2, 3, 4))
    for bad in (
        result((1, 2, 3, 4), score=float("nan")),
        {"bbox": np.zeros(4)},
        good | {"bbox": None},
        good | {"note": endless},
        good | {"note": object()},
        good | {"note": float("inf")},
    ):
        with pytest.raises(DataError, match="results.json"):
            save_results(path, [bad])
    assert path.read_text() == before
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


@pytest.mark.parametrize("num_classes", [10, 45])
def test_table_is_aligned_and_narrow(num_classes):
    truth, results = random_case(5, num_classes=num_classes)
    truth["categories"][0]["name"] = "a class with quite a long name"
    truth["categories"][2]["name"] = truth["categories"][1]["name"]
    found = evaluate(truth, results, max_detections=(1, 10, 100, 500))
    assert len(found.per_class) == num_classes
    lines = found.table().splitlines()
    assert max(map(len, lines)) <= 100
    assert any("8-16 px" in line for line in lines) and any(">=96 px" in line for line in lines)
    header = next(i for i, line in enumerate(lines) if line.startswith("class "))
    assert len(lines) - header - 2 == (num_classes if num_classes <= 30 else (num_classes + 1) // 2)
    # Right-aligned: the last column of each class row ends under its header.
    body = lines[header + 2 : -1]
    assert {len(line) for line in body} == {len(lines[header])}


def test_size_bin_names():
    assert (SizeBin(8, 16).key, SizeBin(8, 16).label) == ("8_16", "8-16 px")
    assert (SizeBin(0, 8).key, SizeBin(0, 8).label) == ("0_8", "<8 px")
    assert (SizeBin(96, math.inf).key, SizeBin(96, math.inf).label) == ("96_inf", ">=96 px")
