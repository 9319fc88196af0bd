"""Balanced samples: counts, membership, randomness."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from querydet_jax.ops.sampling import sample_balanced

SAMPLE = jax.jit(functools.partial(sample_balanced, count=8, fraction=0.25))


def masks(foreground: int, background: int, size: int = 40) -> tuple[np.ndarray, np.ndarray]:
    place = np.random.default_rng(0).permutation(size)
    first, second = np.zeros(size, bool), np.zeros(size, bool)
    first[place[:foreground]] = True
    second[place[foreground : foreground + background]] = True
    return first, second


@pytest.mark.parametrize(
    ("foreground", "background", "wanted"),
    [(5, 30, (2, 6)), (1, 30, (1, 7)), (0, 30, (0, 8)), (5, 3, (2, 3)), (0, 0, (0, 0)), (5, 0, (2, 0)), (0, 3, (0, 3))],
)
def test_numbers(foreground, background, wanted):
    first, second = masks(foreground, background)
    found = jax.device_get(SAMPLE(jax.random.key(0), first, second))
    assert found.index.shape == (8,) and (found.foreground.sum(), found.valid.sum()) == (wanted[0], sum(wanted))
    assert not (found.foreground & ~found.valid).any()
    chosen = found.index[found.valid]
    assert len(set(chosen)) == len(chosen)
    assert first[found.index[found.foreground]].all()
    assert second[found.index[found.valid & ~found.foreground]].all()


def test_fewer_candidates_than_wanted():
    sample = functools.partial(sample_balanced, count=8, fraction=0.5)
    found = jax.device_get(sample(jax.random.key(1), jnp.asarray([True, False]), jnp.asarray([False, True])))
    assert found.valid.tolist() == [True, True, *[False] * 6] and found.index[:2].tolist() == [0, 1]


def test_all_candidates_are_equally_likely_and_the_key_decides():
    first, second = masks(4, 20)
    keys = jax.random.split(jax.random.key(0), 2000)
    found = jax.device_get(jax.jit(jax.vmap(lambda key: SAMPLE(key, first, second)))(keys))
    times = np.bincount(found.index[found.valid], minlength=40)
    np.testing.assert_allclose(times[first] / 2000, 2 / 4, atol=0.05)
    np.testing.assert_allclose(times[second] / 2000, 6 / 20, atol=0.05)
    assert times[~first & ~second].sum() == 0
    again = jax.device_get(SAMPLE(keys[0], first, second))
    np.testing.assert_array_equal(again.index, found.index[0])
