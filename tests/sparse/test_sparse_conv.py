"""Convolution on sites equals the masked dense convolution at the keys."""

from __future__ import annotations

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cascade_oracle import conv3x3, run_stack, squares
from hypothesis.extra.numpy import arrays

from querydet_jax.sparse import (
    Conv,
    conv_rows,
    grow,
    ladder_capacities,
    masked_dense_stacks,
    neighbour_table,
    run_stacks,
    select_sites,
)
from querydet_jax.sparse.conv import beside_a_row_of_zeros, dense_conv, filled_with_zeros, rows_or_zeros
from querydet_jax.sparse.sites import cell_table

HEIGHT, WIDTH, CHANNELS = 6, 7, 4


@functools.cache
def stacks(*depths: int, seed: int = 0) -> tuple[tuple[Conv, ...], ...]:
    """A stack of each depth, 4 channels inside, 3, 4, 5, .. out, biases that an absent cell must not add."""
    rng = np.random.default_rng(seed)
    found = []
    for i, depth in enumerate(depths):
        sizes = [CHANNELS] * depth + [3 + i]
        found.append(
            tuple(
                Conv(
                    rng.normal(0, np.sqrt(2 / (9 * a)), (3, 3, a, b)).astype(np.float32),
                    rng.normal(0, 0.5, b).astype(np.float32),
                )
                for a, b in zip(sizes, sizes[1:], strict=False)
            )
        )
    return tuple(found)


DEPTHS = (1, 3, 3)  # different, and two that share their first gather
FIVE = (5, 5)  # the published heads


@functools.cache
def on_sites(context: int, capacity: int, chunk: int, depths: tuple[int, ...], dtype=jnp.float32):
    """Compiled: features and keys to (outputs a stack [N, O], index, counts)."""

    @jax.jit
    def run(features, keys):
        sites = select_sites(grow(keys, context), capacity)
        rows = features.astype(dtype).reshape(-1, CHANNELS).at[sites.index].get(mode="fill", fill_value=0)
        return run_stacks(rows, neighbour_table(sites), sites, stacks(*depths), chunk=chunk), sites.index, sites.counts

    return run


def at_keys(context, capacity, chunk, depths, features, keys, dtype=jnp.float32) -> list[np.ndarray]:
    """Outputs ``[number of keys, O]`` a stack, in map order."""
    outputs, index, counts = on_sites(context, capacity, chunk, depths, dtype)(features, keys)
    assert int(counts[-1]) <= capacity
    np.testing.assert_array_equal(index[: int(counts[0])], np.flatnonzero(keys))
    assert all(y.dtype == jnp.float32 and y.shape[0] == capacity for y in outputs)
    return [np.asarray(y)[: int(counts[0])] for y in outputs]


masked_dense = jax.jit(masked_dense_stacks)


def make_features(batch: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(batch, HEIGHT, WIDTH, CHANNELS)).astype(np.float32)


def key_masks(batch: int) -> dict[str, np.ndarray]:
    y, x = np.indices((HEIGHT, WIDTH))
    full = np.ones((batch, HEIGHT, WIDTH), bool)
    rng = np.random.default_rng(batch)
    found = {
        "empty": ~full,
        "full": full,
        "checkerboard": full & ((y + x) % 2 == 0),
        "border": full & ((y % (HEIGHT - 1) == 0) | (x % (WIDTH - 1) == 0)),
        "corners": full & (y % (HEIGHT - 1) == 0) & (x % (WIDTH - 1) == 0),
        "one cell": full & (y == 3) & (x == 2) & (np.arange(batch) == 0)[:, None, None],
        "one image": full & (np.arange(batch) == batch - 1)[:, None, None],
    }
    for density in (0.02, 0.05, 0.2, 0.5):
        found[f"random {density}"] = rng.random(full.shape) < density
    return found


def sparse_sizes(batch: int, chunk: int) -> tuple[int, int]:
    (capacity,), chunk = ladder_capacities((1.0,), batch * HEIGHT * WIDTH, chunk)
    return capacity, chunk


