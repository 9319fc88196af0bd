"""Run a detector over a video: reading, device and whoever takes the results work at the same time."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from querydet_jax.config import DataConfig
from querydet_jax.data.plan import fit
from querydet_jax.data.readers.video import Frame, Video
from querydet_jax.data.transforms import place, resize
from querydet_jax.inference.detector import Detector
from querydet_jax.inference.pipeline import QueryTrace
from querydet_jax.inference.prediction import Prediction
from querydet_jax.inference.results import prediction
from querydet_jax.runtime.ahead import Ahead
from querydet_jax.runtime.files import writing

_log = logging.getLogger("querydet_jax")
_AHEAD = 4  # frames that wait at each stage
Example = tuple[Frame, np.ndarray]  # a frame, and what the network sees of it


def run_on_video(
    detector: Callable[..., Any],
    video: Video,
    data: DataConfig,
    classes: tuple[str, ...],
    *,
    stride: int = 1,
    batch_size: int = 1,
    maps: bool = False,
) -> Generator[Prediction, None, None]:
    """Run a detector over a video and yield a result per frame, in order.

    Frames are read and resized in a thread. While the caller has the results of one frame, the device computes the
    next; a stream or camera gets its results at once instead, and frames that it sends meanwhile are passed over.

    Args:
      detector: as in ``run_on_images``.
      stride: take each ``stride``-th frame.
      batch_size: frames per call.
      maps: also return the maps of the cascade, which takes a second pass.

    Raises:
      DataError: the frames fit no canvas.
    """
    shape, canvas = fit(video.size, data, video.name)
    frames = Ahead(_prepared(video, stride, shape, canvas), _AHEAD, newest=video.live)
    index = itertools.count()
    try:
        held: Iterator[Prediction] = iter(())
        while group := list(itertools.islice(frames, batch_size)):
            # The last batch is filled up with its own frames.
            rows = [group[n % len(group)] for n in range(batch_size)]
            batch = {
                "images": np.stack([image for _, image in rows]),
                "sizes": np.tile(np.array(shape, np.int32), (batch_size, 1)),
                "original_sizes": np.tile(np.array(video.size, np.int32), (batch_size, 1)),
            }
            result, trace = detector(batch["images"], batch["sizes"]), None  # returns before the device has finished
            if maps and isinstance(detector, Detector) and detector.config.query != "dense":
                trace = detector.trace(batch["images"], batch["sizes"])
            yield from held
            held = _predictions(detector, video, classes, [frame for frame, _ in group], batch, result, trace, index)
            if video.live:
                yield from held
        yield from held
    finally:
        frames.close()
    if frames.passed_over:
        _log.info("%s: passed over %d frames that came sooner than they were used", video.name, frames.passed_over)


def _prepared(
    video: Video, stride: int, shape: tuple[int, int], canvas: tuple[int, int]
) -> Generator[Example, None, None]:
    for frame in video.frames(stride):
        yield frame, place(resize(frame.pixels, shape), canvas)


def _predictions(
    detector: Callable[..., Any],
    video: Video,
    classes: tuple[str, ...],
    frames: list[Frame],
    batch: dict[str, np.ndarray],
    result: Any,
    trace: QueryTrace | None,
    index: Iterator[int],
) -> Iterator[Prediction]:
    """Wait for a batch's results and yield them; ``index`` counts them."""
    result, full = jax.device_get(result), None if trace is None else jax.device_get(trace)
    for row, frame in enumerate(frames):
        yield prediction(
            detector, result, full, batch, row,
            index=next(index), class_names=classes, path=video.path, frame=frame.index, time=frame.time,
            load=partial(_pixels, frame),
        )  # fmt: skip


def _pixels(frame: Frame) -> np.ndarray:
    return frame.pixels


class FramesFile:
    """Writes a line of JSON per frame: frame, time, boxes (xyxy in px of the frame), scores, classes, names.

    The lines are whole at any moment. A former file is replaced.

    Raises:
      QueryDetError: it cannot be written.
    """

    def __init__(self, path: Path):
        self.path = path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("wb", buffering=0)

    def add(self, found: Prediction) -> None:
        """Append a frame's detections."""
        line = {
            "frame": found.frame,
            "time": None if found.time is None else round(found.time, 6),
            "boxes": [[round(float(v), 2) for v in box] for box in found.boxes],
            "scores": [float(score) for score in found.scores],
            "classes": [int(k) for k in found.classes],
            "names": found.names,
        }
        data = json.dumps(line, allow_nan=False).encode() + b"\n"
        with writing(self.path):
            end = self._file.tell()
            try:
                written = self._file.write(data)
                if written < len(data):  # the system gives the reason at the next write only
                    self._file.write(data[written:])
            except OSError:
                with contextlib.suppress(OSError):  # a device
                    self._file.truncate(end)
                raise

    def __enter__(self) -> FramesFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None):
        self._file.close()
