"""The cascade of three levels against the same thing written from its definition in NumPy."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import cascade_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from querydet_jax.sparse import CascadeLevel, Cells, Conv, LevelResult, SparseOptions, cascade, ladder_capacities

CHANNELS = 8
START = (2, 3, 4)
SHAPES = ((5, 7), (10, 14), (20, 28))  # the first is odd: parents stick out
THRESHOLD = 0.4
LADDER = (0.1, 0.5)


class Network(NamedTuple):
    """Random features and weights; the first level's features are taken as they come."""

    features: list[np.ndarray]
    outputs: list[Conv | None]
    heads: list[list[Conv]]
    query: list[Conv]

    def with_query_bias(self, bias: float) -> Network:
        last = self.query[-1]
        return self._replace(query=[*self.query[:-1], Conv(last.kernel, np.full((1,), bias, np.float32))])

    def oracle(self, start: np.ndarray, context: int, threshold: float = THRESHOLD) -> list[cascade_oracle.Level]:
        features = [
            x if conv is None else cascade_oracle.conv3x3(x, *conv)
            for x, conv in zip(self.features, self.outputs, strict=True)
        ]
        return cascade_oracle.cascade(start, features, self.heads, self.query, threshold=threshold, context=context)


def make_network(seed: int = 0) -> Network:
    rng = np.random.default_rng(seed)

    def conv(inputs: int, outputs: int, gain: float = 2.0) -> Conv:
        return Conv(
            rng.normal(0, np.sqrt(gain / (9 * inputs)), (3, 3, inputs, outputs)).astype(np.float32),
            rng.normal(0, 0.3, outputs).astype(np.float32),
        )

    features = [rng.normal(size=(START[0], *shape, CHANNELS)).astype(np.float32) for shape in SHAPES]
    outputs = [None, conv(CHANNELS, CHANNELS, 1.0), conv(CHANNELS, CHANNELS, 1.0)]
    heads = [
        [conv(CHANNELS, CHANNELS), conv(CHANNELS, CHANNELS), conv(CHANNELS, 6)],
        [conv(CHANNELS, CHANNELS), conv(CHANNELS, 5)],
    ]
    query = [conv(CHANNELS, CHANNELS), conv(CHANNELS, CHANNELS), conv(CHANNELS, 1, 8.0)]
    return Network(features, outputs, heads, query)


def on_the_map(level: int, outputs: list[Any], cells: Cells) -> list[Any]:
    """A ``select`` that shows all it was given: outputs at the keys, put back on a map of zeros."""
    return [jnp.full((), level), *(cells.key_map(y, 0.0) for y in outputs)]


@functools.cache
def compiled(options: SparseOptions):
    @jax.jit
    def run(start, features, outputs, heads, query):
        levels = [CascadeLevel(4 - i, x, conv) for i, (x, conv) in enumerate(zip(features, outputs, strict=True))]
        return cascade(start, levels, heads, query, on_the_map, options)

    return run


def run(network: Network, start: np.ndarray, options: SparseOptions) -> list[LevelResult]:
    return compiled(options)(start, *network)


def starts() -> dict[str, np.ndarray]:
    """Query logits of the start level; a logit of -0.4 is just below the threshold."""
    rng = np.random.default_rng(3)
    low = np.full(START, -4.0, np.float32)
    corner, middle, one_image = low.copy(), low.copy(), low.copy()
    corner[1, -1, -1] = 1.0
    middle[0, 1, 1] = 1.0
    one_image[1] = 1.0
    return {
        "nothing": low,
        "everything": -low,
        "the corner that sticks out": corner,
        "one cell": middle,
        "one image": one_image,
        "random": rng.normal(-1.5, 1.0, START).astype(np.float32),
        "random, more": rng.normal(0.0, 1.0, START).astype(np.float32),
    }


def check(network: Network, start: np.ndarray, options: SparseOptions) -> list[LevelResult]:
    results = run(network, start, options)
    expected = network.oracle(start, options.context)
    assert len(results) == len(SHAPES)
    for i, (result, level) in enumerate(zip(results, expected, strict=True)):
        np.testing.assert_array_equal(result.keys, level.keys)
        np.testing.assert_array_equal(result.active, level.active)

        stats = result.stats
        counts = [int(stats.queries), int(stats.keys), int(stats.active)]
        assert counts == [level.fired.sum(), level.keys.sum(), level.active.sum()]
        capacities, _ = ladder_capacities(options.capacities, level.keys.size, options.chunk)
        fitting = [capacity for capacity in capacities if capacity >= level.active.sum()]
        assert int(stats.capacity) == (fitting[0] if fitting else 0)
        assert bool(stats.overflowed) == (not fitting)
        assert all(x.shape == () for x in stats) and stats.overflowed.dtype == bool
        assert all(x.dtype == jnp.int32 for x in stats[:4])

        number, *maps = result.selected
        assert int(number) == 4 - i
        for y, reference in zip(maps, level.outputs, strict=True):
            shown = np.where(level.keys[..., None], reference, 0.0)
            np.testing.assert_allclose(y, shown, rtol=0, atol=2e-5)
        if level.query is None:
            assert result.query_logits is None and i == len(SHAPES) - 1
        else:
            assert result.query_logits.shape == level.keys.shape and result.query_logits.dtype == jnp.float32
            np.testing.assert_array_equal(np.isneginf(result.query_logits), ~level.keys)
            np.testing.assert_allclose(
                np.asarray(result.query_logits)[level.keys], level.query[level.keys], rtol=0, atol=2e-5
            )
    return results


