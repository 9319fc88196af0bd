"""The compiled enlargement against Pillow's: every pixel."""

import importlib.util

import numpy as np
import pytest
from PIL import Image

from querydet_jax.data import resampling
from querydet_jax.data.resampling import enlarged, resample, taps
from querydet_jax.data.transforms import resize

SIZES = [((7, 5), (7, 9)), ((1, 1), (4, 3)), ((3, 8), (8, 8)), ((9, 13), (17, 22)), ((2, 30), (31, 30))]


def pillow(image, shape):
    return np.array(Image.fromarray(image).resize(shape[::-1], Image.Resampling.BILINEAR))


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_the_loops_that_numba_compiles_give_pillows_pixels(old, new):
    for image in (picture(*old), np.where(picture(*old) > 127, np.uint8(255), np.uint8(0))):
        out = np.empty((*new, 3), np.uint8)
        resample(image, out, taps(old[1], new[1]), taps(old[0], new[0]))
        np.testing.assert_array_equal(out, pillow(image, new))


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="needs requirements-fast.txt")
def test_compiled_they_do_for_any_size(caplog):
    rng = np.random.default_rng(1)
    for seed in range(300):
        old = rng.integers(1, 70, 2)
        new = tuple((old + rng.integers(0, 90, 2)).tolist())
        image = picture(*old, seed)
        np.testing.assert_array_equal(enlarged(image[:, ::-1], new), pillow(image[:, ::-1], new))
    assert not caplog.records


def test_resize_takes_the_compiled_way_to_enlarge_only(monkeypatch):
    image, asked = picture(6, 8), []

    def instead(image, shape):
        asked.append(shape)
        return np.zeros((*shape, 3), np.uint8)

    monkeypatch.setattr("querydet_jax.data.transforms.enlarged", instead)
    assert not resize(image, (6, 9)).any() and not resize(image, (12, 16)).any()
    for shape in ((5, 9), (7, 7), (3, 4)):
        np.testing.assert_array_equal(resize(image, shape), pillow(image, shape))
    assert asked == [(6, 9), (12, 16)]


def test_without_numba_pillow_enlarges(monkeypatch):
    monkeypatch.setattr(resampling, "installed", lambda: False)
    image = picture(6, 8)
    assert enlarged(image, (12, 16)) is None
    np.testing.assert_array_equal(resize(image, (12, 16)), pillow(image, (12, 16)))
