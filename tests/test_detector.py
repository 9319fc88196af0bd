"""The compiled detector: same detections whatever the capacities, the batch and the way of computing.

A small network with random weights and generated pictures; what it finds is compared with the dense
network's own maps, taken through the cascade, the decoding and the suppression of `cascade_oracle`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator

import cascade_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from querydet_jax import Detections, Detector, InferenceConfig, ModelConfig, build_model
from querydet_jax.config import BackboneConfig, FPNConfig, HeadConfig, QueryConfig
from querydet_jax.errors import ConfigError
from querydet_jax.models import RetinaNet

MODEL = ModelConfig(
    num_classes=3,
    max_level=6,
    backbone=BackboneConfig(name="resnet18", flavor="torchvision", width=32),
    fpn=FPNConfig(channels=16),
    head=HeadConfig(channels=16, num_convs=1),
    query=QueryConfig(channels=16, num_convs=2),
)
REACH = 3  # of the deepest stack: two layers and the prediction
BASE = InferenceConfig(
    threshold=0.65,
    context=1,
    capacities=(0.05, 0.25),
    chunk=16,
    score_threshold=0.15,
    topk=100,
    max_detections=50,
)


@pytest.fixture(scope="module", autouse=True)
def _compile_in_a_hurry() -> Iterator[None]:
    """Most programs here run once or twice; the main one is compiled with all optimisations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def randomize(model: RetinaNet, seed: int) -> RetinaNet:
    """Weights under which scores and query probabilities spread and boxes move."""
    rng = np.random.default_rng(seed)

    def draw(conv, gain: float, bias: float = 0.0) -> None:
        shape = conv.kernel[...].shape
        conv.kernel[...] = jnp.asarray(rng.normal(0, np.sqrt(gain / np.prod(shape[:3])), shape), jnp.float32)
        conv.bias[...] = jnp.asarray(rng.normal(bias, 0.1, shape[3:]), jnp.float32)

    # The random backbone's features are that large.
    for name, scale in {"lateral2": 8, "lateral3": 8, "lateral4": 5, "lateral5": 2, "p6": 2}.items():
        conv = getattr(model.fpn, name)
        conv.kernel[...] = conv.kernel[...] / scale
    for conv in [*model.head.cls_tower, *model.head.box_tower, *model.query_head.tower]:
        draw(conv, 2.0)
    draw(model.head.cls_score, 0.8, -2.0)
    draw(model.head.bbox_pred, 0.05)
    draw(model.query_head.pred, 6.0, -0.2)
    return model


@functools.cache
def model() -> RetinaNet:
    return randomize(build_model(MODEL, seed=0), seed=16)


def with_bias(conv_of: Callable[[RetinaNet], nnx.Module], value: float) -> RetinaNet:
    """A copy of the model whose convolution ``conv_of(model)`` has all biases at ``value``."""
    changed = nnx.clone(model())
    conv = conv_of(changed)
    conv.bias[...] = jnp.full_like(conv.bias[...], value)
    return changed


def with_query_bias(value: float) -> RetinaNet:
    """At 100 every cell fires, at -100 none."""
    return with_bias(lambda model: model.query_head.pred, value)


@contextlib.contextmanager
def updated(detector: Detector, changed: RetinaNet) -> Iterator[None]:
    """The detector with other weights for a while; nothing may be compiled for them."""
    before = detector.compilations()
    detector.update(changed)
    yield
    assert detector.compilations() == before
    detector.update(model())


@functools.cache
def detector(**changes) -> Detector:
    return Detector(model(), dataclasses.replace(BASE, **changes))


