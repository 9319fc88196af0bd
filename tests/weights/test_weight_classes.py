"""Weights with other classes: matched by name where names are known, the class layer fresh where not."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from querydet_jax.config import (
    BackboneConfig,
    Config,
    FasterRCNNConfig,
    FPNConfig,
    HeadConfig,
    ModelConfig,
    QueryConfig,
)
from querydet_jax.inference.runs import open_model
from querydet_jax.models import build_model
from querydet_jax.runtime import checkpoint_store
from querydet_jax.runtime.errors import ConfigError, WeightsError
from querydet_jax.weights import load_weights, state_dict

SMALL = ModelConfig(
    num_classes=3,
    min_level=4,
    max_level=5,
    backbone=BackboneConfig(name="resnet10", width=8),
    fpn=FPNConfig(channels=8),
    head=HeadConfig(channels=8, num_convs=1),
    query=QueryConfig(levels=(5,), channels=8, num_convs=1),
)
SECOND_STAGE = dataclasses.replace(
    SMALL,
    detector="faster_rcnn",
    max_level=6,
    fpn=FPNConfig(channels=8, top_source="pool"),
    faster_rcnn=FasterRCNNConfig(roi_size=2, channels=8),
)
DETECTORS = {
    "retinanet": SMALL,
    "fcos": dataclasses.replace(SMALL, detector="fcos"),
    "faster_rcnn": SECOND_STAGE,
}
LAYERS = {
    "retinanet": ("det_head.cls_score.bias", "det_head.cls_score.weight"),
    "fcos": ("det_head.cls_score.bias", "det_head.cls_score.weight"),
    "faster_rcnn": tuple(
        f"roi_heads.box_predictor.{module}.{leaf}"
        for module in ("bbox_pred", "cls_score")
        for leaf in ("bias", "weight")
    ),
}
NAMES = ("ant", "bee", "cow")


@functools.cache
def made(detector: str, number: int) -> tuple[Any, dict[str, np.ndarray]]:
    model = build_model(dataclasses.replace(DETECTORS[detector], num_classes=number), seed=number)
    return model, state_dict(model)


def built(detector: str, number: int) -> Any:
    """A model with its initial weights."""
    model, initial = made(detector, number)
    load_weights(model, initial)
    return model


@functools.cache
def source(detector: str) -> dict[str, np.ndarray]:
    """Weights of a detector of ant, bee and cow."""
    rng = np.random.default_rng(7)
    model = built(detector, 3)
    return {
        name: array if name in ("pixel_mean", "pixel_std") else rng.uniform(0.1, 0.5, array.shape).astype(np.float32)
        for name, array in state_dict(model).items()
    }


@pytest.fixture
def run(tmp_path, monkeypatch, request) -> Path:
    """A run folder as far as names go; its tensors are those of ``source``."""
    (tmp_path / "run" / "checkpoints" / "5").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text(json.dumps({"name": "x", "classes": NAMES}))
    callspec = getattr(request.node, "callspec", None)
    detector = callspec.params.get("detector", "retinanet") if callspec else "retinanet"
    monkeypatch.setattr(checkpoint_store, "read_checkpoint", lambda path, item: dict(source(detector)))
    return tmp_path / "run"


def class_outputs(model: Any) -> np.ndarray:
    """Class logits, classes last: of the heads' maps, of the second stage with its boxes."""
    rng = np.random.default_rng(3)
    number = model.config.num_classes
    if model.config.detector == "faster_rcnn":
        scores, deltas = model.box_head(rng.normal(size=(1, 5, 2, 2, 8)).astype(np.float32))
        return np.concatenate([scores[..., None, :-1], np.swapaxes(deltas, 2, 3)], axis=2)
    cls = model.head(rng.normal(size=(1, 4, 4, 8)).astype(np.float32))[0]
    return np.asarray(cls).reshape(16, -1, number)


@pytest.mark.parametrize(
    ("detector", "names"),
    [
        ("retinanet", ("cow", "ant", "bee")),
        ("retinanet", ("dog", "bee", "ant", "fly", "cow")),
        ("fcos", ("bee",)),
        ("fcos", ("cow", "dog", "elk")),
        ("faster_rcnn", ("dog", "bee", "ant", "fly", "cow")),
    ],
)
def test_classes_of_the_same_name_are_taken(run, detector, names):
    reference = built(detector, 3)
    load_weights(reference, source(detector))
    wanted = class_outputs(reference)
    model = built(detector, len(names))
    initial = state_dict(model)
    report = load_weights(model, run, classes=names)
    kept = [k for k, name in enumerate(names) if name in NAMES]
    found = class_outputs(model)
    # A product of other widths may add up in another order.
    expected = wanted[..., [NAMES.index(names[k]) for k in kept]]
    np.testing.assert_allclose(found[..., kept], expected, rtol=1e-5, atol=1e-6)

    fresh = [k for k in range(len(names)) if k not in kept]
    assert report.fresh == (LAYERS[detector] if fresh else ()) and not report.missing
    assert set(LAYERS[detector]) <= set(report.loaded)
    for k in fresh:
        for name in LAYERS[detector]:
            held, first = state_dict(model)[name], initial[name]
            rows = [k] if "cls_score" in name else range(4 * k, 4 * k + 4)
            if detector == "retinanet":
                rows = [a * len(names) + k for a in range(9)]
            np.testing.assert_array_equal(held[list(rows)], first[list(rows)])
    if detector == "faster_rcnn":  # the background
        name = "roi_heads.box_predictor.cls_score.weight"
        np.testing.assert_array_equal(state_dict(model)[name][-1], source(detector)[name][-1])
    assert f"taken: {', '.join(names[k] for k in kept)}" in str(report)
    assert not fresh or str(report).endswith(f"start fresh: {', '.join(names[k] for k in fresh)}")
    untouched = {n: a for n, a in source(detector).items() if n not in LAYERS[detector]}
    assert all(state_dict(model)[name].tobytes() == array.tobytes() for name, array in untouched.items())


