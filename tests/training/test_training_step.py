"""The step: live batch norm over devices, frozen parts, weight decay."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from small_training import a_batch, assert_same_run, run_steps

from querydet_jax.config import (
    BackboneConfig,
    Config,
    FPNConfig,
    HeadConfig,
    ModelConfig,
    QueryConfig,
    TrainConfig,
    override,
)
from querydet_jax.models import build_model
from querydet_jax.training.schedule import make_optimizer
from querydet_jax.training.step import init_state, merge_into


def tiny(norm: str = "group", **changes) -> Config:
    config = Config(
        model=ModelConfig(
            num_classes=3,
            backbone=BackboneConfig(name="resnet10", flavor="torchvision", norm=norm, freeze_at=0, width=32),
            fpn=FPNConfig(channels=16),
            head=HeadConfig(channels=16, num_convs=1),
            query=QueryConfig(channels=16, num_convs=1),
        ),
        train=TrainConfig(batch_size=4, learning_rate=0.01, warmup_steps=0, decay_steps=(), steps=10),
    )
    return override(config, changes)


def test_live_batch_norm_on_two_devices_equals_one_with_the_same_batch():
    """Its statistics are those of the whole batch."""
    config = tiny("batch")
    batches = [a_batch(seed=0), a_batch(seed=1)]
    one, two = (run_steps(config, batches, devices=devices) for devices in (False, True))
    assert sum(path[-1] == "mean" for path, _ in nnx.to_flat_state(one[0].rest)) == 12  # stem, 4 x 2, 3 shortcuts
    assert_same_run(two, one, rtol=2e-4, rtol_metrics=2e-3)  # norms over 4 images of 2 x 2 cells magnify rounding


@pytest.mark.parametrize(
    ("backbone", "frozen", "trained"),
    [
        ({}, ("stem", "res2"), ("res3", 0, "conv1")),
        ({"name": "mobilenet_v2", "width": 64}, ("stem", "level1", "level2"), ("level3", 0, "expand")),
        ({"name": "shufflenet_v2", "width": 64}, ("stem",), ("level3", 0, "shortcut", "depthwise")),
    ],
)
def test_frozen_parts_are_not_parameters_of_the_state(backbone, frozen, trained):
    """What the optimiser sees, and so what weight decay would move."""
    changes = {f"model.backbone.{key}": value for key, value in backbone.items()}
    config = tiny("frozen", **{"model.backbone.freeze_at": 2, **changes})
    model = build_model(config.model)
    params = {path for path, _ in nnx.to_flat_state(init_state(model, make_optimizer(config.train)).params)}
    assert model.backbone.frozen_parts() == frozen
    assert all(path[0] != "backbone" or path[1] not in frozen for path in params)
    assert not any("norm" in path or path[0].startswith("pixel") for path in params)
    assert ("backbone", *trained, "kernel") in params and ("fpn", "lateral2", "kernel") in params


def test_a_step_moves_all_parameters_and_nothing_else():
    config = tiny("frozen", **{"model.backbone.freeze_at": 2})
    before, after = build_model(config.model), build_model(config.model)
    state, _ = run_steps(config, [a_batch()], devices=True)
    merge_into(after, state)
    pairs = zip(nnx.to_flat_state(nnx.state(before)), nnx.to_flat_state(nnx.state(after)), strict=True)
    moved = {path for (path, a), (_, b) in pairs if not np.array_equal(a[...], b[...])}
    assert moved == {path for path, _ in nnx.to_flat_state(state.params)}


def test_gradient_of_every_parameter_is_zero_where_frozen():
    """With ``nnx.grad``, without the model's own filter."""
    model = build_model(tiny("frozen", **{"model.backbone.freeze_at": 2}).model)
    batch = a_batch(2)
    losses = nnx.jit(
        nnx.grad(lambda net: net.losses(batch["images"], batch["boxes"], batch["classes"], 100.0, batch["sizes"]).total)
    )
    moving = {path for path, value in nnx.to_flat_state(losses(model)) if np.any(value[...])}
    frozen = [path for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)) if path not in moving]
    assert {path[:2] for path in frozen} == {("backbone", "stem"), ("backbone", "res2")}


def test_live_statistics_do_not_change_in_evaluation():
    model = build_model(tiny("batch").model)
    before = jax.tree.map(np.asarray, nnx.state(model, nnx.BatchStat))
    model(a_batch()["images"])
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, nnx.state(model, nnx.BatchStat)))


def test_weight_decay_reaches_biases():
    config = tiny(**{"train.weight_decay": 0.5}).train
    optimizer = make_optimizer(dataclasses.replace(config, momentum=0.0))
    params = {"bias": np.ones(2, np.float32)}
    updates, _ = optimizer.update({"bias": np.zeros(2, np.float32)}, optimizer.init(params), params)
    np.testing.assert_allclose(optax.apply_updates(params, updates)["bias"], 1 - 0.01 * 0.5)
