"""Pixel statistics: what each flavour of backbone weights expects of its input.

Flavours: msra (detectron2's conversion, BGR), torchvision (RGB), efficientnet_lite (RGB).
"""

from __future__ import annotations

_STATISTICS = {
    "msra": ((103.530, 116.280, 123.675), (1.0, 1.0, 1.0)),
    "torchvision": ((123.675, 116.280, 103.530), (58.395, 57.120, 57.375)),
    "efficientnet_lite": ((127.0,) * 3, (128.0,) * 3),
}

Triple = tuple[float, float, float]


def pixel_statistics(flavor: str) -> tuple[Triple, Triple]:
    """Mean and standard deviation of 0..255 pixels, in the flavour's channel order."""
    return _STATISTICS[flavor]


def is_bgr(flavor: str) -> bool:
    """Whether the flavour's first convolution reads blue first."""
    return flavor == "msra"
