"""Weights that come with the package: written, verified, found by name, started from."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest

from querydet_jax.cli.arguments import results_folder
from querydet_jax.cli.train import train
from querydet_jax.config import (
    BackboneConfig,
    Config,
    FPNConfig,
    HeadConfig,
    InferenceConfig,
    LossConfig,
    ModelConfig,
    QueryConfig,
    card_names,
    load_config,
    override,
    zoo,
)
from querydet_jax.models import build_model
from querydet_jax.runtime.errors import ConfigError, WeightsError
from querydet_jax.weights import load_weights, packaged, read_tensors, state_dict

ROOT = Path(__file__).parents[2]
CLASSES = ("ant", "bee", "cow")
MODEL = ModelConfig(
    num_classes=3,
    min_level=4,
    max_level=5,
    backbone=BackboneConfig(name="resnet10", width=8),
    fpn=FPNConfig(channels=8),
    head=HeadConfig(channels=8, num_convs=1),
    query=QueryConfig(levels=(5,), channels=8, num_convs=1),
    loss=LossConfig(level_weighting="uniform", query_weights=(1.0,), query_gammas=(1.0,)),
)
INFERENCE = InferenceConfig(start_level=5)
CARD = packaged.ModelCard(
    title="a toy",
    data="none",
    licence="CC0",
    attribution="nobody",
    recipe="none: random weights",
    limits="finds nothing",
    measured="nothing",
    metrics={"dense": {"AP": 12.345, "APs": None}},
    classes={"ant": {"AP": 1.0, "objects": 7}},
    min_scores={"ant": 0.25, "bee": 0.5, "cow": 0.75},
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo") / "toy"
    config = Config(name="run", classes=CLASSES, model=MODEL, inference=INFERENCE)
    config = override(config, {"data.root": "/home/me/data", "train.init": "/home/me/run"})
    packaged.write_packaged(folder, state_dict(build_model(MODEL, seed=1)), config, CARD)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that may be damaged, in a zoo of its own."""
    monkeypatch.setattr(zoo, "ZOO", tmp_path / "zoo")
    return Path(shutil.copytree(written, tmp_path / "zoo" / "toy"))


