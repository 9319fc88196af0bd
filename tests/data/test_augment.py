"""Augmentation: boxes stay on their objects, small objects stay in crops, every choice follows from the generator."""

from __future__ import annotations

import numpy as np
import pytest

from querydet_jax.config import AugmentConfig, Config, override
from querydet_jax.data.augment import (
    Sample,
    cropped,
    mosaic,
    paste_small,
    photometric,
    quarter_turns,
    resized,
    train_example,
)
from querydet_jax.runtime.errors import ConfigError


def sample(seed: int = 0, shape: tuple[int, int] = (60, 80), sides: tuple[int, ...] = (6, 9, 14)) -> Sample:
    """Bright rectangles on a dark ground, apart from each other, each of its own grey."""
    rng = np.random.default_rng(seed)
    image, boxes = np.full((*shape, 3), 10, np.uint8), []
    for n, side in enumerate(sides):
        for _ in range(1000):
            y, x = int(rng.integers(2, shape[0] - side - 2)), int(rng.integers(2, shape[1] - side - 2))
            if not image[y - 2 : y + side + 2, x - 2 : x + side + 2].max() > 10:
                image[y : y + side, x : x + side] = 200 + 10 * n
                boxes.append([x, y, x + side, y + side])
                break
    return Sample(image, np.array(boxes, np.float32).reshape(-1, 4), np.arange(len(boxes), dtype=np.int32))


def holds_its_objects(image: np.ndarray, boxes: np.ndarray, floor: int = 100) -> None:
    """Every box is bright inside and dark just outside."""
    for x0, y0, x1, y1 in boxes:
        inside = image[round(y0 + 1) : round(y1 - 1), round(x0 + 1) : round(x1 - 1)]
        assert inside.size == 0 or inside.min() > floor
    bright = np.zeros(image.shape[:2], bool)
    for x0, y0, x1, y1 in np.rint(boxes).astype(int):
        bright[max(y0 - 1, 0) : y1 + 1, max(x0 - 1, 0) : x1 + 1] = True
    assert not (image[..., 0][~bright] > floor).any()


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("upside_down", [False, True])
def test_boxes_follow_turns(turns, upside_down):
    out = quarter_turns(sample(), turns, upside_down)
    assert out.image.shape[:2] == ((80, 60) if turns % 2 else (60, 80))
    holds_its_objects(out.image, out.boxes)


def test_a_focused_crop_holds_an_object_and_prefers_small_ones():
    big, small = [0, 0, 40, 40], [180, 90, 184, 94]
    whole = Sample(np.zeros((100, 200, 3), np.uint8), np.array([big, small], np.float32), np.array([0, 1], np.int32))
    rng = np.random.default_rng(0)
    seen = [cropped(whole, (50, 50), rng, focus=1.0).classes.tolist() for _ in range(200)]
    assert all(seen) and sum(classes == [1] for classes in seen) > 150
    anywhere = [cropped(whole, (50, 50), rng).classes.tolist() for _ in range(200)]
    assert sum(1 in classes for classes in anywhere) < 50


def test_a_mosaic_joins_four_pictures_at_a_point():
    samples = [sample(seed) for seed in range(4)]
    points, counts = set(), []
    for seed in range(20):
        out = mosaic(samples, (96, 96), np.random.default_rng(seed))
        assert out.image.shape == (96, 96, 3) and len(out.boxes) == len(out.classes)
        assert (out.boxes >= 0).all() and (out.boxes <= 96).all()
        for x0, y0, x1, y1 in out.boxes:  # cut objects keep their visible part's box
            assert out.image[int(y0 + (y1 - y0) / 2), int(x0 + (x1 - x0) / 2), 0] > 100
        points.add(tuple(np.argwhere(out.image[..., 0] > 0)[0]))
        counts.append(len(out.boxes))
    assert len(points) > 3 and np.mean(counts) > 3


