"""Write a video from pictures and their times. PyAV encodes (an extra)."""

from __future__ import annotations

import contextlib
from fractions import Fraction
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np

from querydet_jax.runtime.errors import DataError, QueryDetError
from querydet_jax.runtime.files import writing
from querydet_jax.runtime.pyav import import_av

SUFFIX = ".mp4"
_TICKS = 90_000  # per second: whole numbers for 24, 25, 30, 50 and 60 frames per second, and for 1001ths of these
_BT709 = 1  # in FFmpeg's lists of matrices, primaries and transfer functions
_LIMITED = 1  # range of values, as televisions expect it
# Encoder and its options, the best first. Builds of PyAV differ.
_ENCODERS: dict[str, dict[str, str]] = {
    # B-frames would start a file of fragments after 0; a fragment begins at each key frame.
    "libx264": {"preset": "veryfast", "crf": "20", "bf": "0", "g": "50"},
    "h264_videotoolbox": {"q": "65"},
    "libopenh264": {},
    "mpeg4": {"qscale": "3"},
}


class VideoWriter:
    """Writes an MP4 file: H.264, or MPEG-4 where PyAV has no encoder for it.

    The file plays once ``close`` has run; if the process is killed, it plays without its last frames.

    Args:
      path: of the file; a former one is replaced.
      size: (height, width) of the pictures.
      rate: pictures per second on average, to begin with; times are those given to ``add``.
      aspect: width of a pixel by its height.

    Attributes:
      encoder: FFmpeg's name of the encoder.

    Raises:
      QueryDetError: PyAV is not installed or has no encoder, or the file cannot be written.
    """

    def __init__(self, path: Path, size: tuple[int, int], rate: Fraction | None = None, aspect: Fraction = Fraction(1)):
        self._av, self._path, self._size = import_av(), path, size
        self.encoder, codec = _encoder(self._av)
        self._last = -1
        height, width = size
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _File(path)
        # Fragments while it is written, one index at the end.
        self._container = self._av.open(self._file, "w", "mp4", options={"movflags": "hybrid_fragmented"})
        self._stream: Any = self._container.add_stream(
            self.encoder, rate=(rate or Fraction(25)).limit_denominator(1001), options=_ENCODERS[self.encoder]
        )
        self._stream.width, self._stream.height = width, height
        even = width % 2 == 0 and height % 2 == 0
        formats = [x.name for x in codec.video_formats or ()]
        # Half the resolution for colour, which every player reads, needs even sides.
        self._stream.pix_fmt = "yuv420p" if even or "yuv444p" not in formats else "yuv444p"
        context = self._stream.codec_context
        context.time_base = Fraction(1, _TICKS if self.encoder != "mpeg4" else 60_000)  # it takes 16 bits
        context.sample_aspect_ratio = aspect
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED
        self._base = context.time_base

    def add(self, image: np.ndarray, time: float) -> None:
        """Append a picture.

        Args:
          image: uint8 RGB [H, W, 3].
          time: in seconds, above that of the picture before.

        Raises:
          DataError: the picture has another size.
          QueryDetError: it cannot be encoded, or the file cannot be written.
        """
        if image.shape != (*self._size, 3):
            raise DataError(f"{self._path}: a picture of {list(image.shape)} in a video of {self._size}")
        frame = self._av.VideoFrame.from_ndarray(image, format="rgb24")
        frame = frame.reformat(format=self._stream.pix_fmt, dst_colorspace="ITU709", dst_color_range="MPEG")
        self._last = max(round(time / self._base), self._last + 1)
        frame.pts, frame.time_base = self._last, self._base
        try:
            self._container.mux(self._stream.encode(frame))
        except self._av.FFmpegError as error:
            self._last = -1  # there is nothing to end
            raise QueryDetError(
                f"{self._path}: {self.encoder} cannot encode {self._size[1]} x {self._size[0]} (width x height) "
                f"({error.strerror}); leave the video out (--draw none)"
            ) from None
        self._check()

    def close(self) -> None:
        """Write what the encoder holds, and the index.

        Raises:
          QueryDetError: the file cannot be written.
        """
        if self._last >= 0:
            self._container.mux(self._stream.encode(None))
        self._container.close()
        self._file.close()
        self._check()

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None):
        if kind is None:
            self.close()
            return
        with contextlib.suppress(QueryDetError):  # the first error is the one to show
            self.close()

    def _check(self) -> None:
        if self._file.error is not None:
            with writing(self._path):
                raise self._file.error


class _File:
    """What FFmpeg writes to. After an error it drops everything: FFmpeg can crash when it closes a file that failed."""

    def __init__(self, path: Path):
        self.error: OSError | None = None
        self._file = path.open("wb", buffering=0)

    def write(self, data: bytes) -> int:
        try:
            done = 0
            while done < len(data) and self.error is None:
                done += self._file.write(memoryview(data)[done:])
        except OSError as error:
            self.error = error
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


def _encoder(av: ModuleType) -> tuple[str, Any]:
    for name in _ENCODERS:
        try:
            return name, av.Codec(name, "w")
        except av.FFmpegError:
            continue
        except ValueError:  # what older versions raise
            continue
    raise QueryDetError(f"PyAV {av.__version__} has no encoder for MP4 ({', '.join(_ENCODERS)}); use --draw none")