@pytest.mark.parametrize(
    ("detector", "names"),
    [("retinanet", ("dog", "elk", "fly", "gnu", "hen")), ("fcos", ("dog",)), ("faster_rcnn", ("dog",) * 5)],
)
def test_other_classes_start_fresh(run, detector, names):
    """Of a run without a class in common, and of weights without names."""
    for weights in (run, source(detector)):
        model = built(detector, len(names))
        initial = state_dict(model)
        report = load_weights(model, weights, classes=names)
        held = state_dict(model)
        assert report.fresh == LAYERS[detector] and not report.missing and not set(report.fresh) & set(report.loaded)
        assert len(report.loaded) == len(held) - len(LAYERS[detector])
        for name, array in held.items():
            expected = initial if name in LAYERS[detector] else source(detector)
            assert array.tobytes() == expected[name].tobytes(), name
        said = (
            f"the class layer starts fresh ({', '.join(LAYERS[detector])}): 3 classes in the weights, {len(names)} in"
        )
        assert said in str(report)


@pytest.mark.parametrize("detector", DETECTORS)
def test_the_same_classes_are_as_before(run, detector):
    model = built(detector, 3)
    for weights, said in (
        (run, ""),
        (run / "checkpoints", ""),
        (run / "checkpoints" / "5", ""),
        (source(detector), "order"),
    ):
        report = load_weights(model, weights, classes=NAMES)
        assert not report.fresh and said in report.classes and bool(said) == bool(report.classes)
        held = state_dict(model)
        assert all(held[name].tobytes() == array.tobytes() for name, array in source(detector).items())


def test_a_run_evaluated_with_classes_in_another_order(run):
    """Or without one of them, which would be evaluated untrained."""
    config = Config(model=SMALL, classes=("cow", "ant", "bee"))
    reference = built("retinanet", 3)
    load_weights(reference, source("retinanet"))
    wanted = class_outputs(reference)[..., [2, 0, 1]]
    np.testing.assert_allclose(class_outputs(open_model(config, "card", run)), wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="run: lacks classes of this configuration: .*these start fresh: dog"):
        open_model(dataclasses.replace(config, classes=("cow", "ant", "dog")), "card", run)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"head": HeadConfig(channels=4, num_convs=1)}, "model.head.channels"),
        ({"fpn": FPNConfig(channels=4)}, "model.fpn.channels"),
        ({"backbone": BackboneConfig(name="resnet10", width=16)}, "model.backbone"),
        ({"anchors": dataclasses.replace(SMALL.anchors, sizes_per_octave=1)}, "model.anchors"),
        ({"query": QueryConfig(levels=(5,), channels=4, num_convs=1)}, "model.query.channels"),
    ],
)
def test_other_mismatches_stay_errors(run, changes, field):
    model = build_model(dataclasses.replace(SMALL, num_classes=2, **changes))
    before = state_dict(model)
    for weights in (run, source("retinanet")):
        with pytest.raises(WeightsError, match=f"the model wants .*set {field}"):
            load_weights(model, weights, classes=("ant", "dog"))
    jax.tree.map(np.testing.assert_array_equal, state_dict(model), before)


@pytest.mark.parametrize("names", [("caf\u00e9", "a\u030a"), ("cafe\u0301", "\u00e5"), ("cafe\u0301", "a\u030a", "x")])
def test_accents_in_one_or_two_characters_are_the_same_class(run, names):
    written = ("\u00e5", "b", "caf\u00e9")
    (run / "config.json").write_text(json.dumps({"classes": written}))
    report = load_weights(built("retinanet", len(names)), run, classes=names)
    assert "taken: caf\u00e9, \u00e5" in report.classes and ("start fresh: x" in report.classes) == ("x" in names)


@pytest.mark.parametrize("number", [1, 5])
def test_without_names_another_number_of_classes_is_an_error(number):
    with pytest.raises(WeightsError, match="cls_score.weight has shape .*set model.num_classes"):
        load_weights(built("retinanet", number), source("retinanet"))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"classes": "ant"}', '{"classes": [1, 2, 3]}', "[" * 100_000])
def test_a_damaged_list_of_classes(run, text):
    (run / "config.json").write_text(text)
    with pytest.raises(WeightsError, match="config.json: damaged, no list of classes in it"):
        load_weights(built("retinanet", 3), run, classes=NAMES)


def test_a_list_of_other_length(run):
    (run / "config.json").write_text(json.dumps({"classes": ["ant"]}))
    with pytest.raises(WeightsError, match="run: has 3 classes, its config.json 1; restore that file"):
        load_weights(built("retinanet", 3), run, classes=NAMES)
