"""Residual networks: shapes, positions of the strides, max pool, freezing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from querydet_jax.config import BackboneConfig
from querydet_jax.models.backbones import build_backbone
from querydet_jax.models.backbones.resnet import BasicBlock, Bottleneck
from querydet_jax.models.layers import FrozenNorm, msra_init
from querydet_jax.ops.pixels import is_bgr, pixel_statistics
from querydet_jax.ops.pooling import max_pool_3x3

FLOAT32 = jnp.dtype("float32")


@pytest.mark.parametrize("flavor", ["msra", "torchvision"])
@pytest.mark.parametrize(
    ("name", "blocks", "channels"),
    [
        ("resnet10", (1, 1, 1, 1), (32, 64, 128, 256)),
        ("resnet18", (2, 2, 2, 2), (32, 64, 128, 256)),
        ("resnet34", (3, 4, 6, 3), (32, 64, 128, 256)),
        ("resnet50", (3, 4, 6, 3), (128, 256, 512, 1024)),
        ("resnet101", (3, 4, 23, 3), (128, 256, 512, 1024)),
    ],
)
def test_depths_channels_and_strides(name, blocks, channels, flavor) -> None:
    config = BackboneConfig(name=name, flavor=flavor, width=32)
    backbone = build_backbone(config, FLOAT32, np.random.default_rng(0))
    assert tuple(len(getattr(backbone, f"res{stage}")) for stage in (2, 3, 4, 5)) == blocks
    assert backbone.out_channels == dict(zip((2, 3, 4, 5), channels, strict=True))
    outputs = jax.eval_shape(backbone, jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32))
    expected = {level: (2, 64 >> level, 96 >> level, c) for level, c in backbone.out_channels.items()}
    assert {level: x.shape for level, x in outputs.items()} == expected


def bottleneck(flavor: str) -> Bottleneck:
    config = BackboneConfig(flavor=flavor)  # pyright: ignore[reportArgumentType]
    common = dict(init=msra_init, norm="frozen", dtype=FLOAT32, rng=np.random.default_rng(0))
    return Bottleneck(16, 4, 2, config, **common)


@pytest.mark.parametrize(("flavor", "sees_odd_pixels"), [("msra", False), ("torchvision", True)])
def test_where_the_stride_sits(flavor: str, sees_odd_pixels: bool) -> None:
    block = bottleneck(flavor)
    x = np.random.default_rng(1).normal(size=(1, 8, 8, 16)).astype(np.float32)
    other = x.copy()
    other[:, 1::2], other[:, :, 1::2] = 7.0, 7.0
    y = np.asarray(block(jnp.asarray(x)))
    assert y.shape == (1, 4, 4, 16)
    # A stride in both 1x1 convolutions skips every odd row and column.
    assert np.array_equal(y, block(jnp.asarray(other))) == (not sees_odd_pixels)


def test_blocks_add_their_shortcut() -> None:
    config = BackboneConfig()
    common = dict(init=msra_init, norm="frozen", dtype=FLOAT32, rng=np.random.default_rng(0))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 6, 6, 8)), jnp.float32)
    same = BasicBlock(8, 8, 1, config, **common)
    assert same.shortcut is None
    expected = jax.nn.relu(same.conv2(jax.nn.relu(same.conv1(x))) + x)
    np.testing.assert_allclose(same(x), expected, rtol=1e-6)
    assert (np.asarray(same(x)) >= 0).all()
    # The last convolution has no ReLU of its own: the sum may be below the shortcut.
    assert (np.asarray(same(x)) < np.asarray(jax.nn.relu(x))).any()
    for block in (BasicBlock(8, 16, 1, config, **common), BasicBlock(8, 8, 2, config, **common)):
        assert block.shortcut is not None and block.conv2.stride == 1
        assert block.shortcut.stride == block.conv1.stride
        assert block(x).shape[1] == 6 // block.conv1.stride


def pool_by_reduce_window(x: jax.Array) -> jax.Array:
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0)))


@pytest.mark.parametrize("shape", [(8, 7), (5, 4), (1, 1)])
def test_max_pool_equals_reduce_window(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    # A permutation: no two values tie, so the gradient is unique.
    x = jnp.asarray(rng.permutation(2 * shape[0] * shape[1] * 3).reshape(2, *shape, 3) - 40.0, jnp.float32)
    weights = jnp.asarray(rng.normal(size=(2, -(-shape[0] // 2), -(-shape[1] // 2), 3)), jnp.float32)

    @jax.jit
    def both(x: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        pulled = [jax.vjp(f, x) for f in (max_pool_3x3, pool_by_reduce_window)]
        return [(value, pull(weights)[0]) for value, pull in pulled]

    (found, gradient), (expected, expected_gradient) = both(x)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-6)


def test_max_pool_gradient_equals_finite_differences() -> None:
    rng = np.random.default_rng(0)
    x = rng.permutation(5 * 6).reshape(1, 5, 6, 1).astype(np.float32)
    weights = rng.normal(size=(1, 3, 3, 1)).astype(np.float32)

    def loss(x: jax.Array) -> jax.Array:
        return jnp.sum(max_pool_3x3(x) * weights)

    gradient = np.asarray(jax.jit(jax.grad(loss))(jnp.asarray(x)))
    steps = np.eye(30, dtype=np.float32).reshape(30, 1, 5, 6, 1) * np.float32(0.25)
    numeric = jax.jit(jax.vmap(lambda d: (loss(x + d) - loss(x - d)) / 0.5))(jnp.asarray(steps))
    np.testing.assert_allclose(gradient.reshape(-1), numeric, atol=1e-4)


def test_pixel_statistics_are_in_the_flavours_channel_order() -> None:
    mean, std = pixel_statistics("msra")
    assert is_bgr("msra") and not is_bgr("torchvision")
    np.testing.assert_allclose(mean, [103.53, 116.28, 123.675], rtol=1e-6)
    np.testing.assert_array_equal(std, np.ones(3))
    mean, std = pixel_statistics("torchvision")
    # ImageNet's statistics of RGB in [0, 1].
    np.testing.assert_allclose(mean, np.array([0.485, 0.456, 0.406]) * 255, rtol=1e-5)
    np.testing.assert_allclose(std, np.array([0.229, 0.224, 0.225]) * 255, rtol=1e-5)


@pytest.mark.parametrize("freeze_at", range(6))
def test_freezing_stops_batch_statistics_too(freeze_at: int) -> None:
    config = BackboneConfig(name="resnet18", norm="batch", freeze_at=freeze_at, width=32)
    backbone = build_backbone(config, FLOAT32, np.random.default_rng(0))
    parts = ("stem", "res2", "res3", "res4", "res5")
    assert backbone.frozen_parts() == parts[:freeze_at]
    for part in parts:
        kinds = {
            type(m) for _, m in nnx.iter_modules(getattr(backbone, part)) if isinstance(m, (FrozenNorm, nnx.BatchNorm))
        }
        assert kinds == {FrozenNorm if part in parts[:freeze_at] else nnx.BatchNorm}