def pictures(batch: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Gray with coloured blocks on a share of the picture: none on the first, everywhere on the last."""
    rng = np.random.default_rng(seed)
    out = np.full((batch, height, width, 3), 118, np.uint8)
    for i in range(batch):
        blocks = rng.integers(0, 256, (-(-height // 6), -(-width // 6), 3), dtype=np.uint8)
        noise = blocks.repeat(6, 0).repeat(6, 1)[:height, :width]
        rows = height * i // max(batch - 1, 1)
        out[i, :rows] = noise[:rows]
    return out


FOUR = pictures(4, 64, 96)


@pytest.fixture(scope="module")
def csq(_compile_in_a_hurry) -> Detector:
    """The main detector, compiled as in use for a batch of four and of one."""
    jax.config.update("jax_disable_most_optimizations", False)
    detector()(FOUR)
    assert detector().compilations() == 1
    detector()(FOUR[:1])
    jax.config.update("jax_disable_most_optimizations", True)
    return detector()


def assert_same(result: Detections, expected: Detections) -> None:
    """The same boxes, classes and order; values to rounding."""
    np.testing.assert_array_equal(result.valid, expected.valid)
    np.testing.assert_array_equal(result.classes, expected.classes)
    np.testing.assert_allclose(result.scores, expected.scores, rtol=0, atol=1e-5)
    np.testing.assert_allclose(result.boxes, expected.boxes, rtol=1e-5, atol=1e-3)


def counts(result: Detections) -> dict[int, list[int]]:
    return {level: [int(x) for x in stats[:3]] for level, stats in result.stats.items()}


# Against the definition ------------------------------------------------------------------------


@functools.cache
def _features():
    return nnx.jit(lambda model, images: model.features(images))


def weights(stack) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(np.asarray(conv.kernel), np.asarray(conv.bias)) for conv in stack]


def reference(
    model: RetinaNet, images: np.ndarray, config: InferenceConfig, context: int | None = None
) -> tuple[list[cascade_oracle.Candidates], dict[int, list[int]]]:
    """What ``config`` should find in each image, and (queries, keys, active) by sparse level."""
    features = {level: np.asarray(x) for level, x in _features()(model, images).items()}
    everywhere = {level: np.ones(x.shape[:3], bool) for level, x in features.items()}
    heads = [weights(stack) for stack in model.head_stacks()]
    found, counts = [], {}
    if config.query == "csq":
        query = weights(model.query_head.stack())
        below = [level for level in range(config.start_level - 1, 1, -1)]
        start = cascade_oracle.run_stack(features[config.start_level], query, everywhere[config.start_level])
        levels = cascade_oracle.cascade(
            start[..., 0],
            [features[level] for level in below],
            heads,
            query,
            threshold=config.threshold,
            context=config.context if context is None else context,
        )
        for level, result in zip(below, levels, strict=True):
            found.append((level, result.outputs, result.keys))
            counts[level] = [int(result.fired.sum()), int(result.keys.sum()), int(result.active.sum())]
    for level, x in features.items():
        if level not in counts:
            outputs = [cascade_oracle.run_stack(x, head, everywhere[level]) for head in heads]
            found.append((level, outputs, everywhere[level]))
    detections = []
    for b in range(len(images)):
        parts = [
            cascade_oracle.candidates(
                cls[b], box[b], keys[b], level, topk=config.topk, score_threshold=config.score_threshold
            )
            for level, (cls, box), keys in found
        ]
        detections.append(
            cascade_oracle.suppress(parts, nms_iou=config.nms_iou, max_detections=config.max_detections)
        )
    return detections, counts


def assert_matches(result: Detections, expected: list[cascade_oracle.Candidates]) -> None:
    for b, image in enumerate(expected):
        valid = np.asarray(result.valid[b])
        assert valid.sum() == len(image.scores)
        np.testing.assert_array_equal(np.asarray(result.classes[b])[valid], image.classes)
        np.testing.assert_allclose(np.asarray(result.scores[b])[valid], image.scores, rtol=0, atol=1e-5)
        np.testing.assert_allclose(np.asarray(result.boxes[b])[valid], image.boxes, rtol=1e-5, atol=1e-3)


def test_csq_finds_what_the_definition_finds(csq):
    result = csq(FOUR)
    expected, expected_counts = reference(model(), FOUR, csq.config)
    assert counts(result) == expected_counts
    assert_matches(result, expected)
    # The example is worth testing: some cells fire on both levels, most do not.
    for level, (queries, _, active) in expected_counts.items():
        assert 0 < queries and active < 0.6 * 4 * (64 // 2**level) * (96 // 2**level)


def test_dense_finds_what_the_definition_finds():
    dense = detector(query="dense")
    result = dense(FOUR)
    assert_matches(result, reference(model(), FOUR, dense.config)[0])
    assert result.stats == {}


@pytest.mark.parametrize(("start_level", "context"), [(3, REACH), (5, 1), (6, 2)])
def test_start_levels(start_level, context):
    """P5 is 3x5 here and P6 2x3: children beyond P5's odd sides are dropped."""
    csq = detector(start_level=start_level, context=context)
    images = pictures(2, 96, 160, seed=1)
    result = csq(images)
    expected, expected_counts = reference(model(), images, csq.config)
    assert counts(result) == expected_counts
    assert list(result.stats) == list(range(start_level - 1, 1, -1))
    assert min(min(found) for found in expected_counts.values()) > 0
    assert_matches(result, expected)
    if start_level == 6:
        assert expected_counts[5][1] < 4 * expected_counts[5][0]
    if context == REACH:  # then the heads see at the keys what dense heads see
        assert_matches(result, reference(model(), images, csq.config, context=100)[0])


# What must not matter --------------------------------------------------------------------------


def test_capacities_and_chunk_do_not_matter(csq):
    result = csq(FOUR)
    ran = {level: [int(stats.capacity)] for level, stats in result.stats.items()}
    for changes in ({"capacities": (1.0,), "chunk": 64}, {"capacities": (0.01,)}):
        other = detector(**changes)(FOUR)
        assert_same(other, result)
        assert counts(other) == counts(result)
        for level, stats in other.stats.items():
            ran[level].append(int(stats.capacity))
            assert bool(stats.overflowed) == (int(stats.capacity) == 0)
    # Not thrice the same computation: each level has run on sites and densely.
    assert all(0 in capacities and max(capacities) > 0 for capacities in ran.values())


def test_a_batch_equals_its_images_one_by_one(csq):
    together = csq(FOUR)
    singles = [csq(FOUR[i : i + 1]) for i in range(4)]
    assert_same(together, jax.tree.map(lambda *parts: jnp.concatenate(parts), *[_without_stats(x) for x in singles]))
    for level, found in counts(together).items():
        apart = [counts(single)[level] for single in singles]
        assert np.sum(apart, axis=0).tolist() == found
        assert apart[0] == [0, 0, 0] and len({queries for queries, _, _ in apart}) > 2  # unequal crowding


def _without_stats(result: Detections) -> Detections:
    return dataclasses.replace(result, stats={})


def test_the_same_picture_gives_the_same_bits(csq):
    first = jax.tree.map(np.asarray, csq(FOUR))
    for _ in range(20):
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, csq(FOUR)), first)


