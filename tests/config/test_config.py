"""Configuration: messages that name the key and the remedy, round trips, the files provided."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from querydet_jax.config import (
    Config,
    TrainConfig,
    check,
    load_config,
    override,
    save_config,
)
from querydet_jax.runtime.errors import ConfigError, QueryDetError, shown

CONFIGS = Path(__file__).parents[2] / "configs"


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
        ("train.steps.more", 1, "train.steps.more: steps is a value, not a group; remove what follows it"),
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
        ({"classes": ("car", "van", "car")}, "classes has 'car' twice: give each class a name of its own"),
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
        (b"\xff\xfe\x00", "not text in UTF-8 or UTF-16"),
        ('{"train": {"steps": 3, "steps": 4}}', "not readable as JSON (an object has the key 'steps' twice)"),
        ('{"train": ' + "[" * 100_000 + "]" * 100_000 + "}", "not readable as JSON (nested too deeply)"),
        ('{"train": {"learning_rate": NaN}}', "train.learning_rate: expected a finite number, got nan"),
        ('{"train": {"learning_rate": 1e999}}', "train.learning_rate: expected a finite number, got inf"),
        ('{"train": {"learning_rate": 1' + "0" * 5000 + "}}", "train.learning_rate: expected a finite number, got inf"),
        ('{"train": {"steps": 1' + "0" * 400 + "}}", "train.steps: expected a finite number, got 1000"),
        ('{"a\\nb": 1}', "unknown configuration key 'a\\nb'"),
        ("", "not readable as JSON"),
    ],
    ids=shown,
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
        ("config = Config()\n", "NameError: name 'Config' is not defined; fix the file"),
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
        (HEADER + "config = Config(classes=(c for c in 'ab'))\n", "TypeError: cannot pickle 'generator' object"),
        (HEADER + "config = Config(train=TrainConfig(ema=float('nan')))\n", "train.ema: expected a finite number"),
        ("raise SystemExit('usage:\\n ...')\n", "SystemExit: usage:; fix the file"),
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
    with pytest.raises(QueryDetError, match=r"nothing\.py: neither a card, .* `querydet cards`"):
        load_config(tmp_path / "nothing.py")
    with pytest.raises(ConfigError, match="no config.json in this folder"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match=r"^a{200}: File name too long; give a card's name"):
        load_config("a" * 5000)


def test_a_card_by_name_and_a_run_folder(tmp_path: Path) -> None:
    config = load_config("demo", {"train.steps": 7})
    assert config == load_config(CONFIGS / "demo.py", {"train.steps": 7})
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path) == config


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("../x", "has one of /"),
        ("/tmp/x", "has one of /"),
        ("a\\b", "has one of /"),
        ("C:x", "has one of /"),
        ("..", "begins or ends with a dot"),
        (" ", "begins or ends with a dot or a space"),
        ("", "is empty"),
        ("a\nb", "has control characters"),
        ("a\x1b[2J", "has control characters"),
        ("a\ud800", "has control characters"),
        ("a\u202eb", "has control characters"),
        ("n" * 256, "is 256 bytes long"),
        ("\N{SNOWMAN}" * 90, "is 270 bytes long"),
    ],
)
def test_a_name_cannot_leave_the_runs_folder(name, wrong):
    with pytest.raises(ConfigError) as error:
        override(Config(), {"name": name})
    assert str(error.value).startswith("name '") and wrong in str(error.value) and str(error.value).isprintable()
    with pytest.raises(ConfigError):
        load_config("demo", {"name": name})


@pytest.mark.parametrize("name", ["exp-1_b.2", "été 3", "\N{SNOWMAN}", "n" * 200])
def test_other_names_are_good(name):
    assert override(Config(), {"name": name}).name == name


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("train.learning_rate", float("nan")),
        ("train.clip_norm", -1.0),
        ("train.keep_checkpoints", 0),
        ("train.eval_images", -3),
        ("train.seed", -1),
        ("inference.score_threshold", float("-inf")),
        ("inference.threshold", 7.0),
        ("inference.nms_iou", -0.1),
    ],
)
def test_numbers_that_mean_nothing_are_refused(field, value):
    """Also those of flags, which do not pass through ``override``."""
    group, name = field.split(".")
    changed = dataclasses.replace(getattr(Config(), group), **{name: value})
    with pytest.raises(ConfigError, match=rf"^{field} .*: must "):
        check(dataclasses.replace(Config(), **{group: changed}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model.fpn.channels", 0),
        ("model.backbone.width", -64),
        ("model.head.num_convs", -1),
        ("model.anchors.ratios", (1.0, 0.0)),
        ("model.anchors.ratios", ()),
        ("model.anchors.scale", -4.0),
        ("model.loss.focal_alpha", 1.5),
        ("model.loss.query_weights", (10.0, -1.0)),
        ("inference.score_threshold", 2.0),
    ],
)
def test_numbers_out_of_their_range_are_refused(field, value):
    assert message({field: value}).startswith(f"{field} ")