@pytest.mark.parametrize(("context", "capacities", "chunk"), [(2, LADDER, 8), (2, (), 8), (0, (1.0,), 256)])
def test_cascade_against_the_definition(context, capacities, chunk):
    options = SparseOptions(THRESHOLD, context, capacities, chunk)
    rungs = set()
    for seed in (0, 1):
        for start in starts().values():
            results = check(make_network(seed), start, options)
            rungs |= {(i, int(result.stats.capacity)) for i, result in enumerate(results)}
    if capacities == LADDER:  # each level has run in each of its buffers and densely, or this shows little
        assert len(rungs) == 9


def test_the_rung_does_not_change_the_result():
    network, start = make_network(), starts()["one cell"]
    ladder, dense = (run(network, start, SparseOptions(THRESHOLD, 2, capacities, 8)) for capacities in (LADDER, ()))
    assert all(int(result.stats.capacity) > 0 for result in ladder)
    for one, other in zip(ladder, dense, strict=True):
        np.testing.assert_array_equal(one.keys, other.keys)
        np.testing.assert_array_equal(one.active, other.active)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), one.selected, other.selected)


@pytest.mark.parametrize("capacities", [LADDER, ()])
def test_a_level_without_queries_ends_the_cascade(capacities):
    options = SparseOptions(THRESHOLD, 2, capacities, 8)
    # Queries on the start level, none on any finer one.
    first, *finer = check(make_network().with_query_bias(-50.0), starts()["everything"], options)
    assert int(first.stats.queries) == 24 and bool(first.keys.all())
    for result in finer:
        assert [int(x) for x in result.stats[:3]] == [0, 0, 0]
        assert not any(np.asarray(y).any() for y in result.selected[1:])
    # None at all: even though the query head would fire everywhere.
    for result in check(make_network().with_query_bias(50.0), starts()["nothing"], options):
        assert [int(x) for x in result.stats[:3]] == [0, 0, 0]
        if result.query_logits is not None:
            assert np.isneginf(result.query_logits).all()


@pytest.mark.parametrize("capacities", [LADDER, ()])
def test_when_all_fire_every_cell_is_a_key(capacities):
    options = SparseOptions(THRESHOLD, 2, capacities, 8)
    for result in check(make_network().with_query_bias(50.0), starts()["everything"], options):
        assert bool(result.keys.all()) and bool(result.stats.overflowed)


def silent_query(network: Network, bias: float) -> Network:
    """A query head that answers ``bias`` everywhere, exactly."""
    return network._replace(
        query=[Conv(np.zeros_like(conv.kernel), np.full_like(conv.bias, bias)) for conv in network.query]
    )


@pytest.mark.parametrize(
    ("logit", "threshold", "fires"),
    [(0.0, 0.5, False), (0.0, 0.4999999, True), (60.0, 1.0, False), (-200.0, 0.0, False), (-20.0, 0.0, True)],
)
def test_the_threshold_is_strict(logit, threshold, fires):
    """A probability exactly equal to sigma is no query, on the start level and on a sparse one."""
    network = silent_query(make_network(), logit)
    options = SparseOptions(threshold, 0, (), 8)
    first, second, third = run(network, np.full(START, logit, np.float32), options)
    assert int(first.stats.queries) == (24 if fires else 0)
    assert bool(first.keys.all()) == bool(third.keys.all()) == fires
    # On the sparse levels, from a start that fires.
    if threshold < 1:
        first, second, third = run(network, np.full(START, 100.0, np.float32), options)
        assert int(first.stats.keys) == 2 * 5 * 7
        assert int(second.stats.queries) == (2 * 5 * 7 if fires else 0)
        assert int(third.stats.queries) == (2 * 10 * 14 if fires else 0)


def test_outputs_of_a_later_level_do_not_depend_on_cells_never_queried():
    """Strictly a cascade: features under dead queries change nothing."""
    network, start = make_network(), starts()["one cell"]
    options = SparseOptions(THRESHOLD, 2, LADDER, 8)
    before = run(network, start, options)
    rng = np.random.default_rng(9)
    features = []
    for x, level in zip(network.features, network.oracle(start, 2), strict=True):
        # The pyramid's own convolution reads one cell further than the heads.
        far = ~cascade_oracle.squares(level.active, 1)
        features.append(np.where(far[..., None], rng.normal(size=x.shape), x).astype(np.float32))
    assert any((a != b).any() for a, b in zip(features, network.features, strict=True))
    after = run(network._replace(features=features), start, options)
    jax.tree.map(np.testing.assert_array_equal, before, after)
