"""Weight files are read without PyTorch, and without running what a pickle says."""

from __future__ import annotations

import argparse
import io
import os
import pickle
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
    """Written by torch 2.13: ``{"model": tensors, "optimizer", "scheduler", "args": Namespace, "iteration"}``,
    the first with ``torch.save(checkpoint, path)``, the second with ``_use_new_zipfile_serialization=False``.
    ``whole``, ``permuted`` and ``part`` share one storage."""
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


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".pkl", ".npz", ".safetensors"])
def test_written_files_read_back(tmp_path: Path, suffix: str) -> None:
    """The .pth was checked by hand to load with ``torch.load(weights_only=True)`` of torch 2.13, with and
    without ``mmap=True``, every tensor of a ResNet-50 QueryDet equal."""
    tensors = {**TENSORS, "scalar": np.array(2.5, np.float32), "empty": np.zeros((0, 3), np.float32)}
    path = tmp_path / f"w{suffix}"
    write_tensors(tensors, path)
    assert_equal(read_tensors(path), tensors)
    assert os.listdir(tmp_path) == [path.name]


def test_big_endian_torch_file(tmp_path: Path) -> None:
    write_tensors(TENSORS, tmp_path / "little.pth")
    with zipfile.ZipFile(tmp_path / "little.pth") as old, zipfile.ZipFile(tmp_path / "big.pth", "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if "/data/" in name:
                data = np.frombuffer(data, "<f4").astype(">f4").tobytes()
            new.writestr(name, b"big" if name.endswith("byteorder") else data)
    assert_equal(read_tensors(tmp_path / "big.pth"), TENSORS)


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
    """A name of an ignored package is not imported, even where the package is there."""
    called = []
    monkeypatch.setattr(np.testing, "measure", lambda *args: called.append(args))
    data = b"\x80\x02}(X\x01\x00\x00\x00xcnumpy.testing\nmeasure\n)RX\x01\x00\x00\x00a"
    (tmp_path / "w.pkl").write_bytes(data + pickle.dumps(TENSORS["b"], protocol=2)[2:-1] + b"u.")
    assert set(read_tensors(tmp_path / "w.pkl")) == {"a"} and not called


def test_pickle_cannot_alter_the_reader(tmp_path: Path) -> None:
    """BUILD with a pair sets attributes; on a function of the reader it would change later readings."""
    evil = b"\x80\x02cnumpy\ndtype\n(N}X\x0c\x00\x00\x00__defaults__)stb."
    (tmp_path / "evil.pkl").write_bytes(evil)
    with pytest.raises(WeightsError, match="sets the state of a function"):
        read_tensors(tmp_path / "evil.pkl")


def test_configurations_in_checkpoints_are_ignored(tmp_path: Path) -> None:
    checkpoint = {"model": TENSORS, "args": argparse.Namespace(lr=0.1), "done": {1, 2}, "path": Path("/tmp")}
    (tmp_path / "w.pth").write_bytes(pickle.dumps(checkpoint, protocol=2))
    assert_equal(read_tensors(tmp_path / "w.pth"), TENSORS)


def torch_pickle(tmp_path: Path, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> Path:
    """A .pth of one tensor over a storage of six floats, with any geometry."""
    write_tensors({"x": np.zeros(6, np.float32)}, tmp_path / "good.pth")
    with zipfile.ZipFile(tmp_path / "good.pth") as old:
        parts = {name: old.read(name) for name in old.namelist()}

    def integers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(pickle.BININT + struct.pack("<i", v) for v in values) + b"t"

    before = b"Q" + pickle.BININT + struct.pack("<i", 0) + integers((6,)) + integers((1,))
    after = b"Q" + pickle.BININT + struct.pack("<i", offset) + integers(size) + integers(stride)
    assert before in parts["archive/data.pkl"]
    parts["archive/data.pkl"] = parts["archive/data.pkl"].replace(before, after)
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as new:
        for name, data in parts.items():
            new.writestr(name, data)
    return tmp_path / "w.pth"


def test_tensor_geometry(tmp_path: Path) -> None:
    assert read_tensors(torch_pickle(tmp_path, (2, 2), (2, 1), offset=2))["x"].shape == (2, 2)
    outside = [((7,), (1,), 0), ((2, 3), (4, 1), 0), ((6,), (1,), 1)]
    for size, stride, offset in [*outside, ((2,), (-1,), 1), ((2,), (1, 1), 0)]:
        with pytest.raises(WeightsError, match=r"w\.pth: tensor x: tensor (that reaches|with offset)"):
            read_tensors(torch_pickle(tmp_path, size, stride, offset))


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
    with pytest.raises(WeightsError, match=rf"w\{suffix}: ") as caught:
        read_tensors(path)
    assert "\n" not in str(caught.value)


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
    with pytest.raises(WeightsError, match="unknown kind of weight file"):
        write_tensors(TENSORS, tmp_path / "w.h5")
    with pytest.raises(WeightsError, match="create it first"):
        write_tensors(TENSORS, tmp_path / "absent" / "w.npz")
