"""Read videos, streams and cameras: frames as a player shows them, with their times. PyAV decodes (an extra).

Letters: H W frame.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from querydet_jax.data.readers.folders import open_regular
from querydet_jax.data.readers.images import DEFAULT, Reading
from querydet_jax.data.readers.memory import check_size
from querydet_jax.runtime.errors import DataError
from querydet_jax.runtime.pyav import import_av
from querydet_jax.runtime.stores import is_url

_log = logging.getLogger("querydet_jax")

SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        "mp4 m4v mov mkv webm avi mpg mpeg m2v ts mts m2ts 3gp wmv asf flv ogv vob h264 264 hevc h265 265 ivf mjpeg "
        "mjpg y4m mxf"
    ).split()
)
_ADDRESS = re.compile(r"(https?|rtsps?|rtmps?|rtp|srt|udp|tcp)://", re.IGNORECASE)
_CAMERA = re.compile(r"/dev/video\d+")
_PATIENCE = 20.0  # s that an address may take to answer
_STEP_BACK = 1.0  # s; a larger one is a clock set anew, a smaller one a slip
_PLAIN = np.array([[1, 0], [0, 1]])
_ALTERED = "the data that follow are cut or altered"


def is_address(name: str | os.PathLike[str]) -> bool:
    """Return whether a name is a stream's address rather than a path."""
    return _ADDRESS.match(os.fspath(name)) is not None


def is_video(name: str | os.PathLike[str]) -> bool:
    """Return whether a name is that of a video file, of a stream's address or of a camera (``/dev/video0``)."""
    text = os.fspath(name)
    if is_address(text) or _CAMERA.fullmatch(text):
        return True
    return Path(text).suffix.lower() in SUFFIXES and not os.path.isdir(text)


@dataclass(frozen=True, eq=False)
class Frame:
    """A frame of a video.

    Attributes:
      index: its position, from 0.
      time: seconds since the first frame; larger than that of the frame before.
      pixels: uint8 RGB ``[H, W, 3]``, turned as the video's metadata say.
    """

    index: int
    time: float
    pixels: np.ndarray


