"""Pixels of picture files: depth, formats, size limits, and files that lie about themselves."""

from __future__ import annotations

import io
import os
import socket
import struct
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from PIL import Image

from querydet_jax.config import Config, override
from querydet_jax.data import open_dataset
from querydet_jax.data.readers import deep
from querydet_jax.data.readers.folders import FORMATS
from querydet_jax.data.readers.images import Reading, read_header, read_image
from querydet_jax.data.readers.pictures import open_pictures
from querydet_jax.inference.export.artifact import Artifact
from querydet_jax.inference.predictor import of_exported
from querydet_jax.runtime.errors import ConfigError, DataError

WIDE = np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8)


# More than 8 bits -------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(deep, "_said", deep.threading.Event())


def png16(values: np.ndarray) -> bytes:
    """Encode uint16 [H, W, C] with 1 to 4 channels, which Pillow cannot write."""
    h, w, channels = values.shape
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", w, h, 16, (0, 4, 2, 6)[channels - 1], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(raw)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def tiff16(values: np.ndarray, order: str) -> bytes:
    """Encode uint16 [H, W, 3] as an uncompressed TIFF of byte order "<" or ">"."""
    h, w, _ = values.shape
    bits = struct.pack(f"{order}3H", 16, 16, 16)
    # Tags: width, height, bits, compression, RGB, strip, samples, rows, bytes.
    tags = [(256, 4, 1, w), (257, 4, 1, h), (258, 3, 3, 200), (259, 4, 1, 1), (262, 4, 1, 2)]
    tags += [(273, 4, 1, 206), (277, 4, 1, 3), (278, 4, 1, h), (279, 4, 1, values.size * 2)]
    ifd = struct.pack(f"{order}H", len(tags)) + b"".join(struct.pack(f"{order}HHII", *tag) for tag in tags) + bytes(4)
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    return (start + ifd).ljust(200, b"\0") + bits + values.astype(f"{order}u2").tobytes()


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


THERMAL = np.linspace(28_000, 29_500, 6 * 5).round().astype(np.uint16).reshape(6, 5)
COLOUR = np.random.default_rng(2).integers(28_000, 29_500, (6, 5, 3)).astype(np.uint16)
COLOUR[0, 0] = 28_000, 29_500, 29_000
ALPHA = np.full((6, 5, 1), 65535, np.uint16)


@pytest.mark.parametrize(
    ("values", "encoded"),
    [
        (THERMAL, png16(THERMAL[..., None])),
        (THERMAL, saved(Image.fromarray(THERMAL), "TIFF")),
        (THERMAL, saved(Image.fromarray(THERMAL), "TIFF", compression="tiff_lzw")),
        (THERMAL, saved(Image.fromarray(THERMAL.astype(np.int32)), "TIFF")),
        (THERMAL, saved(Image.fromarray(THERMAL.astype(np.float32)), "TIFF")),
        (THERMAL, b"P5 5 6 65535\n" + THERMAL.astype(">u2").tobytes()),
        (THERMAL, b"P5 5 6 30000\n" + THERMAL.astype(">u2").tobytes()),
        (THERMAL, png16(np.concatenate([THERMAL[..., None], ALPHA], axis=2))),
        (COLOUR, png16(COLOUR)),
        (COLOUR, png16(np.concatenate([COLOUR, ALPHA], axis=2))),
        (THERMAL, saved(Image.fromarray(65535 - THERMAL), "TIFF", tiffinfo={262: 0})),  # 0 is white
        (COLOUR, b"P6 5 6 65535\n" + COLOUR.astype(">u2").tobytes()),
        (COLOUR, b"P6 5 6 30000\n" + COLOUR.astype(">u2").tobytes()),
        (COLOUR, tiff16(COLOUR, "<")),
        (COLOUR, tiff16(COLOUR, ">")),
    ],
)
def test_bit_depth_scales_every_kind_of_deep_picture(values, encoded):
    grey = values if values.ndim == 3 else np.repeat(values[..., None], 3, axis=2)

    def expected(low: float, high: float) -> np.ndarray:
        return np.rint(np.clip((grey.astype(np.float64) - low) / (high - low) * 255, 0, 255)).astype(np.uint8)

    def read(bit_depth: str) -> np.ndarray:
        return read_image(encoded, "a", reading=Reading(bit_depth=bit_depth))

    np.testing.assert_array_equal(read("file"), expected(28_000, 29_500))
    np.testing.assert_array_equal(read("28000:29000"), expected(28_000, 29_000))
    low, high = np.percentile(values, (10, 90))
    assert np.abs(read("10%:90%").astype(int) - expected(low, high)).max() <= 1  # float32
    assert read("file").flags.writeable


