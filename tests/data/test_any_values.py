"""Readers of annotations and results, given files of the right structure with impossible values in any place.

Each gives a result that makes sense, or a DataError of one line; never another exception.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from querydet_jax.data.coco_json import check_content
from querydet_jax.data.dataset import Dataset
from querydet_jax.data.readers.coco import CocoDataset
from querydet_jax.data.readers.visdrone import VisDroneDataset, parse_annotations
from querydet_jax.data.readers.yolo import YoloDataset, parse_labels, read_names
from querydet_jax.evaluation.coco import evaluate
from querydet_jax.evaluation.coco_input import GroundTruth, annotations_of
from querydet_jax.evaluation.metrics import CocoMetrics
from querydet_jax.evaluation.standalone import score_coco
from querydet_jax.evaluation.visdrone import VisDroneImage, evaluate_visdrone
from querydet_jax.evaluation.visdrone_files import read_result_file
from querydet_jax.evaluation.visdrone_results import VisDroneMetrics
from querydet_jax.runtime.errors import DataError


def examples(count: int) -> settings:
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


# Evaluations take longer than reading.
some_or_all = pytest.mark.parametrize("count", [250, pytest.param(2000, marks=pytest.mark.slow)])

TRUTH: dict[str, Any] = {
    "images": [
        {"id": 1, "file_name": "a.png", "width": 60, "height": 40},
        {"id": 2, "file_name": "b.png", "width": 60, "height": 40},
    ],
    "categories": [{"id": 1, "name": "car"}, {"id": 5, "name": "boat"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 10, 20], "area": 150, "iscrowd": 0},
        {"id": 2, "image_id": 2, "category_id": 5, "bbox": [5, 6, 7, 8]},
        {"id": 3, "image_id": 2, "category_id": 5, "bbox": [30, 6, 7, 8], "iscrowd": 1},
    ],
}
RESULTS = [
    {"image_id": 1, "category_id": 1, "bbox": [1, 2, 10, 19], "score": 0.9},
    {"image_id": 2, "category_id": 5, "bbox": [5, 6, 7, 8], "score": 0.5},
]

HUGE = "an integer of 5,000 digits"  # in files; Python itself writes at most 4,300

ODD: list[Any] = [
    None, "", "x", "1", [], {}, [1], True, False, -1, 0, 1, 2, 7, 0.5, -0.0, 1e308, -1e308, 1e10, 1e11,
    10**30, -(10**400), HUGE, math.nan, math.inf, -math.inf, [[[]]], [None] * 4, [1, 2, 3, 4], {"id": 1},
    [0, 0, 1e9, 1e9], [1, 2, 3, "4"], [1e-320] * 4, [-5, -5, 1e5, 1e5],
    "\0", "\ud800", "\ud83d", "../x", "/", ".", "a" * 300, "\x1b[31m\n", "é", "e\u0301",
]  # fmt: skip


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a value in nested lists and objects."""
    inside = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path] * bool(path) + [place for key, value in inside for place in places(value, (*path, key))]


def one_or_two(choices: Sequence[Any]) -> st.SearchStrategy[Any]:
    one = st.sampled_from(choices)
    return st.tuples(one, one | st.none())


def changes(content: Any) -> st.SearchStrategy[Any]:
    """Odd values for one or two places."""
    return one_or_two([(place, value) for place in places(content) for value in ODD])


def changed(content: Any, values: Iterable[Any]) -> Any:
    content = copy.deepcopy(content)
    for path, value in filter(None, values):
        node = content
        try:
            for key in path[:-1]:
                node = node[key]
            node[path[-1]] = value
        except (TypeError, LookupError):  # an earlier change has replaced what leads there
            continue
    return content


def dumped(content: Any) -> str:
    """JSON with NaN and integers of any length, as Python and other languages write it."""
    return json.dumps(content).replace(f'"{HUGE}"', "9" * 5000)


