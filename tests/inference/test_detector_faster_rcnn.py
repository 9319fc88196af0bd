"""Faster R-CNN with CSQ in its RPN: both stages against their definition in loops, and against each other.

As `test_detector` for RetinaNet; the cascade is the same, what it feeds is not.
"""

from __future__ import annotations

import dataclasses
import functools

import cascade_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import roi_oracle
from small_detector import BASE, MODEL, assert_matches, assert_same, counts, features, pictures, weights

from querydet_jax import Detections, Detector, build_model
from querydet_jax.config import AnchorConfig, FasterRCNNConfig, FPNConfig, HeadConfig, InferenceConfig
from querydet_jax.models import FasterRCNN
from querydet_jax.sparse import SparseOptions, cascade

IMAGE = (64, 96)
FOUR = pictures(4, *IMAGE)
REACH = 2  # of the trunk's two layers; a branch sees its own cell only


@functools.cache
def model() -> FasterRCNN:
    """Weights that spread objectness, queries and classes, and move boxes."""
    config = dataclasses.replace(
        MODEL,
        detector="faster_rcnn",
        max_level=6,
        fpn=FPNConfig(channels=16, top_source="pool"),
        head=HeadConfig(channels=16, num_convs=2),
        anchors=AnchorConfig(scale=8.0, sizes_per_octave=1),
        faster_rcnn=FasterRCNNConfig(proposals=40, roi_size=3, channels=16),
    )
    made = build_model(config)
    assert isinstance(made, FasterRCNN) and made.query_head is not None
    rng = np.random.default_rng(16)
    for name, scale in {"lateral2": 8, "lateral3": 8, "lateral4": 5, "lateral5": 2}.items():
        conv = getattr(made.fpn, name)
        conv.kernel[...] = conv.kernel[...] / scale
    layers = [(conv, 2.0) for conv in made.head.trunk]
    layers += [(made.head.objectness, 4.0), (made.head.deltas, 0.05), (made.query_head.pred, 6.0)]
    head = made.box_head
    layers += [(head.fc1, 2.0), (head.fc2, 2.0), (head.cls_score, 6.0), (head.bbox_pred, 1.0)]
    for layer, gain in layers:
        shape = layer.kernel[...].shape
        layer.kernel[...] = jnp.asarray(rng.normal(0, np.sqrt(gain / np.prod(shape[:3])), shape), jnp.float32)
        layer.bias[...] = jnp.asarray(rng.normal(0, 0.1, shape[3:]), jnp.float32)
    return made


@functools.cache
def detector(**changes) -> Detector:
    return Detector(model(), dataclasses.replace(BASE, **{"score_threshold": 0.4, **changes}))


def reference(config: InferenceConfig) -> tuple[list[cascade_oracle.Candidates], dict[int, list[int]]]:
    """What ``config`` should find in each of the four pictures, and [queries, keys, active] by sparse level."""
    pyramid = {level: np.asarray(x, np.float64) for level, x in features(model(), FOUR).items()}
    proposals, stats = cascade_oracle.detect(
        pyramid,
        [weights(stack) for stack in model().head_stacks()],
        weights(model().query_head.stack()) if config.query == "csq" else None,
        start_level=config.start_level,
        threshold=config.threshold,
        context=config.context,
        topk=config.topk,
        score_threshold=-np.inf,
        nms_iou=model().config.faster_rcnn.proposal_iou,
        max_detections=model().config.faster_rcnn.proposals,
        candidates=roi_oracle.rpn_candidates(model(), IMAGE),
    )
    found = []
    for b, image in enumerate(proposals):
        maps = {level: x[b] for level, x in pyramid.items()}
        scores, boxes = roi_oracle.second_stage(model(), maps, image.boxes, IMAGE)
        chosen = scores > config.score_threshold
        classes = np.broadcast_to(np.arange(scores.shape[1])[None], scores.shape)
        candidates = cascade_oracle.Candidates(boxes[chosen], scores[chosen], classes[chosen])
        found.append(
            cascade_oracle.suppress([candidates], nms_iou=config.nms_iou, max_detections=config.max_detections)
        )
    return found, stats


def assert_same_detections(result: Detections, expected: Detections) -> None:
    assert_same(dataclasses.replace(result, stats={}), dataclasses.replace(expected, stats={}))
    assert np.asarray(expected.valid).any()


