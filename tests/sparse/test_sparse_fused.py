"""The TPU kernel for tiles, in Pallas' interpreter: the same numbers as the masked dense convolution."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from test_sparse_tiles import put_back

from querydet_jax.sparse import CascadeLevel, Conv, fused, masked_dense_stacks, run_stacks_on_tiles
from querydet_jax.sparse.tiles import cells_of_tiles, select_tiles


@pytest.fixture
def _interpret(monkeypatch):
    call = pl.pallas_call
    monkeypatch.setattr(pl, "pallas_call", lambda *a, **k: call(*a, interpret=True, **k))


def stacks(*channels: tuple[int, ...]) -> list[list[Conv]]:
    rng = np.random.default_rng(1)

    def conv(i: int, o: int) -> Conv:
        return Conv(
            jnp.asarray(rng.normal(0, (2 / 9 / i) ** 0.5, (3, 3, i, o)), jnp.float32),
            jnp.asarray(rng.normal(0, 0.1, o), jnp.float32),
        )

    return [[conv(i, o) for i, o in zip(sizes, sizes[1:], strict=False)] for sizes in channels]


@pytest.mark.usefixtures("_interpret")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.03)])
@pytest.mark.parametrize("share", [0.0, 0.02, 1.0])
def test_fused_equals_masked_dense(dtype, tolerance, share):
    """Three layers, one alone, and one that changes the number of channels; tiles stick out of the maps."""
    rng = np.random.default_rng(0)
    features = jnp.asarray(rng.normal(size=(2, 20, 27, 8)), dtype)
    mask = jnp.asarray(rng.random((2, 20, 27)) < share)
    branches = stacks((8, 8, 8, 5), (8, 3), (8, 16, 16, 1))

    @jax.jit
    def both(features, mask):
        tiles = select_tiles(mask, 24, 8)
        level = CascadeLevel(2, features)
        found = run_stacks_on_tiles(level, mask, tiles, branches, chunk=4, fused=True)
        return found, cells_of_tiles(tiles, mask), masked_dense_stacks(features, mask, branches)

    found, cells, expected = both(features, mask)
    for y, dense in zip(put_back(found, cells, mask.shape), expected, strict=True):
        np.testing.assert_allclose(y, dense, rtol=0, atol=tolerance * max(1.0, float(jnp.abs(dense).max())))
        assert share == 0 or np.abs(y).max() > 0.1


def test_tiles_too_many_for_the_memory_run_as_xlas():
    assert fused.fits(700, 8, 256, "bfloat16") and not fused.fits(800, 8, 256, "bfloat16")
    assert not fused.fits(700, 8, 256, "float32")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: requirements-tpu.txt")
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_the_tpus_compiler_takes_it(chip):
    """In a process of its own: the settings of the tests would reach the TPU's compiler."""
    subprocess.run([sys.executable, "-c", COMPILE, chip], cwd=Path(__file__).parents[2], check=True)


COMPILE = """
import sys
from benchmarks.accelerators.chips import Figures, Program, compile_for, devices, require_libtpu
require_libtpu()
import jax, jax.numpy as jnp
from querydet_jax.sparse import Conv
from querydet_jax.sparse.fused import tile_stack
array = jax.ShapeDtypeStruct
conv = lambda o: Conv(array((3, 3, 256, o), jnp.float32), array((o,), jnp.float32))
buffer = [array((65, 8, 8, 256), jnp.bfloat16), array((64, 9), jnp.int32), array((64, 8, 8), bool)]
program = Program(lambda whole: tile_stack(*whole), (*buffer, [conv(256), conv(720)]), ())
assert isinstance(compile_for(program, devices(sys.argv[1])[:1], "x"), Figures)
"""