def refused(read: Callable[[], Any]) -> bool:
    """Whether it raises a DataError, in one short line."""
    try:
        read()
    except DataError as error:
        assert "\n" not in str(error) and len(str(error)) < 600, str(error)
        return True
    return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of 60x40 in the layouts of YOLO and VisDrone."""
    root = tmp_path_factory.mktemp("data")
    for name in ("images", "labels", "annotations"):
        (root / name).mkdir()
    Image.new("RGB", (60, 40)).save(root / "images" / "a.png")
    return root


def assert_sound(dataset: Dataset) -> None:
    """Boxes lie in their images, and evaluation takes the ground truth that comes of them."""
    for i in range(len(dataset)):
        (h, w), truth = dataset.size(i), dataset.annotation(i)
        assert (truth.boxes >= 0).all() and (truth.boxes <= [w, h, w, h]).all()
        assert (truth.boxes[:, 2:] > truth.boxes[:, :2]).all()
        assert ((truth.classes >= 0) & (truth.classes < len(dataset.classes))).all()
    annotations_of(check_content(dataset.coco_ground_truth(), GroundTruth, "a"), "a")


def assert_percent(values: Iterable[float], objects: int) -> None:
    values = list(values)
    assert all(math.isnan(value) or 0 <= value <= 100 for value in values)
    assert objects or all(map(math.isnan, values))  # on no object, nothing is a number


@examples(2000)
@given(changes(TRUTH))
@example([(("annotations", 0, "area"), -1)])
@example([(("annotations", 0, "area"), math.nan)])
@example([(("annotations", 0, "bbox", 3), 10**400)])
def test_coco_annotations(folder, values):
    path = folder / "instances.json"
    path.write_text(dumped(changed(TRUTH, values)))
    opened: list[CocoDataset] = []
    if not refused(lambda: opened.append(CocoDataset(path, folder / "images"))):
        assert_sound(opened[0])


@some_or_all
def test_coco_results(folder, count):
    @examples(count)
    @given(changes(TRUTH) | st.just([]), changes(RESULTS) | st.just([]), st.booleans())
    def check(of_truth: Any, of_results: Any, as_files: bool) -> None:
        truth, results = changed(TRUTH, of_truth), changed(RESULTS, of_results)
        found: list[CocoMetrics] = []
        if as_files:
            (folder / "truth.json").write_text(dumped(truth))
            (folder / "results.json").write_text(dumped(results))
            bad = refused(lambda: found.append(score_coco(folder / "results.json", folder / "truth.json")))
        else:
            bad = refused(lambda: found.append(evaluate(truth, results, size_bins=())))
        if not bad:
            assert_percent(found[0].metrics.values(), found[0].objects["all"])
            json.loads(found[0].to_json())

    check()


WORDS = [
    "0", "1", "7", "-1", "0.5", "0.25", "1.0005", "-0.5", "nan", "inf", "-inf", "1e999", "1e308", "1_0", "0x1",
    "\u0661", "\u00b2", "1\u2028", "\x1b[31m", "\x0c", "\t", "\ufeff1", "", "null", "[]", "x", "x" * 500, "1 2", "1,2",
    "9" * 9, "9" * 10, "9" * 400, "-999999999", "+1", ".5", "1.", "1e-3", "0,",
]  # fmt: skip


def lines(separator: str, usual: list[str]) -> st.SearchStrategy[str]:
    """Three lines, the second with one or two words replaced or left out."""
    line = separator.join(usual)

    def text(changes: Iterable[Any]) -> str:
        words: list[str | None] = list(usual)
        for at, word in filter(None, changes):
            words[at] = word
        return "\n".join([line, separator.join(word for word in words if word is not None), line])

    return one_or_two([(at, word) for at in range(len(usual)) for word in [*WORDS, None]]).map(text)


@examples(2000)
@given(lines(" ", ["0", "0.5", "0.5", "0.25", "0.5"]))
def test_yolo_labels(folder, text):
    if not refused(lambda: parse_labels(text, "a.txt", ("car", "boat"))):
        (folder / "labels" / "a.txt").write_text(text, encoding="utf-8")
        assert_sound(YoloDataset(folder / "images", folder / "labels", ("car", "boat")))


@examples(500)
@given(changes(NAMES := {"path": ".", "nc": 2, "names": ["car", "boat"], "more": {"names": {"0": "car"}}}))
def test_yolo_names(folder, values):
    (folder / "data.yaml").write_text(dumped(changed(NAMES, values)))
    names: list[tuple[str, ...]] = []
    if not refused(lambda: names.append(read_names(folder))):
        assert names[0] and all(isinstance(name, str) and name for name in names[0])


@examples(2000)
@given(lines(",", ["5", "6", "7", "8", "1", "4", "0", "0"]))
def test_visdrone_annotations(folder, text):
    if not refused(lambda: parse_annotations(text, "a.txt")):
        (folder / "annotations" / "a.txt").write_text(text, encoding="utf-8")
        assert_sound(VisDroneDataset(folder))


@some_or_all
def test_visdrone_results(folder, count):
    truth = parse_annotations("5,6,7,8,1,4,0,0\n20,20,5,5,0,0,0,0\n40,10,5,6,0,4,0,0", "a")
    path, rows = folder / "results.txt", [[5, 6, 7, 8, 0.9, 4], [5, 6, 7, 8, 0.8, 4]]

    @examples(count)
    @given(lines(",", ["5", "6", "7", "8", "0.9", "4", "-1", "-1"]) | changes(rows))
    def check(given: Any) -> None:
        found: list[VisDroneMetrics] = []

        def score() -> None:
            if isinstance(given, str):
                path.write_text(given, encoding="utf-8")
            detections: Any = read_result_file(path) if isinstance(given, str) else changed(rows, given)
            found.append(evaluate_visdrone([VisDroneImage("a", (40, 60), truth, detections)]))

        if not refused(score):
            assert_percent(found[0].metrics.values(), found[0].num_objects)
            json.loads(found[0].to_json())

    check()
