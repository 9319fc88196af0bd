"""The report of a GPU on the CPU, at small sizes: it stops, goes on, and finds itself equal to the CPU."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.speed.gpu_report import GpuReport, compare, gpu_report
from querydet_jax.runtime.errors import ConfigError

SMALL = GpuReport(
    backbone="resnet10",
    classes=3,
    channels=16,
    sizes=((64, 96),),
    batches=(1,),
    dtypes=("float32",),
    modes=("plain",),
    agreement_size=(64, 96),
    rounds=1,
    train_config="",
)


def test_a_run_out_of_time_is_continued_by_the_next(tmp_path):
    out = str(tmp_path)
    gpu_report(dataclasses.replace(SMALL, out=out, minutes=1e-9))  # nothing has begun in time
    first = json.loads((tmp_path / "gpu_report.json").read_text())
    assert not first["rows"] and len(first["not_run"]) == 2
    gpu_report(dataclasses.replace(SMALL, out=out))
    second = json.loads((tmp_path / "gpu_report.json").read_text())
    agreement, *timed = second["rows"]
    assert (agreement["score_difference"], agreement["found_again"]) == (0.0, 1.0)
    assert [row["method"] for row in timed] == ["dense", "RetinaNet", "CSQ"] and all(row["ms"] > 0 for row in timed)
    assert not second["not_run"]
    gpu_report(dataclasses.replace(SMALL, out=out))  # measures nothing again
    assert json.loads((tmp_path / "gpu_report.json").read_text())["rows"] == second["rows"]
    assert "| 64x96 batch 1 float32 plain | CSQ |" in (tmp_path / "gpu_report.md").read_text()
    with pytest.raises(ConfigError, match="gpu_report_cases.json: holds another network"):
        gpu_report(dataclasses.replace(SMALL, out=out, classes=4))


def test_time_is_needed():
    with pytest.raises(ConfigError, match="gpu-report --minutes 0: must be above 0"):
        gpu_report(dataclasses.replace(SMALL, minutes=0))


def test_detections_compared_by_hand():
    def detections(boxes, scores):
        return SimpleNamespace(
            boxes=np.array([boxes], float), scores=np.array([scores]), classes=np.array([[0, 1]]), valid=scores > 0
        )

    wanted = detections([[0, 0, 10, 10], [5, 5, 9, 9]], np.array([0.9, 0.5]))
    wanted.valid = wanted.valid[None]
    found = detections([[0, 0.5, 10, 10], [5, 5, 9, 12]], np.array([0.9, 0.25]))
    found.valid = found.valid[None]
    assert compare(found, wanted) == {"score_difference": 0.25, "found_again": 0.5}
