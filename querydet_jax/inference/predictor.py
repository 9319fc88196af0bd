"""From a run, an exported file or packaged weights to results on pictures: ``qd.load(source).predict(pictures)``."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from querydet_jax.config import Config, DataConfig, InferenceConfig, card_names, load_config, override
from querydet_jax.config.zoo import is_packaged, zoo_folder, zoo_names
from querydet_jax.data.plan import both_orientations
from querydet_jax.data.readers.images import Reading
from querydet_jax.data.readers.memory import Frames
from querydet_jax.data.readers.pictures import Pictures, matched, open_pictures
from querydet_jax.data.readers.video import Video, is_video
from querydet_jax.inference.detector import Detector
from querydet_jax.inference.export.exported import EXPORT_ERRORS, Exported, names_exported, open_exported
from querydet_jax.inference.min_scores import BEST, min_scores
from querydet_jax.inference.prediction import Prediction
from querydet_jax.inference.results import run_on_images
from querydet_jax.inference.runs import open_model
from querydet_jax.inference.tiling import OVERLAP, Tiles, parse_tiles, run_tiled
from querydet_jax.inference.video import run_on_video
from querydet_jax.models import DenseDetector
from querydet_jax.runtime.errors import ConfigError, DataError, QueryDetError, shown
from querydet_jax.runtime.stores import as_path, is_file, is_folder, is_there
from querydet_jax.weights.packaged import ModelCard, read_card

Picture = str | os.PathLike[str] | np.ndarray | Image.Image
MinScore = str | float | Mapping[str, float]


def load(source: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> Predictor:
    """Open a trained detector.

    Args:
      source: a run folder, an exported file (an artifact ``.zip`` or ``.onnx``), a folder of packaged weights, or the
        name of those that come with the package (``hituav``). A name goes before a folder of the same name, which is
        ``./NAME``.
      overrides: fields of the configuration by dotted name, such as ``{"inference.query": "dense"}``; an exported
        file's are fixed.

    Raises:
      ConfigError: ``source`` is none of these, or an override is wrong.
      WeightsError: the weights are damaged.
      QueryDetError: the exported file is damaged or does not run here.
    """
    if not isinstance(source, str | os.PathLike):
        raise ConfigError(f"load: {shown(source)} is no name and no path; give a run, an exported file or a name")
    path = zoo_folder(source) or as_path(source)
    if is_file(path) and names_exported(path):
        if overrides:
            raise ConfigError(f"{path}: {', '.join(overrides)}: fixed in this file; export again, or load the run")
        return of_exported(open_exported(path))
    if not is_folder(path):
        raise ConfigError(_unknown(str(source), path))
    config = load_config(path, dict(overrides or {}))
    return of_model(open_model(config, path), config, path)


class Predictor:
    """Detects objects in pictures of any kind and size.

    One preprocessing serves training's evaluation, runs and exported files: decoding, EXIF orientation, depth, largest
    size, resizing and canvases are those of the run. Programs are compiled once per canvas, on first use.

    Args:
      detector: the compiled function.
      name: of the model.
      classes: names of the K classes.
      data: resize rule, canvases and reading.
      query: how the fine levels are computed: dense, csq, cq, ccq.
      batch_size: pictures per call.
      windows: windows of a large picture per call; 0: ``batch_size``.
      nms_iou: of NMS between windows.
      best: where ``min_score="best"`` is looked up, see ``min_scores``.
      card: the model card of packaged weights.
    """

    def __init__(
        self,
        detector: Detector | Exported,
        *,
        name: str,
        classes: tuple[str, ...],
        data: DataConfig,
        query: str,
        batch_size: int = 1,
        windows: int = 0,
        nms_iou: float = InferenceConfig.nms_iou,
        best: Path | Exported | Mapping[str, float] | None = None,
        card: ModelCard | None = None,
    ):
        self.detector, self.name, self.classes, self.query, self.card = detector, name, classes, query, card
        self.data, self._batch_size, self._best = data, batch_size, best
        self._windows, self._nms_iou = windows or batch_size, nms_iou

    def __repr__(self) -> str:
        return f"Predictor({self.name!r}, {self.query}, {len(self.classes)} classes)"

    def predict(
        self,
        source: Picture | Sequence[Picture],
        *,
        min_score: MinScore = "",
        channels: Literal["rgb", "bgr"] = "rgb",
        maps: bool = False,
        tiles: str | int = "off",
        overlap: float = OVERLAP,
        stride: int = 1,
        on_broken: Callable[[str], None] | None = None,
    ) -> Iterator[Prediction]:
        """Detect objects; yield a result per picture, in the order given, or per frame of a video.

        Args:
          source: a picture's path, a folder, a pattern (``cam*/**/*.jpg``), a NumPy array (uint8 ``[H, W, 3]``, or
            ``[N, H, W, 3]`` for N pictures; see ``Frames``), a Pillow picture, or a list of paths or of pictures. A
            file that is named twice counts once. Or one video: a file, an address or a camera, see ``open_video``.
          min_score: the score from which a detection counts: a number, ``best`` (of each class the score with the
            largest F1 in the last evaluation), ``{"Person": 0.4}`` for some classes. Empty: best for packaged weights
            and for exported files that hold scores, otherwise 0.3.
          channels: order of the channels of arrays; bgr as OpenCV reads them.
          maps: also return the maps of the cascade (``Prediction.queries``), which takes a second pass.
          tiles: auto cuts pictures that would be shrunk, and that no canvas holds, into overlapping windows of a canvas
            at their own scale. A number cuts every picture into that many windows along its longer side, scaled to
            fit. off: every picture is seen whole.
          overlap: least share of a window that the next one shows, too; objects up to that size are seen whole.
          stride: of a video, take each ``stride``-th frame.
          on_broken: called with a message for each picture that cannot be used, and with why a video's frames end
            early; None raises, after the frames before.

        Raises:
          ConfigError: ``min_score``, ``channels``, ``tiles``, ``overlap`` or ``stride`` is wrong, or ``maps`` of what
            computes none, or with ``tiles``.
          DataError: there is no picture; one cannot be used, without ``on_broken``.
        """
        if maps and self.no_maps:
            raise ConfigError(f"maps: {self.name} has none, because {self.no_maps}")
        cut = parse_tiles(tiles, overlap)
        if maps and cut:
            raise ConfigError("maps: are of whole pictures; set tiles to off")
        scores = self.min_scores(min_score)
        if channels not in ("rgb", "bgr"):
            raise ConfigError(f"channels {shown(channels)}: choose rgb or bgr")
        if not isinstance(stride, int) or stride < 1:
            raise ConfigError(f"stride {shown(stride)}: give a whole number from 1 on")
        items = _items(source)
        named = [item for item in items if isinstance(item, str | os.PathLike)]
        if len(named) == len(items):
            if channels == "bgr":
                raise ConfigError("channels bgr: is for arrays; files say it themselves")
            videos, named = parted(named)
            if videos and (named or len(videos) > 1):
                raise DataError(f"{os.fspath(videos[0])}: is a video among others; give one video, or pictures")
            if videos and cut:
                raise ConfigError(f"tiles {tiles}: is for pictures; leave it out for a video")
            if videos:
                return self.run_video(self.open_video(videos[0]), scores, maps=maps, stride=stride, on_broken=on_broken)
            pictures = self.open_files(named)
        elif named:
            raise DataError("pictures: paths and pictures in memory in one list; give one kind at a time")
        else:
            pictures = Frames(items, self.classes, Reading.of(self.data), channels)
        if stride != 1:
            raise ConfigError(f"stride {stride}: is for videos; leave it out for pictures")
        return self.run(pictures, scores, maps=maps, tiles=cut, on_broken=on_broken)

    def open_files(self, names: Sequence[str | os.PathLike[str]]) -> Pictures:
        """Open files, folders and patterns for ``run``.

        Raises:
          DataError: there is no picture that can be read.
        """
        return open_pictures(names, self.classes, Reading.of(self.data))

    def open_video(self, name: str | os.PathLike[str]) -> Video:
        """Open a video file, an address (``rtsp://CAMERA``) or a camera (``/dev/video0``) for ``run_video``.

        Raises:
          DataError: it cannot be opened, or holds no frame.
          QueryDetError: PyAV is not installed.
        """
        return Video(name, Reading.of(self.data))

    def run_video(
        self,
        video: Video,
        scores: np.ndarray,
        *,
        maps: bool = False,
        stride: int = 1,
        on_broken: Callable[[str], None] | None = None,
    ) -> Generator[Prediction, None, None]:
        """Yield a result per frame, with the detections from ``scores [K]`` on; see ``predict``."""
        try:
            for result in run_on_video(
                self.detector, video, self.data, self.classes, stride=stride, batch_size=self._batch_size, maps=maps
            ):
                yield result.at_least(scores)
        except EXPORT_ERRORS as error:
            raise QueryDetError(str(error)) from error
        if video.fault and on_broken is None:
            raise DataError(video.fault)
        if video.fault and on_broken is not None:
            on_broken(video.fault)

    def run(
        self,
        pictures: Pictures | Frames,
        scores: np.ndarray,
        *,
        maps: bool = False,
        tiles: Tiles | None = None,
        on_broken: Callable[[str], None] | None = None,
    ) -> Iterator[Prediction]:
        """Yield a result per picture, with the detections from ``scores [K]`` on; see ``predict``."""
        data, paths = self.data, []
        if isinstance(pictures, Pictures):
            paths = [as_path(pictures.file_name(i)) for i in range(len(pictures))]
            for message in pictures.broken:
                if on_broken is None:
                    raise DataError(message)
                on_broken(message)
        else:
            data = dataclasses.replace(data, threads=0, processes=0)  # nothing to read ahead
        if tiles is None:
            results = run_on_images(
                self.detector, pictures, data, batch_size=self._batch_size, maps=maps, on_broken=on_broken
            )
        else:
            results = run_tiled(
                self.detector,
                pictures,
                data,
                tiles,
                min_scores=scores,
                nms_iou=self._nms_iou,
                batch_size=self._windows,
                on_broken=on_broken,
            )
        try:
            for result in results:
                path = paths[result.index] if paths else None
                yield dataclasses.replace(result.at_least(scores), path=path)
        except EXPORT_ERRORS as error:
            raise QueryDetError(str(error)) from error

    def min_scores(self, value: MinScore, name: str = "min_score") -> np.ndarray:
        """Return the score of each class from which detections count, float32 ``[K]``; see ``predict``."""
        if value == "" and self.card is not None and self.card.min_scores:
            value = BEST
        return min_scores(value, self.classes, self._best, query=self.query, name=name)

    @property
    def no_maps(self) -> str:
        """Why ``predict(maps=True)`` is refused; empty if it is not."""
        if self.query == "dense":
            return "inference.query is dense"
        return "an exported file returns no maps; name the run" if isinstance(self.detector, Exported) else ""


def parted(names: Sequence[str | os.PathLike[str]]) -> tuple[list[str], list[str]]:
    """Return the videos, and the pictures and folders, among names; patterns are replaced by what they match.

    Raises:
      DataError: a pattern matches nothing.
    """
    found = matched(names)
    return [name for name in found if is_video(name)], [name for name in found if not is_video(name)]


def of_model(model: DenseDetector, config: Config, weights: Path) -> Predictor:
    """Return the predictor of a model, whose ``weights`` are a run, packaged ones or a file."""
    data = override(config.data, {"test_canvases": both_orientations(config.data.test_canvases)})
    card = read_card(weights) if is_packaged(weights) else None
    return Predictor(
        Detector(model, config.inference, max_shapes=len(data.test_canvases)),
        name=config.name,
        classes=config.class_names,
        data=data,
        query=config.inference.query,
        windows=config.inference.batch_size,
        nms_iou=config.inference.nms_iou,
        best=weights if card is None else card.min_scores,
        card=card,
    )


def of_exported(detector: Exported) -> Predictor:
    """Return the predictor of an exported file, with the preprocessing that its manifest states."""
    resize, inference = detector.manifest["preprocessing"], detector.manifest["inference"]
    data = DataConfig(
        test_short=resize["test_short"],
        test_max=resize["test_max"],
        test_canvases=detector.canvases,
        exif=resize.get("exif", "auto"),  # artifacts of 0.1.0 lack the last three
        bit_depth=resize.get("bit_depth", ""),
        max_pixels=resize.get("max_pixels", DataConfig.max_pixels),
    )
    return Predictor(
        detector,
        name=detector.manifest["name"],
        classes=detector.classes,
        data=data,
        query=inference["query"],
        batch_size=min(detector.batch_sizes or (1,)),
        nms_iou=inference.get("nms_iou", InferenceConfig.nms_iou),  # artifacts of older versions may lack it
        best=detector,
    )


def _unknown(source: str, path: Path) -> str:
    names = zoo_names()
    known = f"packaged weights: {', '.join(names) or 'none in this installation'}"
    if is_there(path):
        return (
            f"{source}: is neither a run folder nor an exported file (.zip, .onnx); weights in a file need their "
            "configuration: build_model, load_weights, Detector"
        )
    if source in card_names():
        return f"{source}: a card holds no weights; give the folder of a run trained with it; {known}"
    near = difflib.get_close_matches(source, names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{source}: no such run folder, exported file or packaged weights; {hint}{known}"


def _items(source: Any) -> list[Any]:
    single = isinstance(source, str | os.PathLike | Image.Image) or hasattr(source, "__array__")
    items = [source] if single else source
    if not isinstance(items, list | tuple):
        raise DataError(f"pictures: {shown(source)} is none; give paths, arrays, Pillow's pictures, or a list of these")
    for i, item in enumerate(items):
        if not isinstance(item, str | os.PathLike | Image.Image) and not hasattr(item, "__array__"):
            raise DataError(f"pictures[{i}]: {shown(item)} is none; give a path, an array or a Pillow picture")
    return [np.asarray(x) if not isinstance(x, str | os.PathLike | Image.Image) else x for x in items]
