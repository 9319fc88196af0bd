"""Configuration: messages that name the key and the remedy, round trips, the files provided."""

from __future__ import annotations

import dataclasses
import itertools
import json
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
    load_config,
    override,
    save_config,
)
from querydet_jax.data.plan import choose_canvas
from querydet_jax.data.transforms import resize_shape
from querydet_jax.data.visdrone import patch_window
from querydet_jax.errors import ConfigError, QueryDetError

CONFIGS = Path(__file__).parents[1] / "configs"


def message(changes: dict[str, Any], config: Config | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        override(config or Config(), changes)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("model.num_class", "did you mean model.num_classes?"),
        ("model.backbone.nmae", "did you mean model.backbone.name?"),
        ("inference.batchsize", "did you mean inference.batch_size?"),
        ("modle.num_classes", "did you mean model?"),
        ("model.backbon.name", "did you mean model.backbone?"),
        ("batch_size", "did you mean train.batch_size?"),  # right name, wrong group
        ("train.threshold", "did you mean inference.threshold?"),
        ("model.matcher", "did you mean model.loss.matcher?"),
        ("zzz", "the keys here are name, classes, model, data, train, inference"),
    ],
)
def test_unknown_key_names_the_nearest(key: str, hint: str) -> None:
    assert message({key: 1}) == f"unknown configuration key {key}: {hint}"


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("train.steps", "100", "train.steps: expected int, got '100'"),
        ("train.steps", 1.5, "train.steps: expected int, got 1.5"),
        ("train.steps", True, "train.steps: expected int, got True"),
        ("train.learning_rate", "fast", "train.learning_rate: expected float, got 'fast'"),
        ("train.learning_rate", False, "train.learning_rate: expected float, got False"),
        ("data.crop", 1, "data.crop: expected bool, got 1"),
        ("data.root", 3, "data.root: expected str, got 3"),
        ("train.decay_steps", 60_000, "train.decay_steps: expected a sequence, got 60000"),
        ("train.decay_steps", [1, "2"], "train.decay_steps: expected int, got '2'"),
        ("classes", "car", "classes: expected a sequence, got 'car'"),
        ("data.scenes_size", (320,), "data.scenes_size: expected 2 values, got (320,)"),
        ("data.train_canvases", [[32, 32, 3]], "data.train_canvases: expected 2 values, got [32, 32, 3]"),
        ("train.steps.more", 1, "train.steps.more: steps is a value, not a group; drop what follows it"),
    ],
)
def test_wrong_types(key: str, value: Any, text: str) -> None:
    assert message({key: value}) == text


def test_a_group_takes_a_group_only() -> None:
    assert message({"model.fpn": 256}) == "model.fpn: is a group of fields; name one of channels, top_source"
    changed = override(Config(), {"train": TrainConfig(steps=5)})
    assert changed.train.steps == 5


def test_what_is_converted() -> None:
    config = override(
        Config(),
        {"train.learning_rate": 1, "train.decay_steps": [3, 4], "data.train_canvases": [[64, 32]], "train.seed": 7},
    )
    assert config.train.learning_rate == 1.0 and isinstance(config.train.learning_rate, float)
    assert config.train.decay_steps == (3, 4) and config.data.train_canvases == ((64, 32),)
    assert hash(config) is not None  # tuples throughout: a configuration can be static under jit


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("standart", "'standart' is not one of loop, standard; did you mean standard?"),
        ("xyz", "'xyz' is not one of loop, standard"),
        (3, "3 is not one of loop, standard"),
    ],
)
def test_a_wrong_choice_names_the_choices(value: Any, text: str) -> None:
    assert message({"model.loss.matcher": value}) == f"model.loss.matcher: {text}"


