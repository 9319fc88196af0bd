"""A detector to train for a few steps in a test: heads on two levels, so little to compile."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from querydet_jax.config import (
    BackboneConfig,
    Config,
    FPNConfig,
    HeadConfig,
    InferenceConfig,
    LossConfig,
    ModelConfig,
    QueryConfig,
    TrainConfig,
    override,
)
from querydet_jax.models import build_model
from querydet_jax.training.parallel import AXIS, Step, replication
from querydet_jax.training.schedule import make_optimizer
from querydet_jax.training.step import Metrics, TrainState, init_state, make_step

SMALL = Config(
    model=ModelConfig(
        num_classes=3,
        min_level=4,
        max_level=5,
        backbone=BackboneConfig(name="resnet10", flavor="torchvision", width=32, freeze_at=4),
        fpn=FPNConfig(channels=16),
        head=HeadConfig(channels=16, num_convs=1),
        query=QueryConfig(levels=(5,), channels=16, num_convs=1),
        loss=LossConfig(level_weighting="linear", query_weights=(10.0,), query_gammas=(1.2,)),
    ),
    train=TrainConfig(batch_size=4, learning_rate=0.01, warmup_steps=0, decay_steps=(), steps=10),
    inference=InferenceConfig(start_level=5),
)


# Changes to configs/demo.py for runs of the loop: eight pictures of 96 px, 16 channels.
SCENES = {
    "data.scenes_train": 8,
    "data.scenes_val": 2,
    "data.scenes_size": (96, 96),
    "data.train_short": (96,),
    "data.train_max": 96,
    "data.train_canvases": ((96, 96),),
    "data.test_short": 96,
    "data.test_max": 96,
    "data.test_canvases": ((96, 96),),
    "model.backbone.name": "resnet10",
    "model.fpn.channels": 16,
    "model.head.channels": 16,
    "model.head.num_convs": 1,
    "model.query.channels": 16,
    "model.query.num_convs": 1,
    "train.batch_size": 4,
    "train.log_every": 1,
}


def a_batch(size: int = 4, seed: int = 0, height: int = 64) -> dict[str, np.ndarray]:
    """Return square images of noise, with 1 box on the first, 2 on the next, and so on."""
    rng = np.random.default_rng(seed)
    most = max(size, 6)
    boxes, classes = np.zeros((size, most, 4), np.float32), np.full((size, most), -1, np.int32)
    for i in range(size):
        corner = rng.uniform(0, 40, (i + 1, 2))
        boxes[i, : i + 1] = np.concatenate([corner, corner + rng.uniform(6, 24, (i + 1, 2))], axis=1)
        classes[i, : i + 1] = rng.integers(0, 3, i + 1)
    return {
        "images": rng.integers(0, 256, (size, height, height, 3), dtype=np.uint8),
        "sizes": np.full((size, 2), height, np.int32),
        "boxes": boxes,
        "classes": classes,
    }


def start(config: Config, axis_name: str | None) -> tuple[TrainState, Step]:
    """Return the first state and the step of a run."""
    model, train = build_model(config.model), config.train
    optimizer = make_optimizer(train)
    step = make_step(model, optimizer, axis_name, accumulate=train.accumulate, remat=train.remat, ema_decay=train.ema)
    return init_state(model, optimizer, ema=train.ema > 0), step


def run_steps(
    config: Config, batches: list[dict[str, np.ndarray]], devices: bool, **changes: Any
) -> tuple[TrainState, Metrics]:
    """Return the state and the last metrics, on the two devices of the tests or on one."""
    config = override(config, changes)
    state, step = start(config, AXIS if devices else None)
    metrics: Metrics = {}
    if devices:
        assert jax.local_device_count() == 2
        over = replication(config.train.parallel)
        step, state = over.replicate_step(step), over.replicate(state)
        for batch in batches:
            state, metrics = step(state, over.split(batch))
        return over.unreplicate(state), over.unreplicate(metrics)
    step = jax.jit(step)
    for batch in batches:
        state, metrics = step(state, batch)
    return state, metrics


def assert_same_run(
    found: tuple[Any, dict[str, Any]],
    expected: tuple[Any, dict[str, Any]],
    rtol: float = 1e-6,
    rtol_metrics: float = 1e-5,
) -> None:
    """Compare arrays (a pytree) to ``rtol`` of their norm, and metrics to ``rtol_metrics``, which is larger because the
    CPU adds the many small terms of the class loss one after another."""
    for name, value in expected[1].items():
        np.testing.assert_allclose(found[1][name], value, rtol=rtol_metrics, err_msg=name)
    leaves, _ = jax.tree_util.tree_flatten_with_path(expected[0])
    for (path, a), b in zip(leaves, jax.tree.leaves(found[0]), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        off = np.linalg.norm(a - b)
        assert off <= rtol * np.linalg.norm(a), f"{jax.tree_util.keystr(path)}: {off:.2g} of {np.linalg.norm(a):.2g}"
