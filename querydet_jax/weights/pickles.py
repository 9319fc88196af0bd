"""Read pickles without running them.

A pickle is a program that may call anything Python can import. This reader binds the few names that tensors are made
of to functions of its own; names that optimisers, schedulers and configurations leave in checkpoints become inert
placeholders; any other name is an error. Nothing is imported, and PyTorch is not needed.

What is read takes no more memory than a multiple of the file. Python's own unpickler is used, not the one in C, which
allocates what a file claims before it looks (a memo of 2^32 entries) and overflows its stack on keys nested deeply.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

import ml_dtypes
import numpy as np

from querydet_jax.runtime.errors import WeightsError

_TORCH_DTYPES: dict[str, Any] = {
    "float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16,
    "int64": np.int64, "int32": np.int32, "int16": np.int16, "int8": np.int8, "bool": np.bool_,
    "uint8": np.uint8, "uint16": np.uint16, "uint32": np.uint32, "uint64": np.uint64,
}  # fmt: skip
_TORCH_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "BoolStorage": "bool", "ByteStorage": "uint8", "UntypedStorage": "uint8",
}  # fmt: skip

# Packages and classes whose objects in a checkpoint are ignored.
_IGNORED_PACKAGES = {"torch", "numpy", "detectron2", "fvcore", "yacs", "omegaconf", "mmcv", "mmengine"}
_IGNORED_NAMES = (
    {
        ("argparse", "Namespace"),
        ("collections", "Counter"),
        ("collections", "defaultdict"),
        ("collections", "deque"),
        ("datetime", "datetime"),
        ("datetime", "timedelta"),
    }
    | {
        (module, name)
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath", "PurePosixPath")
    }
    | {
        (module, name)
        for module in ("builtins", "__builtin__")
        for name in (
            "bytearray",
            "complex",
            "dict",
            "float",
            "frozenset",
            "int",
            "list",
            "object",
            "set",
            "slice",
            "tuple",
        )
    }
)


class Inert:
    """Placeholder of an object of no interest; ignores whatever a pickle does to it."""

    kind = "object"

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    def add(self, item: Any) -> None:
        pass


class _Callable:
    """A function that a pickle may call but not alter (BUILD sets attributes of plain functions)."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("sets the state of a function")


@dataclass(frozen=True, slots=True)
class _TorchType:
    """A storage class or a ``torch.dtype``: a key of ``_TORCH_DTYPES``."""

    name: str

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("sets the state of a type")


class _NumpyDtype:
    """``numpy.dtype`` as pickled: a code such as ``f4``, then the byte order as its state."""

    def __init__(self, code: str, *flags: Any) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]

    def numpy(self) -> np.dtype:
        numeric = isinstance(self.code, str) and re.fullmatch(r"[<>|=]?[fiub]\d+", self.code)
        if not numeric or self.order not in ("<", ">", "|", "="):
            kind = repr(self.code) if isinstance(self.code, str) else "unknown"
            raise WeightsError(f"array of type {kind}, which is not numeric")
        return np.dtype(self.code).newbyteorder(self.order)


