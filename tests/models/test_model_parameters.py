"""Parameters of the published networks: number, training, initialisation."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from querydet_jax.config import BackboneConfig, FPNConfig, HeadConfig, LossConfig, ModelConfig, QueryConfig
from querydet_jax.models import DenseDetector, build_model
from querydet_jax.weights.names import to_torch_layout, torch_name

STATISTICS = json.loads((Path(__file__).parents[1] / "golden" / "init_stats.json").read_text())
TINY = ModelConfig(
    num_classes=3,
    backbone=BackboneConfig(name="resnet18", width=32),
    fpn=FPNConfig(channels=16),
    head=HeadConfig(channels=16, num_convs=1),
    query=QueryConfig(channels=16, num_convs=1),
)


@pytest.fixture(scope="module")
def querydet() -> DenseDetector:
    return build_model(ModelConfig(), seed=0)


def names(model: DenseDetector, *filters) -> dict[str, np.ndarray]:
    """Return {official name: value in torch layout}."""
    found = nnx.to_flat_state(nnx.state(model, *filters))
    query = model.query_head is not None
    return {torch_name(path, query): to_torch_layout(np.asarray(v[...]), path) for path, v in found}


def test_querydet_trains_the_published_parameters(querydet: DenseDetector) -> None:
    trained = names(querydet, querydet.trainable())
    assert len(trained) == 92
    assert sum(x.size for x in trained.values()) == STATISTICS["n_trainable"] == 40_711_669
    assert sorted(trained) == sorted(STATISTICS["trainable"])
    frozen = names(querydet, nnx.All(nnx.Param, nnx.Not(querydet.trainable())))
    assert sorted(frozen) == sorted(STATISTICS["frozen_params"])
    total = sum(x.size for x in trained.values()) + sum(x.size for x in frozen.values())
    assert total == STATISTICS["n_total_params"]


def test_retinanet_trains_the_published_parameters() -> None:
    config = ModelConfig(min_level=3, query=QueryConfig(enabled=False), loss=LossConfig(level_weighting="uniform"))
    model = nnx.eval_shape(lambda: build_model(config))
    assert model.query_head is None
    trained = nnx.state(model, model.trainable())
    assert sum(math.prod(v.shape) for _, v in nnx.to_flat_state(trained)) == STATISTICS["rn_n_trainable"] == 37_693_172


def test_parameters_start_as_the_published_constructors_start_them(querydet: DenseDetector) -> None:
    ours, theirs = names(querydet), STATISTICS["init"]
    assert sorted(ours) == sorted(theirs)
    drawn = 0
    for name, (shape, mean, std, largest) in theirs.items():
        x = ours[name].astype(np.float64)
        assert list(x.shape) == shape, name
        if std < 1e-6 or name.startswith("pixel"):  # constants, as far as float32 averages tell
            np.testing.assert_allclose(
                [x.mean(), x.std(), np.abs(x).max()], [mean, std, largest], atol=1e-5, err_msg=name
            )
            continue
        # Allow five standard errors of the difference of two samples. The largest value distinguishes a
        # uniform distribution (1.7 standard deviations) from a normal one (above 3).
        drawn += 1
        assert abs(x.mean() - mean) < 5 * std * math.sqrt(2 / x.size), name
        assert abs(x.std() / std - 1) < 5 / math.sqrt(x.size), name
        assert 1 / 1.5 < np.abs(x).max() / largest < 1.5, name
    # Convolutions of the backbone (53), FPN (10), heads (10) and query head (5), and one bias.
    assert drawn == 79


def test_a_box_bias_may_start_at_zero() -> None:
    config = dataclasses.replace(TINY, head=dataclasses.replace(TINY.head, box_bias="zero"))
    zero, torch = build_model(config), build_model(TINY)
    assert not np.any(zero.head.bbox_pred.bias[...])
    assert np.any(torch.head.bbox_pred.bias[...])


def test_the_prior_sets_the_class_bias() -> None:
    config = dataclasses.replace(TINY, head=dataclasses.replace(TINY.head, prior=0.1))
    bias = np.asarray(build_model(config).head.cls_score.bias[...])
    np.testing.assert_allclose(1 / (1 + np.exp(-bias)), np.full(27, 0.1), rtol=1e-5)


def test_the_seed_decides() -> None:
    a, b, c = (names(build_model(TINY, seed)) for seed in (3, 3, 4))
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])
    different = {name for name in a if not np.array_equal(a[name], c[name])}
    assert different == {name for name, x in a.items() if x.ndim == 4} | {"det_head.bbox_pred.bias"}


@pytest.mark.parametrize("freeze_at", [0, 1, 2, 5])
def test_freeze_at(freeze_at: int) -> None:
    config = dataclasses.replace(TINY, backbone=dataclasses.replace(TINY.backbone, freeze_at=freeze_at))
    model = build_model(config)
    trained = set(names(model, model.trainable()))
    parts = ("stem.", "res2.", "res3.", "res4.", "res5.")
    frozen = {n for n in names(model, nnx.Param) if any(f".bottom_up.{part}" in n for part in parts[:freeze_at])}
    assert trained == set(names(model, nnx.Param)) - frozen
    assert bool(frozen) == (freeze_at > 0)
    assert any("bottom_up" in name for name in trained) == (freeze_at < 5)
    assert "backbone.fpn_lateral2.weight" in trained


def test_a_model_is_built_for_inference() -> None:
    config = dataclasses.replace(TINY, backbone=dataclasses.replace(TINY.backbone, norm="batch", freeze_at=0))
    model = build_model(config)
    norms = [m for _, m in nnx.iter_modules(model) if isinstance(m, nnx.BatchNorm)]
    assert len(norms) == 20 and all(norm.use_running_average for norm in norms)
    model.train()
    assert not any(norm.use_running_average for norm in norms)
