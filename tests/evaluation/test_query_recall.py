from __future__ import annotations

import dataclasses
import json
import math

import cascade_oracle
import numpy as np
import pytest
from small_detector import BASE, REACH, detector, model, pictures

from querydet_jax import Detector
from querydet_jax.evaluation import QueryRecall, SizeBin, query_recall
from querydet_jax.evaluation.query import THRESHOLDS
from querydet_jax.evaluation.runner import Evaluation
from querydet_jax.runtime.errors import ConfigError, DataError

BINS = (SizeBin(0, 8), SizeBin(8, 16), SizeBin(0, 16))
IMAGES = pictures(2, 64, 96, seed=3)


def test_hits_by_hand():
    keys = np.zeros((4, 6), bool)
    keys[1, 2] = True  # y 8..16, x 16..24 at stride 8
    boxes = np.array(
        [
            [17, 9, 23, 15],  # 6 px, centre (20, 12): hit
            [13, 5, 19, 11],  # 6 px, centre (16, 8), the cell's own corner: hit
            [10, 5, 20, 15],  # 10 px, centre (15, 10), one cell further left: missed
            [16, 8, 24, 16],  # 8 px, in the bin 8..16: hit
            [0, 0, 40, 30],  # in no bin
        ]
    )
    hits, totals = query_recall(boxes, keys, 8, BINS)
    assert hits.tolist() == [2, 1, 3]
    assert totals.tolist() == [2, 2, 4]
    hits, totals = query_recall(boxes, np.stack([keys, ~keys]), 8, BINS)
    assert hits.tolist() == [[2, 1, 3], [0, 1, 1]]
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


def test_accumulates_over_images_and_thresholds():
    recall = QueryRecall(0.3, (0.5,), BINS)
    assert recall.thresholds == (0.3, 0.5)
    assert all(math.isnan(value) for value in [*recall.recall().values(), *recall.active_share().values()])
    none = np.zeros((4, 4), bool)
    one = none.copy()
    one[0, 0] = True
    recall.add(np.zeros((0, 4)), np.stack([none, none]), np.stack([none, none]), 8)
    recall.add([[0, 0, 6, 6]], np.stack([none, none]), np.stack([one, none]), 8)
    keys = np.stack([~none, one])
    recall.add([[0, 0, 6, 6], [0, 0, 10, 10], [8, 8, 14, 14]], keys, keys, 8)
    assert recall.recall() == {"0_8": pytest.approx(200 / 3), "8_16": 100, "0_16": 75}
    assert recall.recall(0.5) == {"0_8": pytest.approx(100 / 3), "8_16": 100, "0_16": 50}
    assert recall.active_share() == {0.3: pytest.approx(17 / 48), 0.5: pytest.approx(1 / 48)}
    header, _, *rows = [line.split() for line in recall.table().splitlines()]
    assert header == ["sqrt(area)", "objects", "at", "keys*", "0.3*", "0.5"]
    assert rows == [
        ["<8", "px", "3", "2", "66.7", "33.3"],
        ["8-16", "px", "1", "1", "100.0", "100.0"],
        ["<16", "px", "4", "3", "75.0", "50.0"],
        ["active", "cells", "35.4", "2.1"],
    ]
    found = recall.to_dict()
    assert found["threshold"] == 0.3 and found["objects"] == {"0_8": 3, "8_16": 1, "0_16": 4}
    assert found["by_threshold"]["0.5"] == {"recall": recall.recall(0.5), "active_share": recall.active_share()[0.5]}
    assert json.dumps(QueryRecall(0.12).to_dict(), allow_nan=False)  # without counts: null, not nan


def test_parts_of_several_hosts_add_up():
    """Includes a host without data on a level, and the times and counts of the evaluation."""
    rng = np.random.default_rng(0)
    images = [
        (np.float32([[0, 0, 6, 6], [9, 9, 20, 20]]) + shift, rng.random((2, 4, 4)) < 0.5, rng.random((2, 4, 4)) < 0.5)
        for shift in range(3)
    ]
    whole, *parts = (QueryRecall(0.3, (0.5,), BINS) for _ in range(3))
    for i, image in enumerate(images):
        whole.add(*image, stride=8)
        parts[i % 2].add(*image, stride=8)
    first = Evaluation(ms=[1.0], active={3: [0.25]}, dense_rungs={3: 1}, recall={3: parts[0]})
    first.add(Evaluation(ms=[3.0, 3.0], active={3: [0.75], 2: [0.5]}, dense_rungs={3: 0, 2: 2}, recall={3: parts[1]}))
    assert first.recall[3].to_dict() == whole.to_dict() and first.ms_median == 3.0
    assert Evaluation(ms=[*range(1, 12)]).ms_p90 == 10.0
    assert first.active_share() == {3: 0.5, 2: 0.5} and first.dense_rungs == {3: 1, 2: 2}
    empty = Evaluation()
    empty.add(first)
    assert empty.recall[3].to_dict() == whole.to_dict()


