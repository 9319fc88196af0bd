"""What a detector takes: pictures and sizes as they are meant, channels in either order; how many shapes it keeps."""

from __future__ import annotations

import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_detector
from small_detector import BASE, pictures

from querydet_jax import Detections, Detector
from querydet_jax.inference import detector as detector_module
from querydet_jax.inference import pipeline
from querydet_jax.models import RetinaNet
from querydet_jax.runtime.errors import ConfigError, DataError

TWO = pictures(2, 32, 64)
BGR = np.ascontiguousarray(TWO[..., ::-1])


@pytest.fixture(autouse=True)
def _what_it_sees(monkeypatch):
    """In place of detections, the pictures and sizes that reach the network."""

    def see(graph, config, state, images, sizes) -> Detections:
        means = jnp.mean(images.astype(jnp.float32), axis=(1, 2))
        return Detections(images, means, sizes, means > 0, {})

    monkeypatch.setattr(pipeline, "detect", see)
    monkeypatch.setattr(pipeline, "dense_part", see)


@functools.cache
def model() -> RetinaNet:
    return small_detector.model()


def new(**options) -> Detector:
    return Detector(model(), BASE, **options)


@functools.cache
def detector() -> Detector:
    return new()


@pytest.mark.parametrize(
    ("images", "seen"),
    [
        (TWO.astype(np.float32) / 255, r"float32 \[2, 32, 64, 3\]"),
        (TWO.astype(np.float64), r"float64 \[2, 32, 64, 3\]"),
        (TWO.astype(np.uint16) * 256, r"uint16 \[2, 32, 64, 3\]"),
        (TWO > 100, r"bool \[2, 32, 64, 3\]"),
        (np.full((1, 32, 64, 3), np.nan, np.float32), "float32"),
        (jnp.zeros((1, 32, 64, 3), jnp.float16), "float16"),
        (TWO[:0], r"uint8 \[0, 32, 64, 3\]; give at least one picture"),
        (TWO[:, :0], r"uint8 \[2, 0, 64, 3\]"),
        (TWO[0], r"uint8 \[32, 64, 3\]"),
        (TWO.transpose(0, 3, 1, 2), r"uint8 \[2, 3, 32, 64\]"),
        (TWO.tolist(), "int64"),
        ("picture.jpg", "<U11"),
    ],
)
def test_other_images_are_refused(images, seen):
    for call in (detector(), new(channels="bgr")):
        with pytest.raises(DataError, match=rf"images must be uint8 \[B, H, W, 3\], not {seen}.*not normalized$"):
            call(images)


def test_pictures_of_several_shapes_are_refused():
    with pytest.raises(DataError, match="images: not an array .*pictures of one batch have one shape"):
        detector()([TWO[0], TWO[0, :16]])


@pytest.mark.parametrize(
    ("sizes", "seen"),
    [
        ([[32, 64], [-1, 64]], r"sizes\[1\] is \[-1, 64\], on a canvas of 32x64; give \(height, width\) per image"),
        ([[0, 64], [32, 64]], r"sizes\[0\] is \[0, 64\]"),
        ([[32, 64], [33, 64]], r"sizes\[1\] is \[33, 64\]"),
        ([[64, 32], [64, 32]], r"sizes\[0\] is \[64, 32\]"),
        (np.array([[32, 2**32 + 64]] * 2), r"sizes\[0\] is \[32, 4294967360\]"),
        (jnp.array([[32, 64], [32, 65]]), r"sizes\[1\] is \[32, 65\]"),
        ([[32, 64]], r"sizes must be integers \[2, 2\], not int64 \[1, 2\]; give \(height, width\)"),
        ([[32, 64]] * 3, r"not int64 \[3, 2\]"),
        ([32, 64], r"not int64 \[2\]"),
        ([[32.0, 64.0]] * 2, "not float64"),
        ([[np.nan, 64.0]] * 2, "not float64"),
        ([[True, True]] * 2, "not bool"),
        ([[None, 64]] * 2, "not object"),
        ([[32, 64], [32]], "sizes: not an array"),
    ],
)
def test_other_sizes_are_refused(sizes, seen):
    with pytest.raises(DataError, match=seen):
        detector()(TWO, sizes)
    with pytest.raises(DataError, match=seen):
        detector().trace(TWO, sizes)


def test_opencv_pictures():
    """Also in a device's memory, and as a view with negative strides; in a call and in a trace."""
    bgr = new(channels="bgr")
    for images in (BGR, jnp.asarray(BGR), TWO[..., ::-1]):
        np.testing.assert_array_equal(bgr(images).boxes, TWO)
    np.testing.assert_array_equal(detector()(BGR).boxes, BGR)
    reverse = detector_module._reverse_channels(lambda state, images, sizes: images)
    np.testing.assert_array_equal(reverse(None, BGR, None), TWO)


def test_sizes_in_any_integers_and_none():
    for sizes in ([[20, 30], [32, 64]], np.array([[20, 30], [32, 64]], np.uint16), jnp.array([[20, 30], [32, 64]])):
        seen = detector()(TWO, sizes).classes
        assert seen.dtype == np.int32
        np.testing.assert_array_equal(seen, [[20, 30], [32, 64]])
    np.testing.assert_array_equal(detector()(TWO).classes, [[32, 64]] * 2)
    assert detector().compilations() == 1


def test_a_camera_may_fill_its_picture_anew():
    picture = np.zeros((1, 400, 600, 3), np.uint8)
    found = []
    for _ in range(10):
        picture[:] = 0
        found.append(detector()(picture))
        picture[:] = 1
    assert not any(np.asarray(one.boxes).any() for one in found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": "BGR"}, "channels 'BGR': choose rgb or bgr"),
        ({"max_shapes": 0}, "max_shapes 0: must be a whole number, at least 1"),
        ({"max_shapes": -3}, "max_shapes -3: must be"),
        ({"max_shapes": None}, "max_shapes None: must be"),
    ],
)
def test_other_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        new(**options)


def live_programs() -> int:
    gc.collect()
    return len(jax.local_devices()[0].client.live_executables())


def test_the_shapes_used_last_are_kept():
    detect = new(max_shapes=2)
    a, b, c = (TWO[:1, :, :width] for width in (16, 32, 48))
    none = live_programs()
    for images, kept in ((a, 1), (b, 2), (a, 2), (c, 2), (a, 2), (b, 2)):
        np.testing.assert_array_equal(detect(images).boxes, images)
        assert detect.compilations() == kept and live_programs() == none + kept
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: compiled.append(event) if "backend_compile" in event else None
    )
    for images, count in ((a, 0), (b, 0), (a, 0), (c, 1), (a, 0), (b, 1)):
        compiled.clear()
        np.testing.assert_array_equal(detect(images).boxes, images)
        assert len(compiled) == count, images.shape
    del detect
    assert live_programs() == none
