"""Dense outputs: layout, padding, sizes, half precision."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from querydet_jax.config import ModelConfig
from querydet_jax.models import DenseDetector, Outputs, build_model

MEAN_RGB = np.float32([123.675, 116.28, 103.53])
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 40, 50, 3)).astype(np.uint8)


def runner(model: DenseDetector) -> Any:
    graph, state = nnx.split(model)
    return jax.jit(lambda *inputs: nnx.merge(graph, state)(*inputs))


@pytest.fixture(scope="module")
def run(small_model: DenseDetector) -> Any:
    return runner(small_model)


def assert_same(a: Outputs, b: Outputs, **tolerance: float) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


def test_shapes_and_types(run: Any) -> None:
    out = run(IMAGES)
    shapes = {3: (8, 8), 4: (4, 4), 5: (2, 2), 6: (1, 1)}
    assert {level: x.shape for level, x in out.features.items()} == {k: (2, *s, 16) for k, s in shapes.items()}
    assert {level: x.shape for level, x in out.cls.items()} == {k: (2, *s, 9, 3) for k, s in shapes.items()}
    assert {level: x.shape for level, x in out.box.items()} == {k: (2, *s, 9, 4) for k, s in shapes.items()}
    assert {level: x.shape for level, x in out.query.items()} == {k: (2, *shapes[k]) for k in (3, 4)}
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(out))


def test_outputs_are_the_heads_channels_in_order(small_model: DenseDetector, run: Any) -> None:
    out = run(IMAGES)
    cls, box = small_model.dense_heads(out.features[4])
    for anchor in range(9):
        for k in range(3):
            np.testing.assert_allclose(out.cls[4][..., anchor, k], cls[..., anchor * 3 + k], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            out.box[4][..., anchor, :], box[..., anchor * 4 : anchor * 4 + 4], rtol=1e-4, atol=1e-5
        )


def test_a_model_without_queries_has_no_query_outputs(small_config: ModelConfig) -> None:
    config = dataclasses.replace(small_config, query=dataclasses.replace(small_config.query, enabled=False))
    model = build_model(config)
    assert model.query_head is None and model.query_logits({}) == {}
    assert jax.eval_shape(runner(model), IMAGES).query == {}


@pytest.mark.parametrize("flavor", ["msra", "torchvision"])
def test_pixels_are_normalised_and_padded_with_the_mean(small_config: ModelConfig, flavor: str) -> None:
    backbone = dataclasses.replace(small_config.backbone, flavor=flavor)
    model = build_model(dataclasses.replace(small_config, backbone=backbone))
    x = np.asarray(model.normalize(jnp.asarray(IMAGES)))
    assert x.shape == (2, 64, 64, 3)
    if flavor == "msra":
        expected = (IMAGES - MEAN_RGB)[..., ::-1]  # BGR, unit deviation
    else:
        expected = (IMAGES - MEAN_RGB) / np.float32([58.395, 57.12, 57.375])
    np.testing.assert_allclose(x[:, :40, :50], expected, rtol=1e-5, atol=1e-5)
    assert not x[:, 40:].any() and not x[:, :, 50:].any()
    exact = np.asarray(model.normalize(jnp.zeros((1, 64, 32, 3), jnp.uint8)))
    assert exact.shape == (1, 64, 32, 3)  # already a multiple of 32


def test_padding_is_as_if_the_image_had_a_border_of_the_mean_colour(run: Any) -> None:
    bordered = np.broadcast_to(MEAN_RGB, (2, 64, 64, 3)).copy()
    bordered[:, :40, :50] = IMAGES
    assert_same(run(IMAGES), run(bordered), rtol=1e-4, atol=1e-5)


def test_sizes_equal_a_smaller_image(run: Any) -> None:
    canvas = np.random.default_rng(1).integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)
    canvas[:, :40, :50] = IMAGES
    whole = canvas.copy()
    sizes = np.array([[40, 50], [64, 64]], np.int32)
    out, small, full = run(canvas, sizes), run(IMAGES), run(whole)
    assert_same(jax.tree.map(lambda x: x[0], out), jax.tree.map(lambda x: x[0], small), rtol=1e-4, atol=1e-5)
    assert_same(jax.tree.map(lambda x: x[1], out), jax.tree.map(lambda x: x[1], full), rtol=1e-4, atol=1e-5)
    assert not np.allclose(out.cls[3][0], full.cls[3][0], atol=1e-3)


@pytest.mark.parametrize("shape", [(64, 64, 3), (1, 64, 64), (1, 64, 64, 4), (1, 3, 64, 64)])
def test_images_of_another_layout_are_an_error(small_model: DenseDetector, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images must be \[B, H, W, 3\], got"):
        small_model(np.zeros(shape, np.uint8))


def test_bfloat16_computes_in_half_and_answers_in_full_precision(run: Any, small_half_model: DenseDetector) -> None:
    assert {v[...].dtype for _, v in nnx.to_flat_state(nnx.state(small_half_model))} == {np.dtype("float32")}
    full, half = run(IMAGES), runner(small_half_model)(IMAGES)
    assert all(x.dtype == jnp.bfloat16 for x in half.features.values())
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((half.cls, half.box, half.query)))
    for x, y in zip(jax.tree.leaves(full), jax.tree.leaves(half), strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        assert 0 < np.abs(x - y).max() < 0.05 * np.abs(x).max()


@pytest.mark.parametrize("norm", ["frozen", "batch", "group"])
def test_bfloat16_reaches_the_whole_backbone(small_config: ModelConfig, norm: str) -> None:
    backbone = dataclasses.replace(small_config.backbone, norm=norm, freeze_at=0)
    model = build_model(dataclasses.replace(small_config, backbone=backbone, dtype="bfloat16"))
    stages = jax.eval_shape(lambda images: model.backbone(model.normalize(images)), IMAGES)
    assert {x.dtype for x in stages.values()} == {np.dtype(jnp.bfloat16)}
