"""Read pickles without running them.

A pickle is a program that may call anything Python can import. This reader binds the few names that tensors are made
of to functions of its own; names that optimisers, schedulers and configurations leave in checkpoints become inert
placeholders; any other name is an error. Nothing is imported, and PyTorch is not needed.
"""

from __future__ import annotations

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
            raise WeightsError(f"array of type {self.code!r}, which is not numeric")
        return np.dtype(self.code).newbyteorder(self.order)


class NumpyArray:
    """A NumPy array as pickled; ``read`` returns it as an array."""

    def __init__(self, raw: Any = b"", dtype: Any = None, shape: Any = (), order: str = "C") -> None:
        self.raw, self.dtype, self.shape, self.order = raw, dtype, shape, order

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        *_, self.shape, self.dtype, fortran, self.raw = state
        self.order = "F" if fortran else "C"

    def read(self) -> np.ndarray:
        # Python 2 wrote the bytes as a string; latin1 restores them.
        raw = self.raw.encode("latin1") if isinstance(self.raw, str) else self.raw
        if not isinstance(self.dtype, _NumpyDtype) or not isinstance(raw, (bytes, bytearray)):
            raise WeightsError("array that holds Python objects")
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
        self.storage, self.offset, self.size, self.stride = storage, offset, tuple(size), tuple(stride)
        self.dtype = dtype or storage.dtype

    def __setstate__(self, state: Any) -> None:
        """Ignore attributes that were set on the tensor."""

    def read(self, load: Callable[[Storage], np.ndarray], swap: bool) -> np.ndarray:
        """Return a read-only array.

        Args:
          load: returns the bytes (uint8) of a storage.
          swap: the file's byte order is not this machine's.

        Raises:
          WeightsError: its type is not supported, or it reaches outside its storage.
        """
        if self.dtype not in _TORCH_DTYPES:
            raise WeightsError(f"tensor of type {self.dtype}, which is not supported; save it as float32")
        dtype = np.dtype(_TORCH_DTYPES[self.dtype])
        raw = load(self.storage)
        raw = raw[: raw.size - raw.size % dtype.itemsize]
        data = raw.view(f"u{dtype.itemsize}")
        data = (data.byteswap() if swap else data).view(dtype)
        numbers = (self.offset, *self.size, *self.stride)
        if len(self.size) != len(self.stride) or not all(isinstance(n, int) and n >= 0 for n in numbers):
            raise WeightsError(f"tensor with offset {self.offset}, size {self.size} and stride {self.stride}")
        if math.prod(self.size) == 0:
            return np.zeros(self.size, dtype)
        # as_strided does not check its arguments, and a file is not to be trusted: stay within the storage.
        last = self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        if last >= data.size:
            raise WeightsError(f"tensor that reaches element {last} of a storage of {data.size}")
        steps = [step * dtype.itemsize for step in self.stride]
        return np.lib.stride_tricks.as_strided(data[self.offset :], self.size, steps, writeable=False)


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
    ("torch", "Size"): tuple,
    ("numpy", "dtype"): _NumpyDtype,
    ("_codecs", "encode"): lambda text, encoding="latin1": text.encode("latin1"),
    ("builtins", "bytes"): lambda *args: b"",  # protocol 2 pickles b"" as bytes(); longer ones as _codecs.encode
    ("__builtin__", "bytes"): lambda *args: b"",
    ("copyreg", "_reconstructor"): Inert,
    ("copy_reg", "_reconstructor"): Inert,
}
for _core in ("numpy.core", "numpy._core"):
    _FUNCTIONS[f"{_core}.multiarray", "_reconstruct"] = lambda *args: NumpyArray()
    _FUNCTIONS[f"{_core}.multiarray", "scalar"] = lambda dtype, raw=b"": NumpyArray(raw, dtype)
    _FUNCTIONS[f"{_core}.numeric", "_frombuffer"] = NumpyArray


class SafeUnpickler(pickle.Unpickler):
    """Reads a pickle into dicts, lists, numbers, ``NumpyArray``, ``TorchTensor`` and ``Inert``.

    Strings of Python 2 are read as latin1.
    """

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="latin1")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) in _FUNCTIONS:
            return _Callable(_FUNCTIONS[module, name])
        if module in ("torch", "torch.storage", "torch.cuda") and name.endswith("Storage"):
            return _TorchType(_TORCH_STORAGES.get(name, name))
        if module == "torch" and name in _TORCH_DTYPES:
            return _TorchType(name)
        if module.partition(".")[0] in _IGNORED_PACKAGES or (module, name) in _IGNORED_NAMES:
            return type("Inert", (Inert,), {"kind": f"{module}.{name}"})
        raise WeightsError(f"the file asks to run {module}.{name}, which weights do not need, and was not read")

    def persistent_load(self, pid: Any) -> Any:
        match pid:
            case ("storage", _TorchType(name=dtype), str(key), _, int(count)):
                return Storage(key, dtype, count)
            case ("storage", _TorchType(name=dtype), str(key), _, int(count), None):
                return Storage(key, dtype, count)
            case ("module", *_):
                return Inert()
            case _:
                raise pickle.UnpicklingError("refers to something outside that is not a storage")


def load_pickle(file: IO[bytes]) -> Any:
    """Read the pickle at the file's position.

    Raises:
      WeightsError: it asks for a name that weights do not need, is damaged, or is no pickle at all.
    """
    try:
        return SafeUnpickler(file).load()
    except WeightsError:
        raise
    # A damaged pickle can make the unpickler and the constructors above raise anything.
    except Exception as error:
        raise WeightsError(f"damaged, or no weight file at all ({type(error).__name__}: {error})") from None
