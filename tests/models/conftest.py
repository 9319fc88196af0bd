"""A detector whose backbone only averages pixels, so that heads, targets and losses compile fast."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from querydet_jax.config import (
    AnchorConfig,
    BackboneConfig,
    FasterRCNNConfig,
    FPNConfig,
    HeadConfig,
    LossConfig,
    ModelConfig,
    QueryConfig,
)
from querydet_jax.models import DenseDetector, build_model


class MeanBackbone(nnx.Module):
    """C2..C5 as means of the pixels over cells, with repeated channels."""

    def __init__(self, out_channels: dict[int, int]):
        self.out_channels = out_channels

    def __call__(self, x: jax.Array) -> dict[int, jax.Array]:
        batch, height, width, _ = x.shape
        outputs = {}
        for level, channels in self.out_channels.items():
            side = 2**level
            means = x.reshape(batch, height // side, side, width // side, side, 3).mean((2, 4))
            outputs[level] = jnp.tile(means, -(-channels // 3))[..., :channels] / 50.0
        return outputs

    def frozen_parts(self) -> tuple[str, ...]:
        return ()


SMALL = ModelConfig(
    num_classes=3,
    min_level=3,
    max_level=6,
    backbone=BackboneConfig(name="resnet18", width=32),
    fpn=FPNConfig(channels=16),
    # A high prior, so that the sums depend on which anchors they include; at the usual .01 they hardly do.
    head=HeadConfig(channels=16, num_convs=1, prior=0.3),
    query=QueryConfig(channels=16, num_convs=1),
    loss=LossConfig(level_weights=(1.0, 1.5, 2.0, 4.0), query_weights=(10.0, 5.0), query_gammas=(1.2, 1.5)),
)


def with_means(config: ModelConfig) -> DenseDetector:
    model = build_model(config, seed=1)
    model.backbone = MeanBackbone(model.backbone.out_channels)
    return model


@pytest.fixture(scope="session")
def small_config() -> ModelConfig:
    return SMALL


@pytest.fixture(scope="session")
def small_half_model() -> DenseDetector:
    """The same weights, with computation in bfloat16."""
    return with_means(dataclasses.replace(SMALL, dtype="bfloat16"))


@pytest.fixture(scope="session")
def small_model() -> DenseDetector:
    """Levels P3..P6, queries on P3 and P4, three classes. Tests must not modify it."""
    return with_means(SMALL)


@pytest.fixture(scope="session")
def small_faster_rcnn() -> DenseDetector:
    """Faster R-CNN whose samples include all anchors and proposals. Tests must not modify it."""
    config = dataclasses.replace(
        SMALL,
        detector="faster_rcnn",
        fpn=FPNConfig(channels=16, top_source="pool"),
        anchors=AnchorConfig(scale=2.0, sizes_per_octave=1),
        loss=dataclasses.replace(SMALL.loss, matcher="standard", iou_background=0.3, iou_foreground=0.7),
        faster_rcnn=FasterRCNNConfig(proposals=40, rpn_samples=800, roi_samples=2400, roi_size=3, channels=16),
    )
    model = with_means(config)
    rng = np.random.default_rng(3)
    # Without this, all anchors have the same score and no box moves.
    for conv, gain in ((model.head.objectness, 2.0), (model.head.deltas, 0.3), (model.box_head.bbox_pred, 0.3)):
        conv.kernel[...] = jnp.asarray(rng.normal(0, gain, conv.kernel[...].shape), jnp.float32)
    return model


@pytest.fixture(scope="session")
def small_fcos() -> DenseDetector:
    """FCOS of the same configuration. Tests must not modify it."""
    return with_means(dataclasses.replace(SMALL, detector="fcos"))
