"""What is written to ONNX files so that runtimes are fast: layouts, loops of as many turns as needed. Same results."""

from __future__ import annotations

import importlib
import importlib.util
from collections import Counter
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from querydet_jax.inference.export.onnx_graph import Builder
from querydet_jax.inference.export.onnx_operators import translate_closed
from querydet_jax.sparse.conv import Conv, conv_rows, pointwise, rows_or_zeros

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnx", "onnxruntime"))), reason="pip install -r requirements-onnx.txt"
)
RANDOM = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape, np.float32)


def translated(function: Any, *inputs: Any, image: bool = False) -> tuple[list[np.ndarray], Counter[str], Any]:
    """Run a function in ONNX Runtime; return its outputs, the number of nodes by operator, and the graph.

    Args:
      image: whether the first input is ``[B, H, W, C]``.
    """
    b = Builder()
    given = [b.input(x.shape, x.dtype, f"x{i}") for i, x in enumerate(inputs)]
    if image:
        given[0] = b.in_layout(given[0], (0, 3, 1, 2))
    traced = jax.make_jaxpr(function)(*inputs)
    b.outputs(translate_closed(b, traced, given), [f"y{i}" for i in range(len(traced.out_avals))])
    model = b.model({}, "test")
    importlib.import_module("onnx").checker.check_model(model, full_check=True)
    runtime = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(
        None, {x.name: np.asarray(value) for x, value in zip(session.get_inputs(), inputs, strict=True)}
    )
    return found, operators(model.graph), model.graph


def operators(graph: Any) -> Counter[str]:
    """Count the nodes that depend on inputs by operator, those of inner graphs included."""
    fixed, counts = {x.name for x in graph.initializer}, Counter()
    for node in graph.node:
        if node.input and fixed.issuperset(node.input):
            fixed.update(node.output)
            continue
        counts[node.op_type] += 1
        for attribute in node.attribute:
            counts += operators(attribute.g) if attribute.HasField("g") else Counter()
    return counts


def scale(x: Any, factors: np.ndarray) -> Any:
    return x * factors[None, None, None]


def test_a_network_is_convolutions_in_one_layout():
    """Norm, ReLU6, 1x1 convolution of every other cell, residual, upsampling and mask stay as ONNX's Conv leaves them.

    Two transposes are left: of the image, and of the result.
    """
    first, second, third = normal(3, 3, 3, 8), normal(8, 6), normal(8, 6)

    def network(x: Any, mask: Any) -> Any:
        x = jnp.pad(x, ((0, 0), (0, 2), (0, 0), (0, 0)))
        x = lax.conv_general_dilated(x, first, (1, 1), [(1, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.nn.relu6(scale(x, np.arange(8, dtype=np.float32)))
        x = jnp.where(mask[..., None], x, 0)
        y = jnp.dot(x[:, ::2, ::2], second) + scale(jnp.dot(x[:, ::2, ::2], third), np.full(6, 2, np.float32))
        return jnp.dot(x, second) + jnp.repeat(jnp.repeat(y, 2, axis=1), 2, axis=2)

    x, mask = normal(2, 6, 10, 3), RANDOM.random((2, 8, 10)) < 0.5
    (found,), counts, _ = translated(network, x, mask, image=True)
    np.testing.assert_allclose(found, jax.jit(network)(x, mask), rtol=1e-5, atol=1e-5)
    assert counts["Transpose"] == 2 and counts["Clip"] == 1 and counts["Resize"] == 2, counts
    assert counts["Conv"] == 4 and not counts["MatMul"] and not counts["Slice"] and not counts["Relu"], counts


def test_a_slice_that_no_stride_replaces_stays():
    weights = normal(3, 4)
    x = normal(1, 6, 7, 3)
    for cut in (np.s_[:, 1::2, ::2], np.s_[:, :4:2, ::2], np.s_[:, ::2, :, :]):
        (found,), _, _ = translated(lambda x, cut=cut: jnp.dot(jax.nn.relu(x)[cut], weights), x, image=True)
        np.testing.assert_allclose(found, np.maximum(x, 0)[cut] @ weights, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("axis", "number"), [(1, 2), (2, 3), (2, 6), (3, 2)])
def test_repeated_entries_are_upsampled_pixels_and_nothing_else(axis, number):
    """Reshapes that join other axes, or tile instead of repeat, are no upsampling."""
    x, filters = normal(2, 4, 6, 2), normal(2, 2)

    def repeated(x: Any) -> Any:
        return jnp.repeat(jnp.dot(x, filters), number, axis=axis)

    def tiled(x: Any) -> Any:
        shape = list(x.shape)
        return jnp.broadcast_to(jnp.expand_dims(x, axis), (*shape[:axis], number, *shape[axis:])).reshape(
            *shape[:axis], number * shape[axis], *shape[axis + 1 :]
        )

    for function in (repeated, tiled):
        (found,), counts, _ = translated(function, x, image=True)
        np.testing.assert_allclose(found, jax.jit(function)(x), rtol=1e-5, atol=1e-5)
        assert counts["Resize"] == (function is repeated), counts


@pytest.mark.parametrize("count", [0, 1, 8, 9, 24])
def test_rows_are_computed_in_as_many_turns_as_needed(count):
    """And what no turn changes stands before the loop. Rows that were asked for are those of jax."""
    rows, table = normal(24, 4), RANDOM.integers(0, 25, (24, 9)).astype(np.int32)
    convs = [Conv(normal(3, 3, 4, outputs), normal(outputs)) for outputs in (5, 2)]

    def function(rows: Any, table: Any, count: Any) -> Any:
        return conv_rows(rows, table, convs, count, relu=True, chunk=8)

    inputs = (rows, table, np.int32(count))
    found, counts, graph = translated(function, *inputs)
    (loop,) = (node for node in graph.node if node.op_type == "Loop")
    assert counts["Loop"] == 1 and counts["MatMul"] == 2 and counts["Concat"] >= 1, counts
    assert "Concat" not in {node.op_type for node in loop.attribute[0].g.node}  # the row of zeros
    for y, expected in zip(found, jax.jit(function)(*inputs), strict=True):
        assert y.shape == expected.shape
        np.testing.assert_allclose(y[:count], expected[:count], rtol=1e-5, atol=1e-5)
        done = 8 * max(-(-count // 8), 1)
        assert not y[done:].any()


@pytest.mark.parametrize("number", [2, 40])
def test_rows_out_of_bounds_read_the_fill_value(number):
    """Many by a further row of it, few by a choice."""
    rows, index = normal(10, 3), RANDOM.integers(-3, 14, number).astype(np.int32)
    index[:2] = 10, 3
    (found,), counts, _ = translated(rows_or_zeros, rows, index)
    np.testing.assert_array_equal(found, jax.jit(rows_or_zeros)(rows, index))
    assert ("Concat" in counts) == (number == 40), counts


def test_pointwise_on_rows_stays_a_product():
    conv = Conv(normal(1, 1, 3, 4), normal(4))
    x = normal(5, 3)
    (found,), counts, _ = translated(partial(pointwise, conv=conv), x)
    np.testing.assert_allclose(found, pointwise(x, conv), rtol=1e-5, atol=1e-5)
    assert counts["MatMul"] == 1 and not counts["Conv"], counts