@pytest.mark.parametrize(
    ("batch", "context", "chunk"),
    [(1, 0, 5), (2, 1, 10), (2, 2, 8), (2, 3, 1000), (2, 4, 1), (3, 5, 12)],
)
def test_sites_equal_masked_dense_at_the_keys(batch, context, chunk):
    features = make_features(batch)
    capacity, chunk = sparse_sizes(batch, chunk)
    for name, keys in key_masks(batch).items():
        active = squares(keys, context)
        np.testing.assert_array_equal(grow(keys, context)[-1], active)
        dense = masked_dense(features, active, stacks(*DEPTHS))
        sparse = at_keys(context, capacity, chunk, DEPTHS, features, keys)
        for convs, on_map, y in zip(stacks(*DEPTHS), dense, sparse, strict=True):
            expected = run_stack(features, convs, active)
            np.testing.assert_allclose(on_map, expected, rtol=0, atol=1e-5, err_msg=name)
            np.testing.assert_allclose(y, np.asarray(on_map)[keys], rtol=0, atol=1e-5, err_msg=name)
            np.testing.assert_allclose(y, expected[keys], rtol=0, atol=1e-5, err_msg=name)


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True, database=None)
@hypothesis.given(keys=arrays(bool, (2, HEIGHT, WIDTH)), seed=hypothesis.strategies.integers(0, 2**16))
def test_any_keys(keys, seed):
    features = make_features(2, seed)
    capacity, chunk = sparse_sizes(2, 8)
    for y, convs in zip(at_keys(2, capacity, chunk, DEPTHS, features, keys), stacks(*DEPTHS), strict=True):
        np.testing.assert_allclose(y, run_stack(features, convs, squares(keys, 2))[keys], rtol=0, atol=2e-5)


