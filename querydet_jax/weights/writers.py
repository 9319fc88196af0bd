"""``{tensor name: float32 array}`` to files that this project, PyTorch and detectron2 read."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
from safetensors.numpy import save

from querydet_jax.runtime.errors import WeightsError
from querydet_jax.runtime.files import written_aside

AUTHOR = "querydet_jax"


def write_tensors(tensors: dict[str, np.ndarray], path: str | Path) -> None:
    """Write tensors in the format that the suffix names, aside first and then renamed.

    Args:
      tensors: float32 arrays by name.
      path: ``.pth`` or ``.pt`` (zip format of torch.save, loads with ``weights_only=True``), ``.pkl``
        (detectron2's dictionary of arrays), ``.npz`` or ``.safetensors``.

    Raises:
      WeightsError: an unknown suffix, a folder that is not there or cannot be written.
    """
    path = Path(path)
    write = _WRITERS.get(path.suffix)
    if write is None:
        raise WeightsError(f"{path}: unknown kind of weight file; give one ending in {', '.join(_WRITERS)}")
    if not path.parent.is_dir():
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
    # Not save_file, which leaves the file readable to its owner only.
    path.write_bytes(save(tensors, metadata={"format": "pt", "author": AUTHOR}))


def _write_pkl(tensors: dict[str, np.ndarray], path: Path) -> None:
    # detectron2 takes a file with both keys for one of its own, and the names for final.
    with path.open("wb") as file:
        pickle.dump({"model": tensors, "__author__": AUTHOR}, file, protocol=4)


def _write_torch(tensors: dict[str, np.ndarray], path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:

        def add(name: str, data: bytes) -> None:
            # A fixed date, so that equal weights give equal files.
            archive.writestr(zipfile.ZipInfo(f"archive/{name}", (1980, 1, 1, 0, 0, 0)), data)

        add("data.pkl", _torch_pickle(tensors))
        add("byteorder", b"little")
        for key, array in enumerate(tensors.values()):
            add(f"data/{key}", array.astype("<f4", copy=False).tobytes())
        add("version", b"3\n")


def _torch_pickle(tensors: dict[str, np.ndarray]) -> bytes:
    """A pickle of ``{"model": {name: tensor}}``, where a tensor is a call of
    ``torch._utils._rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())``.

    Written opcode by opcode, since a pickler would import the functions it names.
    """
    out = [pickle.PROTO, b"\x02", pickle.EMPTY_DICT, _text("model"), pickle.EMPTY_DICT, pickle.MARK]
    for key, (name, array) in enumerate(tensors.items()):
        strides = [stride // array.itemsize for stride in array.strides]
        out += [
            _text(name),
            _global("torch._utils", "_rebuild_tensor_v2"),
            pickle.MARK,
            pickle.MARK, _text("storage"), _global("torch", "FloatStorage"), _text(str(key)), _text("cpu"),
            _integer(array.size), pickle.TUPLE, pickle.BINPERSID,
            _integer(0),
            pickle.MARK, *map(_integer, array.shape), pickle.TUPLE,
            pickle.MARK, *map(_integer, strides), pickle.TUPLE,
            pickle.NEWFALSE,
            _global("collections", "OrderedDict"), pickle.EMPTY_TUPLE, pickle.REDUCE,
            pickle.TUPLE,
            pickle.REDUCE,
        ]  # fmt: skip
    return b"".join([*out, pickle.SETITEMS, pickle.SETITEM, pickle.STOP])


def _text(text: str) -> bytes:
    data = text.encode("utf-8")
    return pickle.BINUNICODE + struct.pack("<I", len(data)) + data


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode("ascii")


def _integer(value: int) -> bytes:
    if value < 2**31:
        return pickle.BININT + struct.pack("<i", value)
    data = pickle.encode_long(value)
    return pickle.LONG1 + bytes([len(data)]) + data


_WRITERS: dict[str, Callable[[dict[str, np.ndarray], Path], None]] = {
    ".pth": _write_torch,
    ".pt": _write_torch,
    ".pkl": _write_pkl,
    ".npz": _write_npz,
    ".safetensors": _write_safetensors,
}
