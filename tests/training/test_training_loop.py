"""The loop on generated scenes: resume equals an uninterrupted run, faults have names, 8 images overfit."""

from __future__ import annotations

import json
import re

import jax
import pytest
from small_training import SCENES

from querydet_jax.config import load_config, override
from querydet_jax.data import open_dataset
from querydet_jax.evaluation.runner import evaluate_detectors
from querydet_jax.inference.detector import Detector
from querydet_jax.models import build_model
from querydet_jax.runtime.errors import ConfigError, QueryDetError, WeightsError
from querydet_jax.training import train
from querydet_jax.training.checkpoint import restore_model_state
from querydet_jax.weights import load_weights

pytestmark = pytest.mark.compiled_as_used


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("scenes")


def small(root, **changes):
    return override(load_config("configs/demo.py"), {**SCENES, "data.root": str(root), **changes})


def test_a_run_is_not_overwritten_and_resume_needs_one(root, tmp_path):
    config = small(root, **{"train.steps": 1})
    train(config, tmp_path / "run")
    with pytest.raises(ConfigError, match="already holds checkpoints; add --resume"):
        train(config, tmp_path / "run")
    with pytest.raises(WeightsError, match="no checkpoint to resume from; start without --resume"):
        train(config, tmp_path / "empty", resume=True)
    with pytest.raises(WeightsError, match="holds no checkpoint; give a run folder"):
        restore_model_state(tmp_path)
    with pytest.raises(WeightsError, match="was trained without a moving average .* resume with train.ema 0"):
        train(small(root, **{"train.steps": 1, "train.ema": 0.9}), tmp_path / "run", resume=True)
    other = small(root, **{"train.steps": 1, "train.optimizer": "sgd"})
    with pytest.raises(WeightsError, match="optimiser state of another configuration"):
        train(other, tmp_path / "run", resume=True)


def test_damaged_checkpoint_is_named(root, tmp_path):
    train(small(root, **{"train.steps": 1}), tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints" / "1" / "model").rglob("*"):
        if file.is_file() and "ocdbt" in file.name:
            file.write_bytes(b"")
    with pytest.raises(WeightsError, match="cannot be read"):
        load_weights(build_model(small(root).model), tmp_path / "run")


def test_classes_must_agree(root, tmp_path):
    with pytest.raises(QueryDetError, match="has 3 categories .* model.num_classes is 5: set it to 3"):
        train(small(root, **{"model.num_classes": 5}), tmp_path / "run")


DETECTORS = {
    "retinanet": (220, {}),
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


@pytest.mark.parametrize("detector", list(DETECTORS))
def test_overfits_eight_images(root, tmp_path, capsys, detector):
    """AP50 above 0.9 on the eight images it was trained on, densely and with CSQ."""
    steps, own = DETECTORS[detector]
    config = small(
        root,
        **{
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
    # Of a second stage's samples the more are foreground the better the proposals: its sum need not fall.
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
