"""Weights prepared once, layouts chosen by the compiler and options for a GPU: the detections stay the same."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_detector import BASE, MODEL, model, pictures, randomize

from querydet_jax.config import override
from querydet_jax.inference import compiling
from querydet_jax.inference.detector import Detector
from querydet_jax.models import DenseDetector, build_model


def in_bfloat16() -> DenseDetector:
    return randomize(build_model(override(MODEL, {"dtype": "bfloat16"}), seed=0), seed=16)


SIZES = ((64, 96), (96, 64))


def other() -> DenseDetector:
    return randomize(nnx.clone(model()), seed=3)


def assert_equal(found, expected) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), found, expected)


@pytest.mark.parametrize("query", ["dense", "csq"])
def test_kernels_are_cast_once_and_detections_are_those_of_float32_weights(query):
    detector, images = Detector(in_bfloat16(), override(BASE, {"query": query})), pictures(1, 64, 96)
    text = detector.lower(images.shape[:3]).as_text()
    arguments = text[text.index("@main") :].split(" -> ")[0]
    kernels = re.findall(r"tensor<\d+x\d+x\d+x\d+x(\w+)>", arguments)
    assert set(kernels) == {"bf16", "ui8"}  # nothing that the program would have to cast; ui8 are the pictures
    function, state = detector.function()
    expected = jax.jit(function)(state, images, jnp.array([[64, 96]], jnp.int32))
    assert np.asarray(expected.valid).any()
    assert_equal(detector(images), expected)


def test_exports_and_biases_keep_their_weights():
    kernels = {x.dtype for x in jax.tree.leaves(Detector(in_bfloat16(), BASE).function()[1])}
    assert kernels == {jnp.dtype("float32")}
    shapes = nnx.state(nnx.eval_shape(in_bfloat16))
    cast = compiling.cast_kernels(shapes, jnp.dtype("bfloat16"))
    kinds = {
        (str(path[-2].key if hasattr(path[-2], "key") else path[-1].key), str(x.dtype))
        for path, x in jax.tree_util.tree_leaves_with_path(cast)
    }
    assert ("kernel", "bfloat16") in kinds and ("kernel", "float32") not in kinds and ("bias", "float32") in kinds


def test_layouts_of_the_compiler_give_the_same_detections(monkeypatch):
    expected = [Detector(m, BASE)(pictures(1, *size)) for m in (model(), other()) for size in SIZES]
    monkeypatch.setattr(compiling, "on_gpu", lambda: True)
    detector = Detector(model(), BASE)
    for size, detections in zip(SIZES, expected[:2], strict=True):
        assert_equal(detector(pictures(1, *size)), detections)
    assert detector.compilations() == 2
    detector.update(other())
    for size, detections in zip(SIZES, expected[2:], strict=True):
        assert_equal(detector(pictures(1, *size)), detections)
    assert detector.compilations() == 2
    assert detector.trace(pictures(1, *SIZES[0])).keys


def test_options_are_those_of_jax_0_12(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    assert compiling.compiler_options("plain") == {}
    tuned, graph = (compiling.compiler_options(mode) for mode in ("tuned", "graph"))
    assert str(tuned["xla_gpu_enable_command_buffer"]).endswith(",WHILE")
    assert graph == {**tuned, "xla_gpu_experimental_enable_conv_fusion": True}
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    assert compiling.compiler_options("graph") == {}  # its XLA would not know them


@pytest.mark.skipif(jax.__version_info__[:2] != (0, 12), reason="jax 0.12 alone knows the options")
@pytest.mark.parametrize("mode", ["tuned", "graph"])
def test_xla_knows_the_options(mode):
    program = jax.jit(lambda x: x + 1, compiler_options=compiling.compiler_options(mode))
    assert program(1) == 2
