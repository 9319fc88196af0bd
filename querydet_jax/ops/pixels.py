"""Pixel statistics and channel order that each flavour of backbone weights expects.

Flavours: msra (detectron2's conversion, BGR), torchvision (RGB), efficientnet_lite (RGB).
"""

from __future__ import annotations

Triple = tuple[float, float, float]

_STATISTICS: dict[str, tuple[Triple, Triple]] = {
    "msra": ((103.530, 116.280, 123.675), (1.0, 1.0, 1.0)),
    "torchvision": ((123.675, 116.280, 103.530), (58.395, 57.120, 57.375)),
    "efficientnet_lite": ((127.0, 127.0, 127.0), (128.0, 128.0, 128.0)),
}


def pixel_statistics(flavor: str) -> tuple[Triple, Triple]:
    """Return mean and standard deviation of 0..255 pixels, in the flavour's channel order."""
    return _STATISTICS[flavor]


def is_bgr(flavor: str) -> bool:
    """Return whether the flavour's input channels are in BGR order."""
    return flavor == "msra"
