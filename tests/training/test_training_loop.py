"""Training works: every detector overfits eight generated scenes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax
import pytest
from small_training import SCENES

from querydet_jax.config import load_config, override
from querydet_jax.data import open_dataset
from querydet_jax.evaluation.runner import evaluate_detectors
from querydet_jax.inference.detector import Detector
from querydet_jax.training import train

pytestmark = pytest.mark.compiled_as_used


DETECTORS = {
    "retinanet": (100, {"train.learning_rate": 3e-3}),
    "fcos": (160, {}),
    "faster_rcnn": (
        160,
        {
            "model.max_level": 6,
            "model.fpn.top_source": "pool",
            "model.anchors.scale": 4.0,
            "model.anchors.sizes_per_octave": 1,
            "model.loss.matcher": "standard",
            "model.loss.iou_background": 0.3,
            "model.loss.iou_foreground": 0.7,
            "model.loss.level_weighting": "uniform",
            "model.faster_rcnn.train_topk": 200,
            "model.faster_rcnn.proposals": 100,
            "model.faster_rcnn.rpn_samples": 64,
            "model.faster_rcnn.roi_samples": 64,
            "model.faster_rcnn.channels": 64,
        },
    ),
}
TERMS = {
    "retinanet": {"cls", "box", "query"},
    "fcos": {"cls", "box", "query", "centerness"},
    "faster_rcnn": {"cls", "box", "query", "rpn_cls", "rpn_box"},
}


@pytest.mark.parametrize(
    "detector",
    ["retinanet", pytest.param("fcos", marks=pytest.mark.slow), pytest.param("faster_rcnn", marks=pytest.mark.slow)],
)
def test_overfits_eight_images(tmp_path, capsys, detector):
    """AP50 above 90 on the eight images it was trained on, densely and with CSQ."""
    steps, own = DETECTORS[detector]
    config = override(
        load_config(Path(__file__).parents[2] / "configs" / "demo.py"),
        {
            **SCENES,
            "data.root": str(tmp_path / "scenes"),
            "model.detector": detector,
            "train.steps": steps,
            "train.batch_size": 8,
            "train.optimizer": "adamw",
            "train.learning_rate": 2e-3,
            "train.warmup_steps": 20,
            "train.log_every": 50,
            "train.checkpoint_every": 1000,
            "data.flip": 0.0,
            "data.keep_empty": True,
            "model.fpn.channels": 32,
            "model.head.channels": 32,
            "model.query.channels": 32,
            **own,
        },
    )
    model = train(config, tmp_path / "run")
    printed = capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for term in set().union(*TERMS.values()):
        assert (term in lines[-1]) == (re.search(rf"[( ]{term} \d", printed) is not None) == (term in TERMS[detector])
    # Better proposals give a second stage more foreground samples: the sum of its loss need not fall.
    regression = "rpn_box" if "rpn_box" in TERMS[detector] else "box"
    assert lines[-1][regression] < lines[0][regression] / 2
    dataset = open_dataset(config.data, "train")
    assert len(dataset) == 8
    detectors = {
        query: Detector(model, override(config, {"inference.query": query}).inference) for query in ("dense", "csq")
    }
    runs = evaluate_detectors(detectors, dataset, config.data, show_progress=False)
    assert runs["dense"].scores.coco.metrics["AP50"] > 90
    assert runs["csq"].scores.coco.metrics["AP50"] > 90
    assert jax.local_device_count() == 2
