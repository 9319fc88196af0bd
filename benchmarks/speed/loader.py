"""What the loader spends on a picture, part by part, and the processor cores that feed a host of accelerators."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import charts
from benchmarks.options import Options
from benchmarks.report import Column, Report, Row, decimals, times
from benchmarks.timing import interleaved, percentiles
from querydet_jax.data.readers.folders import list_files
from querydet_jax.data.readers.images import read_image
from querydet_jax.data.resampling import enlarged
from querydet_jax.data.transforms import place, resize, resize_shape
from querydet_jax.runtime.errors import ConfigError, QueryDetError

_SIZES = ((480, 640), (427, 640), (640, 480), (426, 640), (640, 427), (375, 500))  # frequent in COCO


@dataclass(frozen=True)
class Loader(Options):
    """Read, decode, resize and pad one JPEG: images per second and core; cores that feed a host."""

    pictures: str = ""
    """Folder of JPEGs (default: smooth noise in COCO's frequent sizes, at quality 90)."""
    number: int = 30
    """Pictures per round, the first of the folder."""
    short: int = 800
    """Short side to resize to in px; the long side is at most 1333."""
    devices: int = 8
    """Devices of the host to feed."""
    rates: tuple[float, ...] = (10.0, 25.0, 50.0, 100.0)
    """Images per second and device to count cores for; `benchmark train-step` measures a device's own."""
    rounds: int = 20
    """Timed rounds."""


def loader(arguments: Loader) -> None:
    for name in ("number", "short", "devices", "rounds"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name} {getattr(arguments, name)}: must be at least 1")
    if not arguments.rates or min(arguments.rates) <= 0:
        raise ConfigError("--rates: give images per second and device, each above 0")
    files = _pictures(arguments)
    images = [read_image(data, name) for name, data in files]
    shapes = [resize_shape(image.shape[0], image.shape[1], arguments.short, 1333) for image in images]
    canvases = [(800, 1344) if h <= w else (1344, 800) for h, w in shapes]
    if any(h > canvas[0] or w > canvas[1] for (h, w), canvas in zip(shapes, canvases, strict=True)):
        raise ConfigError(f"--short {arguments.short}: must be at most 800, the short side of the canvas")
    sized = [_pillow(image, shape) for image, shape in zip(images, shapes, strict=True)]
    for image, shape, expected in zip(images, shapes, sized, strict=True):
        if not np.array_equal(resize(image, shape), expected):
            raise QueryDetError("the loader's pixels differ from Pillow's; report this with pip freeze")

    def whole(resized) -> None:
        for (name, data), shape, canvas in zip(files, shapes, canvases, strict=True):
            place(resized(read_image(data, name), shape), canvas)

    functions = {
        "decode": lambda: [read_image(data, name) for name, data in files],
        "resize, Pillow": lambda: list(map(_pillow, images, shapes)),
        "resize, loader": lambda: list(map(resize, images, shapes)),
        "pad": lambda: list(map(place, sized, canvases)),
        "all, Pillow": lambda: whole(_pillow),
        "all, loader": lambda: whole(resize),
    }
    measured = interleaved(functions, arguments.rounds)
    rows: list[Row] = [
        {"part": part, **percentiles(ms / len(files)), "per_second": 1e3 * len(files) / float(np.median(ms))}
        for part, ms in measured.items()
    ]
    before, after = rows[-2:]
    ratio = after["per_second"] / before["per_second"]
    cores = {
        rate: [arguments.devices * rate / row["per_second"] for row in (before, after)] for rate in arguments.rates
    }
    compiled = enlarged(images[0], shapes[0]) is not None
    Report(
        "loader",
        f"One core, {len(files)} JPEGs of {sum(len(data) for _, data in files) / len(files) / 1e3:.0f} kB to a short "
        f"side of {arguments.short}, medians of {arguments.rounds} interleaved rounds",
        [
            Column("part", "part"),
            Column("ms_p50", "ms p50", decimals(2)),
            Column("ms_p90", "ms p90", decimals(2)),
            Column("per_second", "images/s", decimals(1)),
        ],
        rows,
        notes=[
            f"all, loader: {times(ratio)} the images of Pillow alone, the same pixels"
            + ("" if compiled else "; numba is not used here (requirements-fast.txt), or the pictures shrink"),
            *(
                f"{arguments.devices} devices of {rate:g} images/s: {pair[1]:.1f} cores ({pair[0]:.1f} by Pillow alone)"
                for rate, pair in cores.items()
            ),
            "without augmentation and the batch's copy; rates of devices are assumed, not measured here",
        ],
        results={"cores": {f"{rate:g}": pair[1] for rate, pair in cores.items()}, "compiled": compiled},
        draw=lambda figure: charts.bars(
            figure,
            [row["part"] for row in rows],
            {"ms": [row["ms_p50"] for row in rows]},
            x="ms per image (median)",
            title="The loader on one core",
        ),
    ).publish(arguments.out, arguments)


def _pillow(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    return np.array(Image.fromarray(image).resize((shape[1], shape[0]), Image.Resampling.BILINEAR))


def _pictures(arguments: Loader) -> list[tuple[str, bytes]]:
    if arguments.pictures:
        folder = Path(arguments.pictures)
        names = list_files(folder, (".jpg", ".jpeg"))[: arguments.number]
        if not names:
            raise ConfigError(f"--pictures {folder}: no JPEGs in this folder")
        return [(name, (folder / name).read_bytes()) for name in names]
    rng = np.random.default_rng(0)
    made = []
    for n in range(arguments.number):
        height, width = _SIZES[n % len(_SIZES)]
        coarse = Image.fromarray(rng.integers(0, 256, (height // 4, width // 4, 3), np.uint8))
        file = io.BytesIO()
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        made.append((f"made {n}", file.getvalue()))
    return made
