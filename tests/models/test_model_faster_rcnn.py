"""Training of Faster R-CNN: losses of both stages written out, samples, finite values for any truth."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from truths import IMAGES, LEARNT, TRUTHS, assert_finite, losses_and_gradients

from querydet_jax.models import Candidates, FasterRCNN
from querydet_jax.models.anchored import pyramid_anchors
from querydet_jax.models.faster_rcnn import FasterRCNNLosses
from querydet_jax.models.loss_terms import query_scale_range
from querydet_jax.models.second_stage import sample_proposals
from querydet_jax.weights import state_dict

SHAPES = {3: (8, 12), 4: (4, 6), 5: (2, 3), 6: (1, 2)}
BOXES = np.zeros((2, 5, 4), np.float32)
BOXES[0, :3] = [[10, 10, 34, 30], [60, 5, 68, 15], [20, 30, 80, 64]]
BOXES[1, [1, 4]] = [[40, 40, 50, 52], [0, 0, 90, 60]]
CLASSES = np.array([[0, 2, 1, -1, -1], [-1, 1, -1, -1, 0]], np.int32)


@pytest.fixture(scope="module")
def compute(small_faster_rcnn: FasterRCNN) -> Any:
    return losses_and_gradients(small_faster_rcnn)


@pytest.mark.parametrize("name", list(TRUTHS))
def test_losses_and_gradients_are_finite(compute: Any, name: str) -> None:
    losses, gradients = compute(*TRUTHS[name])
    assert_finite(losses, gradients)
    assert float(losses.rpn_cls) > 0
    learnt = name not in ("no boxes", "nothing to learn")
    assert (float(losses.rpn_box) > 0) == np.any(gradients["head"]["deltas"]["kernel"][...]) == learnt
    # Every object is itself a proposal, wherever it is.
    assert (float(losses.num_foreground) > 0) == (name != "no boxes")
    for layer in (gradients["head"]["trunk"][0], gradients["box_head"]["fc1"], gradients["query_head"]["pred"]):
        assert np.any(layer["kernel"][...])


def test_a_nan_box_is_not_an_object(compute: Any) -> None:
    with_nan, _ = compute(*TRUTHS["a box that is no number"])
    without, _ = compute([[(0.0,) * 4], [LEARNT]], [[-1], [0]])
    for a, b in zip(jax.tree.leaves(with_nan), jax.tree.leaves(without), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def cross_entropy(logits: np.ndarray, target: np.ndarray) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    return np.logaddexp(0.0, logits) - logits * target


def smooth_l1(difference: np.ndarray, beta: float) -> np.ndarray:
    size = np.abs(np.asarray(difference, np.float64))
    return np.where(size < beta, 0.5 * size**2 / beta, size - 0.5 * beta)


def test_losses_written_out(small_faster_rcnn: FasterRCNN, compute: Any) -> None:
    """Samples that include everything are not random: sum over all anchors, and over all proposals and objects."""
    model, config = small_faster_rcnn, small_faster_rcnn.config
    beta, weights = config.loss.smooth_l1_beta, np.array([1.0, 1.5, 2.0, 4.0])
    graph, state = nnx.split(model)

    @jax.jit
    def parts(state: Any) -> Any:
        net = nnx.merge(graph, state)
        out, sizes = net(IMAGES), jnp.asarray([[64, 96]] * 2)
        anchors = pyramid_anchors(config.anchors, SHAPES)
        matched = [net.rpn_targets(anchors, *row) for row in zip(jnp.asarray(BOXES), jnp.asarray(CLASSES), strict=True)]
        proposals = net.proposals(net._whole_level_candidates(out, config.faster_rcnn.train_topk), sizes)
        key = jax.random.key(5)
        sampled = [
            sample_proposals(*row, key, config=config.faster_rcnn, num_classes=3)
            for row in zip(proposals.boxes, proposals.valid, jnp.asarray(BOXES), jnp.asarray(CLASSES), strict=True)
        ]
        sampled = jax.tree.map(lambda *x: jnp.stack(x), *sampled)
        probability, deltas = net.classify(out.features, sampled.boxes, sampled.valid)
        return out, anchors, matched, proposals, sampled, probability, deltas

    out, anchors, matched, proposals, sampled, probability, deltas = jax.device_get(parts(state))
    losses, _ = compute(BOXES, CLASSES)

    rpn_cls, rpn_box, start = np.zeros(4), np.zeros(4), 0
    for position, level in enumerate(SHAPES):
        objectness, moved = out.cls[level].reshape(2, -1), out.box[level].reshape(2, -1, 4)
        end = start + objectness.shape[1]
        for b, (labels, box) in enumerate(matched):
            labels, mine = labels[start:end], anchors[start:end]
            rpn_cls[position] += cross_entropy(objectness[b], labels >= 0)[labels != -2].sum()
            truth = BOXES[b][box[start:end]]
            extent = mine[:, 2:] - mine[:, :2]
            shift = ((truth[:, :2] + truth[:, 2:]) - (mine[:, :2] + mine[:, 2:])) / 2 / extent
            with np.errstate(divide="ignore"):
                target = np.concatenate([shift, np.log((truth[:, 2:] - truth[:, :2]) / extent)], axis=1)
            rpn_box[position] += smooth_l1((moved[b] - target)[labels >= 0], beta).sum()
        start = end
    assert start == 384 and rpn_box.min() >= 0 and (rpn_box > 0).sum() > 1
    np.testing.assert_allclose(losses.per_level["rpn_cls"], rpn_cls, rtol=1e-5)
    np.testing.assert_allclose(losses.per_level["rpn_box"], rpn_box, rtol=1e-4)
    assert float(losses.rpn_cls) == pytest.approx((weights * rpn_cls).sum() / 1600, rel=1e-5)
    assert float(losses.rpn_box) == pytest.approx((weights * rpn_box).sum() / 1600, rel=1e-4)

    # All proposals and all five objects, each object its own match.
    assert sampled.valid.sum() == proposals.valid.sum() + 5 and 40 < proposals.valid.sum() <= 80
    foreground = sampled.valid & (sampled.labels < 3)
    assert 5 <= foreground.sum() == float(losses.num_foreground) < sampled.valid.sum()
    chosen = np.take_along_axis(probability, sampled.labels[..., None], axis=-1)[..., 0]
    assert float(losses.cls) == pytest.approx(-np.log(chosen)[sampled.valid].mean(), rel=1e-4)
    mine = np.take_along_axis(deltas, np.minimum(sampled.labels, 2)[..., None, None], axis=2)[:, :, 0]
    difference = (mine - sampled.deltas)[foreground]
    assert float(losses.box) == pytest.approx(smooth_l1(difference, beta).sum() / sampled.valid.sum(), rel=1e-4)
    terms = losses.terms()
    assert list(terms) == ["rpn_cls", "rpn_box", "cls", "box", "query"]
    assert float(losses.total) == pytest.approx(float(sum(terms.values())), rel=1e-6)
    assert float(losses.query) == pytest.approx(
        (np.array([10, 5]) * np.asarray(losses.per_level["query"])).sum(), rel=1e-5
    )


def test_sampled_proposals_have_the_best_object_and_weighted_deltas(small_faster_rcnn: FasterRCNN) -> None:
    config = dataclasses.replace(small_faster_rcnn.config.faster_rcnn, roi_samples=8, roi_foreground=0.5)
    objects = jnp.asarray([[10.0, 10, 30, 30], [0, 0, 0, 0], [40, 10, 60, 50]])
    proposals = jnp.asarray([[12.0, 10, 32, 30], [38, 12, 58, 50], [0, 0, 9, 9], [70, 70, 80, 80], [0, 0, 0, 0]])
    valid = jnp.asarray([True, True, True, False, False])
    run = partial(sample_proposals, config=config, num_classes=3)
    found = jax.device_get(jax.jit(run)(proposals, valid, objects, jnp.asarray([2, -1, 0]), jax.random.key(0)))
    assert found.valid.tolist() == [True] * 5 + [False] * 3
    rows = {
        tuple(box): (label, delta) for box, label, delta in zip(found.boxes, found.labels, found.deltas, strict=True)
    }
    label, delta = rows[12, 10, 32, 30]
    assert label == 2
    np.testing.assert_allclose(delta, [10 * -2 / 20, 0, 0, 0], atol=1e-6)
    label, delta = rows[38, 12, 58, 50]
    assert label == 0
    np.testing.assert_allclose(delta, [10 * 2 / 20, 10 * -1 / 38, 0, 5 * np.log(40 / 38)], rtol=1e-5, atol=1e-6)
    assert rows[0, 0, 9, 9][0] == 3 and rows[10, 10, 30, 30][0] == 2  # background; an object is its own match
    assert not found.deltas[(found.labels == 3) | ~found.valid].any()


def test_no_rows_equal_rows_of_padding(small_faster_rcnn: FasterRCNN, compute: Any) -> None:
    graph, state = nnx.split(small_faster_rcnn)
    none = jax.jit(
        lambda state: nnx.merge(graph, state).losses(
            IMAGES, np.zeros((2, 0, 4), np.float32), np.zeros((2, 0), np.int32), 300.0
        )
    )(state)
    padded, _ = compute(*TRUTHS["no boxes"])
    assert float(none.normalizer) == 300.0
    for a, b in zip(jax.tree.leaves(none), jax.tree.leaves(padded), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_replicas_draw_what_one_device_draws(small_faster_rcnn: FasterRCNN) -> None:
    """Small samples of many anchors, so that the key decides."""
    few = dataclasses.replace(small_faster_rcnn.config.faster_rcnn, rpn_samples=16, roi_samples=16)
    graph, state = nnx.split(small_faster_rcnn)

    def losses(
        images: Any, boxes: Any, classes: Any, keys: Any, axis_name: str | None, remat: bool = False
    ) -> FasterRCNNLosses:
        net = nnx.merge(graph, state)
        net.config = dataclasses.replace(net.config, faster_rcnn=few)
        return net.losses(images, boxes, classes, 100.0, None, axis_name, keys=keys, remat=remat)

    keys = [jax.random.split(jax.random.key(seed), 2) for seed in (1, 2)]
    one = jax.jit(partial(losses, axis_name=None))
    first, second = (one(IMAGES, BOXES, CLASSES, key) for key in keys)
    assert float(first.rpn_cls) != float(second.rpn_cls) and float(first.cls) != float(second.cls)
    mapped = jax.pmap(partial(losses, axis_name="devices"), axis_name="devices")
    both = mapped(IMAGES[:, None], BOXES[:, None], CLASSES[:, None], keys[0][:, None])
    again = jax.jit(partial(losses, axis_name=None, remat=True))(IMAGES, BOXES, CLASSES, keys[0])
    for name in ("rpn_cls", "rpn_box", "cls", "box", "query", "num_foreground"):
        np.testing.assert_allclose(np.mean(getattr(both, name)), getattr(first, name), rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(getattr(again, name), getattr(first, name), rtol=1e-5, err_msg=name)


def test_proposals_are_in_the_image_and_not_empty(small_faster_rcnn: FasterRCNN) -> None:
    boxes = np.float32([[-20, -5, 40, 30], [50, 10, 300, 90], [200, 10, 300, 40], [np.nan, 0, 9, 9], [5, 5, 5, 20]])
    boxes = np.concatenate([boxes, [[-19, -5, 40, 30], [-19, -5, 40, 30]]]).astype(np.float32)
    found = Candidates(boxes[None], np.float32([[3, 2, 9, 9, 9, 1, 0]]), np.int32([[3, 3, 3, 3, 3, 3, 4]]))
    kept = jax.device_get(jax.jit(small_faster_rcnn.proposals)(found, np.int32([[64, 96]])))
    assert kept.boxes.shape == (1, 40, 4)
    # The sixth overlaps the first; so does the seventh, on another level.
    assert kept.boxes[0][kept.valid[0]].tolist() == [[0, 0, 40, 30], [50, 10, 96, 64], [0, 0, 40, 30]]
    assert kept.scores[0][:4].tolist() == [3, 2, 0, -np.inf]


def test_outputs_query_scales_and_names(small_faster_rcnn: FasterRCNN) -> None:
    out = jax.jit(lambda images: small_faster_rcnn(images))(IMAGES)
    for level, (height, width) in SHAPES.items():
        assert out.cls[level].shape == (2, height, width, 3, 1) and out.box[level].shape == (2, height, width, 3, 4)
    assert {level: x.shape for level, x in out.query.items()} == {3: (2, 8, 12), 4: (2, 4, 6)}
    np.testing.assert_array_equal(out.features[6], out.features[5][:, ::2, ::2])
    # s_l: the anchor's size, here of 2 strides.
    assert [query_scale_range(small_faster_rcnn.config, level) for level in (3, 4)] == [(0.0, 16.0), (0.0, 32.0)]
    np.testing.assert_allclose(
        out.query[3], jax.jit(lambda x: small_faster_rcnn.query_head(x))(out.features[3]), atol=1e-5
    )
    names = [name for name in state_dict(small_faster_rcnn) if "fpn" not in name and "pixel" not in name]
    layers = ["conv.conv0", "objectness_logits", "anchor_deltas"]
    heads = ["box_head.fc1", "box_head.fc2", "box_predictor.cls_score", "box_predictor.bbox_pred"]
    assert sorted(names) == sorted(
        f"{layer}.{leaf}"
        for layer in [
            *(f"proposal_generator.rpn_head.{layer}" for layer in layers),
            *(f"roi_heads.{layer}" for layer in heads),
            "query_head.pred_net",
        ]
        for leaf in ("weight", "bias")
    )
