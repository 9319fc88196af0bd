"""Write a detector as a folder of static files: a page that detects in the browser, on the user's machine.

The page is in ``page/``; ``worker.js`` runs the ONNX programs with ONNX Runtime's build for browsers. Each canvas has a
program for the cascade, whose query threshold is an input and which returns the maps, and one for dense inference. All
share one file of weights, in which tensors that float16 holds exactly take half the room.
Shape letters: H W image, K classes.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from querydet_jax.config import Config
from querydet_jax.inference.detector import Detector
from querydet_jax.inference.export.onnx_graph import Builder
from querydet_jax.inference.export.onnx_writer import add_program, check_onnx
from querydet_jax.inference.export.web_runtime import PACKAGE, VERSION, WASM, web_runtime
from querydet_jax.inference.export.writer import Canvas, check_once_each
from querydet_jax.models import DenseDetector
from querydet_jax.runtime.errors import ConfigError, DataError
from querydet_jax.runtime.files import folder_written_aside
from querydet_jax.runtime.stores import as_path, is_url
from querydet_jax.viz.primitives import class_colour, heat_colours
from querydet_jax.weights.packaged import ModelCard

PAGE = Path(__file__).parent / "page"
FORMAT = "querydet_jax page"
ABOUT, WEIGHTS, EXAMPLES, ATTRIBUTION = "model.json", "weights.bin", "examples", "ATTRIBUTION.md"
SHOWN = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".avif")
"""Suffixes of pictures that browsers read."""

_LONG = 256  # entries from which a tensor stands in the file of weights


def write_page(
    folder: str | Path,
    model: DenseDetector,
    config: Config,
    *,
    canvases: Sequence[Canvas],
    min_scores: np.ndarray,
    card: ModelCard | None = None,
    examples: Sequence[str | Path] = (),
    runtime: str | Path = "",
) -> dict[str, Any]:
    """Write the page, its programs and weights, and ONNX Runtime for browsers.

    Args:
      folder: written whole or not at all; an earlier page there is replaced.
      model: the detector.
      config: settings. Unless ``inference.query`` is dense, the page can switch between it and dense.
      canvases: (height, width) of the inputs.
      min_scores: the score from which a detection of each class is shown at first, ``[K]``.
      card: what to say of packaged weights.
      examples: pictures that the page offers, and folders of such; an ``ATTRIBUTION.md`` beside them comes along.
      runtime: see ``web_runtime``.

    Returns:
      What ``model.json`` says.

    Raises:
      ConfigError: no canvases, or a setting that a browser cannot follow.
      DataError: onnx is not installed, the detector uses a primitive that has no translation, the folder holds
        something else, an example or the runtime cannot be read, or the page cannot be written.
    """
    folder = as_path(folder)
    if is_url(folder):
        raise DataError(f"{folder}: a page is written on this machine; give a folder here, and copy it")
    check_onnx()
    check_once_each(canvases=canvases)
    _check_reading(config)
    _check_free(folder)
    pictures, attribution = _pictures(examples)
    files = web_runtime(runtime)
    programs, weights, counts = _programs(model, config, canvases)
    classes = config.class_names
    about = {
        "format": FORMAT,
        "name": config.name,
        "classes": classes,
        "colours": [list(class_colour(k)) for k in range(len(classes))],
        "heat": [[int(x) for x in colour] for colour in heat_colours(np.linspace(0, 1, 32, dtype=np.float32))],
        "min_scores": [float(score) for score in min_scores],
        "query": config.inference.query,
        "threshold": config.inference.threshold,
        "start_level": config.inference.start_level,
        "canvases": [list(canvas) for canvas in canvases],
        "preprocessing": {key: getattr(config.data, key) for key in ("test_short", "test_max", "max_pixels")},
        "programs": {name: {"file": f"{name}.onnx", "bytes": len(data)} for name, data in programs.items()},
        "weights": {"file": WEIGHTS, "bytes": len(weights), **counts},
        "runtime": {"name": PACKAGE, "version": VERSION, "wasm": WASM, "bytes": len(files[WASM])},
        "card": None
        if card is None
        else {key: getattr(card, key) for key in ("title", "licence", "attribution", "limits")},
        "examples": [f"{EXAMPLES}/{path.name}" for path in pictures],
        "attribution": attribution,
    }
    try:
        with folder_written_aside(folder) as new:
            shutil.copytree(PAGE, new, dirs_exist_ok=True)
            (new / ABOUT).write_text(json.dumps(about, indent=1, allow_nan=False))
            (new / WEIGHTS).write_bytes(weights)
            for name, data in programs.items():
                (new / f"{name}.onnx").write_bytes(data)
            for name, data in files.items():
                (new / "ort" / name).write_bytes(data)
            if pictures:
                (new / EXAMPLES).mkdir()
            for path in pictures:
                shutil.copyfile(path, new / EXAMPLES / path.name)
    except OSError as error:
        raise DataError(f"{folder}: not writable ({error}); give a folder in a writable one") from None
    return about


def _check_reading(config: Config) -> None:
    """Refuse what decides how files are read in Python, and cannot in a browser."""
    if config.data.exif == "ignore":
        raise ConfigError("data.exif ignore: browsers turn pictures upright; a page needs --data.exif apply")
    if config.data.bit_depth:
        raise ConfigError(
            f"data.bit_depth {config.data.bit_depth}: browsers read 8 bits; a page needs --data.bit-depth ''"
        )


def _check_free(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise DataError(f"{folder}: is a file; a page is a folder")
    try:
        is_page = json.loads((folder / ABOUT).read_bytes())["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        is_page = False
    if not is_page and any(folder.iterdir()):
        raise DataError(f"{folder}: holds other files than a page; give a new folder, such as {folder / 'web'}")


def _pictures(sources: Sequence[str | Path]) -> tuple[list[Path], str]:
    """Return the example pictures, and what the folders' ``ATTRIBUTION.md`` say."""
    pictures: dict[str, Path] = {}
    texts: dict[Path, str] = {}
    for source in map(Path, sources):
        found = (
            sorted(path for path in source.iterdir() if path.suffix.lower() in SHOWN) if source.is_dir() else [source]
        )
        if not found:
            raise DataError(f"--examples {source}: holds no picture that browsers show ({' '.join(SHOWN)})")
        for path in found:
            if path.suffix.lower() not in SHOWN or not path.is_file():
                raise DataError(f"--examples {path}: no such picture, or none that browsers show ({' '.join(SHOWN)})")
            if pictures.setdefault(path.name, path) != path:
                raise DataError(f"--examples {path}: another one has this name; rename it")
            beside = path.parent / ATTRIBUTION
            if beside.is_file():
                texts[beside] = beside.read_text()
    return list(pictures.values()), "\n".join(texts.values())


