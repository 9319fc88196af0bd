"""Weight files are read without PyTorch and without running a pickle's program; what is written others can read."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from querydet_jax.runtime.errors import WeightsError
from querydet_jax.weights import read_tensors
from querydet_jax.weights.writers import write_tensors

FIXTURES = Path(__file__).parent / "fixtures"
TENSORS = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([1.5], np.float32)}


def assert_equal(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert set(got) == set(wanted)
    for name, array in wanted.items():
        assert got[name].dtype == array.dtype and got[name].shape == array.shape, name
        assert got[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("name", ["torch_zip.pth", "torch_legacy.pth"])
def test_files_of_torch_save(name: str) -> None:
    """Written by torch 2.13: ``{"model": tensors, "optimizer", "scheduler", "args": Namespace, "iteration"}``, the
    second with ``_use_new_zipfile_serialization=False``. ``whole``, ``permuted`` and ``part`` share one storage."""
    whole = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    wanted = {
        "whole": whole,
        "permuted": whole.transpose(2, 0, 1),
        "part": whole[:, 1:, 2],
        "parameter": np.array([1, 2], np.float32),
        "half": np.array([0.5, -2], np.float16),
        "bfloat16": np.array([1.5, -2.25], ml_dtypes.bfloat16),
        "double": np.array([[0.1, 0.2]]),
        "count": np.array(7),
        "expanded": np.full((2, 2), 3, np.float32),
        "empty": np.zeros((0, 3), np.float32),
    }
    assert_equal(read_tensors(FIXTURES / name), wanted)


@pytest.mark.parametrize("suffix", [".pkl", ".npz", ".safetensors"])
def test_written_files_read_back(tmp_path: Path, suffix: str) -> None:
    tensors = {**TENSORS, "scalar": np.array(2.5, np.float32), "empty": np.zeros((0, 3), np.float32)}
    path = tmp_path / f"w{suffix}"
    write_tensors(tensors, path)
    assert_equal(read_tensors(path), tensors)
    assert os.listdir(tmp_path) == [path.name]


def test_detectron2_takes_the_pkl(tmp_path: Path) -> None:
    """The steps of detectron2/checkpoint/detection_checkpoint.py and fvcore/common/checkpoint.py: ``pickle.load`` with
    latin1, both keys (so no matching of names), then ``torch.from_numpy`` of every array, which needs plain, writable
    arrays in this machine's byte order. Nothing but NumPy may be imported."""
    write_tensors(
        {**TENSORS, "transposed": TENSORS["a.weight"].T, "big": TENSORS["b"].astype(">f4")}, tmp_path / "w.pkl"
    )
    with (tmp_path / "w.pkl").open("rb") as file:
        data = pickle.load(file, encoding="latin1")
    assert set(data) == {"model", "__author__"} and "matching_heuristics" not in data
    for name, array in data["model"].items():
        assert type(name) is str and type(array) is np.ndarray
        assert array.dtype == np.dtype("=f4") and array.dtype.isnative and array.flags.writeable
        assert all(stride >= 0 for stride in array.strides)
    np.testing.assert_array_equal(data["model"]["transposed"], TENSORS["a.weight"].T)
    raw = (tmp_path / "w.pkl").read_bytes()
    words = [argument for _, argument, _ in pickletools.genops(raw) if isinstance(argument, str)]
    assert {word.partition(".")[0] for word in words if word.startswith(("numpy", "querydet_jax."))} == {"numpy"}


