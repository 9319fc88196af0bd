"""CQ and CCQ beside CSQ, and the cap that keeps the best-scoring queries."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sparse_cascade import LADDER, THRESHOLD, make_network, run, starts

from querydet_jax.sparse import SparseOptions, cap_queries, children, grow

DEPTH = 3  # of the deepest stack of the network


@pytest.fixture(scope="module")
def network():
    return make_network()


@pytest.mark.parametrize("name", list(starts()))
def test_ccq_equals_csq_with_all_the_context_a_head_sees(network, name):
    complete = run(network, starts()[name], SparseOptions(THRESHOLD, 0, LADDER, 8, method="ccq"))
    sparse = run(network, starts()[name], SparseOptions(THRESHOLD, DEPTH, LADDER, 8))
    for a, b in zip(complete, sparse, strict=True):
        np.testing.assert_array_equal(a.keys, b.keys)
        for x, y in zip(a.selected, b.selected, strict=True):
            np.testing.assert_allclose(x, y, atol=2e-5, rtol=0)
        assert int(a.stats.active) == a.keys.size and np.all(a.active)


def crop_outputs(features: np.ndarray, stack, b: int, y: int, x: int) -> np.ndarray:
    """One crop through unpadded convolutions, from the definition."""
    depth = len(stack)
    padded = np.pad(features[b].astype(np.float64), ((depth, depth), (depth, depth), (0, 0)))
    crop = padded[y : y + 2 * depth + 1, x : x + 2 * depth + 1]
    for layer, (kernel, bias) in enumerate(stack):
        size = crop.shape[0] - 2
        out = np.zeros((size, size, kernel.shape[-1])) + bias
        for i, j in itertools.product(range(3), range(3)):
            out += crop[i : i + size, j : j + size] @ kernel[i, j].astype(np.float64)
        crop = np.maximum(out, 0) if layer < depth - 1 else out
    return crop[0, 0]


@pytest.mark.parametrize("capacities", [(), LADDER])
def test_cq_is_crops_through_unpadded_convolutions(network, capacities):
    start = starts()["random"]
    results = run(network, start, SparseOptions(THRESHOLD, 2, capacities, 64, method="cq"))
    first = results[0]  # its features are taken as they come
    keys = np.argwhere(np.asarray(first.keys))
    assert 4 <= len(keys) < first.keys.size
    for head, stack in enumerate(network.heads):
        for b, y, x in keys:
            expected = crop_outputs(network.features[0], stack, b, y, x)
            np.testing.assert_allclose(first.selected[1 + head][b, y, x], expected, atol=2e-5, rtol=0)
    assert not any(bool(result.stats.overflowed) for result in results)
    np.testing.assert_array_equal(first.active, grow(first.keys, DEPTH)[-1])


def test_cq_equals_ccq_away_from_the_border(network):
    start = starts()["everything"]
    crops, complete = (
        run(network, start, SparseOptions(THRESHOLD, 2, LADDER, 64, method=method)) for method in ("cq", "ccq")
    )
    inner = (slice(None), slice(DEPTH, -DEPTH), slice(DEPTH, -DEPTH))
    compared = 0
    for a, b in zip(crops[1:], complete[1:], strict=True):  # the first level is too small to have an inside
        both = np.asarray(a.keys & b.keys)[inner]
        for x, y in zip(a.selected[1:], b.selected[1:], strict=True):
            np.testing.assert_allclose(np.asarray(x)[inner][both], np.asarray(y)[inner][both], atol=2e-5, rtol=0)
        compared += both.sum()
    assert compared > 50


@pytest.mark.parametrize("method", ["cq", "ccq"])
@pytest.mark.parametrize("name", ["nothing", "one cell", "the corner that sticks out"])
def test_few_or_no_queries(network, method, name):
    results = run(network, starts()[name], SparseOptions(THRESHOLD, 2, LADDER, 64, method=method))
    assert int(results[0].stats.queries) == (0 if name == "nothing" else 1)
    assert all(np.isfinite(x).all() for result in results for x in result.selected)


def active_count(mask: np.ndarray, shape: tuple[int, int], context: int) -> int:
    return int(np.sum(grow(children(jnp.asarray(mask), shape), context)[-1]))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("capacity", [0, 20, 90, 100_000])
def test_cap_keeps_as_many_of_the_best_as_fit(seed, capacity):
    rng = np.random.default_rng(seed)
    shape, context = (18, 25), 2  # the coarser map sticks out by one column
    logits = rng.normal(size=(2, 9, 13)).astype(np.float32)
    if seed % 2:
        logits = np.round(logits, 1)  # ties
    fired = logits > 0.8

    def needed(queries):
        return jnp.sum(grow(children(queries, shape), context)[-1].astype(jnp.int32))

    kept, over = jax.jit(lambda x, f: cap_queries(x, f, needed, capacity))(logits, fired)
    kept = np.asarray(kept)
    assert not np.any(kept & ~fired)
    assert bool(over) == (active_count(fired, shape, context) > capacity)
    if not over:
        np.testing.assert_array_equal(kept, fired)
        return
    assert active_count(kept, shape, context) <= capacity
    left = fired & ~kept
    best_left = logits[left].max()
    assert not kept.any() or logits[kept].min() > best_left
    assert active_count(fired & (logits >= best_left), shape, context) > capacity  # the next would not fit


def test_capped_cascade_reports_what_it_left_out(network):
    start = starts()["random, more"]
    capped = run(network, start, SparseOptions(THRESHOLD, 1, (0.4,), 8, overflow="cap"))
    free = run(network, start, SparseOptions(THRESHOLD, 1, (0.4,), 8))
    assert bool(free[0].stats.overflowed) and bool(capped[0].stats.overflowed)
    assert int(capped[0].stats.queries) == int(free[0].stats.queries)
    assert 0 < int(capped[0].stats.keys) < int(free[0].stats.keys)
    assert int(capped[0].stats.active) <= int(capped[0].stats.capacity)
    roomy = run(network, start, SparseOptions(THRESHOLD, 1, (1.0,), 8, overflow="cap"))
    for a, b in zip(roomy, free, strict=True):
        np.testing.assert_array_equal(a.keys, b.keys)
        assert not bool(a.stats.overflowed)
