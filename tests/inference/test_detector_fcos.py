"""QueryDet on FCOS: dense inference and CSQ against their definition, and against each other.

As `test_detector` for RetinaNet; the cascade is the same, the head, its decoding and its scores are not.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_detector import BASE, MODEL, REACH, assert_matches, assert_same, counts, pictures, randomize, reference

from querydet_jax import Detector, build_model
from querydet_jax.models import FCOS
from querydet_jax.runtime.errors import ConfigError
from querydet_jax.sparse import SparseOptions, cascade, masked_dense_stacks

FOUR = pictures(4, 64, 96)


@functools.cache
def fcos() -> FCOS:
    config = dataclasses.replace(MODEL, detector="fcos", min_level=2, max_level=6)
    model = build_model(config)
    assert isinstance(model, FCOS)
    randomize(model, seed=16)
    rng = np.random.default_rng(5)
    # Boxes of a few strides, some of whose right sides the ReLU cuts; centerness that reorders the scores of classes.
    model.head.bbox_pred.bias[...] = jnp.asarray([1.5, 1.0, 0.0, 2.0])
    model.head.ctrness.kernel[...] = jnp.asarray(rng.normal(0, 0.2, (3, 3, 16, 1)), jnp.float32)
    return model


@functools.cache
def detector(**changes) -> Detector:
    return Detector(fcos(), dataclasses.replace(BASE, score_threshold=0.3, **changes))


def test_dense_finds_what_the_definition_finds():
    dense = detector(query="dense")
    expected, _ = reference(fcos(), FOUR, dense.config)
    assert_matches(dense(FOUR), expected)
    assert min(len(image.scores) for image in expected[1:]) > 5


def test_csq_finds_what_the_definition_finds():
    """The masked dense convolution, whatever runs it: a ladder, on sites alone (``cap`` has no dense rung), densely."""
    csq = detector()
    expected, expected_counts = reference(fcos(), FOUR, csq.config)
    for changes in ({}, {"capacities": (0.8,), "overflow": "cap"}, {"capacities": (0.01,)}):
        result = detector(**changes)(FOUR)
        assert counts(result) == expected_counts
        assert_matches(result, expected)
        ran = [int(stats.capacity) for stats in result.stats.values()]
        assert {(0.8,): min(ran) > 0, (0.01,): max(ran) == 0}.get(changes.get("capacities", ()), True)
    for level, (queries, _, active) in expected_counts.items():
        assert 0 < queries and active < 0.7 * 4 * (64 // 2**level) * (96 // 2**level)


def test_tiles_find_what_single_cells_find():
    tiled = detector(capacities=(0.8,), kernel="tiles", tile=4, chunk=64)
    assert_same_detections(tiled(FOUR), detector()(FOUR))


@pytest.mark.slow  # a second look at what the definition says above
def test_with_all_the_context_that_heads_see_csq_equals_the_dense_heads_at_the_keys():
    images = pictures(2, 128, 160, seed=1)
    csq = detector(context=REACH)
    assert_matches(csq(images), reference(fcos(), images, csq.config, context=100)[0])
    assert_same_detections(csq(images), detector(query="ccq")(images))
    # Output by output: only the keys are read, and there nothing differs.
    model = fcos()
    pyramid = jax.jit(lambda images: model.features(images))(images)

    def to_maps(level, outputs, cells):
        return [cells.key_map(x, 0.0) for x in outputs]

    @jax.jit
    def run(images, coarse):
        stages = model.backbone(model.normalize(images))
        merged = model.fpn.merge(stages, 3)
        options = SparseOptions(BASE.threshold, REACH, (1.0,), 64)
        levels = [model.fpn.sparse_level(level, stages, merged) for level in (3, 2)]
        start, query = model.query_head(coarse), model.query_head.stack()
        return cascade(start, levels, model.head_stacks(), query, to_maps, options)

    results = run(images, pyramid[4])
    for level, result in zip((3, 2), results, strict=True):
        keys = np.asarray(result.keys)
        assert 0 < keys.sum() < keys.size
        for sparse, dense in zip(result.selected, model.dense_heads(pyramid[level]), strict=True):
            sparse = np.asarray(sparse).reshape(dense.shape)
            np.testing.assert_allclose(sparse[keys], np.asarray(dense)[keys], rtol=0, atol=2e-5)


def assert_same_detections(result, expected):
    assert_same(dataclasses.replace(result, stats={}), dataclasses.replace(expected, stats={}))
    assert np.asarray(expected.valid).any()


def test_stacks_are_the_dense_heads():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 7, 16)), jnp.float32)
    stacks = masked_dense_stacks(x, jnp.ones(x.shape[:3], bool), fcos().head_stacks())
    assert [stack.shape[-1] for stack in stacks] == [3, 5]
    for stack, dense in zip(stacks, fcos().dense_heads(x), strict=True):
        np.testing.assert_allclose(stack, dense, rtol=0, atol=1e-5)


def test_centerness_takes_part_in_the_score():
    changed = build_model(fcos().config)
    randomize(changed, seed=16)
    dense = Detector(changed, detector(query="dense").config)
    changed.head.ctrness.bias[...] = jnp.full((1,), -100.0)
    assert dense(FOUR).valid.any()
    dense.update(changed)
    assert not dense(FOUR).valid.any()


def test_group_norm_in_the_heads_is_for_dense_inference():
    head = dataclasses.replace(MODEL.head, channels=32, norm="group")
    model = build_model(dataclasses.replace(MODEL, detector="fcos", head=head))
    for query in ("csq", "cq", "ccq"):
        with pytest.raises(ConfigError, match=f"inference.query {query}: .* group norm, .*; use inference.query dense"):
            Detector(model, dataclasses.replace(BASE, query=query))
    assert model.head.cls_tower[0].norm is not None
    Detector(model, dataclasses.replace(BASE, query="dense"))(FOUR)
