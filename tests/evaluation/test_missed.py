"""Which stage of the cascade lost an object."""

from __future__ import annotations

import numpy as np
import pytest
from small_detector import detector, model, pictures, updated, with_query_bias

from querydet_jax.config import DataConfig
from querydet_jax.data.dataset import Annotation, Dataset
from querydet_jax.evaluation.missed import BINS, STAGES, MissedObjects, count_missed

OBJECT = np.array([[16, 16, 28, 28]], np.float32)
NONE = (np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))
KEY = {2: np.pad(np.ones((1, 1), bool), ((5, 10), (5, 10)))}  # the cell of 20..24 px


def boxes(score: float, label: int = 1, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return OBJECT + np.float32(shift), np.array([score], np.float32), np.array([label], np.int32)


@pytest.mark.parametrize(
    ("stage", "keys", "candidates", "detections"),
    [
        ("found", KEY, boxes(0.9), boxes(0.9)),
        ("found", {2: ~KEY[2]}, boxes(0.9), boxes(0.9, shift=2.0)),  # by a key beside
        ("no key", {2: ~KEY[2]}, NONE, NONE),
        ("no key", {2: ~KEY[2], 3: np.zeros((8, 8), bool)}, boxes(0.9, shift=9.0), NONE),
        ("no box", KEY, boxes(0.9, label=2), boxes(0.9, label=2)),
        ("no box", KEY, boxes(-np.inf), NONE),
        ("no box", {}, boxes(0.9, shift=9.0), NONE),  # dense inference has keys everywhere
        ("low score", KEY, boxes(0.2), boxes(0.2)),
        ("low score", {2: ~KEY[2]}, boxes(0.2), NONE),
        ("NMS", KEY, boxes(0.9), NONE),
    ],
)
def test_each_stage(stage, keys, candidates, detections):
    counted = MissedObjects(0.3)
    counted.add(OBJECT, np.array([1]), keys, candidates, detections)
    assert counted.counts.sum() == 1
    row, column = np.argwhere(counted.counts)[0]
    assert list(STAGES)[column] == stage and BINS[row] == (8.0, 16.0)
    other = MissedObjects(0.3)
    other.merge(counted)
    other.add(np.zeros((0, 4), np.float32), np.zeros(0, int), keys, candidates, detections)
    assert other.to_dict()["objects"]["8_16"][stage] == 1 and "100.00" in other.table()


def test_objects_of_other_sizes():
    counted = MissedObjects(0.3)
    sides = np.array([4, 8, 20, 32, 90], np.float32)
    large = np.stack([0 * sides, 0 * sides, sides, sides], axis=1)
    counted.add(large, np.zeros(5, int), {}, NONE, NONE)
    assert counted.counts.sum(axis=1).tolist() == [1, 1, 1]  # 32 px and more are not counted


class Two(Dataset):
    """Two random pictures with an object where the detector finds one, and one where there is nothing."""

    classes, category_ids = ("a", "b", "c"), (1, 2, 3)

    def __init__(self, truth: list[Annotation]):
        self._truth, self._pixels = truth, pictures(2, 64, 96)

    def __len__(self) -> int:
        return 2

    def image_id(self, i: int) -> int:
        return i

    def file_name(self, i: int) -> str:
        return str(i)

    def size(self, i: int) -> tuple[int, int]:
        return 64, 96

    def annotation(self, i: int) -> Annotation:
        return self._truth[i]

    def load(self, i: int) -> np.ndarray:
        return self._pixels[i]


def test_a_detector_is_counted_over_a_data_set():
    detect = detector()
    large, small = np.array([[4, 4, 60, 60]], np.float32), np.array([[20, 20, 27, 30]], np.float32)
    truth = [
        Annotation(np.concatenate([large, small]), np.array([0, 1], np.int32), np.zeros(2, bool)),
        Annotation(small, np.array([1], np.int32), np.ones(1, bool)),  # a crowd
    ]
    data = DataConfig(test_short=64, test_max=96, test_canvases=((64, 96),), threads=0)
    detect(pictures(1, 64, 96))
    with updated(detect, with_query_bias(100.0)):  # every cell is a key
        keyed = count_missed(detect, Two(truth), data, score=0.99)
    assert keyed.counts.sum() == 1 and keyed.counts[:, list(STAGES).index("no key")].sum() == 0
    with updated(detect, with_query_bias(-100.0)):  # none is
        lost = count_missed(detect, Two(truth), data, score=0.99)
    assert lost.counts[1].tolist() == [int(name == "no key") for name in STAGES]
    detect.update(model())
