"""Dense outputs and detections against those of the published code."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from order import as_recorded

import querydet_jax as qd
from querydet_jax.data.transforms import rescale_to_original
from querydet_jax.ops.anchors import cell_anchors, grid_anchors
from querydet_jax.ops.points import grid_points

pytestmark = pytest.mark.compiled_as_used

STEPS_CLS = {2: 10, 3: 5}  # the fixtures keep every 10th or 5th channel of the large maps
STEPS_BOX = {2: 4, 3: 2}


@pytest.fixture(scope="module")
def outputs(model, image_a):
    return jax.jit(lambda image: model(image))(image_a[None])


@pytest.mark.parametrize("level", range(2, 8))
def test_dense_logits_and_deltas(outputs, recorded, level):
    z = recorded("dense")
    for ours, name, step in ((outputs.cls, "cls", STEPS_CLS), (outputs.box, "box", STEPS_BOX)):
        x = np.asarray(ours[level][0])
        x = x.reshape(*x.shape[:2], -1).transpose(2, 0, 1)[:: step.get(level, 1)]
        np.testing.assert_allclose(x, z[f"p{level}_{name}"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("level", [3, 4])
def test_query_logits(outputs, recorded, level):
    np.testing.assert_allclose(outputs.query[level][0], recorded("dense")[f"p{level}_query"], atol=1e-4, rtol=0)


def test_features(outputs, recorded):
    z = recorded("dense")
    np.testing.assert_allclose(np.asarray(outputs.features[3][0]).transpose(2, 0, 1)[::32], z["p3"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(np.asarray(outputs.features[7][0]).transpose(2, 0, 1), z["p7"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("level", range(2, 8))
def test_anchors_and_query_points(outputs, recorded, level):
    z = recorded("dense")
    height, width = outputs.features[level].shape[1:3]
    anchors = grid_anchors(cell_anchors(4.0 * 2**level, 3, (0.5, 1.0, 2.0)), height, width, 2**level)
    step = {2: 97, 3: 31}.get(level, 1)
    np.testing.assert_allclose(np.asarray(anchors).reshape(-1, 4)[::step], z[f"p{level}_anchors"], atol=1e-4, rtol=0)
    if level in (3, 4):
        centers = np.asarray(grid_points(height, width, 2**level)).reshape(-1, 2)
        np.testing.assert_array_equal(centers, z[f"p{level}_query_centers"])


def test_dense_detections(model, config, image_a, recorded):
    z = recorded("dense")
    detect = qd.Detector(model, dataclasses.replace(config.inference, query="dense"))
    result = jax.device_get(detect(image_a[None]))
    valid = result.valid[0]
    found = result.boxes[0][valid], result.scores[0][valid], result.classes[0][valid]
    as_recorded(found, (z["det0_boxes"], z["det0_scores"], z["det0_classes"]), scores=1e-5, boxes=2e-3)

    boxes, scores, classes = rescale_to_original(
        result.boxes[0], result.scores[0], result.classes[0], valid, (120, 180), (240, 360)
    )
    np.testing.assert_array_equal(classes, z["post0_classes"])
    np.testing.assert_allclose(scores, z["post0_scores"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(boxes, z["post0_boxes"], atol=2e-3, rtol=1e-5)
