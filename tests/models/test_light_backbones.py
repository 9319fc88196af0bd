"""MobileNetV2 and ShuffleNetV2 against recorded features of torchvision's networks.

``mobilenet_v2.npz`` and ``shufflenet_v2.npz`` hold every fifth channel of C2..C5 of torchvision 0.28.0's
``mobilenet_v2`` and ``shufflenet_v2_x1_0`` (torch 2.13, float32, evaluation mode) with the weights of
``backbone_recipe`` on ``recipe.image('a', 96, 128)`` as RGB, normalised with ImageNet's mean and std. timm 1.0.31's
``mobilenetv2_100`` gave bit-identical features with the same tensors in the same order; ``timm`` in
``mobilenet_v2_shapes.json`` lists its names in that order.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import backbone_recipe
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from querydet_jax import build_model, load_weights
from querydet_jax.config import (
    BackboneConfig,
    FPNConfig,
    HeadConfig,
    ModelConfig,
    QueryConfig,
    check,
    load_config,
)
from querydet_jax.models.backbones import build_backbone
from querydet_jax.models.backbones.shufflenet_v2 import channel_shuffle
from querydet_jax.runtime.errors import ConfigError, WeightsError
from querydet_jax.weights import state_dict

HERE = Path(__file__).parent
FLOAT32 = jnp.dtype("float32")
CHANNELS = {
    "mobilenet_v2": {2: 24, 3: 32, 4: 96, 5: 320},
    "shufflenet_v2": {2: 24, 3: 116, 4: 232, 5: 1024},
}
NAMES = tuple(CHANNELS)


def config(name: str, **changes: Any) -> ModelConfig:
    return ModelConfig(
        num_classes=2,
        backbone=BackboneConfig(**{"name": name, "flavor": "torchvision", **changes}),
        fpn=FPNConfig(channels=16),
        head=HeadConfig(channels=16, num_convs=1),
        query=QueryConfig(channels=16, num_convs=1),
    )


def published(name: str) -> dict[str, np.ndarray]:
    """Every tensor of torchvision's network, classifier included."""
    shapes = json.loads((HERE / f"{name}_shapes.json").read_text())["torchvision"]
    return {tensor: backbone_recipe.make(tensor, tuple(shape)) for tensor, shape in shapes.items()}


def timm_names() -> list[str]:
    return json.loads((HERE / "mobilenet_v2_shapes.json").read_text())["timm"]


def loaded(name: str) -> Any:
    model = build_model(config(name))
    report = load_weights(model, published(name))
    assert not report.unexpected and not [tensor for tensor in report.missing if "bottom_up" in tensor]
    return model


@pytest.mark.parametrize("name", NAMES)
def test_features_equal_the_recorded_ones(name):
    model = loaded(name)
    features = jax.jit(lambda x: model.backbone(model.normalize(x)))(jnp.asarray(backbone_recipe.image()[None]))
    assert model.backbone.out_channels == CHANNELS[name]
    with np.load(HERE / f"{name}.npz") as recorded:
        for level, channels in CHANNELS[name].items():
            assert features[level].shape == (1, 96 >> level, 128 >> level, channels)
            expected = recorded[f"c{level}"]
            scale = np.abs(expected).max()
            assert scale > 5
            # Tolerance: torch's own float32 differs from its float64 by up to 1e-5 of the scale.
            np.testing.assert_allclose(features[level][0, :, :, ::5], expected, rtol=0, atol=2e-5 * scale)


