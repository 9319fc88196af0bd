"""The images that the published code's outputs were recorded on."""

from __future__ import annotations

import numpy as np
import recipe


def rgb(tag: str, height: int, width: int) -> np.ndarray:
    """A recorded test image as uint8 RGB ``[H, W, 3]``."""
    return np.ascontiguousarray(recipe.image(tag, height, width)[::-1].transpose(1, 2, 0))
