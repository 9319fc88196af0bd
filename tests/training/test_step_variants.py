"""One update, however its batch is split over devices and time; memory; moving average; communication."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest
from small_training import SMALL, a_batch, assert_same_run, run_steps, start

from querydet_jax.config import override
from querydet_jax.models import build_model
from querydet_jax.runtime.errors import ConfigError
from querydet_jax.training.parallel import AXIS, check_batch_size, replication
from querydet_jax.training.step import merge_into
from querydet_jax.weights import state_dict

BATCHES = [a_batch(seed=seed) for seed in range(3)]  # of 4 images


@pytest.fixture(scope="module")
def reference():
    """Run three steps of four images on one device."""
    return run_steps(SMALL, BATCHES, devices=False)


@pytest.mark.parametrize(
    ("devices", "changes"),
    [
        (True, {}),
        pytest.param(True, {"train.parallel": "shard_map"}, marks=pytest.mark.slow),
        pytest.param(False, {"train.accumulate": 4}, marks=pytest.mark.slow),
        (True, {"train.accumulate": 2, "train.parallel": "shard_map"}),
    ],
    ids=["pmap", "shard_map", "in 4 parts", "in 2 parts on 2 devices"],
)
def test_every_way_makes_the_same_update(reference, devices, changes):
    """Parts and devices hold 1 to 7 boxes: each must divide by the foreground of the whole batch."""
    state, metrics = reference
    assert float(metrics["foreground"]) > 10 and float(metrics["query"]) > 0.01
    assert float(state.normalizer) != SMALL.model.loss.normalizer_init
    assert_same_run(run_steps(SMALL, BATCHES, devices, **changes), reference)


def test_foreground_counted_first_is_that_of_the_losses():
    """For both detectors, with images that are no multiple of 32."""
    batch = a_batch()
    images = batch["images"][:, :50, :60]
    for detector in ("retinanet", "fcos"):
        model = build_model(override(SMALL, {"model.detector": detector}).model)
        labels = model.labels([(4, 4), (2, 2)], batch["boxes"], batch["classes"])
        counted = model.count_foreground(images.shape[1:3], batch["boxes"], batch["classes"])
        assert counted == np.sum(np.asarray(labels) >= 0) > 0
        losses = jax.eval_shape(model.losses, images, batch["boxes"], batch["classes"], 100.0)
        assert counted.dtype == losses.num_foreground.dtype == np.float32


def test_less_memory():
    """With remat the heads of one image of eight are in memory at a time, with accumulate everything of two images."""
    model = {"min_level": 3, "query.levels": (3,), "backbone.freeze_at": 5, "head.channels": 128, "head.num_convs": 2}
    config = override(SMALL, {f"model.{key}": value for key, value in model.items()})
    batch = a_batch(8, height=128)

    def needed(**changes) -> int:
        state, step = start(override(config, changes), None)
        return jax.jit(step).lower(state, batch).compile().memory_analysis().temp_size_in_bytes

    whole = needed()
    assert needed(**{"train.remat": True}) < 0.75 * whole
    assert needed(**{"train.accumulate": 4}) < 0.5 * whole


FASTER = {
    "fpn.top_source": "pool",
    "max_level": 6,
    "anchors.sizes_per_octave": 1,
    "faster_rcnn.proposals": 40,
    "faster_rcnn.rpn_samples": 8,
    "faster_rcnn.roi_samples": 8,
    "faster_rcnn.roi_size": 2,
    "faster_rcnn.channels": 16,
}


@pytest.mark.parametrize(
    ("detector", "own", "ways"),
    [
        ("retinanet", {}, {"train.remat": True}),
        pytest.param("fcos", {}, {"train.remat": True}, marks=pytest.mark.slow),
        pytest.param("faster_rcnn", FASTER, {"train.remat": True, "train.accumulate": 2}, marks=pytest.mark.slow),
    ],
)
def test_every_detector_the_same_in_less_memory(detector, own, ways):
    model = {"detector": detector, "min_level": 3, "query.levels": (3,), **own}
    config = override(SMALL, {f"model.{key}": value for key, value in model.items()})
    expected = run_steps(config, BATCHES[:1], devices=False)
    assert_same_run(run_steps(config, BATCHES[:1], devices=False, **ways), expected)


@pytest.mark.parametrize("parallel", ["pmap", "shard_map"])
def test_a_step_communicates_the_gradients_once_and_one_number(parallel):
    """Besides the foreground count, one group of all-reduces of the size of the parameters (and metrics), however many
    images there are. Nothing is gathered, no activation travels."""
    state, step = start(SMALL, AXIS)
    over = replication(parallel)
    program = over.replicate_step(step).lower(over.replicate(state), over.split(a_batch())).compile().as_text()
    for other in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter", "collective-broadcast"):
        assert other not in program
    reduced = [
        sum(int(np.prod([int(side) for side in shape.split(",") if side], initial=1)) for shape in shapes)
        for shapes in (
            re.findall(r"f32\[([\d,]*)\]", line.split("= ", 1)[1].split(" all-reduce")[0])
            for line in program.splitlines()
            if re.search(r" all-reduce(-start)?\(", line)
        )
    ]
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    metrics = 5  # loss, cls, box, query, foreground
    assert sorted(reduced) in (
        [1, parameters + metrics],
        [1, parameters + metrics - 1],
    )  # the foreground metric may be the count itself


def test_moving_average_is_that_of_the_parameters_and_what_is_exported():
    config = override(SMALL, {"train.ema": 0.15})
    state, step = start(config, None)
    step = jax.jit(step)
    average = jax.tree.map(np.asarray, state.params)
    for decay, batch in zip((0.1, 0.15, 0.15), BATCHES, strict=True):  # (1 + step) / (10 + step) at first
        state, _ = step(state, batch)
        average = jax.tree.map(lambda a, x, d=decay: d * a + (1 - d) * np.asarray(x), average, state.params)
        assert_same_run((state.ema, {}), (average, {}))
    model = build_model(config.model)
    merge_into(model, state)
    exported, name = state_dict(model), "det_head.cls_score.bias"
    np.testing.assert_array_equal(exported[name], np.asarray(state.ema["head"]["cls_score"]["bias"][...]))
    assert not np.array_equal(exported[name], np.asarray(state.params["head"]["cls_score"]["bias"][...]))


@pytest.mark.parametrize("detector", ["retinanet", "fcos"])
def test_bfloat16_is_for_convolutions_alone(detector):
    """Parameters, gradients, optimiser, losses, head outputs and boxes stay float32; features do not."""
    config = override(SMALL, {"model.dtype": "bfloat16", "model.detector": detector, "train.ema": 0.9})
    state, step = start(config, None)
    floats = {x.dtype for x in jax.tree.leaves(jax.eval_shape(step, state, a_batch())) if x.dtype != np.int32}
    assert floats == {np.dtype(np.float32)}
    outputs = jax.eval_shape(build_model(config.model), a_batch()["images"])
    assert {x.dtype for x in outputs.features.values()} == {jax.numpy.bfloat16.dtype}
    for by_level in (outputs.cls, outputs.box, outputs.query):
        assert {x.dtype for x in by_level.values()} == {np.dtype(np.float32)}


def test_batch_that_does_not_divide_names_the_remedy():
    with pytest.raises(ConfigError, match="train.batch_size 3 does not divide over 2 devices; use 2 or 4"):
        check_batch_size(3)
    with pytest.raises(ConfigError, match="batch_size 6 .* 2 devices x train.accumulate 2; use 4 or 8"):
        check_batch_size(6, 2)
    for batch, accumulate, least in ((1, 1, 2), (3, 4, 8), (7, 4, 8)):  # fewer images than devices and parts
        with pytest.raises(ConfigError, match=rf"train.batch_size {batch} .*; use {least}$"):
            check_batch_size(batch, accumulate)
    for key, value in (("accumulate", 0), ("ema", 1.0), ("ema", -0.1)):
        with pytest.raises(ConfigError, match=f"train.{key} {value}: must be"):
            override(SMALL, {f"train.{key}": value})