# Without the classifier's part: MobileNetV2's 1x1 convolution to 1280 channels with its norm.
@pytest.mark.parametrize(
    ("name", "parameters"), [("mobilenet_v2", 2_223_872 - (320 * 1280 + 2 * 1280)), ("shufflenet_v2", 1_253_604)]
)
def test_parameters_are_as_many_as_published(name, parameters):
    backbone = config(name, norm="batch", freeze_at=0).backbone
    made = nnx.eval_shape(lambda: build_backbone(backbone, FLOAT32, np.random.default_rng(0)))
    assert sum(math.prod(v.shape) for v in jax.tree.leaves(nnx.state(made, nnx.Param))) == parameters


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", [(64, 96), (32, 32)])
def test_strides(name, side):
    backbone = nnx.eval_shape(lambda: build_backbone(config(name).backbone, FLOAT32, np.random.default_rng(0)))
    outputs = nnx.eval_shape(lambda b, x: b(x), backbone, jax.ShapeDtypeStruct((2, *side, 3), FLOAT32))
    expected = {level: (2, side[0] >> level, side[1] >> level, c) for level, c in CHANNELS[name].items()}
    assert {level: x.shape for level, x in outputs.items()} == expected


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_computes_in_bfloat16(name):
    half = jnp.dtype("bfloat16")
    backbone = nnx.eval_shape(lambda: build_backbone(config(name).backbone, half, np.random.default_rng(0)))
    outputs = nnx.eval_shape(lambda b, x: b(x), backbone, jax.ShapeDtypeStruct((1, 64, 64, 3), half))
    assert {x.dtype for x in outputs.values()} == {half}
    assert {v.dtype for v in jax.tree.leaves(nnx.state(backbone, nnx.Param))} == {FLOAT32}


def test_channel_shuffle():
    x = jnp.broadcast_to(jnp.arange(6), (2, 3, 4, 6))
    shuffled = channel_shuffle(x)
    assert shuffled.shape == x.shape and (np.asarray(shuffled) == [0, 3, 1, 4, 2, 5]).all()


PARTS = {
    "mobilenet_v2": ("stem", "level1", "level2", "level3", "level4", "level5"),
    "shufflenet_v2": ("stem", "level3", "level4", "level5", "last"),
}
# How many of the parts freeze_at 0, 1, .. 5 freezes. C2 of ShuffleNetV2 is its stem.
FROZEN = {"mobilenet_v2": (0, 1, 3, 4, 5, 6), "shufflenet_v2": (0, 1, 1, 2, 3, 5)}


@pytest.mark.parametrize("freeze_at", range(6))
@pytest.mark.parametrize("name", NAMES)
def test_what_is_frozen(name, freeze_at):
    parts, count = PARTS[name], FROZEN[name][freeze_at]
    model = nnx.eval_shape(lambda: build_model(config(name, freeze_at=freeze_at, norm="batch")))
    assert model.backbone.frozen_parts() == parts[:count]
    trained = nnx.to_flat_state(nnx.state(model, model.trainable()))
    assert {path[1] for path, _ in trained if path[0] == "backbone"} == set(parts[count:])
    # Nor do batch statistics change the output of a frozen part.
    live = nnx.to_flat_state(nnx.state(model.backbone, nnx.BatchStat))
    assert {path[0] for path, _ in live} == set(parts[count:])


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_and_stop_at_what_is_frozen(name):
    backbone = build_backbone(config(name, freeze_at=3).backbone, FLOAT32, np.random.default_rng(0))
    graph, parameters, rest = nnx.split(backbone, nnx.Param, ...)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 32, 64, 3)), jnp.float32)

    @jax.jit
    def gradient(parameters):
        def loss(parameters):
            return sum(jnp.mean(c**2) for c in nnx.merge(graph, parameters, rest)(x).values())

        return jax.grad(loss)(parameters)

    frozen = PARTS[name][: FROZEN[name][3]]
    for path, variable in nnx.to_flat_state(gradient(parameters)):
        found = np.asarray(variable.get_value())
        assert np.isfinite(found).all(), path
        assert (found == 0).all() if path[0] in frozen else (found != 0).any(), path