FASTER = {"model.detector": "faster_rcnn"}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model.min_level": 1}, "model.min_level 1"),
        ({"model.min_level": 6}, "model.min_level 6"),
        ({"model.max_level": 8}, "model.max_level 8"),
        ({"model.max_level": 4}, "model.max_level 4"),  # the pyramid always has P5
        ({"model.min_level": 5, "model.max_level": 5}, "model.min_level 5, model.max_level 5"),
        ({"model.num_classes": 0}, "model.num_classes 0"),
        ({"model.backbone.freeze_at": -1}, "model.backbone.freeze_at -1"),
        ({"model.backbone.freeze_at": 6}, "model.backbone.freeze_at 6"),
        ({"model.head.prior": 0}, "model.head.prior 0.0"),
        ({"model.fcos.range_scale": 0}, "model.fcos.range_scale 0.0: must be above 0"),
        ({"model.fcos.center_radius": -1}, "model.fcos.center_radius -1.0: must be above 0"),
        ({"model.head.norm": "group"}, "model.head.norm group, inference.query csq: group norm needs the whole map"),
        ({"model.head.norm": "group", "inference.query": "ccq"}, "model.head.norm group, inference.query ccq"),
        ({"model.head.norm": "group", "model.head.channels": 80}, "model.head.channels 80: must be a multiple of 32"),
        ({"model.head.prior": 1.0}, "model.head.prior 1.0"),
        ({"model.fpn.top_source": "pool"}, "model.fpn.top_source pool, model.max_level 7: pooling makes P6 only"),
        ({**FASTER, "model.head.num_convs": 0}, "model.head.num_convs 0: an RPN has at least one convolution"),
        ({**FASTER, "model.head.norm": "group", "inference.query": "dense"}, "model.head.norm group"),
        ({**FASTER, "model.faster_rcnn.proposals": 0}, "model.faster_rcnn.proposals 0: must be at least 1"),
        ({**FASTER, "model.faster_rcnn.roi_iou": 0}, "model.faster_rcnn.roi_iou 0.0: must be above 0 and at most 1"),
        ({**FASTER, "model.faster_rcnn.rpn_foreground": 1.5}, "model.faster_rcnn.rpn_foreground 1.5"),
        ({"model.loss.smooth_l1_beta": 0}, "model.loss.smooth_l1_beta 0.0"),
        ({"model.loss.level_weights": (1.0, 2.0)}, "model.loss.level_weights has 2 entries for 6 levels P2..P7"),
        ({"model.loss.query_weights": (10.0,)}, "model.loss.query_weights has 1 entries for the 2 levels"),
        ({"model.loss.query_gammas": (1.0, 1.0, 1.0)}, "model.loss.query_gammas has 3 entries for the 2 levels"),
        ({"model.query.levels": ()}, "model.query.levels is empty"),
        ({"model.query.levels": (1, 3)}, "model.query.levels (1, 3): not all within P2..P7"),
        ({"model.query.enabled": False}, "inference.query csq needs a query head"),
        ({"inference.start_level": 2}, "inference.start_level 2: must be one of P3..P7"),
        ({"inference.start_level": 8}, "inference.start_level 8"),
        ({"inference.capacities": (0.5, 0.25)}, "inference.capacities (0.5, 0.25)"),
        ({"inference.capacities": (0.25, 0.25)}, "inference.capacities (0.25, 0.25)"),
        ({"inference.capacities": (0.0, 0.25)}, "inference.capacities (0.0, 0.25)"),
        ({"inference.capacities": (0.5, 1.5)}, "inference.capacities (0.5, 1.5)"),
        ({"inference.context": -1}, "inference.context"),
        ({"inference.chunk": 0}, "inference.chunk"),
        ({"inference.topk": 0}, "inference.topk"),
        ({"inference.max_detections": 0}, "inference.max_detections"),
        ({"data.train_canvases": ((800, 1340),)}, "data.train_canvases ((800, 1340),)"),
        ({"data.train_canvases": ()}, "data.train_canvases ()"),
        ({"data.test_canvases": ((0, 32),)}, "data.test_canvases ((0, 32),)"),
        ({"classes": ("car", "van")}, "classes has 2 names, model.num_classes is 80"),
        ({"train.batch_size": 0}, "train.batch_size 0: must be at least 1"),
        ({"train.steps": 0}, "train.steps 0"),
        ({"train.log_every": 0}, "train.log_every 0"),
        ({"train.checkpoint_every": -5}, "train.checkpoint_every -5"),
        ({"model.backbone.norm": "group", "model.backbone.width": 48}, "model.backbone.width 48: must be a multiple"),
    ],
)
def test_contradictions(changes: dict[str, Any], named: str) -> None:
    assert named in message(changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model.loss.level_weighting": "linear", "model.max_level": 5},
        {"model.query.enabled": False, "model.query.levels": (), "inference.query": "dense"},
        {"inference.query": "dense", "inference.start_level": 0},
        {"inference.capacities": ()},
        {"inference.capacities": (0.1, 1.0), "inference.context": 0},
        {
            "model.min_level": 5,
            "model.query.levels": (6, 7),
            "model.loss.level_weights": (1, 1, 1),
            "inference.start_level": 6,
        },
        {"model.num_classes": 2, "classes": ("car", "van")},
        {"model.detector": "fcos", "model.head.norm": "group", "inference.query": "dense"},
        {"model.detector": "fcos", "model.fcos.range_scale": 2.5},
    ],
)
def test_what_agrees_passes(changes: dict[str, Any]) -> None:
    if changes.get("model.max_level") == 5:
        changes = changes | {"inference.start_level": 4}
    assert isinstance(override(Config(), changes), Config)


