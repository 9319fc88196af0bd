"""Read weight files into ``{tensor name: array}``, without PyTorch and without running code from them."""

from __future__ import annotations

import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

from querydet_jax.runtime.errors import WeightsError
from querydet_jax.weights.pickles import Inert, NumpyArray, Storage, TorchTensor, itemsize, load_pickle

PICKLE_SUFFIXES = (".pth", ".pt", ".pkl", ".bin", ".ckpt")
SUFFIXES = (*PICKLE_SUFFIXES, ".npz", ".safetensors")

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first object of a file of torch.save before 1.6
_DAMAGE = (SafetensorError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OverflowError)
_WRAPPERS = ("model", "state_dict", "model_state_dict", "blobs")  # keys under which checkpoints keep the weights


def read_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """Read every tensor of a weight file, under the file's own names and in its own types.

    Args:
      path: ``.pth``, ``.pt``, ``.bin``, ``.ckpt`` (torch.save of PyTorch 1.6 or newer), ``.pkl`` (detectron2's or
        Caffe2's dictionaries of arrays), ``.npz``, ``.safetensors``, or a run folder (``read_checkpoint``).
        Checkpoints that keep the weights under ``model``, ``state_dict``, ``model_state_dict`` or ``blobs`` are
        unwrapped; optimiser state and counters are left out.

    Returns:
      Arrays, possibly read-only views of one buffer; bfloat16 as ``ml_dtypes.bfloat16``.

    Raises:
      WeightsError: there is no such file; its suffix is unknown; it is damaged or holds no tensors; its pickle asks
        for anything but tensors.
    """
    path = Path(path)
    if path.is_dir():
        from querydet_jax.runtime.checkpoint_store import read_checkpoint  # imports orbax, which takes a second

        return read_checkpoint(path, "model")
    if path.suffix not in SUFFIXES:
        raise WeightsError(f"{path}: unknown kind of weight file; give one ending in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise WeightsError(f"{path}: no such weight file; check the path")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="np") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        elif path.suffix == ".npz":
            with path.open("rb") as file:
                tensors = _read_npz(file)
        else:
            with path.open("rb") as file:
                zipped = file.read(4) == b"PK\x03\x04"
                file.seek(0)
                tensors = _read_torch_zip(file) if zipped else _read_pickle(file)
        if not tensors:
            raise WeightsError("no tensors in it; save the model's state dict")
    except WeightsError as error:
        # Names from a damaged file may hold anything, line breaks included.
        raise WeightsError(f"{path}: {' '.join(str(error).split())}") from None
    except (*_DAMAGE, OSError, KeyError, ValueError, TypeError, MemoryError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise WeightsError(f"{path}: damaged, or no weight file at all ({reason}); fetch or write it again") from None
    return tensors


def _read_npz(file: BinaryIO) -> dict[str, np.ndarray]:
    arrays = np.load(file, allow_pickle=False)
    if isinstance(arrays, np.ndarray):
        raise WeightsError("a single array without a name; save a dictionary of arrays with numpy.savez")
    with arrays:
        return {name: arrays[name] for name in arrays.files}


def _read_torch_zip(file: BinaryIO) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        entries = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(entries) != 1:
            raise WeightsError("a zip archive, but not of torch.save; give a .pth of weights, or rename it to .npz")
        folder = entries[0].removesuffix("/data.pkl")
        order = b"little"
        if f"{folder}/byteorder" in archive.namelist():
            order = archive.read(f"{folder}/byteorder").strip()
        with archive.open(entries[0]) as pickled:
            checkpoint = load_pickle(pickled)

        def load(storage: Storage) -> np.ndarray:
            data = np.frombuffer(archive.read(f"{folder}/data/{storage.key}"), np.uint8)
            return _part(data, storage)

        return _tensors(checkpoint, load, swap=order.decode("ascii", "replace") != sys.byteorder)


def _read_pickle(file: BinaryIO) -> dict[str, np.ndarray]:
    checkpoint = load_pickle(file)
    if checkpoint == _LEGACY_MAGIC:
        raise WeightsError(
            "written by torch.save before PyTorch 1.6; convert it with PyTorch: "
            "torch.save(torch.load(OLD, map_location='cpu'), NEW)"
        )
    return _tensors(checkpoint, _no_storage, swap=False)


def _part(data: np.ndarray, storage: Storage) -> np.ndarray:
    width = itemsize(storage.dtype)
    return data[: storage.count * width]


def _no_storage(storage: Storage) -> np.ndarray:
    raise WeightsError("a pickle of tensors without their data; write it with torch.save")


def _tensors(checkpoint: Any, load: Callable[[Storage], np.ndarray], swap: bool) -> dict[str, np.ndarray]:
    """Return the weights of a checkpoint; read each storage once."""
    if not isinstance(checkpoint, dict):
        what = checkpoint.kind if isinstance(checkpoint, Inert) else type(checkpoint).__name__
        raise WeightsError(f"holds a {what}, not a dictionary of tensors; save the model's state dict")
    for wrapper in _WRAPPERS:
        inner = checkpoint.get(wrapper)
        if isinstance(inner, dict):
            checkpoint = inner
            break
        if isinstance(inner, Inert):
            raise WeightsError(f"holds a whole {inner.kind} as {wrapper!r}; save its state dict")
    storages: dict[Storage, np.ndarray] = {}

    def load_once(storage: Storage) -> np.ndarray:
        if storage not in storages:
            storages[storage] = load(storage)
        return storages[storage]

    tensors = {}
    for name, value in checkpoint.items():
        if not isinstance(name, str):
            continue
        if isinstance(value, Inert) and "_rebuild" in value.kind:
            raise WeightsError(f"tensor {name}: kind {value.kind} is not supported; save it dense, as float32")
        if isinstance(value, (TorchTensor, NumpyArray)):
            try:
                tensors[name] = value.read(load_once, swap) if isinstance(value, TorchTensor) else value.read()
            except WeightsError as error:
                raise WeightsError(f"tensor {name}: {error}") from None
    return tensors