def test_pytorch_takes_the_safetensors(tmp_path: Path) -> None:
    """The format that ``safetensors.torch.load_file`` reads: u64 length of a JSON header padded to 8 bytes, then the
    tensors in row-major order without gaps."""
    tensors = {**TENSORS, "transposed": TENSORS["a.weight"].T}
    write_tensors(tensors, tmp_path / "w.safetensors")
    raw = (tmp_path / "w.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    assert length % 8 == 0 and header.pop("__metadata__")["format"] == "pt" and set(header) == set(tensors)
    places = sorted(entry["data_offsets"] for entry in header.values())
    assert [start for start, _ in places] == [0, *(end for _, end in places[:-1])] and places[-1][1] == len(data)
    for name, array in tensors.items():
        start, end = header[name]["data_offsets"]
        assert header[name]["dtype"] == "F32" and header[name]["shape"] == list(array.shape)
        assert data[start:end] == array.astype("<f4").tobytes()


def torch_zip(path: Path, storage: np.ndarray, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> Path:
    """Write a file of torch.save with one tensor ``x``, of any geometry over a storage of floats."""

    def numbers(values: tuple[int, ...]) -> str:
        return "(" + "".join(f"I{value}\n" for value in values) + "t"

    program = (
        "(dVx\nctorch._utils\n_rebuild_tensor_v2\n((Vstorage\nctorch\nFloatStorage\nV0\nVcpu\n"
        f"I{storage.size}\ntQI{offset}\n{numbers(size)}{numbers(stride)}I00\nccollections\nOrderedDict\n(tRtRs."
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", "little" if storage.dtype.newbyteorder("<") == storage.dtype else "big")
        archive.writestr("archive/data/0", storage.tobytes())
    return path


@pytest.mark.parametrize("order", "<>")
def test_torch_file_of_either_byte_order(tmp_path: Path, order: str) -> None:
    storage = np.arange(6, dtype=f"{order}f4")
    assert_equal(read_tensors(torch_zip(tmp_path / "w.pth", storage, (2, 3), (3, 1))), {"x": TENSORS["a.weight"]})


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("wrapper", ["", "blobs", "state_dict"])
def test_numpy_pickles(tmp_path: Path, protocol: int, wrapper: str) -> None:
    tensors = {**TENSORS, "fortran": np.asfortranarray(TENSORS["a.weight"]), "int": np.arange(3), "none": np.zeros(0)}
    checkpoint = OrderedDict({**tensors, "not an array": "text"})
    data = pickle.dumps({wrapper: checkpoint, "epoch": 1} if wrapper else checkpoint, protocol=protocol)
    (tmp_path / "w.pkl").write_bytes(data)
    assert_equal(read_tensors(tmp_path / "w.pkl"), tensors)


def test_pickle_of_python_2(tmp_path: Path) -> None:
    """As Caffe2 wrote them: module numpy.core, bytes as a string of 8-bit characters."""
    raw = np.array([1, -2], "<f4").tobytes()
    text = b"\x80\x02(dU\x07conv1_wcnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01(K\x02t"
    text += b"cnumpy\ndtype\n(U\x02f4K\x00K\x01tR(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08"
    (tmp_path / "w.pkl").write_bytes(text + raw + b"tbs.")
    assert_equal(read_tensors(tmp_path / "w.pkl"), {"conv1_w": np.array([1, -2], np.float32)})


def test_safetensors_bfloat16(tmp_path: Path) -> None:
    tensors = {"a": np.array([1.5, -2.25], ml_dtypes.bfloat16), "b": np.array([1, 2], np.float16)}
    save_file(tensors, tmp_path / "w.safetensors")
    assert_equal(read_tensors(tmp_path / "w.safetensors"), tensors)


class Attack:
    def __init__(self, function, *args) -> None:
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("where", ["top", "weights", "optimizer", "zip"])
@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("name", ["system", "eval", "getattr", "open"])
def test_pickle_that_runs_code_is_refused(tmp_path: Path, where: str, protocol: int, name: str) -> None:
    sign = tmp_path / "was_run"
    attack = {
        "system": Attack(os.system, f"touch {sign}"),
        "eval": Attack(eval, f"open({str(sign)!r}, 'w').close()"),
        "getattr": Attack(getattr, "text", "upper"),
        "open": Attack(open, str(sign), "w"),
    }[name]
    checkpoint = {"top": attack, "optimizer": {"model": TENSORS, "optimizer": attack}}
    data = pickle.dumps(checkpoint.get(where, {"model": {**TENSORS, "x": attack}}), protocol=protocol)
    path = tmp_path / "w.pth"
    if where == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", data)
    else:
        path.write_bytes(data)
    with pytest.raises(WeightsError, match=rf"w\.pth.*asks to run \S+\.{name}\b"):
        read_tensors(path)
    assert not sign.exists()


def test_placeholders_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name of an ignored package is not imported, even if the package is installed."""
    called = []
    monkeypatch.setattr(np.testing, "measure", lambda *args: called.append(args))
    data = b"\x80\x02}(X\x01\x00\x00\x00xcnumpy.testing\nmeasure\n)RX\x01\x00\x00\x00a"
    (tmp_path / "w.pkl").write_bytes(data + pickle.dumps(TENSORS["b"], protocol=2)[2:-1] + b"u.")
    assert set(read_tensors(tmp_path / "w.pkl")) == {"a"} and not called


def test_pickle_cannot_alter_the_reader(tmp_path: Path) -> None:
    """BUILD with a pair sets attributes; on a function of the reader it would change what is read later."""
    evil = b"\x80\x02cnumpy\ndtype\n(N}X\x0c\x00\x00\x00__defaults__)stb."
    (tmp_path / "evil.pkl").write_bytes(evil)
    with pytest.raises(WeightsError, match="sets the state of a function"):
        read_tensors(tmp_path / "evil.pkl")


def test_configurations_in_checkpoints_are_ignored(tmp_path: Path) -> None:
    checkpoint = {"model": TENSORS, "args": argparse.Namespace(lr=0.1), "done": {1, 2}, "path": Path("/tmp")}
    (tmp_path / "w.pth").write_bytes(pickle.dumps(checkpoint, protocol=2))
    assert_equal(read_tensors(tmp_path / "w.pth"), TENSORS)


def test_tensor_geometry(tmp_path: Path) -> None:
    storage, path = np.arange(6, dtype="<f4"), tmp_path / "w.pth"
    assert read_tensors(torch_zip(path, storage, (2, 2), (2, 1), offset=2))["x"].tolist() == [[2, 3], [4, 5]]
    outside = [((7,), (1,), 0), ((2, 3), (4, 1), 0), ((6,), (1,), 1)]
    for size, stride, offset in [*outside, ((2,), (-1,), 1), ((2,), (1, 1), 0)]:
        with pytest.raises(WeightsError, match=r"w\.pth: tensor x: tensor (that reaches|with offset)"):
            read_tensors(torch_zip(path, storage, size, stride, offset))


def damage(path: Path, tmp_path: Path, keep: float) -> Path:
    data = path.read_bytes()
    cut = tmp_path / f"cut{path.suffix}"
    cut.write_bytes(data[: int(len(data) * keep)])
    return cut


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("kind", ["torch_zip.pth", "torch_legacy.pth", "w.pkl", "w.npz", "w.safetensors"])
def test_truncated_files(tmp_path: Path, kind: str, keep: float) -> None:
    path = FIXTURES / kind
    if not path.exists():
        path = tmp_path / kind
        write_tensors({"a": np.arange(500, dtype=np.float32)}, path)
    with pytest.raises(WeightsError, match=r"cut\.\w+: ") as caught:
        read_tensors(damage(path, tmp_path, keep))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".npz", ".safetensors"])
@pytest.mark.parametrize("content", [b"<!DOCTYPE html>", b"version https://git-lfs", b"\x00" * 100, b"PK\x03\x04" * 9])
def test_foreign_files(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(
        WeightsError, match=rf"w\{suffix}: .*; (fetch or write it again|give a .pth of weights)"
    ) as caught:
        read_tensors(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".PTH", ".Npz", ".SAFETENSORS"])
def test_suffixes_in_another_case(tmp_path: Path, suffix: str) -> None:
    made = tmp_path / f"w{suffix.lower()}"
    if suffix == ".PTH":
        torch_zip(made, np.arange(4, dtype=np.float32), (4,), (1,))
    else:
        write_tensors(TENSORS, made)
    wanted = read_tensors(made)
    assert_equal(read_tensors(made.rename(tmp_path / f"other{suffix}")), wanted)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("names", [("a.npy", "b.npy", "a.npy"), ("a.npy", "a"), ("b", "a", "a")])
def test_an_array_given_twice_is_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as archive:
        for name in names:
            archive.writestr(name, buffer.getvalue())
    with pytest.raises(WeightsError, match=r"w\.npz: holds a twice"):
        read_tensors(tmp_path / "w.npz")


def test_other_mistakes(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="absent.pth: no such weight file"):
        read_tensors(tmp_path / "absent.pth")
    with pytest.raises(WeightsError, match=r"w\.onnx: unknown kind of weight file; give one ending in \.pth"):
        read_tensors(tmp_path / "w.onnx")
    np.savez(tmp_path / "objects.npz", a=np.array([{}], object))
    with pytest.raises(WeightsError, match=r"objects\.npz"):
        read_tensors(tmp_path / "objects.npz")
    (tmp_path / "objects.pkl").write_bytes(pickle.dumps({"a": np.array([{}], object)}))
    with pytest.raises(WeightsError, match=r"objects\.pkl: tensor a: array"):
        read_tensors(tmp_path / "objects.pkl")
    (tmp_path / "list.pkl").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(WeightsError, match=r"list\.pkl: holds a list, not a dictionary of tensors"):
        read_tensors(tmp_path / "list.pkl")
    (tmp_path / "none.pkl").write_bytes(pickle.dumps({"model": {"epoch": 3}}))
    with pytest.raises(WeightsError, match=r"none\.pkl: no tensors in it"):
        read_tensors(tmp_path / "none.pkl")
    with (tmp_path / "single.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(WeightsError, match=r"single\.npz: a single array without a name"):
        read_tensors(tmp_path / "single.npz")
    buffer = io.BytesIO()
    np.savez(buffer, **TENSORS)
    (tmp_path / "misnamed.pth").write_bytes(buffer.getvalue())
    with pytest.raises(WeightsError, match=r"misnamed\.pth: a zip archive, but not of torch\.save"):
        read_tensors(tmp_path / "misnamed.pth")


def test_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.npz"
    write_tensors(TENSORS, path)

    def full(*args, **kwargs) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(WeightsError, match="cannot be written .No space left on device"):
        write_tensors({"c": np.zeros(3, np.float32)}, path)
    assert os.listdir(tmp_path) == ["w.npz"]
    assert_equal(read_tensors(path), TENSORS)
    with pytest.raises(WeightsError, match=r"w\.h5: cannot write such .* ending in \.safetensors, \.npz, \.pkl$"):
        write_tensors(TENSORS, tmp_path / "w.h5")
    with pytest.raises(WeightsError, match=r"w\.pth: cannot write such a file; .*; PyTorch reads \.safetensors"):
        write_tensors(TENSORS, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="create it first"):
        write_tensors(TENSORS, tmp_path / "absent" / "w.npz")