def test_dense_finds_what_the_definition_finds():
    dense = detector(query="dense")
    expected, _ = reference(dense.config)
    assert_matches(dense(FOUR), expected)
    assert min(len(image.scores) for image in expected[1:]) > 5


def test_csq_finds_what_the_definition_finds():
    """However it runs: a ladder, on sites alone (``cap`` has no dense rung), densely."""
    csq = detector()
    expected, expected_counts = reference(csq.config)
    for changes in ({}, {"capacities": (0.8,), "overflow": "cap"}, {"capacities": (0.01,)}):
        result = detector(**changes)(FOUR)
        assert counts(result) == expected_counts
        assert_matches(result, expected)
        ran = [int(stats.capacity) for stats in result.stats.values()]
        assert {(0.8,): min(ran) > 0, (0.01,): max(ran) == 0}.get(changes.get("capacities", ()), True)
    for level, (queries, _, active) in expected_counts.items():
        assert 0 < queries and active < 0.8 * 4 * (IMAGE[0] // 2**level) * (IMAGE[1] // 2**level)


def test_tiles_find_what_single_cells_find():
    tiled = detector(capacities=(0.8,), kernel="tiles", tile=4, chunk=64)
    assert_same_detections(tiled(FOUR), detector()(FOUR))


@pytest.mark.slow  # a second look at what the definition says above
def test_with_all_the_context_that_the_trunk_sees_csq_equals_the_dense_rpn_at_the_keys():
    images = pictures(2, 128, 160, seed=1)
    assert_same_detections(detector(context=REACH)(images), detector(query="ccq")(images))
    made = model()
    pyramid = jax.jit(lambda images: made.features(images))(images)

    def to_maps(level, outputs, cells):
        objectness, deltas = made.head.branches(jax.nn.relu(outputs[0]))
        return cells.key_map(jnp.concatenate([objectness, deltas], axis=1), 0.0)

    @jax.jit
    def run(images, coarse):
        stages = made.backbone(made.normalize(images))
        merged = made.fpn.merge(stages, 3)
        levels = [made.fpn.sparse_level(level, stages, merged) for level in (3, 2)]
        start, query = made.query_head(coarse), made.query_head.stack()
        options = SparseOptions(BASE.threshold, REACH, (1.0,), 64)
        return cascade(start, levels, made.head_stacks(), query, to_maps, options)

    results = run(images, pyramid[4])
    dense = jax.jit(lambda images: made(images))(images)
    for level, result in zip((3, 2), results, strict=True):
        keys = np.asarray(result.keys)
        assert 0 < keys.sum() < keys.size
        wanted = np.concatenate([dense.cls[level][..., 0], dense.box[level].reshape(*keys.shape, -1)], axis=-1)
        found = np.asarray(result.selected).reshape(wanted.shape)
        np.testing.assert_allclose(found[keys], wanted[keys], rtol=0, atol=2e-5)
        if result.query_logits is not None:
            logits = np.asarray(result.query_logits)
            np.testing.assert_allclose(logits[keys], np.asarray(dense.query[level])[keys], rtol=0, atol=2e-5)


def test_images_of_several_sizes_on_one_canvas():
    """Boxes are cut off at each image's own edge."""
    sizes = np.int32([[64, 96], [40, 96], [64, 50], [33, 33]])
    images = FOUR.copy()
    for image, (height, width) in zip(images, sizes, strict=True):
        image[height:], image[:, width:] = 0, 0
    found = jax.device_get(detector(query="dense")(images, sizes))
    for boxes, valid, (height, width) in zip(found.boxes, found.valid, sizes, strict=True):
        assert (boxes[valid] >= 0).all() and (boxes[valid] <= [width, height, width, height]).all()
    one = detector(query="dense")(images[3:], sizes[3:])
    np.testing.assert_allclose(one.boxes[0], found.boxes[3], atol=1e-3)


def test_without_queries_the_coarse_levels_remain():
    changed = build_model(model().config)
    assert isinstance(changed, FasterRCNN)
    csq = detector()
    before = csq.compilations()
    try:
        csq.update(changed)  # as built, every query probability is about one half, below the threshold
        result = csq(FOUR)
    finally:
        csq.update(model())
    assert counts(result) == {3: [0, 0, 0], 2: [0, 0, 0]} and np.isfinite(result.boxes).all()
    assert csq.compilations() == max(before, 1)
