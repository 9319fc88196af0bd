"""The orientation tag of EXIF: which pictures a data set's boxes are drawn on, the stored or the turned ones."""

from __future__ import annotations

import logging
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from PIL import Image

from querydet_jax.runtime.errors import DataError

_log = logging.getLogger("querydet_jax")

TAG = 0x0112
_SIDEWAYS = (5, 6, 7, 8)
_LOOKED_AT = 2000  # headers that decide the rule of a data set whose annotations state sizes
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Header(NamedTuple):
    """What is known of a picture before it is decoded.

    Attributes:
      stored: (height, width) of the stored pixels.
      orientation: EXIF's, 1 to 8; 1 is as stored, and also stands for unknown.
    """

    stored: tuple[int, int]
    orientation: int

    @property
    def turned(self) -> tuple[int, int]:
        """(height, width) after the orientation is applied."""
        h, w = self.stored
        return (w, h) if self.orientation in _SIDEWAYS else (h, w)

    def size(self, *, upright: bool) -> tuple[int, int]:
        """Return (height, width) of the turned picture if ``upright``, otherwise of the stored one."""
        return self.turned if upright else self.stored


def parse_orientation(exif: bytes) -> int:
    """Return the orientation tag of an EXIF block, 1 if there is none.

    Nothing else in the block is looked at, so other tags may be odd or damaged.
    """
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", tiff, entry)
            if tag == TAG:
                (value,) = struct.unpack_from(
                    {1: "B", 6: "B", 7: "B", 4: f"{order}I", 9: f"{order}I"}.get(kind, f"{order}H"), tiff, entry + 8
                )
                return valid(value)
    except struct.error:  # the block ends too early
        return 1
    return 1


def valid(value: object) -> int:
    """Return an orientation of 1 to 8; anything else is 1."""
    return value if isinstance(value, int) and value in TURNS else 1


@dataclass(frozen=True)
class Rule:
    """Whether the orientation is applied to the pictures of a data set.

    Attributes:
      upright: whether it is.
      note: a sentence for the data report; empty if no picture that was looked at has an orientation.
    """

    upright: bool
    note: str

    @property
    def name(self) -> Literal["apply", "ignore"]:
        """The rule as ``data.exif`` has it."""
        return "apply" if self.upright else "ignore"


def spread(total: int) -> list[int]:
    """Return the positions of at most ``_LOOKED_AT`` pictures, spread evenly over a data set of ``total``."""
    step = max(1, -(-total // _LOOKED_AT))
    return list(range(0, total, step))


def decide(
    where: str,
    setting: Literal["auto", "apply", "ignore"],
    headers: Sequence[Header | DataError],
    *,
    convention: tuple[bool, str],
    stated: Sequence[tuple[int, int]] = (),
    names: Sequence[str] = (),
) -> Rule:
    """Decide the rule of a data set, and log it once if a picture has an orientation.

    Args:
      where: the data set in messages.
      setting: ``data.exif``.
      headers: of the pictures looked at; an error is an unreadable one, which tells nothing.
      convention: the rule where no size tells, and whose it is.
      stated: (height, width) of these pictures in the annotations; empty if these state none.
      names: of these pictures, for messages; empty as ``stated``.
    """
    tagged = sum(isinstance(header, Header) and header.orientation != 1 for header in headers)
    stored, turned = [], []
    for header, size, name in zip(headers, stated, names, strict=True) if stated else ():
        if isinstance(header, Header) and header.turned != header.stored:
            (stored if size == header.stored else turned if size == header.turned else []).append(name)
    if setting != "auto":
        upright, why = setting == "apply", f"data.exif {setting}"
    elif stored or turned:
        upright = len(turned) > len(stored) or (len(turned) == len(stored) and convention[0])
        why = f"the sizes in the annotations are those of the {'turned' if upright else 'stored'} pictures"
    else:
        upright, why = convention
    note = ""
    if tagged:
        note = (
            f"{tagged:,} of {len(headers):,} pictures have an EXIF orientation, which is "
            f"{'applied' if upright else 'ignored'}: {why}"
        )
        _log.info("%s: %s%s", where, note, "" if setting != "auto" else " (data.exif apply or ignore overrides this)")
    against = stored if upright else turned
    if setting == "auto" and against:
        _log.warning(
            "%s: the sizes in the annotations say the opposite of %d of these pictures (first %s); each of them is "
            "read as its size says", where, len(against), against[0],
        )  # fmt: skip
        note += f"; {len(against):,} are read the other way, as their sizes in the annotations say"
    return Rule(upright, note)
