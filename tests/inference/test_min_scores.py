"""`--min-score`: one score per class from a number, `best` or pairs; and what is said about scores of a run."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from querydet_jax.inference.min_scores import min_scores
from querydet_jax.runtime.errors import ConfigError

CLASSES = ("Person", "Car", "a, b=c")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.5, [0.5, 0.5, 0.5]),
        ("0.25", [0.25, 0.25, 0.25]),
        (" 1 ", [1, 1, 1]),
        ("", [0.3, 0.3, 0.3]),
        ("Person=0.4,Car=0.2", [0.4, 0.2, 0.3]),
        ("0.6, Car=0", [0.6, 0, 0.6]),
        ("a, b=c=0.9,Car=0.2", [0.3, 0.2, 0.9]),
        ("best,Car=0.2", [0.11, 0.2, 0.3]),
        ({"Person": 0.4}, [0.4, 0.3, 0.3]),
    ],
)
def test_one_score_per_class(value, expected):
    found = min_scores(value, CLASSES, {"Person": 0.11, "Car": 0.22})
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.array(expected, np.float32))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1.5, "--min-score 1.5: give a score from 0 to 1"),
        (float("nan"), "--min-score nan: give"),
        ("-0.1", "--min-score -0.1: give"),
        ("nan", "'nan': is no score; give a number from 0 to 1, best, or CLASS=NUMBER"),
        ("bset", "'bset': is no score"),
        ("0.3,best", "'best': is no score"),
        ("Person=", "Person=: '' is no score"),
        ("Person=best,Car=0.2", "Person=best: 'best' is no score"),
        ("Person=2", "--min-score Person 2: give a score from 0 to 1"),
        ("Person=0.1,Person=0.2", "names Person twice"),
        ("person=0.1", "no class 'person'; did you mean Person?"),
        ("Dog=0.1", "no class 'Dog'; the classes are Person, Car"),
        (True, "--min-score True: give"),
        ("best", "these weights come from no run folder"),
    ],
)
def test_bad_scores_are_one_line(value, message):
    with pytest.raises(ConfigError) as error:
        min_scores(value, CLASSES)
    assert message in str(error.value) and "\n" not in str(error.value)


def evaluated(folder: Path, *, steps: tuple[int, ...] = (7,), **fields: Any) -> Path:
    """A run folder with checkpoints of these steps and an evaluation."""
    best = {"Person": {"score": 0.4, "f1": 1}, "Car": {"score": 0.2, "f1": 1}, "a, b=c": None}
    other = {"Person": {"score": 0.5}, "Car": {"score": 0.5}, "a, b=c": {"score": 0.5}}
    methods = {"dense": {"best_thresholds": other}, "csq": {"best_thresholds": best}}
    report = {"step": 7, "images": "all", "methods": methods, **fields}
    for step in steps:
        (folder / "checkpoints" / str(step)).mkdir(parents=True)
        (folder / "checkpoints" / str(step) / "checksums.sha256").touch()
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def test_best_scores_of_a_run(tmp_path, caplog):
    run = evaluated(tmp_path)
    np.testing.assert_array_equal(min_scores("best", CLASSES, run, query="csq"), np.float32([0.4, 0.2, 0.3]))
    assert len(caplog.messages) == 1 and "no best score for a, b=c, of which nothing was found" in caplog.text
    np.testing.assert_array_equal(min_scores("best", CLASSES, str(run), query="dense"), np.float32([0.5] * 3))
    assert len(caplog.messages) == 1  # nothing to say about these


@pytest.mark.parametrize(
    ("fields", "query", "said"),
    [
        ({"images": 2}, "csq", r"from 2 images alone; run `querydet eval .*` for all"),
        ({}, "cq", "cq was not evaluated; the best scores of dense are used"),
        ({"step": 3}, "csq", "are those of step 3, the newest is 7; run `querydet eval .*` again"),
        ({"step": None, "weights": "x.npz"}, "csq", "are those of 'x.npz', the newest is 7"),
        ({"steps": ()}, "csq", "are those of step 7, no checkpoint is there"),
    ],
)
def test_doubts_about_best_scores_are_said(tmp_path, caplog, fields, query, said):
    min_scores("best", CLASSES[:2], evaluated(tmp_path, **fields), query=query)
    (message,) = caplog.messages
    assert re.search(said, message)


def test_best_scores_of_a_weight_file_in_a_run(tmp_path, caplog):
    weights = tmp_path / "best.safetensors"
    weights.touch()
    evaluated(tmp_path, step=None, weights="elsewhere/best.safetensors")
    assert min_scores("best", CLASSES[:2], weights, query="csq").tolist() == np.float32([0.4, 0.2]).tolist()
    assert not caplog.messages
    os.utime(weights, (2e9, 2e9))
    min_scores("best", CLASSES[:2], weights, query="csq")
    evaluated(tmp_path, steps=())
    min_scores("best", CLASSES[:2], weights, query="csq")
    assert "are those of an earlier best.safetensors; run `querydet eval" in caplog.messages[0]
    assert "are those of step 7, not of best.safetensors; run" in caplog.messages[1] and len(caplog.messages) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "holds no evaluation; run `querydet eval "),
        ("{", "not readable as JSON"),
        ("[]", "holds no best thresholds (an older version wrote it)"),
        ('{"methods": {"csq": {"metrics": {}}}}', "holds no best thresholds"),
        ('{"methods": {"csq": {"best_thresholds": {"Car": 0.3}}}}', "best_thresholds of Car: 0.3 is no entry"),
        ('{"methods": {"csq": {"best_thresholds": {"Car": {"score": NaN}}}}}', "best_thresholds of Car: nan: give"),
        ('{"methods": {"csq": {"best_thresholds": {"Car": {"score": "1"}}}}}', "best_thresholds of Car: '1': give"),
    ],
)
def test_a_report_without_scores_is_one_line(tmp_path, text, message):
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    with pytest.raises(ConfigError) as error:
        min_scores("best", CLASSES, tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)
