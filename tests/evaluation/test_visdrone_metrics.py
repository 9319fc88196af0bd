from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
from visdrone_oracle import drop_in_regions, evaluate_by_loops

from querydet_jax.evaluation import visdrone
from querydet_jax.evaluation.metrics import DEFAULT_BINS
from querydet_jax.evaluation.visdrone import VisDroneImage, evaluate_visdrone
from querydet_jax.evaluation.visdrone_files import as_written, read_result_file, write_result_files
from querydet_jax.evaluation.visdrone_results import CLASSES
from querydet_jax.runtime.errors import DataError

RECORDED = Path(__file__).parents[1] / "golden" / "aux.npz"
HEADLINE = ["AP", "AP50", "AP75", "AR1", "AR10", "AR100", "AR500"]
PEDESTRIAN, CAR = 1, 4


def image(truth, detections, size=(300, 400), name="a"):
    return VisDroneImage(name, size, np.array(truth), np.array(detections))


def box(x, y, w, h, category=CAR, score=1):
    return (x, y, w, h, score, category, 0, 0)


def random_images(seed, count=8, objects=12, detections=40, size=(270, 480), decimals=8):
    """Images with all special cases: regions, ignored objects, ties, any order, empty boxes, other categories."""
    rng = np.random.default_rng(seed)
    height, width = size
    out = []
    for index in range(count):
        n = int(rng.integers(0, objects + 1))
        sides = np.exp(rng.uniform(np.log(4), np.log(120), (n, 2))).astype(int)
        corner = (rng.random((n, 2)) * [width, height]).astype(int)
        truth = np.concatenate([corner, sides, np.ones((n, 4), int)], axis=1)
        truth[:, 4] = rng.random(n) < 0.85
        truth[:, 5] = rng.choice([1, 1, 4, 4, 4, 5, 9, 10, 11, 0], n)
        truth[rng.random(n) < 0.05, 2] = 0
        m = int(rng.integers(0, detections + 1))
        found = np.full((m, 8), -1.0)
        found[:, :2] = rng.random((m, 2)) * [width, height]
        found[:, 2:4] = np.exp(rng.uniform(np.log(4), np.log(120), (m, 2)))
        found[:, 5] = rng.choice([1, 4, 5, 6, 10, 10, 0, 11], m)
        if n:
            near = rng.random(m) < 0.7
            source = truth[rng.integers(0, n, m)]
            found[near, :4] = (source[:, :4] + rng.normal(0, 0.08, (m, 4)) * sides.mean())[near]
            found[near, 5] = source[near, 5]
            exact = near & (rng.random(m) < 0.3)
            found[exact, :4] = source[exact, :4]
            found[exact, 0] += rng.choice([0, 0.5, 1, 2.5], exact.sum())
        found[:, 2:4] = np.maximum(found[:, 2:4], 0)
        found[:, 4] = np.round(rng.random(m), decimals)
        if rng.random() < 0.6:
            found = found[np.argsort(-found[:, 4], kind="stable")]
        out.append(VisDroneImage(f"{seed}_{index}", size, truth, found))
    return out


def assert_equal_metrics(metrics, expected):
    assert set(expected) <= set(metrics)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=0, atol=1e-9, err_msg=name)


