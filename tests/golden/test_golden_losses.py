"""Targets, losses and gradients against those of the published code."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from querydet_jax.weights import state_dict

SHAPES = [(32, 48), (16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]


@pytest.fixture(scope="module")
def step(model):
    graph, params, rest = nnx.split(model, model.trainable(), ...)

    @jax.jit
    def run(images, boxes, classes, sizes):
        def total(params):
            net = nnx.merge(graph, params, rest)
            losses = net.losses(images, boxes, classes, net.config.loss.normalizer_init, sizes)
            return losses.total, losses

        (_, losses), grads = jax.value_and_grad(total, has_aux=True)(params)
        return losses, grads

    return run


def of(case, batch):
    images, boxes, classes, sizes = batch
    if case == "empty":
        classes = np.stack([classes[0], np.full_like(classes[1], -1)])
    return images, boxes, classes, sizes


@pytest.mark.parametrize("case", ["main", "empty"])
def test_losses(step, batch, recorded, case):
    z = recorded("losses")
    losses, _ = step(*of(case, batch))
    assert losses.num_foreground == z[f"{case}_num_foreground"]
    for ours, name in (
        (losses.cls, "loss_cls"),
        (losses.box, "loss_box_reg"),
        (losses.query, "loss_query"),
        (losses.normalizer, "normalizer_after"),
    ):
        np.testing.assert_allclose(ours, z[f"{case}_{name}"], rtol=2e-5)
    sums = np.stack([losses.per_level["cls"], losses.per_level["box"]], axis=1)
    np.testing.assert_allclose(sums, z[f"{case}_per_level_sums"], rtol=2e-5, atol=1e-6)
    query = 10.0 * np.asarray(losses.per_level["query"])
    np.testing.assert_allclose(query, [z[f"{case}_p3_query_loss"], z[f"{case}_p4_query_loss"]], rtol=2e-5)


@pytest.mark.parametrize("case", ["main", "empty"])
def test_targets(model, batch, recorded, case):
    z = recorded("losses")
    _, boxes, classes, _ = of(case, batch)
    labels, targets = jax.jit(lambda b, c: model.targets(SHAPES, b, c))(boxes, classes)
    # Recorded level by level; background is class K there, ignored -1.
    splits = np.cumsum([h * w * 9 for h, w in SHAPES])[:-1]
    labels = np.concatenate([part.reshape(-1) for part in np.split(np.asarray(labels), splits, axis=1)])
    targets = np.concatenate([part.reshape(-1, 4) for part in np.split(np.asarray(targets), splits, axis=1)])
    translated = np.select([labels == -1, labels == -2], [10, -1], labels)
    np.testing.assert_array_equal(translated, z[f"{case}_gt_cls"])
    np.testing.assert_allclose(targets[labels >= 0], z[f"{case}_gt_reg_fg"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["main", "empty"])
@pytest.mark.parametrize("level", [3, 4])
def test_query_targets(model, batch, recorded, case, level):
    _, boxes, classes, _ = of(case, batch)
    shape = SHAPES[level - 2]
    ours = model.query_target(level, shape, jnp.asarray(boxes), jnp.asarray(classes))
    np.testing.assert_array_equal(np.asarray(ours).reshape(2, -1), recorded("losses")[f"{case}_p{level}_query_gt"])


def test_gradients(model, step, batch, recorded):
    z = recorded("losses")
    _, grads = step(*batch)
    graph, _, rest = nnx.split(model, model.trainable(), ...)
    by_name = state_dict(nnx.merge(graph, grads, rest))
    frozen = []
    for name, norm, head in zip(z["main_grad_names"], z["main_grad_norms"], z["main_grad_head"], strict=True):
        if norm < 0:
            frozen.append(name)
            continue
        gradient = by_name[str(name)].astype(np.float64)
        np.testing.assert_allclose(np.linalg.norm(gradient), norm, rtol=1e-3)
        first = gradient.reshape(-1)[:4]
        np.testing.assert_allclose(first, head[: len(first)], rtol=1e-2, atol=1e-3 * np.abs(gradient).max())
    # Every recorded gradient is matched; what the published code freezes has none here.
    assert len(jax.tree.leaves(grads)) == len(z["main_grad_names"]) - len(frozen) == 92
    assert all(".stem." in name or ".res2." in name for name in frozen)
