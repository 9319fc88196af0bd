"""Read weight files into ``{tensor name: array}``, without PyTorch and without running code from them."""

from __future__ import annotations

import io
import math
import os
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

from querydet_jax.config.zoo import is_packaged
from querydet_jax.runtime.errors import WeightsError
from querydet_jax.runtime.stores import StoreError, as_path, local_copy
from querydet_jax.weights.packaged import verified
from querydet_jax.weights.pickles import Inert, NumpyArray, Storage, TorchTensor, itemsize, load_pickle

PICKLE_SUFFIXES = (".pth", ".pt", ".pkl", ".bin", ".ckpt")
SUFFIXES = (*PICKLE_SUFFIXES, ".npz", ".safetensors")

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first object of a file of torch.save before 1.6
_DAMAGE = (
    SafetensorError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OverflowError, OSError, KeyError,
    ValueError, TypeError, AttributeError, MemoryError,
)  # fmt: skip
# torch.save and numpy.savez do not compress; numpy.savez_compressed halves weights at most. What grows more is a bomb.
_MOST_GROWTH, _SMALL = 20, 2**26
_SAFETENSORS = {"BOOL", "U8", "I8", "U16", "I16", "F16", "BF16", "U32", "I32", "F32", "U64", "I64", "F64"}
_WRAPPERS = ("model", "state_dict", "model_state_dict", "blobs")  # keys under which checkpoints keep the weights


def read_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """Read every tensor of a weight file, under the file's own names and in its own types.

    Args:
      path: ``.pth``, ``.pt``, ``.bin``, ``.ckpt`` (torch.save, zip or legacy), ``.pkl`` (detectron2's or
        Caffe2's dictionaries of arrays), ``.npz``, ``.safetensors``, a run folder (``read_checkpoint``), or a folder of
        packaged weights, which is checked against its card.
        Checkpoints that keep the weights under ``model``, ``state_dict``, ``model_state_dict`` or ``blobs`` are
        unwrapped; optimiser state and counters are left out.

    Returns:
      Arrays, possibly read-only views of one buffer; bfloat16 as ``ml_dtypes.bfloat16``.

    Raises:
      WeightsError: there is no such file; its suffix is unknown; it is damaged or holds no tensors; its pickle asks
        for anything but tensors.
    """
    path = as_path(path)
    if path.is_dir() and is_packaged(path):
        path = verified(path)
    elif path.is_dir():
        from querydet_jax.runtime.checkpoint_store import read_checkpoint  # imports orbax, which takes a second

        return read_checkpoint(path, "model")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise WeightsError(f"{path}: unknown kind of weight file; give one ending in {', '.join(SUFFIXES)}")
    if not path.is_file():
        found = "is no regular file" if path.exists() else "no such weight file"
        raise WeightsError(f"{path}: {found}; check the path")
    try:
        with local_copy(path) as here:
            tensors = _read_file(here)
        if not tensors:
            raise WeightsError("no tensors in it; save the model's state dict")
    except WeightsError as error:
        raise WeightsError(f"{path}: {_one_line(error)}") from None
    except StoreError:
        raise
    except _DAMAGE as error:
        reason = _one_line(error)
        raise WeightsError(f"{path}: damaged, or no weight file at all ({reason}); fetch or write it again") from None
    return tensors


def _read_file(path: Path) -> dict[str, np.ndarray]:
    if path.suffix.lower() == ".safetensors":
        return _read_safetensors(path)
    with path.open("rb") as file:
        if path.suffix.lower() == ".npz":
            return _read_npz(file)
        zipped = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        return _read_torch_zip(file) if zipped else _read_pickle(file)


def _one_line(error: Exception) -> str:
    """Return a message as a line: names from a damaged file may hold anything, of any length."""
    text = " ".join((str(error) or type(error).__name__).split())
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}"


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    tensors = {}
    with safe_open(path, framework="np") as file:
        for name in file.keys():  # noqa: SIM118
            kind = file.get_slice(name).get_dtype()
            if kind not in _SAFETENSORS:
                raise WeightsError(f"tensor {name}: type {kind} is not supported; save it as float32")
            tensors[name] = file.get_tensor(name)
    return tensors


def _check_growth(archive: zipfile.ZipFile, size: int) -> None:
    """Raise WeightsError if what an archive of ``size`` bytes holds is out of proportion to it."""
    total = sum(entry.file_size for entry in archive.infolist())
    if total > _room(size):
        raise WeightsError(f"{size} bytes that unpack to {total}; write it again without compression")


def _room(size: int) -> int:
    """Return how many bytes the tensors of a file may have."""
    return max(_MOST_GROWTH * size, _SMALL)


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def _read_npz(file: BinaryIO) -> dict[str, np.ndarray]:
    if file.read(6) == b"\x93NUMPY":
        raise WeightsError("a single array without a name; save a dictionary of arrays with numpy.savez")
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        _check_growth(archive, _size(file))
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise WeightsError(f"holds {twice} twice; write it again")
        return {name.removesuffix(".npy"): _read_npy(name, archive.read(name)) for name in archive.namelist()}