def test_without_bit_depth_one_line_gives_the_range(caplog):
    for encoded in (png16(THERMAL[..., None]), png16(COLOUR)):
        image = read_image(encoded, "a.png")
        assert image.min() == 28_000 >> 8 and image.max() == 29_500 >> 8
    (said,) = caplog.messages
    assert said.startswith("a.png: pixels from 28,000 to 29,500 of 65,535 become 109 to 115 of 255; set data.bit_depth")


def test_16_bit_colour_is_warned_of_too(caplog):
    read_image(png16(COLOUR), "a.png")
    assert "pixels from 28,000 to 29,500 of 65,535" in caplog.text


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_32_bit_pixels_need_the_option(kind):
    encoded = saved(Image.fromarray((THERMAL / 7).astype(kind)), "TIFF")
    with pytest.raises(DataError, match=r"a: pixels are 32-bit numbers from 4000 to 421\d.*; set data.bit_depth"):
        read_image(encoded, "a")


@pytest.mark.parametrize("values", [[2**31 - 1, 2**31 + 1], [0, 2**32 - 1], [5, 6]])
def test_unsigned_32_bit_pixels_keep_their_order(values):
    encoded = bytearray(saved(Image.fromarray(np.array([values], np.uint32).view(np.int32)), "TIFF"))
    at = encoded.index(struct.pack("<HHI", 339, 3, 1)) + 8  # the tag that says signed
    encoded[at : at + 2] = struct.pack("<H", 1)
    image = read_image(bytes(encoded), "a", reading=Reading(bit_depth="file"))
    assert image[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize("filler", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("bit_depth", ["file", "0:10", "0%:100%"])
def test_numbers_that_are_not_finite_do_not_set_the_range(filler, bit_depth):
    values = np.array([[0, 5], [10, filler]], np.float32)
    image = read_image(saved(Image.fromarray(values), "TIFF"), "a", reading=Reading(bit_depth=bit_depth))
    assert image[..., 0].tolist() == [[0, 128], [255, 255 if filler == np.inf else 0]]


@pytest.mark.parametrize("value", [0, 700, np.nan])
def test_a_picture_of_one_value_is_black(value):
    encoded = saved(Image.fromarray(np.full((3, 4), value, np.float32)), "TIFF")
    assert not read_image(encoded, "a", reading=Reading(bit_depth="file")).any()


@pytest.mark.parametrize("bit_depth", ["", "file", "0:16383", "1%:99%"])
def test_8_bit_pictures_do_not_change(bit_depth):
    np.testing.assert_array_equal(
        read_image(saved(Image.fromarray(WIDE), "PNG"), "a", reading=Reading(bit_depth=bit_depth)), WIDE
    )


@pytest.mark.parametrize(
    "text", ["auto", "16", "5:5", "9:1", "1%:99", "1:99%", "0:nan", "0:inf", "a:b", "-1%:50%", "0%:101%", ":", "1:2:3"]
)
def test_a_bit_depth_that_says_nothing_is_refused(text):
    for use in (lambda: override(Config(), {"data.bit_depth": text}), lambda: Reading(bit_depth=text)):
        with pytest.raises(ConfigError, match=r"data.bit_depth .*: give file, values LOW:HIGH such as"):
            use()


@pytest.mark.parametrize("text", ["", "file", "-40:120.5", "0:16383", "0.5%:99.5%", "-1e3:1e3"])
def test_a_bit_depth_that_is_accepted(text):
    assert override(Config(), {"data.bit_depth": text}).data.bit_depth == text


@pytest.mark.parametrize("bit_depth", ["file", "28000:29000", "5%:95%"])
def test_training_and_prediction_scale_alike(tmp_path, bit_depth):
    config = override(Config(), {"data.source": "yolo", "data.root": str(tmp_path), "data.bit_depth": bit_depth})
    for inside in ("images/train", "labels/train"):
        (tmp_path / inside).mkdir(parents=True)
    (tmp_path / "images/train/a.png").write_bytes(png16(THERMAL[..., None]))
    (tmp_path / "data.yaml").write_text("names: [car]")
    trained = open_dataset(config.data, "train").load(0)
    assert trained.max() == 255 and trained.min() == 0
    manifest = {
        "preprocessing": {"test_short": 32, "test_max": 32, "exif": config.data.exif, "bit_depth": bit_depth},
        "inference": {"query": "dense", "threshold": 0.1},
        "name": "a",
    }
    artifact = cast("Artifact", SimpleNamespace(manifest=manifest, canvases=((32, 32),), batch_sizes=(1,), classes=()))
    for data in (config.data, of_exported(artifact).data):
        pictures = open_pictures([tmp_path / "images/train"], ("car",), Reading.of(data))
        np.testing.assert_array_equal(pictures.load(0), trained)


# Formats and modes ------------------------------------------------------------------------------

_GREEN = (0, 200, 0)


def _animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (6, 4), colour) for colour in (_GREEN, (250, 0, 0))]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:])