class NumpyArray:
    """A NumPy array as pickled; ``read`` returns it as an array."""

    def __init__(self, raw: Any = b"", dtype: Any = None, shape: Any = (), order: str = "C") -> None:
        self.raw, self.dtype, self.shape, self.order = raw, dtype, shape, order

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        *_, self.shape, self.dtype, fortran, self.raw = state
        self.order = "F" if fortran else "C"

    def read(self, room: int) -> np.ndarray:
        """Return a read-only array of at most ``room`` bytes.

        Raises:
          WeightsError: its type is not supported, or it has more bytes than that.
        """
        # Python 2 wrote the bytes as a string; latin1 restores them.
        raw = self.raw.encode("latin1") if isinstance(self.raw, str) else self.raw
        if not isinstance(self.dtype, _NumpyDtype) or not isinstance(raw, (bytes, bytearray)):
            raise WeightsError("array that holds Python objects")
        if len(raw) > room:
            raise WeightsError("arrays that share their bytes are out of proportion to the file")
        if not all(isinstance(side, int) and side >= 0 for side in self.shape):
            raise WeightsError("array with a size that is no number, or negative")
        flat = np.frombuffer(raw, self.dtype.numpy())
        return flat.reshape(self.shape, order="F" if self.order == "F" else "C")


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of ``count`` elements of ``dtype``, kept outside the pickle."""

    key: str
    dtype: str
    count: int

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("sets the state of a storage")


class TorchTensor:
    """A tensor as pickled, a strided view of a storage; ``read`` returns it as an array."""

    def __init__(self, storage: Storage, offset: int, size: Any, stride: Any, dtype: str | None = None) -> None:
        if not isinstance(storage, Storage):
            raise pickle.UnpicklingError("tensor without a storage")
        self.storage, self.offset, self.size, self.stride = storage, offset, _sizes(size), _sizes(stride)
        self.dtype = dtype or storage.dtype

    def __setstate__(self, state: Any) -> None:
        """Ignore attributes that were set on the tensor."""

    def read(self, load: Callable[[Storage], np.ndarray], swap: bool, room: int) -> np.ndarray:
        """Return a read-only array.

        Args:
          load: returns the bytes (uint8) of a storage.
          swap: the file's byte order is not this machine's.
          room: bytes that it may have; an expanded tensor has more than its storage.

        Raises:
          WeightsError: its type is not supported, it reaches outside its storage, or has more bytes than that.
        """
        if self.dtype not in _TORCH_DTYPES:
            raise WeightsError(f"tensor of type {self.dtype}, which is not supported; save it as float32")
        dtype = np.dtype(_TORCH_DTYPES[self.dtype])
        numbers = (self.offset, *self.size, *self.stride)
        if len(self.size) != len(self.stride) or not all(isinstance(n, int) and n >= 0 for n in numbers):
            if not all(isinstance(n, int) for n in numbers):
                raise WeightsError("tensor with offset, size or stride that are no numbers")
            raise WeightsError(f"tensor with offset {self.offset}, size {self.size} and stride {self.stride}")
        raw = load(self.storage)
        data = raw[: raw.size - raw.size % dtype.itemsize].view(dtype)
        if math.prod(self.size) == 0:
            return np.zeros(self.size, dtype)
        # as_strided does not check its arguments, and a file is not to be trusted: stay within the storage.
        last = self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        if last >= data.size:
            raise WeightsError(f"tensor that reaches element {last} of a storage of {data.size}")
        if math.prod(self.size) * dtype.itemsize > room:
            raise WeightsError(
                f"size {self.size} of a storage of {data.size} elements is out of proportion to the file"
            )
        steps = [step * dtype.itemsize for step in self.stride]
        view = np.lib.stride_tricks.as_strided(data[self.offset :], self.size, steps, writeable=False)
        return view.view(f"u{dtype.itemsize}").byteswap().view(dtype) if swap else view


def itemsize(dtype: str) -> int:
    """Return the bytes per element of a torch type.

    Raises:
      WeightsError: the type is not supported.
    """
    if dtype not in _TORCH_DTYPES:
        raise WeightsError(f"storage of type {dtype}, which is not supported; save the tensors as float32")
    return np.dtype(_TORCH_DTYPES[dtype]).itemsize


def _tensor_v3(storage: Any, offset: int, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any) -> Any:
    return TorchTensor(storage, offset, size, stride, dtype.name if isinstance(dtype, _TorchType) else "unknown")


def _first(data: Any, *_: Any) -> Any:
    return data


def _sizes(values: Any) -> tuple[Any, ...]:
    values = tuple(values)
    if len(values) > 64:  # NumPy's limit
        raise pickle.UnpicklingError(f"tensor of {len(values)} dimensions")
    return values


_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): TorchTensor,
    ("torch._utils", "_rebuild_tensor_v2"): lambda storage, offset, size, stride, *_: TorchTensor(
        storage, offset, size, stride
    ),
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch._utils", "_rebuild_device_tensor_from_numpy"): _first,
    ("torch._utils", "_rebuild_xla_tensor"): _first,
    ("torch._tensor", "_rebuild_from_type_v2"): lambda function, kind, args, state: function(*args),
    ("torch", "Size"): _sizes,
    ("numpy", "dtype"): _NumpyDtype,
    ("builtins", "bytes"): lambda *args: b"",  # protocol 2 pickles b"" as bytes(); longer ones as _codecs.encode
    ("__builtin__", "bytes"): lambda *args: b"",
    ("copyreg", "_reconstructor"): Inert,
    ("copy_reg", "_reconstructor"): Inert,
}
for _core in ("numpy.core", "numpy._core"):
    _FUNCTIONS[f"{_core}.multiarray", "_reconstruct"] = lambda *args: NumpyArray()
    _FUNCTIONS[f"{_core}.multiarray", "scalar"] = lambda dtype, raw=b"": NumpyArray(raw, dtype)
    _FUNCTIONS[f"{_core}.numeric", "_frombuffer"] = NumpyArray


class _Dict(OrderedDict[Any, Any]):
    """A dictionary with keys that cost no time or stack to hash."""

    def __init__(self, items: Any = ()) -> None:
        super().__init__()
        for key, value in items:
            self[key] = value

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(_plain(key), value)


def _plain(key: Any) -> Any:
    """Return a key of a dictionary or item of a set if it is no deeply nested tuple."""
    inner = key if isinstance(key, tuple) else ()
    if any(isinstance(item, (tuple, frozenset)) for item in inner) or isinstance(key, frozenset):
        raise pickle.UnpicklingError("has a nested key")
    return key


class _Bounded(io.BufferedIOBase):
    """A file's rest, of which no more can be asked for than it has."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self.left = file, size

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0 or size > self.left:
            raise EOFError("cut short")
        self.left -= size
        return self._file.read(size)

    def readline(self, size: int | None = -1, /) -> bytes:
        line = self._file.readline(self.left)
        self.left -= len(line)
        return line


