"""Curves of a run from its metrics.jsonl."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from PIL import Image

from querydet_jax.runtime.errors import DataError
from querydet_jax.viz.training_curves import read_metrics, save_curves, smoothed

LINES = b"""{"step": 1, "loss": 4.0, "cls": 3.0, "box": null, "lr": 0.1}
{"step": 2, "loss": 3.0, "cls": 2.0, "box": 1.0, "lr": 0.1}
{"step": 2, "dense/AP": 1.0, "csq/AP": null}
{"step": 3, "lo
[1]
{"step": "4", "loss": 1.0}
{"step": 2, "loss": 2.5, "cls": 1.5, "box": 1.0, "lr": 0.2}
{"step": 2, "dense/AP": 2.0, "csq/AP": 1.5}
"""


def test_the_last_line_of_a_step_holds(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(LINES)
    losses, evaluations = read_metrics(path)
    assert list(losses) == [1, 2] and losses[2]["loss"] == 2.5 and math.isnan(losses[1]["box"])
    assert evaluations == {2: {"dense/AP": 2.0, "csq/AP": 1.5}}


def test_smoothing_by_hand():
    values = np.array([1.0, 4.0, np.nan, 7.0, 10.0])
    np.testing.assert_allclose(smoothed(values, 3), [2.5, 2.5, 5.5, 8.5, 8.5])
    np.testing.assert_array_equal(smoothed(values, 1), values)


def test_a_picture_of_any_run(tmp_path):
    pytest.importorskip("matplotlib", reason="requirements-plots.txt")
    path, picture = tmp_path / "metrics.jsonl", tmp_path / "curves.png"
    for lines in (LINES, LINES.splitlines()[2]):  # no loss
        path.write_bytes(lines)
        assert save_curves(path, picture, "csq/AP")
        with Image.open(picture) as image:
            assert image.width > 1000
        picture.unlink()


def test_nothing_to_draw_is_one_line(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(DataError, match="metrics.jsonl: no such file; give the folder of a run"):
        save_curves(path, tmp_path / "curves.png")
    path.write_bytes(b"[]\n")
    with pytest.raises(DataError, match="no line of a step; train first"):
        save_curves(path, tmp_path / "curves.png")
    path.write_bytes(LINES)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    assert not save_curves(path, tmp_path / "curves.png") and not (tmp_path / "curves.png").exists()