def test_capacity_and_chunk_do_not_matter():
    features, keys = make_features(2), key_masks(2)["random 0.05"]
    active = int(squares(keys, 2).sum())
    reference = at_keys(2, 88, 8, DEPTHS, features, keys)
    assert len(reference[0]) > 0
    for capacity, chunk in [(active, active), (-(-active // 5) * 5, 5), (1000, 250)]:
        for y, expected in zip(at_keys(2, capacity, chunk, DEPTHS, features, keys), reference, strict=True):
            np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)


def test_context_5_equals_the_dense_head_with_five_layers():
    features = make_features(2)
    everywhere = np.ones((2, HEIGHT, WIDTH), bool)
    differs = False
    for keys in key_masks(2).values():
        for y, less, convs in zip(
            at_keys(5, 88, 8, FIVE, features, keys), at_keys(2, 88, 8, FIVE, features, keys), stacks(*FIVE), strict=True
        ):
            dense = run_stack(features, convs, everywhere)[keys]
            np.testing.assert_allclose(y, dense, rtol=0, atol=1e-5)
            differs |= bool(np.abs(less - dense).max(initial=0.0) > 0.01)
    assert differs  # at context 2 the mask can be felt, or this test shows nothing


def test_a_full_mask_is_the_plain_dense_stack():
    features = make_features(3)
    outputs = masked_dense(features, np.ones((3, HEIGHT, WIDTH), bool), stacks(*DEPTHS))
    for convs, y in zip(stacks(*DEPTHS), outputs, strict=True):
        x = features
        for layer, conv in enumerate(convs):
            x = jax.jit(dense_conv)(x, conv)
            x = jax.nn.relu(x) if layer < len(convs) - 1 else x
        assert y.dtype == jnp.float32
        np.testing.assert_allclose(y, x, rtol=0, atol=1e-5)


def test_outputs_are_zero_outside_the_mask():
    features, mask = make_features(2), key_masks(2)["random 0.5"]
    for y in masked_dense(features, mask, stacks(*DEPTHS)):
        assert not np.asarray(y)[~mask].any() and np.asarray(y)[mask].any()


def test_what_lies_beyond_reach_is_not_read():
    """A stack of m layers reads its key's surroundings up to distance m, and only active cells."""
    keys = np.zeros((1, HEIGHT, WIDTH), bool)
    keys[0, 0, 0] = True
    y, x = np.indices((HEIGHT, WIDTH))
    distance = np.maximum(y, x)[None]
    features = make_features(1)
    clean = at_keys(5, 48, 8, DEPTHS, features, keys)
    for reach in (1, 2, 3):
        poisoned = np.where((distance > reach)[..., None], np.nan, features).astype(np.float32)
        for depth, before, after in zip(DEPTHS, clean, at_keys(5, 48, 8, DEPTHS, poisoned, keys), strict=True):
            if depth <= reach:
                np.testing.assert_array_equal(after, before)
            else:
                assert np.isnan(after).all()
    poisoned = np.where((distance > 1)[..., None], np.nan, features).astype(np.float32)
    for y in at_keys(1, 48, 8, DEPTHS, poisoned, keys):
        assert np.isfinite(y).all()


def test_bfloat16_rows():
    features, keys = make_features(2), key_masks(2)["random 0.2"]
    wide = at_keys(2, 88, 8, DEPTHS, features, keys)
    narrow = at_keys(2, 88, 8, DEPTHS, features, keys, jnp.bfloat16)
    dense = masked_dense(features.astype(jnp.bfloat16), squares(keys, 2), stacks(*DEPTHS))
    for y, half, on_map in zip(wide, narrow, dense, strict=True):
        assert on_map.dtype == jnp.float32
        scale = np.abs(y).max()
        assert 0 < np.abs(half - y).max() < 0.03 * scale  # 8 bits of mantissa, a few layers
        np.testing.assert_allclose(np.asarray(on_map)[keys], half, rtol=0, atol=0.03 * scale)


# conv_rows by itself ---------------------------------------------------------------------------


def test_conv_rows_on_every_cell_is_a_dense_convolution():
    features = make_features(2)
    sites = select_sites(grow(np.ones((2, HEIGHT, WIDTH), bool), 0), 84)
    convs = [stack[0] for stack in stacks(*DEPTHS)]
    for relu in (False, True):
        run = jax.jit(functools.partial(conv_rows, relu=relu, chunk=12))
        outputs = run(features.reshape(84, CHANNELS), cell_table(sites), convs, sites.counts[-1])
        for conv, y in zip(convs, outputs, strict=True):
            expected = conv3x3(features, conv.kernel, conv.bias).reshape(84, -1)
            np.testing.assert_allclose(y, np.maximum(expected, 0) if relu else expected, rtol=0, atol=1e-5)


def test_rows_or_zeros_on_every_platform():
    rows = np.arange(1, 13, dtype=np.float32).reshape(4, 3)
    index = np.array([[0, 4, 3], [4, 4, 1]], np.int32)
    expected = np.concatenate([rows, np.zeros((1, 3), np.float32)])[index]
    for form in (rows_or_zeros, filled_with_zeros, beside_a_row_of_zeros):
        np.testing.assert_array_equal(form(jnp.asarray(rows), index), expected, form.__name__)
    np.testing.assert_array_equal(rows_or_zeros(jnp.asarray(rows), index[0]), expected[0])


def test_only_a_tpu_gets_the_row_of_zeros_and_not_beside_a_larger_map():
    def concatenates(rows: int, platform: str) -> bool:
        shapes = jax.ShapeDtypeStruct((rows, 3), jnp.float32), jax.ShapeDtypeStruct((9,), jnp.int32)
        lowered = jax.jit(rows_or_zeros).trace(*shapes).lower(lowering_platforms=(platform,))
        return "stablehlo.concatenate" in lowered.as_text()

    assert concatenates(4, "tpu")
    assert not concatenates(4, "cpu") and not concatenates(4, "cuda") and not concatenates(10, "tpu")


def test_conv_rows_stops_after_the_chunk_with_the_last_row():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(10, CHANNELS)).astype(np.float32)
    table = rng.integers(0, 11, (24, 9)).astype(np.int32)  # 10 is no row and reads as zeros
    conv = stacks(2)[0][0]
    run = jax.jit(functools.partial(conv_rows, relu=False, chunk=8))
    gathered = np.concatenate([rows, np.zeros((1, CHANNELS), np.float32)])[table].reshape(24, -1)
    expected = gathered @ conv.kernel.reshape(-1, CHANNELS) + conv.bias
    for count in (0, 1, 8, 9, 16, 24):
        (y,) = run(rows, table, [conv], count)
        np.testing.assert_allclose(y[:count], expected[:count], rtol=0, atol=1e-5)
        assert not np.asarray(y)[-(-count // 8) * 8 :].any()


def test_conv_rows_keeps_or_changes_the_type():
    rows, table = jnp.ones((8, CHANNELS), jnp.bfloat16), jnp.zeros((8, 9), jnp.int32)
    conv = stacks(2)[0][0]
    (same,) = conv_rows(rows, table, [conv], jnp.int32(8), relu=True, chunk=4)
    (wide,) = conv_rows(rows, table, [conv], jnp.int32(8), relu=True, chunk=4, out_dtype=jnp.float32)
    assert same.dtype == jnp.bfloat16 and wide.dtype == jnp.float32


def test_a_chunk_that_does_not_divide_is_refused():
    rows, table = jnp.zeros((4, CHANNELS)), jnp.zeros((10, 9), jnp.int32)
    with pytest.raises(ValueError, match="chunk 4 does not divide the capacity 10"):
        conv_rows(rows, table, [stacks(2)[0][0]], jnp.int32(1), relu=False, chunk=4)
