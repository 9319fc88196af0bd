"""The part of `querydet predict` that videos take: three stages at work at once (read, detect, draw and encode)."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from querydet_jax.data.readers.video import SUFFIXES, is_address
from querydet_jax.inference.predictor import Predictor
from querydet_jax.inference.video import FramesFile
from querydet_jax.runtime.ahead import Ahead
from querydet_jax.runtime.errors import DataError
from querydet_jax.runtime.files import beside, check_writable, identity
from querydet_jax.runtime.names import one_line, result_stems
from querydet_jax.runtime.progress import progress
from querydet_jax.runtime.stores import as_path
from querydet_jax.viz.draw import draw_on_frame
from querydet_jax.viz.video import SUFFIX, VideoWriter

_log = logging.getLogger("querydet_jax")
_AHEAD = 4  # results that wait to be drawn


def video_stems(names: Sequence[str]) -> list[str]:
    """Return a file stem for the results of each video; of an address without user, password and query."""
    named = []
    for name in names:
        if is_address(name):
            name = re.sub(r"(?<=://)[^/@]*@|[?#].*", "", name)
            if Path(name).suffix.lower() not in SUFFIXES:
                name += ".stream"  # so that nothing of a host is taken for a suffix
        named.append(name)
    return result_stems(named)


def predict_video(predictor: Predictor, name: str, scores: np.ndarray, out: Path, draw: bool, stride: int) -> None:
    """Detect objects in a video; write ``OUT_detections.jsonl``, a line per frame, and ``OUT_detections.mp4``.

    Args:
      name: of the video, see ``Predictor.open_video``.
      scores: float32 ``[K]``, the score of each class from which detections count.
      out: folder and stem of what is written; the video itself is never overwritten.
      draw: whether to write the video with the detections drawn.
      stride: take each ``stride``-th frame.

    Raises:
      DataError: the video cannot be opened, or is damaged; what was found in the frames before is written.
    """
    check_writable(out.parent)
    video = predictor.open_video(name)
    lines, drawn = (beside(out.with_name(f"{out.name}_detections{s}"), _inputs(name)) for s in (".jsonl", SUFFIX))
    fault: list[str] = []
    results = Ahead(predictor.run_video(video, scores, stride=stride, on_broken=fault.append), _AHEAD)
    total = None if video.length is None else -(-video.length // stride)
    frames = objects = 0
    begun = 0.0
    with contextlib.ExitStack() as stack:
        stack.callback(results.close)
        file = stack.enter_context(FramesFile(lines))
        rate = video.rate and video.rate / stride
        writer = stack.enter_context(VideoWriter(drawn, video.size, rate, video.aspect)) if draw else None
        try:
            for result in progress(results, "predicting", "frame", total=total):
                begun = begun or time.monotonic()  # the first frame also waits for the compilation
                file.add(result)
                if writer is not None:
                    image = draw_on_frame(result.image, result.boxes, result.classes, result.scores, result.class_names)
                    writer.add(image, result.time or 0.0)
                frames, objects = frames + 1, objects + len(result)
        except KeyboardInterrupt:
            _log.info("%s: stopped after %d frames, which %s holds", video.name, frames, lines)
            raise
    speed = f", {(frames - 1) / (time.monotonic() - begun):.1f} frames per second" if frames > 1 else ""
    written = ", ".join(str(path) for path in ([drawn, lines] if draw else [lines]))
    tqdm.write(one_line(f"{video.name}: {frames} frames, {objects} objects{speed} -> {written}"), file=sys.stdout)
    sys.stdout.flush()
    if fault:
        raise DataError(fault[0])


def _inputs(name: str) -> set[tuple[object, object] | None]:
    return {identity(as_path(name) if not is_address(name) else Path(name))} - {None}