def test_padding_and_floats_do_not_matter(csq):
    """A 50x70 picture, of floats and by itself, equals the same on a canvas beside larger ones."""
    canvas = pictures(4, 64, 96, seed=2)[::-1].copy()  # beyond its size, a picture's canvas holds rubbish
    sizes = np.array([[50, 70], [64, 96], [33, 96], [50, 70]], np.int32)
    result = csq(canvas, sizes)
    alone = detector()(canvas[[0, 3], :50, :70].astype(np.float32))
    assert_same(jax.tree.map(lambda x: x[jnp.array([0, 3])], _without_stats(result)), alone)
    filling = csq(canvas)
    np.testing.assert_allclose(result.scores[1], filling.scores[1], rtol=0, atol=1e-5)
    assert np.abs(np.asarray(result.scores - filling.scores)[[0, 2]]).max(axis=1).min() > 1e-3


# Extremes --------------------------------------------------------------------------------------


def test_without_queries_only_the_upper_levels_detect(csq):
    changed = with_query_bias(-100.0)
    with updated(csq, changed):
        result = csq(FOUR)
    expected, _ = reference(changed, FOUR, csq.config)
    assert_matches(result, expected)
    assert counts(result) == {3: [0, 0, 0], 2: [0, 0, 0]}
    assert not any(bool(stats.overflowed) for stats in result.stats.values())
    assert (csq(FOUR).scores != result.scores).any()  # the fine levels do add something


@pytest.mark.parametrize("changes", [{}, {"capacities": (1.0,), "chunk": 64}], ids=["dense rung", "on sites"])
def test_when_every_cell_fires_it_is_dense_inference(csq, changes):
    cells = {3: 4 * 8 * 12, 2: 4 * 16 * 24}
    everywhere = detector(**changes)
    everywhere(FOUR)
    with updated(everywhere, with_query_bias(100.0)):
        result = everywhere(FOUR)
    assert {level: found[1:] for level, found in counts(result).items()} == {l: [n, n] for l, n in cells.items()}
    assert_same(result, detector(query="dense")(FOUR))


def test_nothing_above_the_score_threshold(csq):
    with updated(csq, with_bias(lambda model: model.head.cls_score, -100.0)):
        result = csq(FOUR)
    assert not result.valid.any() and not result.scores.any() and not result.boxes.any()
    assert (result.classes == -1).all()


# The contract ----------------------------------------------------------------------------------


