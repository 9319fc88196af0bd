"""Weight files made to cost memory, time or the process: one line, and no more memory than a multiple of the file."""

from __future__ import annotations

import json
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from querydet_jax.runtime.errors import WeightsError
from querydet_jax.weights import read_tensors

MOST_MEMORY = 100e6  # bytes; the files are of a few kilobytes


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MOST_MEMORY


def refused(path: Path, message: str) -> None:
    with pytest.raises(WeightsError, match=message) as caught:
        read_tensors(path)
    said = str(caught.value)
    assert said.startswith(f"{path}: ") and said.isprintable() and len(said) < 600 + len(str(path))


ARRAY = (
    "cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntVb\ntR(I1\n{shape}cnumpy\ndtype\n(Vf4\nI0\nI1\ntR"
    "(I3\nV<\nNNNI-1\nI-1\nI0\ntbI00\n{raw}tb"
)
TORCH = (
    "ctorch._utils\n_rebuild_tensor_v2\n((Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nI4\ntQI0\n{size}{stride}I00\n"
    "ccollections\nOrderedDict\n(tRtR"
)
TUPLES = b")" + b"\x85" * 30_000
ENCODED = b"h\x00h\x01\x85R"


def array(shape: str) -> bytes:
    return b"(dVx\n" + ARRAY.format(shape=shape, raw="C\x04abcd").encode() + b"s."


PICKLES = {
    "a memo of 2^32 entries": b"\x80\x02}r\xff\xff\xff\xff.",
    "a string of 2^40 bytes": b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"x.",
    "bytes of 2^40": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.",
    "a bytearray of 2^40": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",
    "a frame of 2^60": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"}.",
    "an integer of 2^31 bytes": b"\x80\x02\x8b\xff\xff\xff\x7f1.",
    "an integer of 10,000 digits": b"L" + b"9" * 10_000 + b"L\n.",
    "a key of 100,000 tuples": b"}" + TUPLES + b"K\x01s.",
    "keys of tuples in a batch": b"}(" + TUPLES + b"K\x01u.",
    "keys of tuples in a dict": b"(" + TUPLES + b"K\x01d.",
    "a set of tuples": b"\x80\x04\x8f(" + TUPLES + b"\x90.",
    "a frozen set of tuples": b"\x80\x04(" + TUPLES + b"\x91.",
    "an ordered dict of tuples": b"ccollections\nOrderedDict\n((l(l" + TUPLES + b"aK\x01aatR.",
    "lists in lists": b"]" * 30_000 + b"a" * 29_999 + b".",
    "a text encoded again and again": (
        b"\x80\x02c_codecs\nencode\nq\x00X\xff\xff\x00\x00"
        + b"x" * 0xFFFF
        + b"q\x01]("
        + b"h\x00h\x01\x85R" * 20_000
        + b"e."
    ),
    "a thousand classes": b"](" + b"".join(b"ctorch\nx%d\n" % i for i in range(2000)) + b"e.",
    "a size of many": b"ctorch\nSize\n((" + b"I1\n" * 10_000 + b"ttR.",
    "a jump outside": b"\x80\x02h\x07.",
    "nothing to take": b"0.",
    "opcodes that are none": b"\xff\xfe\xfd.",
    "a name with a line break": b"(dV\\u000aname\nctorch._utils\n_rebuild_sparse_tensor\n(tRs.",
    "a name of 10,000 letters": b"(dV" + b"n" * 10_000 + b"\nctorch._utils\n_rebuild_sparse_tensor\n(tRs.",
    "a module to run of 10,000 letters": b"c" + b"m" * 10_000 + b"\nsystem\n.",
    "an array larger than its bytes": array("(I1000000\nI1000000\nt"),
    "an array of negative size": array("(I-1\nt"),
    "an array of sizes that are none": array("(VabcI1\nt"),
}


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("zipped", [False, True])
def test_pickles(tmp_path: Path, kind: str, zipped: bool) -> None:
    path = tmp_path / ("w.pth" if zipped else "w.pkl")
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", PICKLES[kind])
    else:
        path.write_bytes(PICKLES[kind])
    refused(path, "w")


