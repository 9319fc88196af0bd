"""Which buffer sizes there are, and that only the smallest that fits runs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from querydet_jax.sparse import ladder_capacities, run_ladder


@pytest.mark.parametrize("chunk", [1, 7, 256, 10_000])
@pytest.mark.parametrize("cells", [1, 5, 63, 64, 100, 4_097, 67_200])
@pytest.mark.parametrize("fractions", [(), (0.001,), (0.01, 0.05, 0.25), (0.5, 0.999, 1.0)])
def test_capacities(fractions, cells, chunk):
    sizes, rows = ladder_capacities(fractions, cells, chunk)
    assert 1 <= rows <= chunk and (cells < 64 or rows <= cells / 8)
    assert sizes == sorted(set(sizes)) and len(sizes) <= len(fractions)
    whole_map = -(-cells // rows) * rows
    for size in sizes:
        assert size % rows == 0 and rows <= size <= whole_map
    for fraction in fractions:  # each is there, rounded up by less than a chunk
        fitting = min(size for size in sizes if size >= fraction * cells - 1e-6)
        assert fitting < fraction * cells + rows + 1e-6
    if 1.0 in fractions:
        assert sizes[-1] == whole_map


def test_capacities_of_the_published_sizes():
    # P2 and P3 of an 800x1344 image, the default fractions.
    assert ladder_capacities((0.05, 0.25), 200 * 336, 256) == ([3_584, 16_896], 256)
    assert ladder_capacities((0.05, 0.25), 100 * 168, 256) == ([1_024, 4_352], 256)


CAPACITIES = (8, 16, 40)


def make_ladder(ran: list[int]):
    """Branches that say that they ran; the result is the operand plus a number of the branch's own."""

    @jax.jit
    def ladder(count, x):
        def sparse(capacity: int):
            jax.debug.callback(lambda: ran.append(capacity))
            return {"sum": x.sum() + capacity}

        def dense():
            jax.debug.callback(lambda: ran.append(0))
            return {"sum": x.sum()}

        return run_ladder(count, CAPACITIES, sparse, dense)

    return ladder


def test_the_smallest_that_fits_runs_and_no_other():
    ran: list[int] = []
    ladder = make_ladder(ran)
    x = np.arange(3, dtype=np.float32)
    expected = [(0, 8), (1, 8), (8, 8), (9, 16), (16, 16), (17, 40), (40, 40), (41, 0), (10**6, 0)]
    for count, capacity in expected:
        result, used, overflowed = ladder(jnp.int32(count), x)
        jax.effects_barrier()
        assert float(result["sum"]) == 3 + capacity
        assert (int(used), bool(overflowed)) == (capacity, capacity == 0)
        assert used.dtype == jnp.int32 and used.shape == overflowed.shape == ()
    assert ran == [capacity for _, capacity in expected]
    assert ladder._cache_size() == 1


def test_without_capacities_the_dense_branch_runs():
    def never(capacity: int):
        raise AssertionError("there is no capacity to run")

    result, used, overflowed = run_ladder(jnp.int32(0), [], never, lambda: jnp.float32(6))
    assert (float(result), int(used), bool(overflowed)) == (6.0, 0, True)


def test_it_compiles_to_a_branch():
    text = make_ladder([]).lower(jnp.int32(0), jnp.zeros(3)).compile().as_text()
    assert text.count(" conditional(") == 1
