"""Programs for TPUs: GFLOP as the arithmetic says, detections as with CSQ, recorded figures within 5 %.

What needs libtpu (`pip install -r requirements-tpu.txt`) is skipped without it.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_detector import BASE, assert_same, counts, model, pictures

from benchmarks.accelerators.chips import CHIPS, Chip, out_of_memory, roofline
from benchmarks.accelerators.command import Accelerator, accelerator
from benchmarks.accelerators.hlo import traffic
from benchmarks.accelerators.programs import Program, inference_program, rooms_needed, train_program
from benchmarks.flops import gflop
from benchmarks.subjects import laid_out_queries, random_model
from querydet_jax.config import InferenceConfig, override
from querydet_jax.inference.detector import Detector
from querydet_jax.runtime.errors import ConfigError

ROOT = Path(__file__).parents[2]
RECORDED = json.loads(Path(__file__).with_name("accelerator_figures.json").read_text())
ARGUMENTS = Accelerator(**RECORDED["arguments"])


def test_roofline_by_hand():
    chip = Chip(peak_tflops=100, hbm_gb_s=1000, hbm_gib=16, ghz=1, topology="", config="")
    assert roofline(chip, 2e12, 1e9) == (20.0, "compute")
    assert roofline(chip, 2e12, 30e9) == (30.0, "memory")
    assert CHIPS["v5e"].peak_tflops / (4 * 128 * 128 * 2 / 1e3) == pytest.approx(CHIPS["v5e"].ghz, rel=0.01)


def test_traffic_by_hand():
    text = """HloModule jit_f, is_scheduled=true

%fused (p: f32[4,8]) -> f32[4,8] {
  %p = f32[4,8]{1,0:T(8,128)} parameter(0)
  ROOT %t = f32[4,8]{1,0:T(8,128)} tanh(%p)
}

ENTRY %main (x: f32[4,8], k: bf16[10]) -> f32[4,8] {
  %x = f32[4,8]{1,0:T(8,128)} parameter(0)
  %k = bf16[10]{0} parameter(1)
  %copy-start = (bf16[10]{0:S(3)}, bf16[10]{0}, u32[]{:S(2)}) copy-start(%k)
  %slice-start = ((f32[4,8]{1,0}), f32[2,8]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:2], [0:8]}
  %copy-done = bf16[10]{0:S(1)} copy-done(%copy-start)
  %slice-done = f32[2,8]{1,0:S(1)} slice-done(%slice-start)
  %y = pred[16]{0:S(1)} fusion(%copy-done), kind=kLoop, calls=%other, backend_config={"estimated_cycles":"70"}
  ROOT %fusion = f32[4,8]{1,0} fusion(%x), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"30"}
}
"""
    # HBM: k and half of x are copied from there; the last fusion reads and writes 128 bytes.
    # On the chip: the two copies' other ends; the other fusion reads 20 bytes and writes 16.
    assert traffic(text) == (20 + 64 + 128 + 128, 20 + 64 + 20 + 16, 100)


def test_a_program_that_does_not_fit_says_how_large_it_is():
    found = out_of_memory(RECORDED["out_of_memory"]["message"])
    assert found.memory_bytes == RECORDED["out_of_memory"]["gib"] * 2**30
    assert out_of_memory("RESOURCE_EXHAUSTED: no room").memory_bytes is None


def test_without_libtpu_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs libtpu; pip install -r requirements-tpu.txt"):
        accelerator(Accelerator())


@pytest.mark.parametrize("kernel", ["gather", pytest.param("tiles", marks=pytest.mark.slow)])
def test_one_buffer_per_level_gives_the_detections_of_csq(kernel):
    inference = override(BASE, {"kernel": kernel})
    images = pictures(2, 64, 96)
    expected = Detector(model(), inference)(images)
    rooms = {3: 96, 2: 128} if kernel == "gather" else {3: 128, 2: 192}  # neither level needs all of it
    program = inference_program(model(), inference, images.shape[:3], rooms)
    found = jax.jit(program.function)(program.whole, images, jnp.array([[64, 96]] * 2, jnp.int32))
    assert {level: int(stats.capacity) for level, stats in found.stats.items()} == rooms
    assert counts(found) == counts(expected)
    assert_same(found, expected)


def test_rooms_by_hand():
    model = nnx.eval_shape(partial(random_model, "resnet10", 3, 8))
    queries = np.zeros((16, 16), bool)
    queries[5, 6] = True  # rows 10, 11 and columns 12, 13 of P3; rows 20..23, columns 24..27 of P2
    inference = override(InferenceConfig(), {"chunk": 8})
    # Context 2: 6x6 cells of P3, and one ring more of P2, 10x10.
    assert rooms_needed(model, inference, (3, 256, 256), queries) == {3: 112, 2: 304}
    # P3: rows 8..13, columns 10..15, one tile. P2: rows 18..25, columns 22..29, of two tiles each.
    tiles = override(inference, {"kernel": "tiles"})
    assert rooms_needed(model, tiles, (1, 256, 256), queries) == {3: 64, 2: 256}


def programs() -> dict[str, Program]:
    """Return the programs that the command compiles for `ARGUMENTS`, for this machine's first device."""
    shape = (ARGUMENTS.height, ARGUMENTS.width)
    build = partial(random_model, ARGUMENTS.backbone, ARGUMENTS.classes, ARGUMENTS.channels, dtype=ARGUMENTS.dtype)
    model, queries = nnx.eval_shape(build), laid_out_queries(*shape, ARGUMENTS.active)
    found = {}
    for name, changes in {"dense": {"query": "dense"}, "gather": {}, "tiles": {"kernel": "tiles"}}.items():
        inference = override(InferenceConfig(), changes)
        rooms = {} if name == "dense" else rooms_needed(model, inference, (1, *shape), queries)
        found[name] = inference_program(model, inference, (1, *shape), rooms)
    found["training"] = train_program(build, jax.devices()[:1], (ARGUMENTS.train_batches[0], *shape), remat=False)
    return found


def test_gflop_as_lowered_are_those_recorded():
    """Counted before a backend optimises them, so without a TPU's compiler."""
    found = {name: gflop(p.function, p.whole, *p.rows) for name, p in programs().items()}
    assert found == pytest.approx(RECORDED["lowered_gflop"], rel=0.05)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: requirements-tpu.txt")
@pytest.mark.parametrize("chip", sorted(RECORDED["chips"]))
def test_figures_of_the_compiler_are_those_recorded(tmp_path, chip):
    """In a process of its own: the settings of the tests would reach the TPU's compiler."""
    words = [f"--{name}={value}" for name, value in RECORDED["arguments"].items()]
    command = [sys.executable, "benchmark.py", "accelerator", "--chips", chip, *words, "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    rows = json.loads((tmp_path / "accelerator.json").read_text())["rows"]
    keys = ("gflop", "accessed_gb", "hbm_gb", "memory_gib", "schedule_ms")
    found = {row["program"]: {key: row[key] for key in keys} for row in rows}
    assert list(found) == list(RECORDED["chips"][chip])
    for program, figures in RECORDED["chips"][chip].items():
        assert found[program] == pytest.approx(figures, rel=0.05), program