def torch_zip(
    path: Path, pickled: bytes, storage: bytes = bytes(16), method: int = zipfile.ZIP_STORED, **more: bytes
) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in {"data.pkl": pickled, "data/0": storage, **more}.items():
            archive.writestr(f"archive/{name}", data)
    return path


def tensor(size: tuple[int, ...], stride: tuple[int, ...], name: str = "x") -> bytes:
    size_, stride_ = ("(" + "".join(f"I{n}\n" for n in values) + "t" for values in (size, stride))
    return f"V{name}\n{TORCH.format(size=size_, stride=stride_)}s".encode()


@pytest.mark.parametrize(
    ("size", "stride"),
    [
        ((80_000, 80_000), (0, 0)),
        ((2**62, 4), (0, 1)),
        ((10**30,), (0,)),
        ((1,) * 70, (0,) * 70),
        ((5000, 5000, 2), (0, 0, 1)),
    ],
)
def test_tensors_of_zero_strides(tmp_path: Path, size: tuple[int, ...], stride: tuple[int, ...]) -> None:
    refused(torch_zip(tmp_path / "w.pth", b"(d" + tensor(size, stride) + b"."), "w")


def test_many_tensors_of_zero_strides(tmp_path: Path) -> None:
    """Each of a size that would be allowed alone."""
    names = b"".join(tensor((2000, 2000), (0, 0), f"x{i}") for i in range(5))
    refused(torch_zip(tmp_path / "w.pth", b"(d" + names + b"."), "tensor x4: size .2000, 2000.*out of proportion")


def test_arrays_that_share_their_bytes(tmp_path: Path) -> None:
    raw = np.zeros(10**6, np.float32)
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({f"x{i}": raw for i in range(40)}, protocol=4))
    refused(tmp_path / "w.pkl", r"tensor x\d+: arrays that share their bytes are out of proportion to the file")


@pytest.mark.parametrize("order", [b"middle", b"", b"LITTLE", b"\xff\xfe", b"little\nbig", b"x" * 10_000])
def test_an_unknown_byte_order(tmp_path: Path, order: bytes) -> None:
    path = torch_zip(tmp_path / "w.pth", b"(d" + tensor((4,), (1,)) + b".", byteorder=order)
    refused(path, "w.pth: its byteorder is b.*, not little or big; save the state dict again")


def test_known_byte_orders(tmp_path: Path) -> None:
    storage = np.arange(4, dtype=">f4").tobytes()
    path = torch_zip(tmp_path / "w.pth", b"(d" + tensor((2, 2), (1, 2)) + b".", storage, byteorder=b"big\n")
    np.testing.assert_array_equal(read_tensors(path)["x"], [[0, 2], [1, 3]])


@pytest.mark.parametrize("suffix", [".pth", ".npz"])
def test_zip_bombs(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch_zip(path, b"(d" + tensor((4,), (1,)) + b".", bytes(7 * 10**7), zipfile.ZIP_DEFLATED)
    else:
        np.savez_compressed(path, x=np.zeros(7 * 10**7, np.uint8))
    tracemalloc.reset_peak()
    refused(path, r"bytes that unpack to 7\d+; write it again without compression")


def test_compressed_weights_are_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "w.npz", x=np.arange(1000, dtype=np.float32), y=np.zeros((3, 0)), z=np.array(2.0))
    found = read_tensors(tmp_path / "w.npz")
    assert found["x"].tolist() == list(range(1000)) and found["y"].shape == (3, 0) and found["z"] == 2


HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': (4,), }"