_MOST_NAMES = 1000  # of ignored classes: each takes a hundred times the memory that it takes in the file


class SafeUnpickler(pickle._Unpickler):  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue, reportUntypedBaseClass]
    """Reads a pickle into dicts, lists, numbers, ``NumpyArray``, ``TorchTensor`` and ``Inert``.

    Strings of Python 2 are read as latin1.

    Args:
      file: at the pickle's start.
      size: bytes that it may have.

    Attributes:
      storages: those that the pickle refers to, by key.
    """

    def __init__(self, file: IO[bytes], size: int) -> None:
        super().__init__(_Bounded(file, size), encoding="latin1")
        self._inert: dict[tuple[str, str], type[Inert]] = {}
        self._encoded = size
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return _Dict
        if (module, name) == ("_codecs", "encode"):
            return _Callable(self._encode)
        if (module, name) in _FUNCTIONS:
            return _Callable(_FUNCTIONS[module, name])
        if module in ("torch", "torch.storage", "torch.cuda") and name.endswith("Storage"):
            return _TorchType(_TORCH_STORAGES.get(name, name))
        if module == "torch" and name in _TORCH_DTYPES:
            return _TorchType(name)
        if module.partition(".")[0] in _IGNORED_PACKAGES or (module, name) in _IGNORED_NAMES:
            if len(self._inert) > _MOST_NAMES:
                raise WeightsError(f"refers to more than {_MOST_NAMES} classes; save the model's state dict alone")
            kind = {"kind": f"{module}.{name}"}
            return self._inert.setdefault((module, name), type("Inert", (Inert,), kind))
        raise WeightsError(f"the file asks to run {module}.{name}, which weights do not need, and was not read")

    def _encode(self, text: str, encoding: str = "latin1") -> bytes:
        data = text.encode("latin1")
        self._encoded -= len(data)
        if self._encoded < 0:
            raise pickle.UnpicklingError("holds more bytes than the file")
        return data

    def persistent_load(self, pid: Any) -> Any:
        match pid:
            case ("storage", _TorchType(name=dtype), str(key), _, int(count)) | (
                "storage",
                _TorchType(name=dtype),
                str(key),
                _,
                int(count),
                None,
            ):
                return self.storages.setdefault(key, Storage(key, dtype, count))
            case ("module", *_):
                return Inert()
            case _:
                raise pickle.UnpicklingError("refers to something outside that is not a storage")

    # Opcodes that hash what the file gives, or allocate what it claims.
    dispatch: Any = dict(pickle._Unpickler.dispatch)  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]

    def _set_item(self: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1][_plain(key)] = value

    def _set_items(self: Any) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.stack[-1][_plain(key)] = value

    def _dict(self: Any) -> None:
        items = self.pop_mark()
        self.append({_plain(key): value for key, value in zip(items[::2], items[1::2], strict=True)})

    def _frozen_set(self: Any) -> None:
        items = self.pop_mark()
        self.append(frozenset(map(_plain, items)))

    def _add_items(self: Any) -> None:
        items = self.pop_mark()
        for item in items:
            self.stack[-1].add(_plain(item))

    def _byte_array(self: Any) -> None:
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    dispatch[pickle.SETITEM[0]] = _set_item
    dispatch[pickle.SETITEMS[0]] = _set_items
    dispatch[pickle.DICT[0]] = _dict
    dispatch[pickle.FROZENSET[0]] = _frozen_set
    dispatch[pickle.ADDITEMS[0]] = _add_items
    dispatch[pickle.BYTEARRAY8[0]] = _byte_array


def load_pickle(file: IO[bytes], size: int) -> tuple[Any, dict[str, Storage]]:
    """Read the pickle at the file's position, of at most ``size`` bytes, and the storages that it refers to, by key.

    Raises:
      WeightsError: it asks for a name that weights do not need, is damaged, or is no pickle at all.
    """
    unpickler = SafeUnpickler(file, size)
    try:
        return unpickler.load(), unpickler.storages
    except WeightsError:
        raise
    # A damaged pickle can make the unpickler and the constructors above raise anything.
    except Exception as error:
        raise WeightsError(
            f"damaged, or no weight file at all ({type(error).__name__}: {error}); fetch or write it again"
        ) from None
