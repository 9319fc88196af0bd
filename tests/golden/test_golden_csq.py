"""Cascade Sparse Query against the published code with spconv: children, active sites, outputs, detections."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from order import as_recorded

import querydet_jax as qd
from querydet_jax.sparse import SparseOptions, cascade

OPTIONS = SparseOptions(threshold=0.12, context=2, capacities=(0.1, 0.3, 1.0), chunk=64)


@pytest.fixture(scope="module")
def levels(model, image_a):
    """The cascade with head outputs put back on maps, to read at the recorded children."""

    def to_maps(level, outputs, cells):
        return [cells.key_map(x, jnp.nan) for x in outputs]

    @jax.jit
    def run(image):
        stages = model.backbone(model.normalize(image))
        merged = model.fpn.merge(stages, 3)
        start = model.query_head(model.fpn.output(4)(merged[4]))
        fine = [model.fpn.sparse_level(level, stages, merged) for level in (3, 2)]
        return start, cascade(start, fine, model.head_stacks(), model.query_head.stack(), to_maps, OPTIONS)

    start, results = jax.device_get(run(image_a[None]))
    return start, results


@pytest.mark.parametrize("position", [0, 1])
def test_children_and_active_sites(levels, recorded, position):
    z, result = recorded("csq"), levels[1][position]
    shape = z[f"lv{position}_active_shape"]
    active = np.unpackbits(z[f"lv{position}_active"])[: shape.prod()].reshape(shape).astype(bool)
    np.testing.assert_array_equal(result.active[0], active)
    keys = np.zeros(shape, bool)
    keys[z[f"lv{position}_ys"], z[f"lv{position}_xs"]] = True
    np.testing.assert_array_equal(result.keys[0], keys)
    queries, children, sites = z["counts"][position]
    assert (result.stats.queries, result.stats.keys, result.stats.active) == (queries, children, sites)


@pytest.mark.parametrize("position", [0, 1])
def test_head_outputs_at_the_children(levels, recorded, position):
    z, result = recorded("csq"), levels[1][position]
    y, x = z[f"lv{position}_ys"], z[f"lv{position}_xs"]
    for ours, name in zip(result.selected, ("cls", "box"), strict=True):
        np.testing.assert_allclose(ours[0, y, x], z[f"lv{position}_{name}"], atol=1e-4, rtol=0)
    if position == 0:
        np.testing.assert_allclose(result.query_logits[0, y, x], z["lv0_query"], atol=1e-4, rtol=0)
        np.testing.assert_allclose(levels[0][0].reshape(-1), z["lv0_in_query_logits"], atol=1e-4, rtol=0)


def compare(result, z, prefix):
    valid = result.valid[0]
    found = result.boxes[0][valid], result.scores[0][valid], result.classes[0][valid]
    recorded = z[f"{prefix}_boxes"], z[f"{prefix}_scores"], z[f"{prefix}_classes"]
    as_recorded(found, recorded, scores=1e-5, boxes=2e-3)


@pytest.mark.parametrize(
    "capacities",
    # The second runs on sites alone, as the fixture does; inference/test_detector compares capacities, too.
    [(0.05, 0.25), pytest.param((1.0,), marks=pytest.mark.slow), (0.001,)],
)
def test_detections_at_any_capacity(model, config, image_a, recorded, capacities):
    detect = qd.Detector(model, dataclasses.replace(config.inference, capacities=capacities))
    compare(jax.device_get(detect(image_a[None])), recorded("csq"), "det")


def test_without_context(model, config, image_b, recorded):
    z = recorded("csq_variants")
    result = jax.device_get(qd.Detector(model, dataclasses.replace(config.inference, context=0))(image_b[None]))
    compare(result, z, "ctx0_det")
    counts = [[result.stats[level].queries, result.stats[level].keys, result.stats[level].active] for level in (3, 2)]
    np.testing.assert_array_equal(counts, z["ctx0_counts"])


def test_no_query_fires(model, config, image_b, recorded):
    detect = qd.Detector(model, dataclasses.replace(config.inference, threshold=0.9999))
    result = jax.device_get(detect(image_b[None]))
    compare(result, recorded("csq_variants"), "thr0.9999_det")
    assert result.stats[3].active == result.stats[2].active == 0