def _read_npy(name: str, raw: bytes) -> np.ndarray:
    """Read an array in NumPy's format, without allocating what its header claims."""
    file = io.BytesIO(raw)
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = read(file)
    except Exception as error:  # parts of Python's tokenizer and parser read the header
        raise WeightsError(f"{name}: has no header of an array ({type(error).__name__}: {error})") from None
    if dtype.hasobject:
        raise WeightsError(f"{name}: holds Python objects; save arrays of numbers")
    start, size = file.tell(), math.prod(shape) * dtype.itemsize
    if any(side < 0 for side in shape) or size != len(raw) - start:
        raise WeightsError(f"{name}: its header says {size} bytes, but it has {len(raw) - start}; write it again")
    if not size:
        return np.zeros(shape, dtype)
    return np.frombuffer(raw, dtype, offset=start).reshape(shape, order="F" if fortran else "C")


def _read_torch_zip(file: BinaryIO) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        _check_growth(archive, _size(file))
        entries = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(entries) != 1:
            raise WeightsError("a zip archive, but not of torch.save; give a .pth of weights, or rename it to .npz")
        folder = entries[0].removesuffix("/data.pkl")
        order = b"little"
        if f"{folder}/byteorder" in archive.namelist():
            order = archive.read(f"{folder}/byteorder").strip()
        if order not in (b"little", b"big"):
            raise WeightsError(f"its byteorder is {order[:20]!r}, not little or big; save the state dict again")
        size = archive.getinfo(entries[0]).file_size
        with archive.open(entries[0]) as pickled:
            checkpoint, _ = load_pickle(pickled, size)
        storages: dict[str, np.ndarray] = {}

        def load(storage: Storage) -> np.ndarray:
            if storage.key not in storages:
                storages[storage.key] = np.frombuffer(archive.read(f"{folder}/data/{storage.key}"), np.uint8)
            return storages[storage.key][: storage.count * itemsize(storage.dtype)]

        return _tensors(checkpoint, load, swap=order.decode() != sys.byteorder, room=_room(_size(file)))


def _read_pickle(file: BinaryIO) -> dict[str, np.ndarray]:
    first, _ = load_pickle(file, _size(file))
    if first == _LEGACY_MAGIC:
        return _read_torch_legacy(file)
    return _tensors(first, _no_storage, swap=False, room=_room(_size(file)))


def _read_torch_legacy(file: BinaryIO) -> dict[str, np.ndarray]:
    """Read what follows the magic number: pickles, then the storages in a row, each behind its number of elements.

    EfficientNet-Lite0's packaged weights are such a file.
    """
    end = _size(file)

    def pickled() -> tuple[Any, dict[str, Storage]]:
        return load_pickle(file, end - file.tell())

    pickled()  # version of the format, 1001 ever since
    machine, _ = pickled()
    checkpoint, storages = pickled()
    keys, _ = pickled()
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in storages for key in keys):
        raise WeightsError("lists storages that its tensors do not have; fetch or write it again")
    places: dict[str, int] = {}
    for key in keys:
        count, size = file.read(8), storages[key].count * itemsize(storages[key].dtype)
        places[key] = file.tell()
        if int.from_bytes(count, "little") != storages[key].count or places[key] + size > end:
            raise WeightsError("its storages do not have the sizes that it states; fetch or write it again")
        file.seek(size, os.SEEK_CUR)

    def load(storage: Storage) -> np.ndarray:
        file.seek(places[storage.key])
        return np.frombuffer(file.read(storage.count * itemsize(storage.dtype)), np.uint8)

    little = not isinstance(machine, dict) or machine.get("little_endian", True)
    return _tensors(checkpoint, load, swap=little != (sys.byteorder == "little"), room=_room(end))


def _no_storage(storage: Storage) -> np.ndarray:
    raise WeightsError("a pickle of tensors without their data; write it with torch.save")


def _tensors(checkpoint: Any, load: Callable[[Storage], np.ndarray], swap: bool, room: int) -> dict[str, np.ndarray]:
    """Return the weights of a checkpoint, of at most ``room`` bytes together."""
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
    tensors = {}
    for name, value in checkpoint.items():
        if not isinstance(name, str):
            continue
        if isinstance(value, Inert) and "_rebuild" in value.kind:
            raise WeightsError(f"tensor {name}: kind {value.kind} is not supported; save it dense, as float32")
        if isinstance(value, (TorchTensor, NumpyArray)):
            try:
                array = value.read(load, swap, room) if isinstance(value, TorchTensor) else value.read(room)
            except WeightsError as error:
                raise WeightsError(f"tensor {name}: {error}") from None
            room -= array.nbytes
            tensors[name] = array
    return tensors
