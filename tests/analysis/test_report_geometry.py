"""Best anchors and query cells against the operations of training and inference."""

from __future__ import annotations

import cascade_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_detector import BASE, MODEL, model, pictures

from querydet_jax.analysis.anchors import best_anchor_iou
from querydet_jax.analysis.queries import (
    Demand,
    _margin,
    demand,
    held,
    query_maps,
    query_shares,
    sparse_levels,
    suggested_capacities,
)
from querydet_jax.analysis.views import Truth, inference_view, training_view, unfit_for_training
from querydet_jax.config import AnchorConfig, Config, DataConfig
from querydet_jax.evaluation.metrics import DEFAULT_BINS
from querydet_jax.inference.pipeline import make_pyramid
from querydet_jax.models.anchored import level_anchors
from querydet_jax.ops.anchors import grid_anchors, level_shape
from querydet_jax.ops.boxes import pairwise_iou
from querydet_jax.ops.matching import query_targets
from querydet_jax.sparse import CascadeLevel

LEVELS = (2, 3, 4, 5, 6, 7)


def random_boxes(rng: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
    """Boxes of all scales and shapes, some at the edge, some centred on corners of cells, clipped to the image."""
    centers = rng.uniform((0, 0), (width, height), (count, 2))
    centers[::3] = np.round(centers[::3] / 8) * 8
    sides = np.exp(rng.uniform(np.log(1), np.log(300), (count, 2)))
    boxes = np.concatenate([centers - sides / 2, centers + sides / 2], axis=1)
    boxes = np.clip(boxes, 0, [width, height, width, height])
    return np.float32(boxes[((boxes[:, 2:] - boxes[:, :2]) > 0.5).all(axis=1)])


def test_best_anchor_against_all_anchors():
    anchors = AnchorConfig(scale=3.0, sizes_per_octave=2, ratios=(0.5, 1.0, 3.0))
    height, width = 96, 288
    boxes = random_boxes(np.random.default_rng(0), 100, height, width)
    found = best_anchor_iou(boxes, np.full((len(boxes), 2), (height, width)), anchors, LEVELS)

    @jax.jit
    def brute(boxes: jax.Array) -> jax.Array:
        grids = [grid_anchors(level_anchors(anchors, n), *level_shape(height, width, n), 2**n) for n in LEVELS]
        return jnp.stack([pairwise_iou(boxes[:, None], g.reshape(1, -1, 4)).max(axis=1) for g in grids], axis=1)

    best = np.asarray(brute(boxes))
    assert found.dtype == np.float32 and found.shape == (len(boxes), 6)
    np.testing.assert_allclose(found, best, rtol=0, atol=1e-6)
    assert (best.max(axis=1) < 0.4).any() and (best.max(axis=1) > 0.5).any()


@pytest.mark.parametrize("radius", ["object", "level"])
def test_query_cells_equal_the_training_targets(radius):
    rng = np.random.default_rng(1)
    boxes = [random_boxes(rng, count, 96, 128) for count in (40, 40, 4)] + [np.zeros((0, 4), np.float32)]
    boxes[1] = np.round(boxes[1])
    boxes[1][:10] = boxes[1][10:20] + np.float32([-2, -2, 2, 2])  # equally near and larger: the first counts
    owner = np.repeat(np.arange(4), [len(b) for b in boxes])
    for stride, scale_range, factor in ((4, (0.0, 16.0), 1.0), (8, (6.0, 32.0), 1.7), (16, (0.0, 64.0), 0.5)):
        height, width = 96 // stride, 128 // stride
        rule = dict(scale_range=scale_range, radius=radius, factor=factor)
        found = query_maps(np.concatenate(boxes), owner, (4, height, width), stride, **rule)
        wanted = np.stack(
            [query_targets(height, width, stride, jnp.asarray(b), jnp.zeros(len(b), int), **rule) for b in boxes]
        )
        np.testing.assert_array_equal(found, wanted)
        assert 0 < wanted[2].mean() < 1


DATA = DataConfig(
    train_short=(64, 96),
    train_max=160,
    train_canvases=((64, 96),),
    crop=True,
    test_short=64,
    test_max=128,
    test_canvases=((64, 96), (128, 128)),
)
CONFIG = Config(model=MODEL, data=DATA, inference=BASE)
# The third fits no test canvas.
SIZES = np.array([(128, 192), (100, 100), (90, 400), (128, 192), (64, 128)], np.int32)


def truth() -> Truth:
    rng = np.random.default_rng(2)
    boxes = [random_boxes(rng, 8 if i else 0, *size) for i, size in enumerate(SIZES.tolist())]
    image = np.repeat(np.arange(len(SIZES)), [len(b) for b in boxes])
    return Truth(SIZES, np.concatenate(boxes), np.zeros(len(image), np.int32), image, np.zeros(5, np.int64), 0)


def test_views():
    view = inference_view(truth(), DATA)
    assert view.shapes.tolist() == [[64, 96], [64, 64], [29, 128], [64, 96], [64, 128]]
    assert view.canvas.tolist() == [0, 0, 1, 0, 1]
    assert view.inputs.tolist() == [[64, 96], [64, 96], [128, 128], [64, 96], [128, 128]]
    last = truth().image == 1
    np.testing.assert_allclose(view.boxes[last], truth().boxes[last] * 0.64, rtol=1e-6)
    view = training_view(truth(), DATA, seed=0)
    drawn = view.shapes.min(axis=1)
    assert {64, 96} == set(drawn[[0, 1, 3]].tolist())
    whole = view.canvas < 0  # larger than the canvas: the whole image, padded
    assert (whole == ((view.shapes > (64, 96)).any(axis=1))).all()
    assert (view.inputs[whole] % 32 == 0).all() and (view.inputs >= view.shapes).all()
    # At 96 px no image fits; at 64 px all but the third and the last do.
    assert unfit_for_training(truth(), DATA) == 5


def test_demand_against_the_cascade_by_its_definition():
    """Compare with ground-truth queries, their children and squares around them in NumPy loops."""
    given, view = truth(), inference_view(truth(), DATA)
    images = np.array([0, 1, 3, 4])
    asked = demand(given, view, images, CONFIG, DEFAULT_BINS)
    assert list(asked) == [3, 2] == list(sparse_levels(CONFIG))
    shares = query_shares(given, view, MODEL, (4, 3, 2))
    hits = dict.fromkeys(asked, 0)
    for row, i in enumerate(images):
        boxes = view.boxes[given.image == i]
        height, width = view.inputs[i]
        targets = {
            level: np.asarray(
                query_targets(
                    height // 2**level, width // 2**level, 2**level, jnp.asarray(boxes), jnp.zeros(len(boxes), int),
                    scale_range=(0.0, 4.0 * 2**level),
                )
            )[None]
            for level in (2, 3, 4)
        }  # fmt: skip
        keys = None
        for level, of_level in asked.items():
            assert shares[level][i] == pytest.approx(targets[level].mean())
            above = targets[level + 1] if keys is None else targets[level + 1] & keys
            keys = cascade_oracle.children(above, (height // 2**level, width // 2**level))
            for context in range(6):
                square = cascade_oracle.squares(keys, context).mean()
                assert of_level.active[row, context] == pytest.approx(square)
            # The finest level computes its input one cell beyond the active ones.
            ring = cascade_oracle.squares(keys, BASE.context + (level == 2)).mean()
            assert of_level.room[row] == pytest.approx(ring)
            centers = ((boxes[:, :2] + boxes[:, 2:]) / 2 / 2**level).astype(int)
            hits[level] += keys[0, centers[:, 1], centers[:, 0]].sum()
    for level, of_level in asked.items():
        assert of_level.hits[:5].sum() == hits[level]
        assert of_level.totals[:5].sum() == np.isin(given.image, images).sum()
        assert of_level.active[0].sum() == of_level.room[0] == 0  # no boxes
    assert 0 < hits[2] <= hits[3]


def test_margins_equal_the_models():
    network, images, sizes = model(), jnp.asarray(pictures(1, 64, 96)), jnp.asarray([[64, 96]])

    def levels() -> dict[int, CascadeLevel]:
        pyramid = make_pyramid(network, BASE, images, sizes)
        return {level: network.fpn.sparse_level(level, pyramid.stages, pyramid.merged) for level in (2, 3)}

    margins = {level: made.margin for level, made in jax.eval_shape(levels).items()}
    assert margins == {level: _margin(MODEL, level) for level in (2, 3)} == {2: 1, 3: 0}


def test_capacities_hold_what_they_promise():
    def asks(*room: float) -> Demand:
        return Demand(np.zeros((len(room), 6)), np.array(room), np.zeros(1, np.int64), np.zeros(1, np.int64))

    # The larger values of the two levels are .0101 .2 .3 .4
    demands = {3: asks(0.0101, 0.1, 0.3, 0.2), 2: asks(0.01, 0.2, 0.1, 0.4)}
    assert suggested_capacities(demands) == (0.2, 0.4)
    assert suggested_capacities(demands, (0.25, 0.5)) == (0.011, 0.2)
    assert [held(demands, c) for c in (0.011, 0.2, 0.4)] == [0.25, 0.5, 1.0]
    assert suggested_capacities({3: asks(0, 0, 0)}) == (0.001,)
    assert suggested_capacities({3: asks(1, 0.99999, 1)}) == (1.0,)