@pytest.mark.parametrize(("below", "expected"), [(7, {0}), (10, {0, 1}), (32, {0, 1, 2})])
def test_pasted_copies_are_small_objects_at_free_places(below, expected):
    whole, seen = sample(), set()
    for seed in range(30):
        out = paste_small(whole, whole, 3, below, np.random.default_rng(seed))
        added = out.classes[3:].tolist()
        seen |= set(added)
        np.testing.assert_array_equal(out.boxes[:3], whole.boxes)
        for i, (x0, y0, x1, y1) in enumerate(out.boxes[3:]):
            assert out.image[int(y0) + 1 : int(y1) - 1, int(x0) + 1 : int(x1) - 1].min() > 190
            others = np.delete(out.boxes, i + 3, axis=0)
            apart = (others[:, 0] >= x1) | (others[:, 2] <= x0) | (others[:, 1] >= y1) | (others[:, 3] <= y0)
            assert apart.all()
    assert seen == expected
    assert paste_small(whole, whole, 3, 2, np.random.default_rng(0)) is whole  # nothing as small
    assert np.array_equal(sample().image, whole.image)  # the input is not changed


def test_a_pasted_object_fades_into_the_picture():
    whole = sample(sides=(12,))
    grey = Sample(np.full((60, 80, 3), 90, np.uint8), np.zeros((0, 4), np.float32), np.zeros(0, np.int32))
    out = paste_small(grey, whole, 1, 32, np.random.default_rng(1))
    (x0, y0), row = out.boxes[0, :2], out.image[..., 0].astype(int)
    across = row[int(y0 + 6), int(x0) - 4 : int(x0) + 1]
    assert across[0] == 90 and across[-1] == 200 and len(set(across.tolist())) > 2
    assert out.image[0, 0, 0] == 90 or (x0 < 4 and y0 < 4)


def test_photometric_changes_are_bounded_and_keep_grey_grey():
    image = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    np.testing.assert_allclose(photometric(image, 0.0, np.random.default_rng(0)).astype(int), image, atol=1)
    means = [photometric(image, 1.0, np.random.default_rng(seed)).mean() for seed in range(30)]
    assert np.std(means) > 10 and 20 < min(means) < max(means) < 235
    grey = np.repeat(image[..., :1], 3, axis=2)
    for seed in range(10):
        out = photometric(grey, 1.0, np.random.default_rng(seed)).astype(int)
        assert np.abs(out - out[..., :1]).max() <= 1


ALL = AugmentConfig(scale=(0.5, 2.0), crop_to_objects=0.5, turn=1.0, photometric=0.3, mosaic=0.5, paste=3)


@pytest.mark.parametrize(
    "augment",
    [
        AugmentConfig(),
        AugmentConfig(scale=(0.5, 2.0)),
        AugmentConfig(turn=1.0),
        AugmentConfig(mosaic=1.0),
        AugmentConfig(paste=4),
        ALL,
    ],
)
def test_examples_follow_from_the_generator_alone(augment):
    def example(seed: int) -> dict[str, np.ndarray]:
        return train_example(
            sample(), shape=(90, 120), canvas=(96, 96), flip_probability=0.5, capacity=40,
            rng=np.random.default_rng(seed), augment=augment,
            another=lambda rng: (sample(int(rng.integers(9))), (90, 120)),
        )  # fmt: skip

    different = set()
    for seed in range(12):
        first, second = example(seed), example(seed)
        for key in first:
            np.testing.assert_array_equal(first[key], second[key])
        kept = first["boxes"][first["classes"] >= 0]
        assert first["image"].shape == (96, 96, 3)
        height, width = first["size"]
        assert (kept[:, 2] <= width).all() and (kept[:, 3] <= height).all() and (kept >= 0).all()
        assert (kept[:, 2:] > kept[:, :2]).all()
        different.add(first["image"].tobytes())
    assert len(different) > 6


def test_resizing_drops_boxes_without_area():
    out = resized(Sample(np.zeros((10, 10, 3), np.uint8), np.array([[0, 0, 0, 5], [1, 1, 3, 4]], np.float32),
                         np.array([0, 1], np.int32)), (20, 20))  # fmt: skip
    assert out.classes.tolist() == [1] and out.boxes.tolist() == [[2, 2, 6, 8]]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scale", (2.0, 0.5)),
        ("scale", (0.0, 1.0)),
        ("mosaic", 1.5),
        ("turn", -0.1),
        ("paste", -1),
        ("paste_below", 1.0),
    ],
)
def test_impossible_settings_are_named(field, value):
    with pytest.raises(ConfigError, match=f"data.augment.{field.split('_below')[0]}"):
        override(Config(), {f"data.augment.{field}": value})
