"""The step: devices agree with one device, live batch norm, frozen parts, clipping, bfloat16."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import optax
import pytest
from flax import nnx

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
from querydet_jax.errors import ConfigError
from querydet_jax.models import build_model
from querydet_jax.training.parallel import (
    AXIS,
    check_batch_size,
    parallel_step,
    replicate,
    split_batch,
    unreplicate,
)
from querydet_jax.training.schedule import make_optimizer
from querydet_jax.training.step import init_state, make_step, merge_into


@pytest.fixture(autouse=True)
def quick_compile():
    """These steps run once or twice: compiling them well would take longer than running them badly."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


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


def a_batch(size: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    boxes, classes = np.zeros((size, 6, 4), np.float32), np.full((size, 6), -1, np.int32)
    for i in range(size):
        corner = rng.uniform(0, 40, (i + 1, 2))
        boxes[i, : i + 1] = np.concatenate([corner, corner + rng.uniform(6, 24, (i + 1, 2))], axis=1)
        classes[i, : i + 1] = rng.integers(0, 3, i + 1)
    return {
        "images": rng.integers(0, 256, (size, 64, 64, 3), dtype=np.uint8),
        "sizes": np.full((size, 2), 64, np.int32),
        "boxes": boxes,
        "classes": classes,
    }


def run_steps(config: Config, batches: list[dict[str, np.ndarray]], devices: bool):
    model = build_model(config.model)
    optimizer = make_optimizer(config.train)
    state = init_state(model, optimizer)
    metrics = {}
    if devices:
        step, state = parallel_step(make_step(model, optimizer, AXIS)), replicate(state)
        for batch in batches:
            state, metrics = step(state, split_batch(batch))
        return unreplicate(state), unreplicate(metrics)
    step = jax.jit(make_step(model, optimizer, None))
    for batch in batches:
        state, metrics = step(state, batch)
    return state, metrics


def test_two_devices_equal_one_with_the_same_batch():
    """The normaliser differs by definition (mean over replicas of the foreground, not the sum), so it
    is held where it divides by one on both: far below a single foreground anchor."""
    config = tiny(**{"model.loss.normalizer_init": 0.0, "model.loss.normalizer_momentum": 1.0})
    assert jax.local_device_count() == 2
    _, one = run_steps(config, [a_batch()], devices=False)
    _, two = run_steps(config, [a_batch()], devices=True)
    # Sums over two images a replica, averaged over two replicas: half the sum over four images.
    for name in ("cls", "box", "foreground"):
        np.testing.assert_allclose(two[name] * 2, one[name], rtol=2e-5)
    np.testing.assert_allclose(two["query"], one["query"], rtol=2e-5)  # a mean over cells


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_replicas_of_one_batch_equal_one_device(norm):
    """Two replicas with the same images average to exactly what one device makes of them."""
    half = a_batch(2)
    both = {name: np.concatenate([value, value]) for name, value in half.items()}
    config = tiny(norm)
    one, metrics_one = run_steps(config, [half, half], devices=False)
    two, metrics_two = run_steps(config, [both, both], devices=True)
    for name in metrics_one:
        np.testing.assert_allclose(metrics_two[name], metrics_one[name], rtol=2e-5)
    for a, b in zip(jax.tree.leaves((one.params, one.rest)), jax.tree.leaves((two.params, two.rest)), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=2e-6)
    assert float(two.normalizer) == pytest.approx(float(one.normalizer))


def test_batch_norm_statistics_are_those_of_the_whole_batch():
    """Synchronised: two devices with two images each see the statistics of four."""
    config = tiny("batch", **{"train.learning_rate": 0.0})
    one, _ = run_steps(config, [a_batch()], devices=False)
    two, _ = run_steps(config, [a_batch()], devices=True)
    stem_one = nnx.to_flat_state(one.rest)
    stem_two = dict(nnx.to_flat_state(two.rest))
    checked = 0
    for path, value in stem_one:
        if path[-1] in ("mean", "var"):
            np.testing.assert_allclose(stem_two[path][...], value[...], rtol=1e-4, atol=1e-5)
            checked += 1
    assert checked == 2 * 12  # stem, four blocks of two, three shortcuts


@pytest.mark.parametrize(
    ("backbone", "frozen", "trained"),
    [
        ({}, ("stem", "res2"), ("res3", 0, "conv1")),
        ({"name": "mobilenet_v2", "width": 64}, ("stem", "level1", "level2"), ("level3", 0, "expand")),
        ({"name": "shufflenet_v2", "width": 64}, ("stem",), ("level3", 0, "shortcut", "depthwise")),
    ],
)
def test_frozen_parts_do_not_move(backbone, frozen, trained):
    changes = {f"model.backbone.{key}": value for key, value in backbone.items()}
    config = tiny("frozen", **{"model.backbone.freeze_at": 2, **changes})
    before = build_model(config.model)
    after = build_model(config.model)
    state, _ = run_steps(config, [a_batch()], devices=True)
    merge_into(after, state)
    moved, still = set(), set()
    for (path, a), (_, b) in zip(
        nnx.to_flat_state(nnx.state(before)), nnx.to_flat_state(nnx.state(after)), strict=True
    ):
        (still if np.array_equal(a[...], b[...]) else moved).add(path)
    assert before.backbone.frozen_parts() == frozen
    assert all(path[0] != "backbone" or path[1] not in frozen for path in moved)
    assert not any("norm" in path or path[0].startswith("pixel") for path in moved)
    assert ("backbone", *trained, "kernel") in moved and ("fpn", "lateral2", "kernel") in moved


def test_gradient_of_every_parameter_is_zero_where_frozen():
    """As a user of ``nnx.grad`` takes it, without the model's own filter."""
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


def test_bfloat16_step_keeps_float32_state():
    config = tiny(**{"model.dtype": "bfloat16"})
    state, metrics = run_steps(config, [a_batch()], devices=True)
    reference, metrics32 = run_steps(tiny(), [a_batch()], devices=True)
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {np.dtype(np.float32)}
    assert metrics["loss"].dtype == np.float32
    np.testing.assert_allclose(metrics["loss"], metrics32["loss"], rtol=0.03)


def test_loss_falls():
    config = tiny(**{"train.optimizer": "adamw", "train.learning_rate": 1e-3})
    _, first = run_steps(config, [a_batch()], devices=True)
    _, last = run_steps(config, [a_batch()] * 12, devices=True)
    assert float(last["loss"]) < 0.7 * float(first["loss"])


def test_batch_that_does_not_divide_names_the_remedy():
    with pytest.raises(ConfigError, match="train.batch_size 3 does not divide over 2 devices; use 2 or 4"):
        check_batch_size(3)


def test_weight_decay_reaches_biases():
    config = tiny(**{"train.weight_decay": 0.5}).train
    optimizer = make_optimizer(dataclasses.replace(config, momentum=0.0))
    params = {"bias": np.ones(2, np.float32)}
    updates, _ = optimizer.update({"bias": np.zeros(2, np.float32)}, optimizer.init(params), params)
    np.testing.assert_allclose(optax.apply_updates(params, updates)["bias"], 1 - 0.01 * 0.5)