class Video:
    """An opened video, stream or camera, of which the first frame has been decoded.

    A file ends at its first damaged frame, because those that follow are made from it. A stream or camera goes on
    without the frames that were damaged or lost on the way.

    Args:
      name: of a file, an address (``rtsp://``, ``http://``, ...) or a camera, see ``is_video``.
      reading: whether frames are turned as metadata say (``exif``), and the largest number of pixels.

    Attributes:
      name: for messages, without a password.
      path: the file; None for an address or a camera.
      live: whether frames come at their own pace and do not wait for the reader.
      size: (height, width) of the frames.
      rate: frames per second on average; None if the video does not say.
      aspect: width of a pixel by its height.
      length: the number of frames that the header states or implies; None if it does neither. An estimate.
      fault: why the frames end before the video does; empty otherwise.

    Raises:
      DataError: it cannot be opened, holds no video, or no frame of it can be decoded.
      QueryDetError: PyAV is not installed.
    """

    def __init__(self, name: str | os.PathLike[str], reading: Reading = DEFAULT):
        self._av = import_av()
        source = os.fspath(name)
        self.name = re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", source)
        camera, address = _CAMERA.fullmatch(source), is_address(source)
        if is_url(source):
            raise DataError(f"{source}: videos are read from files on this machine; copy it here first")
        self.path = None if camera or address else Path(source)
        self.live = bool(camera or (address and not source.lower().startswith("http")))
        self.fault = ""
        try:
            if self.path is not None:
                with open_regular(self.path):
                    pass
            self._container = self._open(source)
        except FileNotFoundError:
            raise DataError(f"{self.name}: no such video; correct the name") from None
        except (OSError, self._av.FFmpegError, UnicodeError) as error:
            raise DataError(
                f"{self.name}: cannot be opened as a video ({_reason(error)}); give a video that is whole and plays"
            ) from None
        streams = [s for s in self._container.streams.video if not _is_cover(s)]
        if not streams:
            raise DataError(f"{self.name}: holds no video; give a file with a video stream")
        self._stream = streams[0]
        if self._stream.codec_context is None:
            raise DataError(f"{self.name}: its codec is not known to PyAV here; convert it to H.264")
        self._good = self._left_out = 0  # frames
        self._damage, self._shown = "", False  # what ends the frames; whether a frame shows it, and all before are out
        self._frames = self._decoded()
        first = next(self._frames, None)
        if first is None:
            raise DataError(self.fault or f"{self.name}: no frame can be decoded; give a video that is whole and plays")
        self._first = first
        self._turn = _turn_of(first) if reading.upright else _PLAIN
        upright = self._turn[0, 0] != 0
        self.size = (first.height, first.width) if upright else (first.width, first.height)
        check_size(*self.size, self.name, reading)
        aspect = Fraction(self._stream.codec_context.sample_aspect_ratio or 1)
        self.aspect = aspect if upright else 1 / aspect
        rate = self._stream.average_rate or self._stream.guessed_rate
        self.rate = None if not rate or self.live else Fraction(rate)
        seconds = self._stated_seconds()
        self.length = self._stream.frames or (round(seconds * self.rate) if seconds and self.rate else None)
        if not np.array_equal(self._turn, _PLAIN):
            _log.info("%s: turned as its metadata say, to %d x %d (width x height)", self.name, *self.size[::-1])

    def frames(self, stride: int = 1) -> Generator[Frame, None, None]:
        """Yield every ``stride``-th frame, once; ``fault`` tells afterwards whether all were there."""
        with contextlib.closing(self._frames):
            for index, (frame, time) in enumerate(self._timed()):
                if index % stride == 0:
                    yield Frame(index, time, self._pixels(frame))
        if self._left_out:
            _log.warning("%s: left out %d frames that were damaged or lost on the way", self.name, self._left_out)

    def _open(self, source: str) -> Any:
        if self.path is not None:
            # With its protocol, so that a name with a colon is no other.
            return self._av.open(f"file:{source}")
        if _CAMERA.fullmatch(source):
            return self._av.open(source, format="v4l2")
        options = {"rtsp_transport": "tcp"} if source.lower().startswith("rtsp") else {}  # loses no packets
        return self._av.open(source, options=options, timeout=_PATIENCE)

    def _decoded(self) -> Generator[Any, None, None]:
        """Yield the decoder's frames up to the end or the first damage."""
        with contextlib.closing(self._container):
            try:
                for packet in self._container.demux(self._stream):
                    yield from self._sound(packet)
                    if self._damage:
                        break
            except self._av.FFmpegError as error:  # the file or the connection, not a frame
                self._damage = _reason(error)
            if self._damage:
                if not self._shown:
                    yield from self._sound(None)
                if not self._good:
                    why = f"no frame can be decoded ({self._damage}); give a video that is whole and plays"
                else:
                    why = f"broken off after frame {self._good - 1} ({self._damage}); the frames so far are used"
                self.fault = f"{self.name}: {why}"

    def _sound(self, packet: Any) -> Iterator[Any]:
        """Yield the frames that the decoder returns for a packet, or still holds (None), up to a damaged one."""
        if packet is not None and packet.is_corrupt:
            self._note(_ALTERED)
            return
        try:
            frames = self._stream.codec_context.decode(None) if packet is None else packet.decode()
        except self._av.FFmpegError as error:
            self._note(_reason(error))
            return
        for frame in frames:
            if not frame.is_corrupt:
                self._good += 1
                yield frame
            elif self._note(_ALTERED):
                self._shown = True
                return

    def _note(self, damage: str) -> bool:
        """Return whether damage ends the frames; in a stream, and before the first good frame, it is only counted."""
        if self.live or not self._good:
            self._left_out += 1
            return False
        self._damage = self._damage or damage
        return True

    def _timed(self) -> Iterator[tuple[Any, float]]:
        """Yield frames with their seconds since the first, rising."""
        step = float(1 / self.rate) if self.rate else 0.04
        base = self._stream.time_base or Fraction(0)
        start, last, index = (self._first.pts or 0) * base, -step, -1
        if self._first.pts is None:
            _log.info("%s: states no times; they are counted at %g frames per second", self.name, 1 / step)
        for index, frame in enumerate(itertools.chain([self._first], self._frames)):
            if (frame.height, frame.width) != (self._first.height, self._first.width):
                self.fault = (
                    f"{self.name}: from frame {index} on it is {frame.width} x {frame.height} (width x height) instead "
                    f"of {self._first.width} x {self._first.height}; the frames before are used; cut it there"
                )
                return
            time = last + step if frame.pts is None else float(frame.pts * base - start)
            if time < last - _STEP_BACK:
                _log.warning("%s: its clock goes back at frame %d; time is counted on", self.name, index)
                start += Fraction(time - (last + step))
                time = last + step
            last = max(time, last + 0.001) if index else time
            yield frame, last
        stated = self._stated_seconds()
        if stated and not self.fault and last + step < stated - max(0.5, 5 * step):
            self.fault = (
                f"{self.name}: ends after frame {index} ({last:.2f} s), where its header states {stated:.2f} s; the "
                "frames so far are used; it was cut short, so copy or record it again"
            )

    def _stated_seconds(self) -> float:
        """Return the duration of the video that the header states; 0 if it states none."""
        if self.live or self.path is None:
            return 0.0
        if self._stream.duration and self._stream.time_base:
            return float(self._stream.duration * self._stream.time_base)
        clock = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", self._stream.metadata.get("DURATION", ""))  # Matroska
        return 0.0 if clock is None else 3600 * int(clock[1]) + 60 * int(clock[2]) + float(clock[3])

    def _pixels(self, frame: Any) -> np.ndarray:
        # Without a statement, players take BT.709 from 720 lines on, and FFmpeg BT.601.
        unstated = frame.colorspace == 2 and frame.height >= 720 and not frame.format.is_rgb
        pixels = frame.to_ndarray(format="rgb24", **({"src_colorspace": "ITU709"} if unstated else {}))
        (a, b), (c, d) = self._turn
        if not a:
            pixels = pixels.transpose(1, 0, 2)
        if a + c < 0:
            pixels = pixels[:, ::-1]
        if b + d < 0:
            pixels = pixels[::-1]
        return np.ascontiguousarray(pixels)


def _turn_of(frame: Any) -> np.ndarray:
    """Return where the display matrix sends the axes, [2, 2]: the columns' direction (1, 0) becomes row 0, as (x, y).

    An angle other than a quarter turn becomes the nearest one.
    """
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            matrix = np.frombuffer(bytes(data), "=i4")[:6].reshape(2, 3)[:, :2].astype(np.float64)
            straight, turned = np.abs(matrix[0, 0] * matrix[1, 1]), np.abs(matrix[0, 1] * matrix[1, 0])
            if max(straight, turned) > 0:
                return np.sign(matrix * (1 - _PLAIN if turned > straight else _PLAIN)).astype(int)
    return _PLAIN


def _is_cover(stream: Any) -> bool:
    """Whether a video stream is the picture of a song."""
    return bool(stream.disposition & type(stream.disposition).attached_pic)


def _reason(error: BaseException) -> str:
    """Return an error's reason without the address, which may hold a password."""
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0][:100]
