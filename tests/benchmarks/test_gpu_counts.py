"""Launches, host waits, sorts and prepared weights, counted by hand in small texts as XLA:GPU writes them."""

from __future__ import annotations

import importlib.util

import pytest

from benchmarks.accelerators.command import Accelerator, accelerator
from benchmarks.accelerators.launches import Launches, launches, preparing_bytes, sorts
from querydet_jax.runtime.errors import ConfigError

THUNKS = """001: kCustomKernel  [source        | next=004 (2)] fusion_22 grid: [1920, 1, 1] threads: [128, 1, 1]
004: kConvolution   [prev=001 (1)  | next=005 (1)] kConvolution
000: kCommandBuffer [prev=004 (1)  | next=117 (1)]
    104: kCustomKernel [source       | next=105 (1)] select_fusion grid: [1, 1, 1] threads: [20, 1, 1]
    105: kWhile        [prev=104 (1) | sink        ]
condition:
        No thunks.      body:
        106: kCopy     [source | sink] kCopy
371: kConditional   [prev=178 (1)  | next=000 (1)]
  branch_0:
    000: kCommandBuffer [source | sink]
        179: kCustomKernel [source        | next=182 (3)] fusion_1 grid: [2, 1, 1] threads: [128, 1, 1]
  branch_1:
    310: kConvolution   [prev=309 (1) | next=311 (1)] kConvolution
    311: kCopy          [prev=310 (1) | sink        ] kCopy
613: kWhile         [prev=000 (1)  | next=000 (1)]
condition:
    614: kCustomKernel [source       | sink        ] input_reduce_fusion grid: [1, 1, 1] threads: [256, 1, 1]
  body:
    628: kWhile         [prev=000 (1) | next=000 (1)]
condition:
        No thunks.      body:
        629: kCustomKernel [source       | sink        ] select_fusion_2 grid: [1, 1, 1] threads: [1024, 1, 1]
"""

PROGRAM = """HloModule jit_f, is_scheduled=true

%fused (p: f32[8,4]) -> bf16[4,8] {
  %p = f32[8,4]{1,0} parameter(0)
  %c = bf16[8,4]{1,0} convert(%p)
  ROOT %t = bf16[4,8]{1,0} transpose(%c), dimensions={1,0}
}

%sorted (s: f32[2,1000]) -> (f32[2,1000], s32[2,1000]) {
  %s = f32[2,1000]{1,0} parameter(0)
  %i = s32[2,1000]{1,0} iota(), iota_dimension=1
  ROOT %sort.1 = (f32[2,1000]{1,0}, s32[2,1000]{1,0}) sort(%s, %i), dimensions={1}, to_apply=%compare
}

%branch_0 (a: (f32[8,4], u8[3])) -> f32[2] {
  %a = (f32[8,4]{1,0}, u8[3]{0}) parameter(0)
  %k = f32[8,4]{1,0} get-tuple-element(%a), index=0
  %x = u8[3]{0} get-tuple-element(%a), index=1
  %cast = bf16[8,4]{1,0} convert(%k)
  ROOT %y = f32[2]{0} fusion(%cast, %x), kind=kLoop, calls=%other
}

%branch_1 (b: u8[3]) -> f32[2] {
  %b = u8[3]{0} parameter(0)
  ROOT %z = f32[2]{0} fusion(%b), kind=kLoop, calls=%other
}

ENTRY %main (kernel: f32[8,4], images: u8[3], sizes: s32[]) -> f32[2] {
  %kernel = f32[8,4]{1,0} parameter(0)
  %images = u8[3]{0} parameter(1)
  %sizes = s32[] parameter(2)
  %one = bf16[] constant(1)
  %turned = bf16[4,8]{1,0} fusion(%kernel), kind=kInput, calls=%fused
  %same = bf16[32]{0} bitcast(%turned)
  %scaled = bf16[32]{0} multiply(%same, %one)
  %product = f32[4,3]{1,0} fusion(%scaled, %images), kind=kLoop, calls=%other
  %radix = (f32[500]{0}, u8[64]{0}) custom-call(%product), custom_call_target="__cub$DeviceRadixSort"
  %weights = (f32[8,4]{1,0}, u8[3]{0}) tuple(%kernel, %images)
  ROOT %out = f32[2]{0} conditional(%sizes, %weights, %images), branch_computations={%branch_0, %branch_1}
}
"""


def test_launches_by_hand():
    # Single: 001, 004, 310, 311, 614, 629. Waits: the conditional, the loop and the loop in it.
    assert launches(THUNKS) == Launches(launches=6, convolutions=2, host_waits=3, command_buffers=2)
    assert launches("") == Launches(0, 0, 0, 0)


def test_sorts_by_hand():
    assert sorts(PROGRAM) == (2, 1000)
    assert sorts("") == (0, 0)


def test_bytes_that_prepare_weights_by_hand():
    # Cast and transposed 128 + 64; scaled 64 + 64 + 2; cast again in a branch 128 + 64. The rest reads pictures.
    assert preparing_bytes(PROGRAM) == 192 + 130 + 192


def test_without_the_plugin_the_error_names_the_file(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs jax's plugin for CUDA; pip install -r requirements-gpu-counts.txt"):
        accelerator(Accelerator(gpus=("h200",)))
