"""Transforms on boxes that can be checked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from querydet_jax.data import transforms as t
from querydet_jax.data.augment import Sample, train_example
from querydet_jax.runtime.errors import DataError


@pytest.mark.parametrize(
    ("h", "w", "short", "maximum", "expected"),
    [
        (480, 640, 800, 1333, (800, 1067)),
        (640, 480, 640, 1333, (853, 640)),
        (427, 640, 1200, 1999, (1200, 1799)),
        (480, 640, 3999, 3999, (2999, 3999)),
        (375, 500, 3999, 3999, (2999, 3999)),
        (765, 1360, 800, 1333, (750, 1333)),
        (540, 961, 800, 1333, (749, 1333)),
        (382, 680, 3999, 3999, (2246, 3999)),
        (640, 128, 3999, 3999, (3999, 800)),
        (120, 180, 1200, 1999, (1200, 1800)),
        (320, 320, 320, 320, (320, 320)),
        (1, 5000, 800, 1333, (1, 1333)),  # at least one pixel
    ],
)
def test_resize_shape(h, w, short, maximum, expected):
    assert t.resize_shape(h, w, short, maximum) == expected


def test_resize_is_bilinear_and_antialiased():
    image = np.zeros((4, 4, 3), np.uint8)
    image[:, 2:] = 200
    # Halving filters with a triangle of radius 2 source pixels: weights 1 3 3 1 (at the edge 3 3 1).
    halved = t.resize(image, (2, 2))
    np.testing.assert_array_equal(halved[0, :, 0], [round(200 / 7), round(200 * 6 / 7)])
    assert t.resize(image, (4, 4)) is image
    wide = t.resize(image, (3, 8))
    assert wide.shape == (3, 8, 3) and wide.dtype == np.uint8


def test_boxes_follow_resize_flip_and_clip():
    boxes = np.array([[10, 20, 30, 40]], np.float32)
    doubled = t.resize_boxes(boxes, (50, 100), (100, 50))
    np.testing.assert_array_equal(doubled, [[5, 40, 15, 80]])
    assert doubled.dtype == np.float32
    image = np.arange(2 * 50 * 3, dtype=np.uint8).reshape(2, 50, 3)
    mirrored, moved = t.flip(image, doubled)
    np.testing.assert_array_equal(mirrored, image[:, ::-1])
    np.testing.assert_array_equal(moved, [[35, 40, 45, 80]])
    cut, kept = t.clip(np.array([[-5, -5, 5, 5], [60, 0, 70, 5], [1, 1, 1.000001, 9]], np.float32), (100, 50))
    np.testing.assert_array_equal(cut[0], [0, 0, 5, 5])
    assert kept.tolist() == [True, False, False]


def test_crop_keeps_boxes_with_enough_area_in_view():
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    boxes = np.array([[10, 5, 20, 15], [0, 5, 10, 15], [1, 5, 11, 15], [2, 5, 12, 15]], np.float32)
    part, cut, kept = t.crop(image, boxes, (4, 8, 10, 12))  # x from 8 to 20, y from 4 to 14
    np.testing.assert_array_equal(part, image[4:14, 8:20])
    np.testing.assert_array_equal(cut[0], [2, 1, 12, 10])
    # In view: 10x9, 2x9, 3x9 and 4x9 of 100 px.
    assert kept.tolist() == [True, False, False, False]
    assert t.crop(image, boxes, (4, 7, 10, 12))[2].tolist() == [True, False, False, True]  # now 5x9


def test_place_and_pad():
    image = np.full((2, 3, 3), 9, np.uint8)
    canvas = t.place(image, (4, 5))
    assert canvas.shape == (4, 5, 3) and canvas.sum() == image.sum() and (canvas[:2, :3] == 9).all()
    with pytest.raises(DataError, match="2x3 .* does not fit the canvas"):
        t.place(image, (4, 2))
    boxes, classes = t.pad_boxes(np.ones((2, 4), np.float32), np.array([5, 6], np.int32), 3)
    assert boxes.tolist() == [[1] * 4, [1] * 4, [0] * 4] and classes.tolist() == [5, 6, -1]
    boxes, classes = t.pad_boxes(np.ones((2, 4), np.float32), np.array([5, 6], np.int32), 1)
    assert boxes.shape == (1, 4) and classes.tolist() == [5]


def _example(seed: int, *, flip: float = 0.0, shape=(20, 40), canvas=(32, 64)) -> dict[str, np.ndarray]:
    image = np.zeros((10, 20, 3), np.uint8)
    image[2:5, 4:9] = 255
    boxes = np.array([[4, 2, 9, 5]], np.float32)
    return train_example(
        Sample(image, boxes, np.array([3], np.int32)),
        shape=shape, canvas=canvas, flip_probability=flip, capacity=2, rng=np.random.default_rng(seed),
    )  # fmt: skip


def test_train_example_without_randomness():
    out = _example(0)
    assert out["image"].shape == (32, 64, 3) and out["size"].tolist() == [20, 40]
    np.testing.assert_array_equal(out["boxes"], [[8, 4, 18, 10], [0, 0, 0, 0]])
    assert out["classes"].tolist() == [3, -1]
    np.testing.assert_array_equal(_example(0, flip=1.0)["boxes"][0], [22, 4, 32, 10])


def test_flip_has_its_probability():
    flipped = [_example(seed, flip=0.25)["boxes"][0, 0] == 22 for seed in range(400)]
    assert 70 <= sum(flipped) <= 130  # 100 expected, deviation 8.7


def test_image_and_boxes_stay_together_under_crop_and_flip():
    seen = set()
    for seed in range(40):
        out = _example(seed, flip=0.5, shape=(80, 160), canvas=(64, 96))
        assert out["size"].tolist() == [64, 96]
        if out["classes"][0] < 0:
            continue
        x0, y0, x1, y1 = out["boxes"][0]
        bright = out["image"][:, :, 0] > 127
        ys, xs = np.nonzero(bright)
        assert abs(xs.min() - x0) <= 1 and abs(xs.max() + 1 - x1) <= 1
        assert abs(ys.min() - y0) <= 1 and abs(ys.max() + 1 - y1) <= 1
        seen.add((x0, y0))
    assert len(seen) > 20  # the window moves


def test_no_boxes():
    out = train_example(
        Sample(np.zeros((8, 8, 3), np.uint8), np.zeros((0, 4), np.float32), np.zeros(0, np.int32)),
        shape=(16, 16), canvas=(8, 8), flip_probability=1.0, capacity=3, rng=np.random.default_rng(0),
    )  # fmt: skip
    assert out["boxes"].shape == (3, 4) and (out["classes"] == -1).all()