def test_fields(csq):
    for images in (FOUR, FOUR[:1]):
        result = csq(images)
        batch = len(images)
        assert (result.boxes.shape, result.boxes.dtype) == ((batch, 50, 4), jnp.float32)
        assert (result.scores.shape, result.scores.dtype) == ((batch, 50), jnp.float32)
        assert (result.classes.shape, result.classes.dtype) == ((batch, 50), jnp.int32)
        assert (result.valid.shape, result.valid.dtype) == ((batch, 50), jnp.bool_)
        assert list(result.stats) == [3, 2]
        for stats in result.stats.values():
            assert [x.dtype for x in stats] == [jnp.int32] * 4 + [jnp.bool_]
            assert all(x.shape == () for x in stats)
        valid, scores, classes = np.asarray(result.valid), np.asarray(result.scores), np.asarray(result.classes)
        assert (np.diff(valid.astype(int), axis=1) <= 0).all()  # the valid ones first
        assert (np.diff(scores, axis=1) <= 0).all()
        assert (scores[valid] > csq.config.score_threshold).all() and not scores[~valid].any()
        assert ((classes[valid] >= 0) & (classes[valid] < 3)).all() and (classes[~valid] == -1).all()
        assert np.isfinite(result.boxes).all() and not np.asarray(result.boxes)[~valid].any()
    assert valid.any() and not valid.all()  # the gray picture alone


def test_one_program_an_input_shape():
    dense = detector(query="dense")
    dense(FOUR)
    count = dense.compilations()
    dense(pictures(4, 64, 96, seed=9))
    dense(jnp.asarray(FOUR), np.array([[10, 20]] * 4))
    assert dense.compilations() == count
    dense(FOUR[:2])
    assert dense.compilations() == count + 1


def test_new_weights_count_only_after_update(csq):
    result = csq(FOUR)
    changed = nnx.clone(model())
    randomize(changed, seed=77)
    with updated(csq, changed):
        other = csq(FOUR)
        assert (other.scores != result.scores).any()
        # The detector has its own copy: training goes on without it.
        changed.head.cls_score.bias[...] = changed.head.cls_score.bias[...] - 1
        np.testing.assert_array_equal(csq(FOUR).scores, other.scores)
    np.testing.assert_array_equal(csq(FOUR).scores, result.scores)


def test_a_model_in_training_stays_so():
    config = dataclasses.replace(MODEL, backbone=BackboneConfig(name="resnet18", norm="batch", width=32))
    trained = build_model(config)
    norm = trained.backbone.stem.conv1.norm
    for mode, averages in ((trained.train, False), (trained.eval, True)):
        mode()
        Detector(trained, BASE)
        assert norm.use_running_average is averages


def test_trace_shows_what_the_stats_count(csq):
    trace = csq.trace(FOUR)
    assert list(trace.probability) == [4, 3] and list(trace.keys) == list(trace.active) == [3, 2]
    for level, (queries, keys, active) in counts(csq(FOUR)).items():
        above = np.asarray(trace.probability[level + 1])
        fired = above > csq.config.threshold
        assert above.shape == (4, 64 // 2 ** (level + 1), 96 // 2 ** (level + 1)) and above.dtype == np.float32
        assert fired.sum() == queries
        children = cascade_oracle.children(fired, (64 // 2**level, 96 // 2**level))
        np.testing.assert_array_equal(trace.keys[level], children)
        np.testing.assert_array_equal(trace.active[level], cascade_oracle.squares(children, csq.config.context))
        assert (children.sum(), np.asarray(trace.active[level]).sum()) == (keys, active)
    assert not np.asarray(trace.probability[3])[~np.asarray(trace.keys[3])].any()
    assert (np.asarray(trace.probability[3])[np.asarray(trace.keys[3])] > 0).all()


def test_rungs_compile_to_a_branch():
    """A select would compute every rung for every picture, also in a batch."""
    one_level = detector(start_level=3, capacities=(0.25,))
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        text = one_level.lower((2, 64, 96)).compile().as_text()
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
    assert text.count(" conditional(") == 1


# Errors ----------------------------------------------------------------------------------------


def test_a_model_without_query_head_is_refused():
    without = build_model(dataclasses.replace(MODEL, query=QueryConfig(enabled=False)))
    with pytest.raises(ConfigError, match="inference.query csq: this model has no query head; use .* dense"):
        Detector(without, BASE)
    Detector(without, dataclasses.replace(BASE, query="dense", start_level=2))


@pytest.mark.parametrize("start_level", [0, 2, 7])
def test_a_start_level_that_is_not_there_is_refused(start_level):
    with pytest.raises(ConfigError, match=rf"inference.start_level {start_level}: the model has P2..P6; choose"):
        Detector(model(), dataclasses.replace(BASE, start_level=start_level))


def test_dense_inference_has_no_trace():
    with pytest.raises(ConfigError, match="inference.query dense computes no queries; use inference.query csq"):
        detector(query="dense").trace(FOUR)


@pytest.mark.parametrize("shape", [(64, 96, 3), (1, 64, 96), (1, 3, 64, 96), (1, 64, 96, 4)])
def test_images_of_another_layout_are_refused(shape):
    with pytest.raises(ValueError, match=r"images must be \[B, H, W, 3\], got"):
        detector()(np.zeros(shape, np.uint8))
