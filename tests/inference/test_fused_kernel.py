"""`inference.kernel fused` where it cannot run: one line that names the remedy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from flax import nnx

from querydet_jax import Detector, InferenceConfig, ModelConfig, build_model
from querydet_jax.config import BackboneConfig, Config, FPNConfig, HeadConfig, QueryConfig
from querydet_jax.inference.export.writer import check_kernel
from querydet_jax.runtime.errors import ConfigError

FUSED = InferenceConfig(kernel="fused")
WIDE = ModelConfig(
    num_classes=3,
    backbone=BackboneConfig(name="resnet18", width=32),
    fpn=FPNConfig(channels=128),
    head=HeadConfig(channels=128, num_convs=1),
    query=QueryConfig(channels=128, num_convs=1),
)


def test_on_another_device():
    detector = Detector(build_model(WIDE, seed=0), FUSED)
    with pytest.raises(ConfigError, match="kernel fused: is for TPUs, and jax runs on cpu here; use .*gather"):
        detector(np.zeros((1, 64, 64, 3), np.uint8))


@pytest.mark.parametrize(
    ("model", "inference", "message"),
    [
        (WIDE, dataclasses.replace(FUSED, tile=4), "inference.tile 4: kernel fused needs a multiple of 8"),
        (
            dataclasses.replace(WIDE, head=HeadConfig(channels=64)),
            FUSED,
            "model.head.channels 64 is no multiple of 128; use inference.kernel tiles",
        ),
        (dataclasses.replace(WIDE, head=HeadConfig(norm="group")), FUSED, "group norm.*use inference.query dense"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused_at_construction(model, inference, message):
    with pytest.raises(ConfigError, match=message):
        Detector(nnx.eval_shape(lambda: build_model(model, seed=0)), inference)


def test_exports():
    check_kernel(FUSED, ["tpu"], "")
    check_kernel(dataclasses.replace(FUSED, query="dense"), ["cpu"], "")
    with pytest.raises(ConfigError, match="not for cpu, tpu; export with --platforms tpu, or set"):
        check_kernel(FUSED, ["cpu", "tpu"], "export with --platforms tpu, or ")
    with pytest.raises(ConfigError, match="not for ONNX; set inference.kernel gather"):
        check_kernel(FUSED, ["ONNX"], "")
    assert Config().inference.kernel == "gather"