def test_recorded_figures():
    with np.load(RECORDED) as file:
        recorded = dict(file)
    images = [
        VisDroneImage(str(i), tuple(size), recorded[f"ve_gt{i}"], recorded[f"ve_det{i}"])
        for i, size in enumerate(recorded["ve_hw"].tolist())
    ]
    found = evaluate_visdrone(images)
    np.testing.assert_allclose([found.metrics[name] for name in HEADLINE], recorded["ve_result"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(found.classwise, recorded["ve_classwise"], rtol=0, atol=1e-4)
    expected, _ = evaluate_by_loops(images)
    assert_equal_metrics(found.metrics, expected)


@pytest.mark.parametrize("seed", range(6))
def test_equals_the_loops(seed):
    # Few decimals make ties.
    images = random_images(seed, decimals=8 if seed % 2 else 1, size=(270, 480) if seed else (40, 60))
    found = evaluate_visdrone(images)
    expected, by_class = evaluate_by_loops(images)
    assert_equal_metrics(found.metrics, expected)
    np.testing.assert_allclose([row["AP"] for row in found.per_class.values()], by_class, atol=1e-9)
    for entry in DEFAULT_BINS[1:4]:
        expected, _ = evaluate_by_loops(images, *entry)
        row = found.per_size[entry.key]
        assert_equal_metrics(row, {name: expected[name] for name in ("AP", "AP50", "AR500", "AP_mean")})


def test_limits_beyond_500_equal_the_loops():
    images = random_images(11, count=2, objects=60, detections=1500)
    assert max(len(one.detections) for one in images) > 500
    assert_equal_metrics(evaluate_visdrone(images, size_bins=()).metrics, evaluate_by_loops(images)[0])


def test_a_bin_of_every_size_is_the_headline():
    found = evaluate_visdrone(random_images(21), size_bins=[(0, math.inf)])
    row = found.per_size["0_inf"]
    assert {name: row[name] for name in ("AP", "AP50", "AR500", "AP_mean")} == pytest.approx(
        {name: found.metrics[name] for name in ("AP", "AP50", "AR500", "AP_mean")}
    )
    assert row["objects"] == found.num_objects


def test_at_least_8_times_the_speed_of_the_loops():
    # Measured: about 40 times (70 to 100 on full val images). The margin allows for busy machines.
    images = random_images(31, count=12, objects=60, detections=300, size=(540, 960))
    begun = time.process_time()
    expected, _ = evaluate_by_loops(images)
    loops = time.process_time() - begun
    times = []
    for _ in range(3):
        begun = time.process_time()
        found = evaluate_visdrone(images)
        times.append(time.process_time() - begun)
    assert_equal_metrics(found.metrics, expected)
    assert loops > 8 * min(times), (loops, times)


def test_perfect_detections():
    truth = [box(10, 10, 20, 20), box(60, 10, 30, 20), box(10, 100, 9, 9, PEDESTRIAN)]
    found = evaluate_visdrone([image(truth, truth)])
    assert [found.metrics[name] for name in ("AP", "AP50", "AP75", "AR10", "AR500")] == pytest.approx([100] * 5)
    # The first detection is a car: with limit 1, half of the cars and no pedestrian are found.
    assert found.metrics["AR1"] == pytest.approx(25)
    assert found.per_class["car"]["objects"] == 2 and found.per_class["car"]["images"] == 1
    assert math.isnan(found.per_class["bus"]["AP"]) and found.classwise[CLASSES.index("bus")] == 0
    assert {key: row["objects"] for key, row in found.per_size.items() if row["objects"]} == {
        "8_16": 1,
        "16_32": 2,
        "0_16": 1,
    }


def test_classes_are_weighted_by_their_images():
    car, person = box(10, 10, 20, 20), box(50, 50, 20, 20, PEDESTRIAN)
    images = [image([car], [car], name=str(i)) for i in range(3)] + [image([person, person], [], name="last")]
    found = evaluate_visdrone(images)
    assert found.metrics["AP"] == pytest.approx(75)
    assert found.metrics["AP_mean"] == pytest.approx(50)


def test_limits_count_all_categories_in_file_order():
    car = box(10, 10, 20, 20)
    found = evaluate_visdrone([image([car], [box(200, 200, 9, 9, 11, 0.2), (10, 10, 20, 20, 0.9, CAR, -1, -1)])])
    assert found.metrics["AR1"] == 0 and found.metrics["AR10"] == pytest.approx(100)
    assert any("category 0 or 11" in note for note in found.notes)
    assert any("not by descending score" in note for note in found.notes)
    others = [box(200, 200, 9, 9, 2, 0.5)] * 500
    found = evaluate_visdrone([image([car], [*others, car])])
    assert found.metrics["AR500"] == 0 and found.per_class["car"]["AP"] == 0


def test_ignored_regions_remove_truth_and_detections():
    region = box(100, 100, 50, 50, 0, 0)
    inside, out = box(110, 110, 20, 20), box(10, 10, 20, 20)
    found = evaluate_visdrone([image([region, inside, out], [inside, box(120, 120, 9, 9, CAR, 0.99), out])])
    assert found.num_objects == 1 and found.num_detections == 1
    assert found.metrics["AP"] == pytest.approx(100)
    # The region covers columns 99..149, counted from 0. A box at x counts columns x..x+19: at 140 exactly half.
    for x, objects in ((141, 1), (140, 0), (90, 0), (89, 0), (88, 1)):
        assert evaluate_visdrone([image([region, box(x, 110, 20, 20)], [])]).num_objects == objects


def test_boxes_at_the_edges_equal_the_pixel_map():
    # Boxes at all integer and half-integer positions of a small image, and beyond its edges.
    rng = np.random.default_rng(5)
    for size in ((9, 13), (1, 13), (9, 1), (1, 1)):
        regions = [box(*rng.integers(-1, 12, 2), *rng.integers(0, 9, 2), 0, 0) for _ in range(4)]
        boxes = np.concatenate([rng.integers(-6, 30, (3000, 2)), rng.integers(0, 30, (3000, 2))], axis=1) / 2
        rows = np.concatenate([boxes, np.full((3000, 4), 1.0)], axis=1)
        case = image(regions, rows, size)
        for ours, theirs in zip(visdrone._outside_regions(case), drop_in_regions(case), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_ignored_truth_absorbs_by_the_detections_area():
    car, ignored = box(10, 10, 20, 20), box(100, 100, 80, 80, CAR, 0)
    inside = [box(110, 110, 10, 10, CAR, 0.9), box(130, 130, 10, 10, CAR, 0.8)]
    found = evaluate_visdrone([image([car, ignored], [*inside, box(10, 10, 20, 20, CAR, 0.7)])])
    # Neither detection counts; the ignored object still counts as an object.
    assert found.metrics["AP"] == pytest.approx(50) and found.metrics["AR500"] == pytest.approx(50)
    found = evaluate_visdrone([image([car, ignored], [box(110, 110, 10, 10, PEDESTRIAN, 0.9), car])])
    assert found.metrics["AP"] == pytest.approx(50)


def test_best_free_object_is_taken():
    # The second detection's best object is taken, so it takes the other.
    truth = [box(10, 10, 20, 20), box(14, 10, 20, 20)]
    found = evaluate_visdrone([image(truth, [box(10, 10, 20, 20, CAR, 0.9), box(11, 10, 20, 20, CAR, 0.8)])])
    assert found.metrics["AP50"] == pytest.approx(100)
    duplicate = [box(10, 10, 20, 20, CAR, 0.9), box(10, 10, 20, 20, CAR, 0.8), box(100, 10, 20, 20, CAR, 0.7)]
    found = evaluate_visdrone([image([box(10, 10, 20, 20), box(100, 10, 20, 20)], duplicate)])
    assert found.metrics["AP"] == pytest.approx(100 * (1 + 2 / 3) / 2)


def test_equal_scores():
    truth = [box(10, 10, 20, 20)]
    loose, tight = box(10, 10, 20, 14, CAR, 0.5), box(10, 10, 20, 20, CAR, 0.5)
    # Matching takes the later one first, the ranking over images the earlier one, because the port reverses twice.
    first, second = (evaluate_visdrone([image(truth, rows)]) for rows in ([loose, tight], [tight, loose]))
    assert first.metrics["AP50"] == pytest.approx(50) and first.metrics["AP75"] == pytest.approx(50)
    assert second.metrics["AP50"] == pytest.approx(50) and second.metrics["AP75"] == pytest.approx(100)
    others = VisDroneImage("b", (300, 400), np.array([box(99, 99, 9, 9)]), np.array([box(9, 99, 9, 9, CAR, 0.5)]))
    found = evaluate_visdrone([image(truth, [tight]), others])  # the later image's first
    assert found.metrics["AP"] == pytest.approx(25)


def test_curves():
    truth = [box(10 + 40 * i, 10, 20, 20) for i in range(4)]
    detections = [
        box(10, 10, 20, 20, CAR, 0.9),
        box(10, 200, 20, 20, CAR, 0.8),
        box(50, 10, 20, 20, CAR, 0.7),
        box(90, 10, 20, 12, CAR, 0.6),  # IoU 0.6
    ]
    found = evaluate_visdrone([image(truth, detections)])
    curve = found.curves["car"][50]
    np.testing.assert_allclose(curve.recall, [0.25, 0.5, 0.75])
    np.testing.assert_allclose(curve.precision, [1, 0.75, 0.75])
    np.testing.assert_allclose(curve.scores, [0.9, 0.7, 0.6])
    np.testing.assert_allclose(curve.at([0, 0.25, 0.26, 0.75, 0.76, 1]), [1, 1, 0.75, 0.75, 0, 0])
    np.testing.assert_allclose(found.curves["car"][75].recall, [0.25, 0.5])
    assert found.per_class["car"]["AP50"] == pytest.approx(100 * (1 + 0.75 + 0.75) / 4)
    assert len(found.curves["bus"][50].recall) == 0 and found.curves["bus"][50].at(0.5) == 0


def test_size_bins_ignore_what_is_outside():
    small, large = box(10, 10, 10, 10), box(100, 100, 40, 40)
    detections = [
        box(100, 100, 40, 40, CAR, 0.9),  # on the large object: does not count in the small bin
        box(200, 200, 40, 40, CAR, 0.8),  # large and false: does not count either
        box(110, 110, 10, 10, CAR, 0.7),  # small and false, inside the large object: counts
        box(10, 10, 10, 10, CAR, 0.6),
    ]
    found = evaluate_visdrone([image([small, large], detections)], size_bins=[(0, 16), (32, math.inf)])
    assert found.per_size["0_16"] == pytest.approx({"AP": 50, "AP50": 50, "AR500": 100, "AP_mean": 50, "objects": 1})
    assert found.per_size["32_inf"]["AP"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("images", "note"),
    [
        ([], "no images"),
        ([image([], [box(1, 1, 5, 5)])], "no objects"),
        ([image([box(1, 1, 5, 5)], [])], "no detections"),
    ],
)
def test_nothing_there(images, note, capsys):
    found = evaluate_visdrone(images)
    assert note in found.notes[0] and note in found.table()
    plain = json.loads(found.to_json())
    if note == "no detections":
        assert plain["metrics"]["AP"] == 0
    else:
        assert math.isnan(found.metrics["AP"]) and plain["metrics"]["AP"] is None
    assert capsys.readouterr().out == ""


def test_forms():
    found = evaluate_visdrone(random_images(3))
    plain = json.loads(found.to_json())
    assert plain["per_class"]["truck"]["AP"] is None and plain["per_class"]["car"]["AP"] > 0
    assert list(plain["precision"]["car"]) == ["IoU50", "IoU75"] and plain["precision"]["truck"]["IoU50"]["R10"] is None
    assert list(plain["precision"]["car"]["IoU50"]) == [f"R{recall}" for recall in range(10, 100, 10)]
    assert plain["precision"]["car"]["IoU50"]["R30"] == pytest.approx(100 * found.curves["car"][50].at(0.3))
    lines = found.table().splitlines()
    assert max(map(len, lines)) <= 100
    assert sum(line.startswith("awning-tricycle") for line in lines) == 3
    assert any(line.startswith("8-16 px") for line in lines)


def test_recall_precision_curves_have_the_areas_of_the_table():
    found = evaluate_visdrone(random_images(3, count=30))
    *means, whole = found.recall_precision().means
    assert [line.iou for line in means] == [f"0.{iou}" for iou in range(50, 100, 5)] and whole.iou == "0.50:0.95"
    assert (means[0].ap, means[5].ap, whole.ap) == pytest.approx([found.metrics[k] for k in ("AP50", "AP75", "AP")])
    classes = {line.name: line for line in found.recall_precision().classes}
    assert list(classes) == list(CLASSES)
    for name, line in classes.items():
        np.testing.assert_equal(line.ap, found.per_class[name]["AP50"])
        assert np.isnan(line.precision).all() == (found.per_class[name]["objects"] == 0)
        assert line.precision.shape == (101,) and not (np.diff(line.precision) > 0).any()
    # Weighted by the images that hold the class, as the AP is.
    known = [name for name in CLASSES if found.per_class[name]["objects"]]
    weights = [found.per_class[name]["images"] for name in known]
    np.testing.assert_allclose(
        means[0].precision, np.average([classes[name].precision for name in known], axis=0, weights=weights)
    )
    # The mean of 101 samples of a falling curve is its area to within a hundredth of its height.
    assert means[0].precision.mean() == pytest.approx(means[0].ap, abs=1)
    assert math.isnan(evaluate_visdrone([]).recall_precision().means[0].ap)


def test_inputs_are_not_modified():
    images = random_images(4)
    before = [(one.truth.copy(), one.detections.copy()) for one in images]
    evaluate_visdrone(images)
    for one, (truth, detections) in zip(images, before, strict=True):
        np.testing.assert_array_equal(one.truth, truth)
        np.testing.assert_array_equal(one.detections, detections)


@pytest.mark.parametrize(
    ("truth", "detections", "message"),
    [
        ([box(1, 1, 5, 5)], [(1, 1, 5, 5)], r"a: detections: shape \[1, 4\]"),
        ([box(1, 1, 5, 5)], [box(1, 1, 5, 5), box(1, math.nan, 5, 5)], "a: detections: row 1: .*finite"),
        ([], [box(1, 1, 5, 5), box(1, 1e308, 5, 5)], r"a: detections: row 1: .* beyond 1e\+09"),
        ([], [box(1, 1, 5, 5), box(1, "x", 5, 5)], "a: detections: rows are not an array of numbers"),
        ([], [box(1, None, 5, 5)], "a: detections: row 0: .*finite"),
        ([], [box(1, 10**400, 5, 5)], "a: detections: rows are not an array of numbers"),
        ([], [box(1, 1, -5, 5)], "a: detections: row 0: negative"),
        ([], [box(1, 1, 5, 5, 12)], "category 12"),
        ([], [box(1, 1, 5, 5, 1.5)], "category 1.5"),
        ([box(1, 1.5, 5, 5)], [], "a: truth has fractions"),
        ([box(1, 1, 5, 5, 1, 2)], [], "a: truth has a score"),
    ],
)
def test_bad_rows_are_named(truth, detections, message):
    with pytest.raises(DataError, match=message):
        image(truth, detections)


def test_bad_images_are_named():
    for size in ((0, 10), (10,), (float("nan"), 10), ("10", 10), None, (10.5, 10), (-1, 10)):
        with pytest.raises(DataError, match="a: size"):
            image([], [], size=size)
    with pytest.raises(DataError, match="a: given twice"):
        evaluate_visdrone([image([], []), image([], [])])
    with pytest.raises(DataError, match="not a range"):
        evaluate_visdrone([], size_bins=[(8, 8)])


def test_result_files_round_trip(tmp_path):
    rows = [(1.234, 2, 30.5, 4, 0.25, CAR), (5, 6, 7, 8, 0.123456789, PEDESTRIAN), (9, 9, 9, 9, 0.9, 10)]
    paths = write_result_files(tmp_path / "new", {"one.jpg": rows, "two": np.zeros((0, 6))})
    assert [path.name for path in paths] == ["one.txt", "two.txt"]
    assert paths[0].read_text().splitlines() == [
        "9.00,9.00,9.00,9.00,0.90000000,10,-1,-1",
        "1.23,2.00,30.50,4.00,0.25000000,4,-1,-1",
        "5.00,6.00,7.00,8.00,0.12345679,1,-1,-1",
    ]
    assert paths[1].read_text() == ""
    read = read_result_file(paths[0])
    assert read.shape == (3, 8) and read[1].tolist() == [1.23, 2, 30.5, 4, 0.25, 4, -1, -1]
    assert read_result_file(paths[1]).shape == (0, 8)


def test_written_files_score_the_same(tmp_path):
    images = [
        VisDroneImage(one.name, one.size, one.truth, np.round(one.detections, 2)[np.argsort(-one.detections[:, 4])])
        for one in random_images(7)
    ]
    paths = write_result_files(tmp_path, {one.name: one.detections for one in images})
    again = [
        VisDroneImage(one.name, one.size, one.truth, read_result_file(path))
        for one, path in zip(images, paths, strict=True)
    ]
    assert evaluate_visdrone(again).to_dict() == evaluate_visdrone(images).to_dict()


def test_as_written_equals_the_written_file(tmp_path):
    for one in random_images(8):
        (path,) = write_result_files(tmp_path, {one.name: one.detections})
        np.testing.assert_array_equal(as_written(one.detections, one.name), read_result_file(path)[:, :6])


def test_subfolders_of_image_names_are_kept(tmp_path):
    paths = write_result_files(tmp_path, {"day/one.webp": [(1, 2, 3, 4, 0.5, CAR)], "night/one.webp": []})
    assert [str(path.relative_to(tmp_path)) for path in paths] == ["day/one.txt", "night/one.txt"]
    assert paths[0].read_text() and not paths[1].read_text()


def test_annotation_files_are_read(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("684,8,273,116,0,0,0,0\n406,119,265,70,0,0,0,0,\n\n255,22,119,128,1,4,0,2")
    truth = read_result_file(path)
    assert truth.shape == (3, 8) and truth[2].tolist() == [255, 22, 119, 128, 1, 4, 0, 2]
    assert read_result_file(_written(tmp_path, "1,2,3,4,0.5,6"))[0].tolist() == [1, 2, 3, 4, 0.5, 6, -1, -1]


def _written(folder, text):
    path = folder / "bad.txt"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1,2,3,4,0.5", "not 6 to 8 numbers"),
        ("1,2,3,4,0.5,x,-1,-1", "not 6 to 8 numbers"),
        ("1,2,3,4,0.5,1,-1,-1,7", "not 6 to 8 numbers"),
        ("1 2 3 4 0.5 1", "not 6 to 8 numbers"),
        ("1,2,3,4,nan,1,-1,-1", "finite"),
        ("1,2,-3,4,0.5,1,-1,-1", "negative"),
        ("1,2,3,4,0.5,13,-1,-1", "category 13"),
        ("1,2,3,4_0,0.5,1,-1,-1", r"not 6 to 8 numbers, all finite in '1,2,3,4_0,0.5,1,-1,-1'"),
        ("1,2,3,1e999,0.5,1,-1,-1", "not 6 to 8 numbers, all finite"),
        ("1,2,3,1e300,0.5,1,-1,-1", "not finite or beyond"),
        ("1,2,\u0663,4,0.5,1", "not 6 to 8 numbers, all finite"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = _written(tmp_path, f"1,2,3,4,0.5,1,-1,-1\n{line}\n")
    with pytest.raises(DataError, match=f"bad.txt: line 2: .*{message}.*expected x,y,w,h") as error:
        read_result_file(path)
    assert "\n" not in str(error.value)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"none.txt: not readable \(No such file"):
        read_result_file(tmp_path / "none.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="binary.txt: not text in UTF-8 or UTF-16"):
        read_result_file(tmp_path / "binary.txt")


def test_invalid_input_writes_no_file(tmp_path):
    good = [(1, 2, 3, 4, 0.5, 1)]
    for bad, message in (
        ({"b": [(1, 2, 3, 4, math.inf, 1)]}, "b: row 0"),
        ({"../b": good}, "not an image name"),
        ({"/b": good}, "not an image name"),
        ({"b\0": good}, "'b.x00': not an image name"),
        ({"a.png": good}, "a second image"),
    ):
        with pytest.raises(DataError, match=message):
            write_result_files(tmp_path / "out", {"a": good, **bad})
        assert not (tmp_path / "out").exists()
