"""The feature pyramid: its formula on small maps, and its levels for any size of P5."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from querydet_jax.config import FPNConfig
from querydet_jax.models.fpn import FPN

CHANNELS = {2: 3, 3: 4, 4: 5, 5: 6}


def make_fpn(min_level: int = 2, max_level: int = 7, **options) -> FPN:
    config = FPNConfig(channels=8, **options)
    return FPN(config, CHANNELS, min_level, max_level, jnp.dtype("float32"), np.random.default_rng(0))


def stages(height: int, width: int) -> dict[int, jax.Array]:
    """Return C2..C5 for a P5 of ``height x width``."""
    rng = np.random.default_rng(1)
    return {
        level: jnp.asarray(rng.normal(size=(2, height << (5 - level), width << (5 - level), c)), jnp.float32)
        for level, c in CHANNELS.items()
    }


def conv(x: np.ndarray, layer, stride: int = 1) -> np.ndarray:
    kernel = layer.kernel[...]
    pad = kernel.shape[0] // 2
    out = lax.conv_general_dilated(
        jnp.asarray(x), kernel, (stride, stride), ((pad, pad), (pad, pad)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return np.asarray(out) + np.asarray(layer.bias[...])


@pytest.mark.parametrize("top_source", ["c5", "p5"])
def test_the_pyramid_is_its_formula(top_source: str) -> None:
    fpn = make_fpn(top_source=top_source)
    rng = np.random.default_rng(2)
    for name in [f"{kind}{level}" for kind in ("lateral", "output") for level in (2, 3, 4, 5)] + ["p6", "p7"]:
        getattr(fpn, name).bias[...] = jnp.asarray(rng.normal(size=8), jnp.float32)  # biases start at 0
    features = stages(2, 3)
    merged = {5: conv(features[5], fpn.lateral5)}
    for level in (4, 3, 2):
        above = merged[level + 1]
        doubled = np.zeros((2, 2 * above.shape[1], 2 * above.shape[2], 8), np.float32)
        for i in (0, 1):
            for j in (0, 1):
                doubled[:, i::2, j::2] = above
        merged[level] = conv(features[level], fpn.lateral(level)) + doubled
    expected = {level: conv(merged[level], fpn.output(level)) for level in (2, 3, 4, 5)}
    expected[6] = conv(features[5] if top_source == "c5" else expected[5], fpn.p6, stride=2)
    expected[7] = conv(np.maximum(expected[6], 0), fpn.p7, stride=2)
    found = fpn(features)
    assert list(found) == [2, 3, 4, 5, 6, 7]
    for level, x in expected.items():
        np.testing.assert_allclose(found[level], x, rtol=1e-4, atol=1e-4)
    assert (expected[6] < 0).any()  # P6 itself is not rectified


@pytest.mark.parametrize("top_source", ["c5", "p5"])
@pytest.mark.parametrize(
    ("p5", "p6", "p7"),
    [((2, 4), (1, 2), (1, 1)), ((3, 5), (2, 3), (1, 2)), ((1, 1), (1, 1), (1, 1)), ((25, 42), (13, 21), (7, 11))],
)
def test_shapes(p5: tuple[int, int], p6: tuple[int, int], p7: tuple[int, int], top_source: str) -> None:
    fpn = make_fpn(top_source=top_source)
    out = jax.eval_shape(fpn, {level: jax.ShapeDtypeStruct(x.shape, x.dtype) for level, x in stages(*p5).items()})
    expected = {level: (2, p5[0] << (5 - level), p5[1] << (5 - level), 8) for level in (2, 3, 4, 5)}
    assert {level: x.shape for level, x in out.items()} == expected | {6: (2, *p6, 8), 7: (2, *p7, 8)}


@pytest.mark.parametrize(("min_level", "max_level"), [(2, 5), (3, 7), (5, 6), (4, 5)])
def test_levels_are_those_asked_for(min_level: int, max_level: int) -> None:
    fpn = make_fpn(min_level, max_level)
    out = jax.eval_shape(fpn, stages(2, 2))
    assert list(out) == list(range(min_level, max_level + 1))
    assert hasattr(fpn, f"lateral{min_level}") and not hasattr(fpn, f"lateral{min_level - 1}")
    assert hasattr(fpn, "p6") == (max_level >= 6) and hasattr(fpn, "p7") == (max_level >= 7)


@pytest.mark.parametrize("top_source", ["c5", "p5"])
def test_coarse_levels_do_not_depend_on_where_the_outputs_start(top_source: str) -> None:
    # Sparse inference uses the merged maps of the fine levels, not their outputs.
    fpn, features = make_fpn(top_source=top_source), stages(2, 2)
    merged = fpn.merge(features, 2)
    assert sorted(merged) == [2, 3, 4, 5] and sorted(fpn.merge(features, 4)) == [4, 5]
    whole = fpn(features)
    for start in (4, 6, 7):
        part = fpn.outputs(features, merged, start)
        assert list(part) == list(range(start, 8))
        for level, x in part.items():
            np.testing.assert_allclose(x, whole[level], rtol=1e-5, atol=1e-6)
