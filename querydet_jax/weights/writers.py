"""Write ``{tensor name: float32 array}`` to files that this project, PyTorch and detectron2 read."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
from safetensors.numpy import save

from querydet_jax.runtime.errors import WeightsError
from querydet_jax.runtime.files import written_aside
from querydet_jax.runtime.stores import as_path, is_url

AUTHOR = "querydet_jax"


def write_tensors(tensors: dict[str, np.ndarray], path: str | Path) -> None:
    """Write tensors in the format that the suffix names, aside first and then renamed.

    Args:
      tensors: float32 arrays by name.
      path: ``.safetensors``, ``.npz`` or ``.pkl`` (detectron2's dictionary of arrays).

    Raises:
      WeightsError: the suffix is another, or the folder is missing or cannot be written.
    """
    path = as_path(path)
    write = _WRITERS.get(path.suffix)
    if write is None:
        hint = "; PyTorch reads .safetensors, detectron2 .pkl" if path.suffix in (".pth", ".pt") else ""
        raise WeightsError(f"{path}: cannot write such a file; give one ending in {', '.join(_WRITERS)}{hint}")
    if not is_url(path) and not path.parent.is_dir():
        raise WeightsError(f"{path}: no folder {path.parent}; create it first")
    try:
        with written_aside(path) as aside:
            write({name: np.asarray(array, np.float32, order="C") for name, array in tensors.items()}, aside)
    except OSError as error:
        reason = error.strerror or error
        raise WeightsError(f"{path}: cannot be written ({reason}); free space or choose another place") from None


def _write_npz(tensors: dict[str, np.ndarray], path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, **cast(dict[str, Any], tensors))


def _write_safetensors(tensors: dict[str, np.ndarray], path: Path) -> None:
    # save_file would make the file readable to its owner only.
    path.write_bytes(save(tensors, metadata={"format": "pt", "author": AUTHOR}))


def _write_pkl(tensors: dict[str, np.ndarray], path: Path) -> None:
    # With both keys detectron2's checkpointer takes the names as they are, without matching them to the model's.
    with path.open("wb") as file:
        pickle.dump({"model": tensors, "__author__": AUTHOR}, file, protocol=4)


_WRITERS: dict[str, Callable[[dict[str, np.ndarray], Path], None]] = {
    ".safetensors": _write_safetensors,
    ".npz": _write_npz,
    ".pkl": _write_pkl,
}
