"""The experiment cards: each says what it must, and they differ where the published configurations do."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from querydet_jax.config import (
    Config,
    DataConfig,
    InferenceConfig,
    ModelConfig,
    TrainConfig,
    check,
    load_card,
    load_config,
    save_config,
)
from querydet_jax.config.zoo import ZOO, zoo_names
from querydet_jax.data.plan import choose_canvas
from querydet_jax.data.readers.visdrone import patch_window
from querydet_jax.data.transforms import resize_shape
from querydet_jax.runtime.errors import ConfigError
from querydet_jax.weights.packaged import read_card

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_the_files_provided(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    check(config)
    assert config.name != "unnamed"
    card = load_card(path)
    assert f"configs/{path.name}" in card.command and card.title and card.reproduces and card.pod
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "does not define `card = Card"),
        ('card = Card(title="t", reproduces="r", command="c", pod="p")', "give measured .figures. or needs"),
        ('card = Card(title="t", reproduces="r", command="c", pod="p", measured="m", needs="n")', "not both"),
    ],
)
def test_what_is_no_card(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "experiment.py"
    path.write_text(f"from querydet_jax.config import Card\n{text}\n")
    with pytest.raises(ConfigError, match=f"experiment.py: .*{message}"):
        load_card(path)
    with pytest.raises(ConfigError, match="absent.py: neither a card"):
        load_card(tmp_path / "absent.py")


def test_some_files_are_provided() -> None:
    assert CONFIGS / "demo.py" in CONFIGS.glob("*.py")


def test_the_coco_files_differ_where_the_published_ones_do() -> None:
    def differences(a: str, b: str) -> dict[str, Any]:
        flat = [_flat(dataclasses.asdict(load_config(CONFIGS / f"coco_{name}.py"))) for name in (a, b)]
        return {key: flat[1][key] for key in flat[0] if flat[0][key] != flat[1][key] and key != "name"}

    longer = {"train.steps": 270_000, "train.decay_steps": (210_000, 250_000)}
    no_query = {"model.query.enabled": False, "inference.query": "dense"}
    assert differences("querydet_r50", "querydet_r50_3x") == longer
    assert differences("retinanet_r50", "retinanet_r50_3x") == longer
    assert differences("querydet_r50", "retinanet_r50") == {
        "model.min_level": 3,
        "model.head.box_bias": "zero",
        "model.query.enabled": False,
        "model.loss.matcher": "standard",
        "model.loss.level_weighting": "uniform",
        "inference.query": "dense",
        "inference.score_threshold": 0.05,
    }
    # Table 3: one part more a row.
    assert differences("querydet_r50", "highres_rebalanced_r50") == no_query
    assert differences("highres_rebalanced_r50", "highres_r50") == {"model.loss.level_weighting": "uniform"}
    rescaled = differences("retinanet_r50", "rebalanced_r50")
    assert rescaled.pop("model.loss.level_weights") == pytest.approx((1, 2.1 / 1.4, 2.5 / 1.4, 2.9 / 1.4, 3.2 / 1.4))
    assert rescaled == {"model.loss.level_weighting": "table"}
    # Table 4: where queries start, and what the query head has learnt by then.
    for start, levels in ((3, (3,)), (5, (3, 4, 5)), (6, (3, 4, 5, 6))):
        assert differences("querydet_r50", f"querydet_r50_start_p{start}") == {
            "model.query.levels": levels,
            "model.loss.query_weights": (10.0,) * len(levels),
            "model.loss.query_gammas": (1.2,) * len(levels),
            "inference.start_level": start,
        }
    for card, network in (("mobilenetv2", "mobilenet_v2"), ("shufflenetv2", "shufflenet_v2")):
        for kind in ("querydet", "retinanet"):
            assert differences(f"{kind}_r50", f"{kind}_{card}") == {
                "model.backbone.name": network,
                "model.backbone.flavor": "torchvision",
            }
    points = {
        "model.detector": "fcos",
        "model.fpn.top_source": "p5",
        "model.loss.normalizer_init": 300.0,
        "inference.score_threshold": 0.2,
        "inference.nms_iou": 0.6,
        "inference.max_detections": 100,
    }
    assert differences("retinanet_r50", "fcos_r50") == points | {"model.head.norm": "group"}
    assert differences("querydet_r50", "querydet_fcos_r50") == points
    assert differences("querydet_r50", "querydet_faster_rcnn_r50") == {
        "model.detector": "faster_rcnn",
        "model.max_level": 6,
        "model.fpn.top_source": "pool",
        "model.head.num_convs": 3,
        "model.anchors.scale": 8.0,
        "model.anchors.sizes_per_octave": 1,
        "model.loss.matcher": "standard",
        "model.loss.iou_background": 0.3,
        "model.loss.iou_foreground": 0.7,
        "model.loss.smooth_l1_beta": 1e-6,
        "model.loss.level_weighting": "uniform",
        "train.learning_rate": 0.02,
        "inference.threshold": 0.15,
        "inference.score_threshold": 0.05,
        "inference.max_detections": 100,
    }
    first = load_config(CONFIGS / "coco_querydet_r50.py")
    assert (first.train.batch_size, first.train.steps, first.train.decay_steps) == (16, 90_000, (60_000, 80_000))
    assert (first.train.learning_rate, first.model.num_classes, first.inference.max_detections) == (0.01, 80, 200)
    names = {load_config(path).name for path in CONFIGS.glob("coco_*.py")}
    assert names == {path.stem for path in CONFIGS.glob("coco_*.py")}


def _flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in fields.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def test_defaults_are_the_published_coco_values() -> None:
    model, train, inference = ModelConfig(), TrainConfig(), InferenceConfig()
    assert (model.num_classes, model.levels, model.anchors.per_cell) == (80, (2, 3, 4, 5, 6, 7), 9)
    assert model.loss.level_weights == (1.0, 1.4, 2.1, 2.5, 2.9, 3.2)
    assert (model.loss.query_weights, model.loss.query_gammas) == ((10.0, 10.0), (1.2, 1.2))
    assert (train.batch_size, train.steps, train.decay_steps) == (16, 90_000, (60_000, 80_000))
    assert (train.learning_rate, train.momentum, train.weight_decay) == (0.01, 0.9, 1e-4)
    assert (inference.threshold, inference.context, inference.score_threshold) == (0.12, 2, 1e-4)
    assert (inference.topk, inference.nms_iou, inference.max_detections) == (1000, 0.5, 200)
    assert DataConfig().train_short == (640, 672, 704, 736, 768, 800)
    assert json.loads(json.dumps(dataclasses.asdict(Config())))["model"]["backbone"]["name"] == "resnet50"


# Height and width of the images of VisDrone2019-DET.
VISDRONE_SIZES = ((540, 960), (765, 1360), (788, 1400), (1050, 1400), (1078, 1916), (1080, 1920), (1500, 2000))


def test_the_visdrone_files_are_the_published_ones() -> None:
    querydet, retinanet = (load_config(CONFIGS / f"visdrone_{name}_r50.py") for name in ("querydet", "retinanet"))
    loss, inference = querydet.model.loss, querydet.inference
    assert (querydet.model.levels, querydet.model.num_classes) == ((2, 3, 4, 5, 6, 7), 10)
    assert (loss.matcher, loss.level_weighting, loss.level_weights) == ("loop", "table", (1.0, 1.4, 1.8, 2.2, 2.6, 2.6))
    assert (loss.query_weights, loss.query_gammas, loss.query_alpha) == ((10.0, 10.0), (1.3, 1.3), 0.25)
    assert (inference.query, inference.threshold, inference.context) == ("csq", 0.12, 2)
    assert (inference.score_threshold, querydet.model.head.box_bias) == (1e-4, "torch")
    assert (retinanet.inference.query, retinanet.inference.score_threshold) == ("dense", 0.005)
    assert (retinanet.model.levels, retinanet.model.query.enabled) == ((3, 4, 5, 6, 7), False)
    loss = retinanet.model.loss
    assert (loss.matcher, loss.level_weighting, retinanet.model.head.box_bias) == ("standard", "uniform", "zero")
    assert (querydet.train.clip_value, retinanet.train.clip_value) == (35.0, 0.0)
    for config in (querydet, retinanet):
        assert (config.train.batch_size, config.train.steps, config.train.decay_steps) == (8, 50_000, (30_000, 40_000))
        assert (config.train.learning_rate, config.model.backbone.freeze_at) == (0.01, 2)
        assert (config.inference.topk, config.inference.nms, config.inference.nms_iou) == (1000, "hard", 0.5)
        assert (config.inference.soft_sigma, config.inference.max_detections) == (0.6, 500)
        data = config.data
        assert (data.source, data.patches, data.keep_empty, data.flip) == ("visdrone", True, True, 0.5)
        assert (data.train_short, data.train_max, data.test_short, data.test_max) == ((1200,), 1999, 3999, 3999)


@pytest.mark.parametrize("name", zoo_names())
def test_packaged_weights_are_those_of_their_card(name: str) -> None:
    """Else a card would state figures that its command cannot give."""
    weights = load_config(name)
    named = re.search(r"`querydet cards (\w+)`", read_card(ZOO / name).recipe)
    assert named is not None
    card = load_config(named[1])
    assert weights.classes == card.classes and weights.model == card.model and weights.inference == card.inference
    assert dataclasses.replace(weights.data, root="") == dataclasses.replace(card.data, root="")


def test_the_visdrone_canvases_hold_every_image() -> None:
    data = load_config(CONFIGS / "visdrone_querydet_r50.py").data
    used = set()
    for size in VISDRONE_SIZES:
        assert choose_canvas(resize_shape(*size, data.test_short, data.test_max), data.test_canvases) >= 0, size
        for patch, short in itertools.product(range(4), data.train_short):
            shape = resize_shape(*patch_window(size, patch)[2:], short, data.train_max)
            used.add(choose_canvas(shape, data.train_canvases))
    assert used == {0, 1}  # each by one of the canvases made for them
    for width in range(751, 2000, 7):  # the last holds a patch of any other form that is not upright
        assert choose_canvas(resize_shape(750, width, 1200, 1999), data.train_canvases) >= 0, width