def test_timms_names_load_the_same():
    weights = published("mobilenet_v2")
    names = timm_names()
    assert len(names) == len(weights) and "blocks.3.2.conv_pwl.weight" in names
    source = dict(zip(names, weights.values(), strict=True))
    expected = {name: array for name, array in state_dict(loaded("mobilenet_v2")).items() if "bottom_up" in name}
    model = build_model(config("mobilenet_v2"), seed=1)
    # Sorted, bn1 (which a ResNet also has) comes before conv_stem.
    report = load_weights(model, {f"module.{name}": source[name] for name in sorted(source)})
    assert not report.unexpected and set(report.loaded) == set(expected)
    held = state_dict(model)
    for name, array in expected.items():
        np.testing.assert_array_equal(held[name], array, err_msg=name)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("mobilenet_v2", "features.19.conv.2.weight"),  # no such block
        ("mobilenet_v2", "features.2.conv.4.weight"),  # no such module of a block
        ("mobilenet_v2", "features.1.conv.3.weight"),  # the first block has no expansion
        ("shufflenet_v2", "stage2.4.branch2.0.weight"),  # no such unit
        ("shufflenet_v2", "stage2.1.branch1.0.weight"),  # only the first unit has this branch
        ("shufflenet_v2", "stage2.0.branch2.2.weight"),  # a ReLU
    ],
)
def test_names_that_are_no_tensor(name, tensor):
    report = load_weights(build_model(config(name)), {**published(name), tensor: np.ones(3, np.float32)})
    assert report.unexpected == (tensor,)


@pytest.mark.parametrize("tensor", ["blocks.7.0.conv_pw.weight", "blocks.1.2.conv_pw.weight", "blocks.0.0.bn3.bias"])
def test_timm_names_that_are_no_tensor(tensor):
    source = dict(zip(timm_names(), published("mobilenet_v2").values(), strict=True))
    report = load_weights(build_model(config("mobilenet_v2")), {**source, tensor: np.ones(3, np.float32)})
    assert report.unexpected == (tensor,)


def resnet(**changes: Any) -> ModelConfig:
    return config("resnet10", **changes)


@pytest.mark.parametrize(
    ("model", "names", "message"),
    [
        (resnet(), "mobilenet_v2", r"no tensor of this model .it has features\.0\.0\.weight"),
        (resnet(), "shufflenet_v2", r"conv1\.0\.weight has shape \[24, 3, 3, 3\].*; set model\.backbone\.name to"),
        (config("mobilenet_v2"), "shufflenet_v2", r"stage2.*set model\.backbone\.name to"),
        (config("shufflenet_v2"), "mobilenet_v2", r"features.*set model\.backbone\.name to"),
        (
            config("efficientnet_lite0", flavor="efficientnet_lite"),
            "mobilenet_v2",
            "torchvision names.*; efficientnet_lite0 takes weights of the efficientnet_lite flavour only",
        ),
        (
            config("efficientnet_lite0", flavor="efficientnet_lite"),
            "timm",
            "timm names.*; efficientnet_lite0 takes weights of the efficientnet_lite flavour only",
        ),
    ],
)
def test_weights_of_another_network_are_refused(model, names, message):
    weights = published("mobilenet_v2" if names == "timm" else names)
    if names == "timm":
        weights = dict(zip(timm_names(), weights.values(), strict=True))
    with pytest.raises(WeightsError, match=message):
        load_weights(build_model(model), weights)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flavor": "msra"}, "set the flavor to torchvision$"),
        ({"norm": "group"}, "{name} has a fixed width and no group norm"),
        ({"width": 32}, "{name} has a fixed width and no group norm"),
    ],
)
def test_settings_that_contradict(name, changes, message):
    whole = load_config(HERE.parents[1] / "configs" / "coco_querydet_r50.py")
    backbone = BackboneConfig(**{"name": name, "flavor": "torchvision", **changes})
    with pytest.raises(ConfigError, match=message.format(name=name)):
        check(dataclasses.replace(whole, model=dataclasses.replace(whole.model, backbone=backbone)))
