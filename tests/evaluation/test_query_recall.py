from __future__ import annotations

import math

import numpy as np
import pytest

from querydet_jax.errors import DataError
from querydet_jax.evaluation import QueryRecall, SizeBin, query_recall

BINS = (SizeBin(0, 8), SizeBin(8, 16), SizeBin(0, 16))


def test_hits_by_hand():
    keys = np.zeros((4, 6), bool)
    keys[1, 2] = True  # y 8..16, x 16..24 at stride 8
    boxes = np.array(
        [
            [17, 9, 23, 15],  # 6 px, centre (20, 12): hit
            [13, 5, 19, 11],  # 6 px, centre (16, 8), the cell's own corner: hit
            [10, 5, 20, 15],  # 10 px, centre (15, 10), one cell left: missed
            [16, 8, 24, 16],  # 8 px belongs to 8..16: hit
            [0, 0, 40, 30],  # in no bin
        ]
    )
    hits, totals = query_recall(boxes, keys, 8, BINS)
    assert hits.tolist() == [2, 1, 3]
    assert totals.tolist() == [2, 2, 4]


def test_centre_outside_the_map_is_missed():
    keys = np.ones((2, 2), bool)
    hits, totals = query_recall([[14, 14, 20, 20], [-9, 0, -3, 6], [10, 10, 14, 14]], keys, 8, BINS)
    assert hits.tolist() == [1, 0, 1] and totals.tolist() == [3, 0, 3]


def test_axes_are_not_swapped():
    keys = np.zeros((4, 4), bool)
    keys[3, 0] = True
    assert query_recall([[1, 25, 7, 31]], keys, 8, BINS)[0][0] == 1
    assert query_recall([[25, 1, 31, 7]], keys, 8, BINS)[0][0] == 0


def test_accumulates_over_images():
    recall = QueryRecall(BINS)
    assert all(math.isnan(value) for value in recall.recall().values())
    keys = np.zeros((4, 4), bool)
    recall.add(np.zeros((0, 4)), keys, 8)
    recall.add([[0, 0, 6, 6]], keys, 8)
    recall.add([[0, 0, 6, 6], [0, 0, 10, 10], [8, 8, 14, 14]], ~keys, 8)
    assert recall.recall() == {"0_8": pytest.approx(200 / 3), "8_16": 100, "0_16": 75}
    assert recall.table().splitlines()[2].split() == ["<8", "px", "3", "2", "66.67"]


@pytest.mark.parametrize(
    ("boxes", "keys", "stride", "message"),
    [
        (np.zeros((3, 5)), np.zeros((2, 2), bool), 8, "boxes"),
        (np.zeros((3, 4)), np.zeros((2, 2), np.int32), 8, "keys"),
        (np.zeros((3, 4)), np.zeros((1, 2, 2), bool), 8, "keys"),
        (np.zeros((3, 4)), np.zeros((2, 2), bool), 0, "stride"),
    ],
)
def test_bad_input_is_named(boxes, keys, stride, message):
    with pytest.raises(DataError, match=message):
        query_recall(boxes, keys, stride)