@pytest.mark.parametrize(
    "header",
    [
        HEADER.replace("(4,)", "(80000, 80000)"),
        HEADER.replace("(4,)", "(-4,)"),
        HEADER.replace("(4,)", "(-2, -2)"),
        HEADER.replace("(4,)", "(2.0, 2)"),
        HEADER.replace("(4,)", "4"),
        HEADER.replace("<f4", "<f999"),
        HEADER.replace("<f4", "|O"),
        HEADER.replace("'<f4'", "[('a', '<f4'"),
        HEADER.replace("'<f4'", "None"),
        HEADER.replace("False", "'no'"),
        "{'descr': '<f4'}",
        "{" + "(" * 5000,
        "'" * 1000,
        "\x00" * 100,
        "[1,2",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (4L,), ",
    ],
)
@pytest.mark.parametrize("version", [(1, 0), (3, 0), (9, 9)])
def test_headers_of_arrays(tmp_path: Path, header: str, version: tuple[int, int]) -> None:
    raw = header.encode()
    length = struct.pack("<H" if version == (1, 0) else "<I", len(raw))
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY" + bytes(version) + length + raw + bytes(16))
    refused(tmp_path / "w.npz", "x.npy: ")


@pytest.mark.parametrize("entry", [b"", b"\x93NUM", b"\x93NUMPY\x01\x00", b"\x93NUMPY\x01\x00\xff\xff{", b"text"])
def test_entries_without_a_header(tmp_path: Path, entry: bytes) -> None:
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as archive:
        archive.writestr("x.npy", entry)
    refused(tmp_path / "w.npz", "x.npy: has no header of an array")


@pytest.mark.parametrize(
    ("kind", "each"),
    [("F8_E4M3", 1), ("F8_E5M2", 1), ("F8_E8M0", 1), ("F4", 0.5), ("F6_E2M3", 0.75), ("C64", 8), ("NEW", 1)],
)
def test_other_types_of_safetensors(tmp_path: Path, kind: str, each: float) -> None:
    number = int(4 * each)
    header = json.dumps({"x": {"dtype": kind, "shape": [4], "data_offsets": [0, number]}}).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(number))
    refused(path, f"{kind}")


@pytest.mark.parametrize(
    "header",
    [
        {"x": {"dtype": "F32", "shape": [80_000, 80_000], "data_offsets": [0, 16]}},
        {"x": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 16]}},
        {"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 2**60]}},
        {"x": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}},
        {"x": {"dtype": "F32", "shape": [4], "data_offsets": [8, 4]}},
        {"x": None},
        [],
    ],
)
def test_headers_of_safetensors(tmp_path: Path, header: object) -> None:
    raw = json.dumps(header).encode()
    path = tmp_path / "w.safetensors"
    for length in (len(raw), 2**63, 2**30):
        path.write_bytes(struct.pack("<Q", length) + raw + bytes(16))
        refused(path, "damaged, or no weight file at all")


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".npz", ".safetensors"])
def test_what_is_no_file(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"fifo{suffix}")
    refused(tmp_path / f"fifo{suffix}", "is no regular file")
    (tmp_path / f"device{suffix}").symlink_to("/dev/zero")
    refused(tmp_path / f"device{suffix}", "is no regular file")
    (tmp_path / f"loop{suffix}").symlink_to(tmp_path / f"loop{suffix}")
    refused(tmp_path / f"loop{suffix}", "no such weight file")
    (tmp_path / f"empty{suffix}").touch()
    refused(tmp_path / f"empty{suffix}", "damaged, or no weight file at all")


def test_old_pickles_are_read(tmp_path: Path) -> None:
    """Of every protocol, with dictionaries in order and sets."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    for protocol in range(6):
        weights = OrderedDict(a=array, b=array.T)
        data = {"model": weights, "seen": {1, 2}, "kept": frozenset("ab"), "raw": bytearray(b"x"), (1, "a"): 10**30}
        (tmp_path / "w.pkl").write_bytes(pickle.dumps(data, protocol=protocol))
        found = read_tensors(tmp_path / "w.pkl")
        np.testing.assert_array_equal(found["a"], array)
        np.testing.assert_array_equal(found["b"], array.T)