def _palette(**options) -> bytes:
    picture = Image.new("P", (6, 4), 1)
    picture.putpalette([0, 0, 0, *_GREEN])
    return saved(picture, "PNG", **options)


def _cmyk() -> Image.Image:
    return Image.fromarray(np.broadcast_to(np.array([255, 55, 255, 0], np.uint8), (4, 6, 4)).copy(), "CMYK")


@pytest.mark.parametrize(
    ("encoded", "expected"),
    [
        *((_animated(kind), _GREEN) for kind in ("GIF", "PNG", "TIFF", "WEBP", "MPO")),
        (_palette(), _GREEN),
        (_palette(transparency=bytes([255, 0])), _GREEN),  # the colour behind full transparency
        (_palette(transparency=1), _GREEN),
        (saved(_cmyk(), "JPEG"), _GREEN),  # which Adobe, and Pillow, store inverted
        (saved(_cmyk(), "TIFF"), _GREEN),
        (saved(Image.new("RGBA", (6, 4), (*_GREEN, 0)), "PNG"), _GREEN),
        (saved(Image.new("LA", (6, 4), (90, 10)), "PNG"), (90, 90, 90)),
        (saved(Image.new("1", (6, 4), 1), "PNG"), (255, 255, 255)),
        (saved(Image.new("L", (6, 4), 7), "BMP"), (7, 7, 7)),
        *((saved(Image.new("RGB", (6, 4), _GREEN), kind), _GREEN) for kind in FORMATS),  # AVIF from Pillow 11.3 on
    ],
)
def test_every_kind_of_picture_becomes_rgb_of_its_first_frame(encoded, expected):
    image = read_image(encoded, "a")
    assert image.shape == (4, 6, 3) and image.dtype == np.uint8 and image.flags.writeable
    assert np.abs(image.astype(int) - expected).max() <= 6
    assert read_header(encoded, "a").stored == (4, 6)


