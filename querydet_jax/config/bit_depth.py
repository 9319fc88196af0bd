"""How pictures of more than 8 bits per channel become 8 bits."""

from __future__ import annotations

import functools
import math
import re
from typing import NamedTuple

from querydet_jax.runtime.errors import ConfigError

_RANGE = re.compile(r"\s*(?P<low>[^:%]+)(?P<percent>%?)\s*:\s*(?P<high>[^:%]+)(?P=percent)\s*")


class BitDepth(NamedTuple):
    """The values that become 0 and 255; what lies beyond them becomes 0 or 255 as well.

    Attributes:
      low, high: values of the file, or with ``percent`` percentiles (0 to 100) of the picture's own values.
    """

    low: float
    high: float
    percent: bool


@functools.cache
def parse_bit_depth(text: str) -> BitDepth | None:
    """Read ``data.bit_depth``: ``file``, ``LOW:HIGH``, ``LOW%:HIGH%``, or empty, which gives None.

    Raises:
      ConfigError: it is none of these, or LOW is not below HIGH.
    """
    if not text:
        return None
    if text.strip() == "file":
        return BitDepth(0, 100, percent=True)
    match = _RANGE.fullmatch(text)
    try:
        low, high = (float(match[end]) for end in ("low", "high")) if match else (math.nan, math.nan)
    except ValueError:
        low = high = math.nan
    percent = bool(match and match["percent"])
    if not (math.isfinite(low) and math.isfinite(high) and low < high) or (percent and not 0 <= low < high <= 100):
        raise ConfigError(
            f"data.bit_depth {text!r}: give file, values LOW:HIGH such as 0:16383, or percentiles such as 1%:99%, the "
            "first below the second; leave it empty to keep the upper 8 bits"
        )
    return BitDepth(low, high, percent)
