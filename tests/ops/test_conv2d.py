"""Convolution: the kernel gradient in blocks of rows against XLA's."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from querydet_jax.ops import conv2d


@pytest.mark.parametrize(
    ("size", "stride", "padding", "shape"),
    [
        (3, 1, [(1, 1), (1, 1)], (2, 12, 7)),  # blocks of four rows
        (3, 1, [(1, 1), (1, 1)], (1, 11, 7)),  # a prime number of rows: one per block
        (3, 2, [(1, 1), (1, 1)], (2, 13, 10)),
        (3, 2, [(0, 1), (0, 1)], (1, 12, 8)),  # TensorFlow's padding
        (7, 2, [(3, 3), (3, 3)], (2, 16, 18)),  # a ResNet's stem
        (3, 1, [(0, 0), (0, 0)], (1, 6, 40)),  # a row is more than a block
    ],
)
def test_gradients(size, stride, padding, shape, monkeypatch):
    for name, value in {"_BLOCK": 30, "_CELLS": 1, "_CHANNELS": 1}.items():
        monkeypatch.setattr(conv2d, name, value)
    rng = np.random.default_rng(size)
    x = jnp.asarray(rng.normal(size=(*shape, 5)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(size, size, 5, 4)), jnp.float32)

    def plain(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def ours(x, kernel):
        return conv2d.conv2d(x, kernel, stride, padding)

    expected, pull = jax.vjp(plain, x, kernel)
    found, our_pull = jax.vjp(ours, x, kernel)
    np.testing.assert_array_equal(found, expected)
    g = jnp.asarray(rng.normal(size=expected.shape), jnp.float32)
    (to_x, to_kernel), (expected_x, expected_kernel) = our_pull(g), pull(g)
    np.testing.assert_array_equal(to_x, expected_x)
    np.testing.assert_allclose(to_kernel, expected_kernel, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_summed_in_float32(monkeypatch):
    """A thousand cells of ones: in bfloat16 the sum would stop at 256."""
    monkeypatch.setattr(conv2d, "_CELLS", 1)
    monkeypatch.setattr(conv2d, "_CHANNELS", 1)
    x, kernel = jnp.ones((1, 32, 32, 1), jnp.bfloat16), jnp.zeros((1, 1, 1, 1), jnp.bfloat16)
    _, pull = jax.vjp(lambda kernel: conv2d.conv2d(x, kernel, 1, [(0, 0), (0, 0)]), kernel)
    (gradient,) = pull(jnp.ones((1, 32, 32, 1), jnp.bfloat16))
    assert gradient.dtype == jnp.bfloat16 and float(gradient.reshape(())) == 1024


def test_large_maps_take_blocks_and_small_ones_do_not():
    """The program of a large map contains the loop over blocks, that of a small one does not."""

    def loops(side: int, channels: int) -> int:
        x, kernel = jnp.zeros((1, side, side, channels)), jnp.zeros((3, 3, channels, 4))
        gradient = jax.grad(lambda kernel: conv2d.conv2d(x, kernel, 1, [(1, 1), (1, 1)]).sum())
        return jax.jit(gradient).lower(kernel).as_text().count("stablehlo.while")

    assert (loops(32, 16), loops(31, 16), loops(32, 3)) == (1, 0, 0)


@pytest.mark.parametrize(
    ("size", "padding", "shape"),
    [
        (3, [(1, 1), (1, 1)], (2, 12, 7)),
        (3, [(0, 1), (1, 0)], (1, 6, 9)),
        (5, [(2, 2), (2, 2)], (2, 5, 8)),
    ],
)
def test_bfloat16_by_rows(size, padding, shape, monkeypatch):
    """Integers of a few bits are exact in bfloat16, and so are their sums in float32: nothing may differ."""
    monkeypatch.setattr(conv2d, "_CHANNELS", 1)
    rng = np.random.default_rng(size)
    x = jnp.asarray(rng.integers(-2, 3, (*shape, 4)), jnp.bfloat16)
    kernel = jnp.asarray(rng.integers(-1, 2, (size, size, 4, 6)), jnp.bfloat16)

    def ours(x, kernel):
        return conv2d.conv2d(x, kernel, 1, padding)

    def by_xla(x, kernel):
        return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    expected, pull = jax.vjp(by_xla, x.astype(jnp.float32), kernel.astype(jnp.float32))
    g = jnp.asarray(rng.integers(-1, 2, expected.shape), jnp.bfloat16)
    for cells, loops in ((1, 3), (10**6, 0)):
        monkeypatch.setattr(conv2d, "_BF16_CELLS", cells)
        found, our_pull = jax.vjp(ours, x, kernel)
        text = jax.jit(lambda x, kernel, g: jax.vjp(ours, x, kernel)[1](g)).lower(x, kernel, g).as_text()
        assert bool(text.count("stablehlo.while")) == bool(loops)
        for a, b in zip((found, *our_pull(g)), (expected, *pull(g.astype(jnp.float32))), strict=True):
            assert a.dtype == jnp.bfloat16
            np.testing.assert_array_equal(a.astype(jnp.float32), b.astype(jnp.bfloat16).astype(jnp.float32))


@pytest.mark.parametrize("cells", [1, 10**6])
def test_sums_stay_in_float32(cells, monkeypatch):
    """By rows and by XLA: sums of small integers are exact, and bfloat16 would round those above 256."""
    monkeypatch.setattr(conv2d, "_BF16_CELLS", cells)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(0, 8, (2, 12, 7, 16)), jnp.bfloat16)
    kernel = jnp.asarray(rng.integers(0, 5, (3, 3, 16, 6)), jnp.bfloat16)
    padding = [(1, 1), (1, 1)]
    found = jax.jit(lambda x, kernel: conv2d.conv2d_sums(x, kernel, padding))(x, kernel)
    expected = conv2d._plain(1, padding, x.astype(jnp.float32), kernel.astype(jnp.float32))
    assert found.dtype == jnp.float32 and np.any(expected != expected.astype(jnp.bfloat16))
    np.testing.assert_array_equal(found, expected)


def test_a_gpu_convolves_in_bfloat16_and_a_tpu_sums_in_float32():
    x, kernel = jnp.zeros((1, 32, 32, 16), jnp.bfloat16), jnp.zeros((3, 3, 16, 8), jnp.bfloat16)

    def outputs(platform: str) -> list[str]:
        traced = jax.jit(lambda x, kernel: conv2d.conv2d_sums(x, kernel, [(1, 1), (1, 1)])).trace(x, kernel)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        return re.findall(r"stablehlo.convolution.*-> tensor<.*x(\w+)>", text)

    assert (outputs("cuda"), outputs("tpu"), outputs("cpu")) == (["bf16"], ["f32"], [])


FIRST_LAYERS = [(7, ((3, 3), (3, 3))), (3, ((1, 1), (1, 1))), (3, ((0, 1), (1, 1))), (4, ((1, 2), (0, 3)))]


@pytest.mark.parametrize(("size", "padding"), FIRST_LAYERS)
@pytest.mark.parametrize("shape", [(16, 18), (15, 18), (17, 13)])
def test_by_phases(size, padding, shape):
    """Values and both gradients of a first layer, on even and odd sizes."""
    rng = np.random.default_rng(size)
    x = jnp.asarray(rng.normal(size=(2, *shape, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(size, size, 3, 8)), jnp.float32)

    @jax.jit
    def both(x, kernel, g):
        ways = (conv2d.conv2d_by_phases, lambda x, kernel, padding: conv2d._plain(2, padding, x, kernel))
        pulled = [jax.vjp(lambda x, kernel, way=way: way(x, kernel, padding), x, kernel) for way in ways]
        return [(y, *pull(g)) for y, pull in pulled]

    output = jax.eval_shape(lambda: conv2d.conv2d(x, kernel, 2, padding))
    found, expected = both(x, kernel, jnp.asarray(rng.normal(size=output.shape), jnp.float32))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-5)


def test_a_tpu_convolves_pictures_by_phases():
    """Only there, only pictures, and only with stride 2; by how the convolution is lowered."""

    def lowered(channels: int, stride: int, platform: str) -> str:
        x, kernel = jnp.zeros((1, 32, 32, channels)), jnp.zeros((7, 7, channels, 8))
        convolve = jax.jit(lambda x, kernel: conv2d.conv2d(x, kernel, stride, [(3, 3), (3, 3)]))
        return convolve.trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()

    assert "tensor<4x4x12x8xf32>" in lowered(3, 2, "tpu")
    for channels, stride, platform in ((3, 2, "cpu"), (3, 2, "cuda"), (3, 1, "tpu"), (8, 2, "tpu")):
        text = lowered(channels, stride, platform)
        assert "stablehlo.convolution" in text and "tensor<4x4x" not in text