@pytest.mark.parametrize(("init", "kept"), [("toy", ""), ("efficientnet_lite0", "efficientnet_lite0")])
def test_starting_weights(init: str, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that went on from their own former version do not name themselves as their start."""
    monkeypatch.setattr(zoo, "ZOO", tmp_path)
    config = override(Config(name="run", classes=CLASSES, model=MODEL, inference=INFERENCE), {"train.init": init})
    packaged.write_packaged(tmp_path / "toy", state_dict(build_model(MODEL, seed=1)), config, CARD)
    assert load_config("toy").train.init == kept


def test_what_is_stored_and_read_back(folder: Path) -> None:
    """Kernels rounded to 16 bits, the rest bit for bit, all float32 in the model."""
    model = build_model(MODEL, seed=1)
    wanted = state_dict(model)
    other = build_model(MODEL, seed=2)
    report = load_weights(other, "toy")
    assert not report.missing and not report.unexpected
    for name, array in state_dict(other).items():
        rounded = wanted[name].astype(np.float16) if wanted[name].ndim > 1 else wanted[name]
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, rounded.astype(np.float32), err_msg=name)
    kinds = {name: array.dtype for name, array in read_tensors(folder).items()}
    assert kinds["backbone.bottom_up.stem.conv1.weight"] == np.float16
    config = load_config("toy")
    assert (config.name, config.classes, config.model) == ("toy", CLASSES, MODEL)
    assert (config.data.root, config.train.init) == ("", "")  # nothing of the machine that trained it
    assert packaged.read_card(folder) == CARD
    text = (folder / "card.md").read_text()
    assert (
        "# toy: a toy" in text
        and "| ant | 1.00 | 7 |" in text
        and "| dense | 12.35 |  |" in text
        and "| cow | 0.750 |" in text
    )


def test_a_value_that_16_bits_cannot_hold(tmp_path: Path) -> None:
    config = Config(model=MODEL, inference=INFERENCE)
    tensors = {"x": np.full((1, 1), 1e5, np.float32), "bias": np.full(1, 1e5, np.float32)}
    with pytest.raises(WeightsError, match="x: holds 100000, too large for float16; store float32"):
        packaged.write_packaged(tmp_path / "toy", tensors, config, CARD)
    assert not list(tmp_path.iterdir())
    packaged.write_packaged(tmp_path / "toy", tensors, config, CARD, storage="float32")
    assert read_tensors(tmp_path / "toy")["x"] == np.float32(1e5)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("weights.safetensors", lambda data: data[:-1] + b"?", "weights.safetensors: damaged or edited .its SHA-256"),
        ("weights.safetensors", None, "weights.safetensors: cannot be read .No such file"),
        ("config.json", lambda data: data.replace(b"resnet10", b"resnet18"), "config.json: damaged or edited"),
        ("card.json", lambda data: data[:-9], "card.json: not readable as JSON"),
        ("card.json", lambda data: b"{}", "card.json: is no model card"),
        (
            "card.json",
            lambda data: data.replace(b'"format_version": 1', b'"format_version": 2'),
            "card.json: format version 2, but this reader supports 1; install the querydet_jax that wrote it",
        ),
        ("card.json", lambda data: data.replace(b'"sha256": {', b'"sha256": {"x": 1,'), "sha256 does not list config"),
    ],
    ids=["weights", "no weights", "config", "card", "no card", "version", "sums"],
)
def test_damage_is_one_line(folder: Path, file: str, change, message: str) -> None:
    path = folder / file
    data = path.read_bytes()
    path.unlink()
    if change is not None:
        path.write_bytes(change(data))
    model = build_model(MODEL, seed=2)
    before = state_dict(model)
    with pytest.raises(WeightsError, match=message) as error:
        load_weights(model, "toy")
    assert "\n" not in str(error.value)
    np.testing.assert_equal(state_dict(model), before)


@pytest.mark.parametrize("change", [{"licence": None}, {"min_scores": {"ant": 7}}, {"classes": []}], ids=str)
def test_a_damaged_card_names_the_field(folder: Path, change: dict) -> None:
    card = folder / "card.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | change))
    with pytest.raises(WeightsError, match=f"card.json: {next(iter(change))} is damaged"):
        packaged.read_card(folder)


def test_a_name_means_the_package_wherever_a_program_runs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="querydet_jax")
    (tmp_path / "toy").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_config("toy").name == "toy" and "./toy is what has this name here" in caplog.text
    for own in ("./toy", Path("toy")):
        with pytest.raises(ConfigError, match="no config.json in this folder"):
            load_config(own)
    with pytest.raises(ConfigError, match="tyo: neither a card.*did you mean toy"):
        load_config("tyo")


def test_commands_leave_the_package_as_it_is(folder: Path) -> None:
    """They write to runs/NAME; a training is refused, with the way to start from the weights."""
    config = load_config("toy")
    assert results_folder(folder, config) == Path("runs/toy") == results_folder(Path("card.py"), config)
    assert results_folder(folder.parent, config) == folder.parent
    with pytest.raises(ConfigError, match="toy: weights, not a card; start from them: train CARD --train.init toy"):
        train(["toy"], "querydet train")


def test_names_of_the_package_mean_one_thing() -> None:
    assert not set(zoo.zoo_names()) & {*card_names(), *packaged._PACKAGES}


def test_training_starts_from_classes_of_the_same_name(folder: Path) -> None:
    """As from a run (test_weight_classes)."""
    source = state_dict(build_model(MODEL, seed=1))["det_head.cls_score.bias"]
    model = build_model(MODEL, seed=2)
    initial = state_dict(model)["det_head.cls_score.bias"]
    report = load_weights(model, "toy", classes=("cow", "dog", "ant"))
    assert "taken: cow, ant; these start fresh: dog" in report.classes
    bias = state_dict(model)["det_head.cls_score.bias"].reshape(-1, 3)
    np.testing.assert_array_equal(bias[:, 0], source.reshape(-1, 3)[:, 2])
    np.testing.assert_array_equal(bias[:, 1], initial.reshape(-1, 3)[:, 1])


def test_every_packaged_detector_is_whole_and_small() -> None:
    """What the installed package holds; there may be none yet."""
    for name in zoo.zoo_names():
        folder = zoo.ZOO / name
        assert sum(path.stat().st_size for path in folder.iterdir()) <= 12e6
        config, card = load_config(name), packaged.read_card(folder)
        assert config.name == name and set(card.min_scores) == set(config.classes)
        assert "CC BY 4.0" in card.licence and card.attribution and card.limits and card.metrics
        assert not load_weights(build_model(config.model), name).missing


def test_the_wheel_takes_the_zoo(folder: Path) -> None:
    """And can be built at all: setuptools reads requirements, but no options such as `-r`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = project["package-data"]["querydet_jax"]
    taken = {path for pattern in patterns for path in folder.parents[1].glob(pattern)}
    assert taken == set(folder.iterdir())
    extras = project["dynamic"]["optional-dependencies"]
    for files in (project["dynamic"]["dependencies"], *extras.values()):
        for file in files["file"]:
            assert not [line for line in (ROOT / file).read_text().splitlines() if line.startswith("-")], file


def test_pictures_of_others_are_attributed() -> None:
    folder = ROOT / "examples" / "hituav"
    text = (folder / "ATTRIBUTION.md").read_text()
    pictures = list(folder.glob("*.jpg"))
    assert len(pictures) == 2 and all(path.name in text and path.stat().st_size < 100e3 for path in pictures)
    assert "creativecommons.org/licenses/by/4.0" in text and "Jiashun Suo" in text and "Changes:" in text