def test_thresholds_against_the_dense_query_logits():
    """If the context covers the query head's receptive field, dense query probabilities give the cascade."""
    probability = {level: cascade_oracle.sigmoid(np.asarray(logits)) for level, logits in model()(IMAGES).query.items()}
    thresholds = (0.3, 0.45, 0.6, 0.65, 0.7, 0.8)
    assert min(abs(p - t).min() for p in probability.values() for t in thresholds) > 1e-6, "choose others"
    rng = np.random.default_rng(0)
    centres = rng.uniform((0, 0), (96, 64), (400, 2))
    sizes = rng.uniform(2, 14, (400, 2))
    boxes = np.float32(np.concatenate([centres - sizes / 2, centres + sizes / 2], axis=1))
    small = np.sqrt(sizes.prod(axis=1)) < 8

    found = [trace.keys for trace in detector(context=REACH).traces(IMAGES, None, thresholds)]
    percents = []
    for threshold, keys in zip(thresholds, found, strict=True):
        above = cascade_oracle.children(probability[4] > threshold, (8, 12))
        finest = cascade_oracle.children((probability[3] > threshold) & above, (16, 24))
        np.testing.assert_array_equal(keys[3], above)
        np.testing.assert_array_equal(keys[2], finest)
        hit = finest[0, (centres[:, 1] // 4).astype(int), (centres[:, 0] // 4).astype(int)]
        percents.append(100 * hit[small].mean())
    recall = QueryRecall(thresholds[0], thresholds, (SizeBin(0, 8),))
    maps = np.stack([keys[2][0] for keys in found])
    recall.add(boxes, maps, maps, 4)
    assert [recall.recall(t)["0_8"] for t in thresholds] == pytest.approx(percents)
    assert percents == sorted(percents, reverse=True) and percents[0] > percents[-1]
    assert recall.totals == [small.sum()]


def test_a_threshold_is_as_if_configured():
    """At context 1 a level's probabilities depend on the active cells, so compare with the cascade itself."""
    thresholds = (0.5, BASE.threshold, 0.75)
    swept = detector()
    found = list(swept.traces(IMAGES, None, thresholds))
    own = Detector(model(), dataclasses.replace(BASE, threshold=thresholds[0])).trace(IMAGES)
    for trace, theirs in ((found[0], own), (found[1], swept.trace(IMAGES))):
        for mine, other in zip(trace, theirs, strict=True):
            assert mine.keys() == other.keys()
            for level, x in mine.items():
                np.testing.assert_array_equal(x, other[level])
    assert swept._programs[IMAGES.shape].trace._cache_size() == 1  # one program, whatever the threshold
    counts = [int(trace.keys[3].sum()) for trace in found]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]


def test_dense_inference_has_no_thresholds():
    with pytest.raises(ConfigError, match="computes no queries"):
        detector(query="dense").traces(IMAGES, None, THRESHOLDS)


@pytest.mark.parametrize(
    ("boxes", "keys", "stride", "message"),
    [
        (np.zeros((3, 5)), np.zeros((2, 2), bool), 8, "boxes"),
        (np.zeros((3, 4)), np.zeros((2, 2), np.int32), 8, "keys"),
        (np.zeros((3, 4)), np.zeros(2, bool), 8, "keys"),
        (np.zeros((3, 4)), np.zeros((2, 2), bool), 0, "stride"),
        ([[1, 2, float("nan"), 4]], np.zeros((4, 4), bool), 4, "boxes hold values that are not finite"),
        ([[1, 2, 1e308, 4]], np.zeros((4, 4), bool), 4, "boxes hold values that are not finite or beyond 1e9"),
        ([[1, 2, "x", 4]], np.zeros((4, 4), bool), 4, "boxes are not an array of numbers"),
    ],
)
def test_bad_input_is_named(boxes, keys, stride, message):
    with pytest.raises(DataError, match=message):
        query_recall(boxes, keys, stride)


def test_maps_of_another_number_of_thresholds():
    recall = QueryRecall(0.12)
    maps = np.zeros((len(recall.thresholds) - 1, 2, 2), bool)
    with pytest.raises(DataError, match="T the 9 thresholds"):
        recall.add(np.zeros((0, 4)), maps, maps, 8)