def _programs(
    model: DenseDetector, config: Config, canvases: Sequence[Canvas]
) -> tuple[dict[str, bytes], bytes, dict[str, int]]:
    """Return the programs by name (``csq_512x640``), the file of weights, and its number of halves and of floats."""
    query = config.inference.query
    built: dict[str, Any] = {}
    for method in dict.fromkeys((query, "dense")):
        detector = Detector(model, dataclasses.replace(config.inference, query=method))
        for height, width in canvases:
            builder = Builder()
            images = builder.input((1, height, width, 3), np.uint8, "images")
            sizes = builder.input((1, 2), np.int32, "sizes")
            threshold = None if method == "dense" else builder.input((), np.float32, "threshold")
            results = add_program(builder, detector, images, sizes, threshold)
            builder.outputs(list(results.values()), list(results))
            built[f"{method}_{height}x{width}"] = builder.model({}, "querydet_jax")
    data, counts = _share_weights([program.graph for program in built.values()])
    return {name: program.SerializeToString(deterministic=True) for name, program in built.items()}, data, counts


def _share_weights(graphs: Sequence[Any]) -> tuple[bytes, dict[str, int]]:
    """Move the long float32 constants of all graphs to one file, each once; the graphs name them as external data.

    The file starts with those that float16 holds exactly, as float16. The graphs count in the file's float32 form,
    which the page makes when it has loaded it.
    """
    import onnx  # pyright: ignore[reportMissingImports]  # an extra

    tensors = [
        tensor
        for graph in graphs
        for tensor in graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.raw_data) >= 4 * _LONG
    ]
    arrays = {data: np.frombuffer(data, "<f4") for data in dict.fromkeys(tensor.raw_data for tensor in tensors)}
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    for data, array in arrays.items():
        parts[_is_half(array)].append(data)
    places: dict[bytes, int] = {}
    end = 0
    for data in (*parts[True], *parts[False]):
        places[data], end = end, end + len(data)
    for tensor in tensors:
        data = tensor.raw_data
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", WEIGHTS), ("offset", places[data]), ("length", len(data))):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, str(value)
    halves = b"".join(arrays[data].astype("<f2").tobytes() for data in parts[True])
    stored = b"".join((halves, *parts[False]))
    return stored, {"float16": len(halves) // 2, "float32": (len(stored) - len(halves)) // 4}


def _is_half(array: np.ndarray) -> bool:
    with np.errstate(over="ignore"):
        return bool((array.astype(np.float16).astype(np.float32) == array).all())