def test_override_checks_the_whole_not_each_step() -> None:
    config = override(Config(), {"model.min_level": 3, "model.loss.level_weights": (1, 1, 1, 1, 1)})
    assert config.model.levels == (3, 4, 5, 6, 7)
    assert Config().model.min_level == 2  # and changes a copy


def test_saved_and_loaded_again(tmp_path: Path) -> None:
    config = override(
        Config(name="mine"),
        {
            "classes": ["a", "b"],
            "model.num_classes": 2,
            "data.train_canvases": [[64, 96], [96, 64]],
            "train.learning_rate": 0.1 + 0.2,
            "inference.query": "dense",
        },
    )
    save_config(config, tmp_path / "config.json")
    again = load_config(tmp_path / "config.json")
    assert again == config and hash(again) == hash(config)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert load_config(str(tmp_path / "config.json"), {"train.steps": 7}).train.steps == 7
    # What a file leaves out has its default.
    (tmp_path / "part.json").write_text('{"train": {"steps": 9}}')
    assert load_config(tmp_path / "part.json") == override(Config(), {"train.steps": 9})


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    save_config(Config(name="old"), path)
    with pytest.raises(TypeError):
        save_config(dataclasses.replace(Config(), name=object()), path)  # pyright: ignore[reportArgumentType]
    assert load_config(path).name == "old"


def load_text(tmp_path: Path, name: str, text: str | bytes) -> str:
    """The error of loading such a file, without the folder."""
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    error = str(caught.value)
    assert error.startswith(f"{path}: ") and "\n" not in error
    return error.removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('{"train": {"stepss": 3}}', "unknown configuration key train.stepss: did you mean train.steps?"),
        ('{"trian": {}}', "unknown configuration key trian: did you mean train?"),
        ('{"train": {"steps": "x"}}', "train.steps: expected int, got 'x'"),
        ('{"train": 3}', "train must be a group of fields"),
        ("[1, 2]", "the file must be a group of fields"),
        ('{"train": {"st', "not readable as JSON"),
        (b"\xff\xfe\x00", "not readable as JSON"),
        ("", "not readable as JSON"),
    ],
)
def test_json_that_cannot_be_used(tmp_path: Path, text: str | bytes, error: str) -> None:
    assert load_text(tmp_path, "config.json", text).startswith(error)


HEADER = "from querydet_jax.config import *\n"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("x = 1\n", "does not define `config = Config(...)`; see configs/demo.py"),
        ("config = {'name': 'a'}\n", "does not define `config = Config(...)`"),
        ("def (\n", "SyntaxError: invalid syntax"),
        (HEADER + "config = Config(model=ModelConfig(num_clases=3))\n", "TypeError: "),
        ("config = Config()\n", "NameError: name 'Config' is not defined; mend the file"),
        ("import no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise RuntimeError('no GPU')\n", "RuntimeError: no GPU"),
        # A dataclass takes any value: types are checked on loading.
        (
            HEADER + "config = Config(model=ModelConfig(num_classes='10'))\n",
            "model.num_classes: expected int, got '10'",
        ),
        (
            HEADER + "config = Config(model=ModelConfig(backbone=BackboneConfig(name='resnet9')))\n",
            "model.backbone.name: ",
        ),
        (HEADER + "config = Config(model=None)\n", "model must be a group of fields"),
    ],
)
def test_python_that_cannot_be_used(tmp_path: Path, text: str, error: str) -> None:
    assert load_text(tmp_path, "experiment.py", text).startswith(error)


def test_contradictions_in_a_file_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(HEADER + "config = Config(model=ModelConfig(num_classes=0))\n")
    with pytest.raises(ConfigError, match="model.num_classes 0"):
        load_config(tmp_path / "a.py")


def test_lists_in_a_python_file_become_tuples(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(HEADER + "config = Config(train=TrainConfig(decay_steps=[1, 2], learning_rate=1))\n")
    config = load_config(tmp_path / "a.py")
    assert config.train.decay_steps == (1, 2) and isinstance(config.train.learning_rate, float)
    assert isinstance(hash(config), int)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(QueryDetError, match=r"nothing\.py: no such configuration file; see configs/"):
        load_config(tmp_path / "nothing.py")
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_config(tmp_path)  # a folder


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_the_files_provided(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    check(config)
    assert config.name != "unnamed"
    docstring = path.read_text().split('"""')[1]
    assert f"configs/{path.name}" in docstring  # the command that runs it
    lines = docstring.splitlines()
    for word in ("Reproduces:", "Command:", "Pod:", "Measured"):
        assert sum(line.startswith(word) for line in lines) == 1, word
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == config


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