# Files that are no pictures, or lie about themselves ----------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"%PDF-1.4\n",
        saved(Image.new("RGB", (16, 16)), "ICO"),
        saved(Image.new("RGB", (16, 16)), "TGA"),
        saved(Image.new("RGB", (16, 16)), "PCX"),
        b"SIMPLE  =                    T" + b" " * 60,
        b"",
        b"GIF89a",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    ],
)
def test_other_formats_are_refused_whatever_their_name(tmp_path, content, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail("a program was started"))
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    for read in (read_image, read_header):
        with pytest.raises(DataError, match=r"a.jpg: not readable as an image \(.*\); restore the file, or leave it"):
            read(path, str(path))
    with pytest.raises(DataError, match="a.jpg: not readable"):
        open_pictures([tmp_path], ("car",))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC or a video; convert it to JPEG"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0", "HEIC or a video; convert it to JPEG"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "a pointer of Git LFS; git lfs pull fetches"),
        (b"<!DOCTYPE html><html>404</html>", "none of JPEG, PNG"),
    ],
)
def test_what_a_file_is_instead_is_said(content, reason):
    with pytest.raises(DataError, match=rf"a.jpg: not readable as an image \({reason}"):
        read_image(content, "a.jpg")


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [_fifo, _socket, _device, Path.mkdir])
def test_pipes_sockets_and_devices_are_refused_at_once(folder, tmp_path, make, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    dataset = folder.open()
    (folder.images / "7.png").unlink()
    make(Path("images/7.png"))
    with pytest.raises(DataError, match=r"7.png: is a folder, pipe, socket or device, not a regular file; remove"):
        dataset.load(0)
    with pytest.raises(DataError, match=r"7.png: (is a folder, pipe|no such picture|no pictures)"):
        open_pictures(["images/7.png"], ("car",))
    assert folder.open().load(1).shape == (50, 30, 3)  # opening passes over what it cannot read


def _taller_png(data: bytes) -> bytes:
    changed = data[:20] + struct.pack(">I", 400) + data[24:29]
    return changed + struct.pack(">I", zlib.crc32(changed[12:29])) + data[33:]


def _taller_jpeg(data: bytes) -> bytes:
    at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    return data[: at + 5] + struct.pack(">H", 400) + data[at + 7 :]


def _taller_tiff(data: bytes) -> bytes:
    at = data.find(struct.pack("<HHI", 257, 4, 1))
    return data[: at + 8] + struct.pack("<I", 400) + data[at + 12 :]


_NOISE = Image.fromarray(np.random.default_rng(3).integers(0, 256, (40, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "lie",
    [
        _taller_png(saved(_NOISE, "PNG")),
        _taller_png(saved(_NOISE.convert("P"), "PNG")),
        _taller_jpeg(saved(_NOISE, "JPEG")),
        _taller_jpeg(saved(_NOISE, "JPEG", progressive=True)),
        _taller_jpeg(saved(_NOISE.convert("L"), "JPEG")),
        _taller_tiff(saved(_NOISE, "TIFF")),
        saved(_NOISE, "BMP").replace(struct.pack("<ii", 64, 40), struct.pack("<ii", 64, 400)),
        saved(_NOISE, "PPM").replace(b"64 40", b"64 400"),
    ],
)
def test_a_header_that_claims_more_than_the_data_is_refused(lie):
    assert read_header(lie, "a").stored == (400, 64)
    with pytest.raises(DataError, match=r"a: not readable as an image \((header says 64x400|image file is trun)"):
        read_image(lie, "a")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
def test_a_picture_with_a_plain_border_is_whole(kind, options):
    framed = Image.new("RGB", (64, 120), (0, 0, 0))
    framed.paste(_NOISE, (0, 0))
    image = read_image(saved(framed, kind, **(options if kind == "JPEG" else {})), "a")
    assert image.shape == (120, 64, 3) and not image[60:].any()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:20],
        lambda data: data[:40] + bytes(30) + data[70:],
        lambda data: data[:8] + data[8:][::-1],
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_pictures_are_one_line(damage, kind):
    try:
        read_image(damage(saved(_NOISE, kind)), "a")
    except DataError as error:
        assert str(error).startswith("a: ") and "\n" not in str(error)


def test_a_huge_text_chunk_is_one_line():
    data, text = saved(_NOISE, "PNG"), b"k\0\0" + zlib.compress(bytes(1 << 21))
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    with pytest.raises(DataError, match=r"a: not readable as an image \("):
        read_image(data[:33] + chunk + data[33:], "a")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF"])
def test_too_large_is_said_with_the_number_and_the_option(kind):
    encoded, reading = saved(Image.new("RGB", (40, 30)), kind), Reading(max_pixels=1199)
    for read in (lambda: read_image(encoded, "a", reading=reading), lambda: read_header(encoded, "a", reading)):
        with pytest.raises(DataError, match=r"a: too large, 1,200 pixels where 1,199 are allowed; set data.max_pixels"):
            read()
    for allowed in (1200, 0):
        assert read_image(encoded, "a", reading=Reading(max_pixels=allowed)).shape == (30, 40, 3)


def _claims(width: int, height: int) -> bytes:
    data = saved(_NOISE, "PNG")
    changed = data[:16] + struct.pack(">II", width, height) + data[24:29]
    return changed + struct.pack(">I", zlib.crc32(changed[12:29])) + data[33:]


@pytest.mark.parametrize("size", [(13_380, 13_380), (100_000, 100_000), (2**31 - 1, 2**31 - 1)])
def test_over_the_limit_of_pillow_nothing_is_called_damaged(size, monkeypatch):
    pixels = size[0] * size[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match=f"a: too large, {pixels:,} pixels where 178,956,970 are allowed"):
            read_header(_claims(*size), "a")
        assert read_header(_claims(10_000, 10_000), "a").stored == (10_000, 10_000)  # where Pillow warns
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
        if pixels < 2**40:
            assert read_header(_claims(*size), "a", Reading(max_pixels=0)).stored == size[::-1]


def test_a_limit_below_nothing_is_refused():
    with pytest.raises(ConfigError, match="data.max_pixels -1: must be 0"):
        override(Config(), {"data.max_pixels": -1})
