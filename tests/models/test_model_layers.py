"""Convolutions, norms and initialisers, against NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from querydet_jax.models.layers import (
    Conv,
    Frozen,
    FrozenNorm,
    constant_bias,
    fpn_init,
    make_norm,
    msra_init,
    normal_init,
    torch_bias,
    xavier_normal_init,
    zeros_bias,
)


def conv_by_loops(x: np.ndarray, kernel: np.ndarray, stride: int) -> np.ndarray:
    """Cross-correlation as in torch, with size // 2 zeros on every side."""
    size, pad = kernel.shape[0], kernel.shape[0] // 2
    x = np.pad(np.float64(x), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    height, width = ((n - size) // stride + 1 for n in x.shape[1:3])
    out = np.zeros((len(x), height, width, kernel.shape[3]))
    for y in range(height):
        for i in range(width):
            window = x[:, y * stride : y * stride + size, i * stride : i * stride + size]
            out[:, y, i] = np.einsum("bhwc,hwco->bo", window, kernel)
    return out


@pytest.mark.parametrize(("size", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2), (7, 2)])
@pytest.mark.parametrize("shape", [(8, 6), (7, 5)])
def test_convolution_pads_like_torch(size: int, stride: int, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    conv = Conv(3, 4, size, stride=stride, init=normal_init(1.0), bias=constant_bias(0.5), rng=rng)
    x = rng.normal(size=(2, *shape, 3)).astype(np.float32)
    found = conv(jnp.asarray(x))
    np.testing.assert_allclose(
        found, conv_by_loops(x, np.asarray(conv.kernel[...]), stride) + 0.5, rtol=1e-4, atol=1e-4
    )


def test_convolution_computes_in_its_dtype_and_keeps_float32_parameters() -> None:
    conv = Conv(4, 4, 3, init=msra_init, bias=zeros_bias, dtype=jnp.dtype("bfloat16"), rng=np.random.default_rng(0))
    assert conv(jnp.ones((1, 4, 4, 4))).dtype == jnp.bfloat16
    assert conv.kernel[...].dtype == conv.bias[...].dtype == jnp.float32


def test_only_a_convolution_with_bias_and_without_norm_runs_on_sites() -> None:
    rng = np.random.default_rng(0)
    conv = Conv(4, 8, 3, init=msra_init, bias=constant_bias(2.0), rng=rng)
    kernel, bias = conv.weights()
    np.testing.assert_array_equal(kernel, conv.kernel[...])
    np.testing.assert_array_equal(bias, np.full(8, 2.0))
    for other in (dict(), dict(bias=zeros_bias, norm="frozen")):
        with pytest.raises(ValueError, match="with a bias and without a norm"):
            Conv(4, 8, 3, init=msra_init, rng=rng, **other).weights()


def test_frozen_norm() -> None:
    norm = FrozenNorm(3)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 5, 3)), jnp.float32)
    np.testing.assert_allclose(norm(x), x, rtol=1e-6)  # the variance starts at 1 - 1e-5
    norm.scale[...], norm.bias[...] = jnp.asarray([1.0, 2, 3]), jnp.asarray([0.0, 1, -1])
    norm.mean[...], norm.var[...] = jnp.asarray([0.5, 0, 1]), jnp.asarray([4.0, 0.25, 0])
    expected = (np.asarray(x) - [0.5, 0, 1]) * [1, 2, 3] / np.sqrt(np.array([4, 0.25, 0]) + 1e-5) + [0, 1, -1]
    np.testing.assert_allclose(norm(x), expected, rtol=1e-4, atol=1e-4)
    assert {type(v) for v in jax.tree.leaves(nnx.state(norm), is_leaf=lambda v: isinstance(v, nnx.Variable))} == {
        Frozen
    }
    assert norm(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_batch_norm_updates_statistics_in_training_only() -> None:
    norm = make_norm("batch", 3, jnp.dtype("float32"))
    x = np.random.default_rng(0).normal([5, 0, -2], [1, 2, 3], size=(4, 6, 6, 3)).astype(np.float32)
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    np.testing.assert_allclose(norm(jnp.asarray(x)), x / np.sqrt(1 + 1e-5), rtol=1e-5)  # statistics 0 and 1
    np.testing.assert_array_equal(norm.mean[...], np.zeros(3))
    norm.train()
    np.testing.assert_allclose(norm(jnp.asarray(x)), (x - mean) / np.sqrt(var + 1e-5), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(norm.mean[...], 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * var, rtol=1e-5)
    norm.eval()
    expected = (x - 0.1 * mean) / np.sqrt(0.9 + 0.1 * var + 1e-5)
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norm.mean[...], 0.1 * mean, rtol=1e-5)


def test_group_norm_is_of_each_image_and_the_same_in_both_modes() -> None:
    norm = make_norm("group", 64, jnp.dtype("float32"))
    # Small values, so that epsilon (torch's 1e-5) matters.
    x = np.random.default_rng(0).normal(0, 0.01, (2, 4, 5, 64)).astype(np.float32)
    groups = x.reshape(2, 4, 5, 32, 2).astype(np.float64)
    mean, var = groups.mean((1, 2, 4), keepdims=True), groups.var((1, 2, 4), keepdims=True)
    expected = ((groups - mean) / np.sqrt(var + 1e-5)).reshape(x.shape)
    for mode in (norm.eval, norm.train):
        mode()
        np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=1e-3, atol=1e-4)
    assert not jax.tree.leaves(nnx.state(norm, nnx.BatchStat))


def test_an_unknown_norm_is_an_error() -> None:
    with pytest.raises(ValueError, match="'layer' is not one of frozen, batch, group"):
        make_norm("layer", 32, jnp.dtype("float32"))


@pytest.mark.parametrize(
    ("init", "std", "bound"),
    [
        (msra_init, (2 / (9 * 128)) ** 0.5, None),  # fan_out
        (fpn_init, (1 / (9 * 64)) ** 0.5, (3 / (9 * 64)) ** 0.5),  # fan_in, uniform
        (xavier_normal_init, (2 / (9 * (64 + 128))) ** 0.5, None),
        (normal_init(0.01), 0.01, None),
    ],
)
def test_initialisers(init, std: float, bound: float | None) -> None:
    draws = init(np.random.default_rng(1), (3, 3, 64, 128))
    assert draws.dtype == np.float32 and draws.shape == (3, 3, 64, 128)
    assert draws.std() == pytest.approx(std, rel=0.02)
    assert abs(draws.mean()) < 0.02 * std
    if bound is not None:
        assert 0.99 * bound < np.abs(draws).max() <= bound
    else:
        assert np.abs(draws).max() > 3.5 * std  # normal, not uniform


def test_torch_bias_is_uniform_within_the_fan_in() -> None:
    bias = torch_bias(np.random.default_rng(0), (3, 3, 256, 36))
    assert bias.shape == (36,) and bias.dtype == np.float32
    assert 0.8 / 48 < np.abs(bias).max() <= 1 / 48
