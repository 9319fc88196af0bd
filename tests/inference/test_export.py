"""Artifacts: the same detections from one file, in a process with jax alone; and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import io
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import small_detector as small
from PIL import Image

import querydet_jax as qd
from querydet_jax.cli.export import export
from querydet_jax.cli.predict import predict
from querydet_jax.config import Config, DataConfig, save_config
from querydet_jax.inference.export import artifact as artifact_module
from querydet_jax.inference.export.artifact import Artifact, ArtifactError
from querydet_jax.inference.export.writer import any_batch_size, write_artifact
from querydet_jax.inference.min_scores import min_scores
from querydet_jax.models import RetinaNet
from querydet_jax.ops.depthwise import depthwise_conv
from querydet_jax.runtime.errors import ConfigError, DataError, QueryDetError

pytestmark = pytest.mark.compiled_as_used

pytest.importorskip("flatbuffers", reason="pip install -r requirements-export.txt")

CANVAS = (64, 96)
SIZES = np.array([[64, 96], [50, 96]], np.int32)
CONFIG = Config(
    name="small",
    classes=("ant", "bee", "cow"),
    model=dataclasses.replace(
        small.MODEL,
        max_level=5,
        loss=dataclasses.replace(small.MODEL.loss, level_weighting="uniform"),
        backbone=dataclasses.replace(small.MODEL.backbone, name="resnet10"),
        query=dataclasses.replace(small.MODEL.query, num_convs=1),
    ),
    data=DataConfig(test_short=64, test_max=96, test_canvases=(CANVAS,)),
    inference=dataclasses.replace(small.BASE, start_level=3, capacities=(0.25,)),
)
ALONE = """
import sys
import numpy as np
from artifact import Artifact
images, sizes = np.load("images.npy"), np.load("sizes.npy")
for name, batches in (("csq", (1, 2)), ("dense", (2,))):
    detect = Artifact(name + ".zip")
    for batch in batches:
        found = detect(images[-batch:], sizes[-batch:])
        stats = {f"{level}_{key}": x for level, counts in found.stats.items() for key, x in counts.items()}
        np.savez(f"{name}_{batch}.npz", **{**found._asdict(), "stats": None, **stats})
loaded = {name.split(".")[0] for name in sys.modules}
assert "jax" in loaded and not loaded & {"flax", "querydet_jax", "orbax", "optax", "PIL"}, loaded
"""


@functools.cache
def model() -> RetinaNet:
    model = qd.build_model(CONFIG.model, seed=0)
    assert isinstance(model, RetinaNet)
    return small.randomize(model, seed=16)


@functools.cache
def detector(query: str) -> qd.Detector:
    return qd.Detector(model(), dataclasses.replace(CONFIG.inference, query=query))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """csq.zip for one and for two images, dense.zip for any number; both for all platforms."""
    folder = tmp_path_factory.mktemp("artifacts")
    for query, batch_sizes in (("csq", (1, 2)), ("dense", ())):
        write_artifact(folder / f"{query}.zip", detector(query), CONFIG, canvases=[CANVAS], batch_sizes=batch_sizes)
    return folder


def contents(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewritten(path: Path, to: Path, changed: dict[str, bytes], **fields) -> Path:
    """A sound archive with other parts, and other fields of the manifest."""
    whole = {**contents(path), **changed}
    whole["manifest.json"] = json.dumps({**json.loads(whole["manifest.json"]), **fields}).encode()
    with zipfile.ZipFile(to, "w") as archive:
        for name, data in whole.items():
            archive.writestr(name, data)
    return to


def test_same_detections_bit_for_bit_with_jax_alone(folder, tmp_path):
    images = small.pictures(2, *CANVAS)
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "sizes.npy", SIZES)
    for file in (folder / "csq.zip", folder / "dense.zip", Path(artifact_module.__file__)):
        shutil.copy(file, tmp_path)
    ran = subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    for query, batches in (("csq", (1, 2)), ("dense", (2,))):  # a single picture: with predict.py below
        for batch in batches:
            expected = detector(query)(images[-batch:], SIZES[-batch:])
            assert expected.valid.sum() > 10
            with np.load(tmp_path / f"{query}_{batch}.npz", allow_pickle=True) as found:
                for name in ("boxes", "scores", "classes", "valid"):
                    np.testing.assert_array_equal(found[name], getattr(expected, name), strict=True)
                for level, stats in expected.stats.items():
                    assert {key: int(found[f"{level}_{key}"]) for key in stats._fields} == {
                        key: int(x) for key, x in stats._asdict().items()
                    }


def test_manifest(folder):
    whole = contents(folder / "csq.zip")
    manifest = json.loads(whole.pop("manifest.json"))
    assert set(whole) == {"weights.npz", "programs/64x96_batch1.bin", "programs/64x96_batch2.bin"}
    assert {name: hashlib.sha256(data).hexdigest() for name, data in whole.items()} == {
        name: part["sha256"] for name, part in manifest["parts"].items()
    }
    assert manifest["made_with"]["jax"] == jax.__version__ and manifest["classes"] == list(CONFIG.classes)
    assert manifest["inference"]["threshold"] == small.BASE.threshold and manifest["inference"]["query"] == "csq"
    assert manifest["preprocessing"]["test_short"] == 64 and manifest["preprocessing"]["test_max"] == 96
    # One copy of the weights, by name; none in the programs, and nothing of where this machine keeps its files.
    with np.load(io.BytesIO(whole["weights.npz"])) as weights:
        np.testing.assert_array_equal(weights["head.bbox_pred.kernel"], model().head.bbox_pred.kernel[...])
    for name, data in whole.items():
        if name.startswith("programs/"):
            assert jax.export.deserialize(bytearray(data)).platforms == ("cpu", "cuda", "tpu")
            assert len(data) < 300_000 and b"base.py" in data and str(Path(__file__).parents[2]).encode() not in data


def test_depthwise_convolution_is_exported_for_every_platform():
    """The one layer whose program depends on the platform (multiply-adds on CPU)."""
    x, kernel = small.pictures(2, 16, 24).astype(np.float32), jnp.asarray(np.ones((3, 3, 1, 3), np.float32))
    conv = jax.jit(lambda x, kernel: depthwise_conv(x, kernel, 2, ((1, 1), (1, 1))))
    number = jax.export.symbolic_shape("b")[0]
    exported = jax.export.export(conv, platforms=("cpu", "cuda", "tpu"))(
        jax.ShapeDtypeStruct((number, 16, 24, 3), jnp.float32), kernel
    )
    assert "convolution" in str(exported.mlir_module()) and "case" in str(exported.mlir_module())
    np.testing.assert_array_equal(exported.call(x, kernel), conv(x, kernel))


@pytest.mark.parametrize("place", ["manifest.json", "weights.npz", "programs/64x96.bin", "directory"])
def test_a_damaged_byte_is_refused(folder, tmp_path, place):
    data = bytearray((folder / "dense.zip").read_bytes())
    with zipfile.ZipFile(folder / "dense.zip") as archive:
        at = archive.start_dir + 50 if place == "directory" else archive.getinfo(place).header_offset + 300
    data[at] ^= 0x40
    (tmp_path / "damaged.zip").write_bytes(data)
    with pytest.raises(ArtifactError, match="damaged.zip: damaged, cut short .*export it again"):
        Artifact(tmp_path / "damaged.zip")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9999])
def test_a_truncated_file_is_refused(folder, tmp_path, share):
    data = (folder / "dense.zip").read_bytes()
    (tmp_path / "short.zip").write_bytes(data[: int(share * len(data))])
    with pytest.raises(ArtifactError, match="short.zip: damaged, cut short .*copy it again"):
        Artifact(tmp_path / "short.zip")


def test_what_is_not_what_was_written_is_refused(folder, tmp_path):
    """Archives without a damaged byte."""
    path = folder / "dense.zip"
    cases = {
        "weights.npz is damaged": rewritten(path, tmp_path / "a.zip", {"weights.npz": b"others"}),
        "format version 2, but this reader supports 1": rewritten(path, tmp_path / "b.zip", {}, format_version=2),
        "its manifest.json is not an artifact's": rewritten(path, tmp_path / "c.zip", {}, format="something else"),
        "no such file": tmp_path / "absent.zip",
    }
    for message, file in cases.items():
        with pytest.raises(ArtifactError, match=f"{file.name}: .*{message}"):
            Artifact(file)


PART = "programs/64x96.bin"


def resealed(path: Path, to: Path, part: str, data: bytes, **fields) -> Path:
    """An artifact with another part, whose manifest agrees."""
    parts = json.loads(contents(path)["manifest.json"])["parts"]
    parts[part] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return rewritten(path, to, {part: data}, **{"parts": parts, **fields})


@pytest.fixture(scope="module")
def exported(folder):
    return jax.export.deserialize(bytearray(contents(folder / "dense.zip")[PART]))


def test_programs_of_a_jax_that_writes_otherwise_are_refused(folder, tmp_path, exported):
    newer = exported.calling_convention_version + 99
    foreign = bytes(dataclasses.replace(exported, calling_convention_version=newer).serialize())
    unknown = bytes(dataclasses.replace(exported, mlir_module_serialized=b"newer operations").serialize())
    other = {"made_with": {"jax": "0.99.0"}}
    for data, fields in ((foreign, {}), (unknown, other), (b"not what jax.export serializes", other)):
        detect = Artifact(resealed(folder / "dense.zip", tmp_path / "x.zip", PART, data, **fields))
        with pytest.raises(ArtifactError, match=f"x.zip: {PART} was written by jax .* pip install jax=="):
            detect(small.pictures(1, *CANVAS))


@pytest.mark.parametrize("kind", ["not a program", "cut short", "its operations", "zeros"])
def test_a_damaged_program_says_so(folder, tmp_path, exported, kind):
    data = contents(folder / "dense.zip")[PART]
    foreign = {
        "not a program": b"not what jax.export serializes",
        "cut short": data[: len(data) // 2],
        "its operations": bytes(dataclasses.replace(exported, mlir_module_serialized=b"MLcut").serialize()),
        "zeros": data[: len(data) // 3] + bytes(1000) + data[len(data) // 3 + 1000 :],
    }
    detect = Artifact(resealed(folder / "dense.zip", tmp_path / "x.zip", PART, foreign[kind]))
    with pytest.raises(ArtifactError, match=f"x.zip: {PART} is damaged .*copy it again from its source"):
        detect(small.pictures(1, *CANVAS))


@pytest.mark.parametrize("target", ["xla_ffi_python_cpu_callback", "shape_assertion_", "Sharding"])
def test_a_program_that_reaches_out_is_not_run(folder, tmp_path, exported, target):
    """A resealed one; ``exported`` lends it everything but the computation."""

    def program(weights, images, sizes):
        seen = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct((), jnp.float32))(jnp.float32(1))
        return exported.call(weights, images, sizes)["scores"] + seen

    weights, images, sizes = jax.tree.unflatten(exported.in_tree, exported.in_avals)[0]
    images, sizes = (jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for x in (images, sizes))
    checks = [jax.export.DisabledSafetyCheck.custom_call(target)]
    evil = jax.export.export(jax.jit(program), disabled_checks=checks)(weights, images, sizes)
    detect = Artifact(resealed(folder / "dense.zip", tmp_path / "x.zip", PART, bytes(evil.serialize())))
    with pytest.raises(ArtifactError, match=f"x.zip: {PART} asks for custom_call, which no exported detector does"):
        detect(small.pictures(1, *CANVAS))


def test_a_program_for_something_else_is_not_run(folder, tmp_path, exported):
    csq = contents(folder / "csq.zip")["programs/64x96_batch1.bin"]
    other = jax.export.export(jax.jit(lambda x: x + 1))(jax.ShapeDtypeStruct((3,), jnp.float32))
    for data in (csq, bytes(other.serialize())):
        detect = Artifact(resealed(folder / "dense.zip", tmp_path / "x.zip", PART, data))
        with pytest.raises(ArtifactError, match=f"x.zip: {PART} is not the program that its manifest.json describes"):
            detect(small.pictures(1, *CANVAS))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("classes", None),
        ("classes", []),
        ("classes", "ant"),
        ("classes", ["ant", 3]),
        ("classes", ["ant", "bee"]),
        ("classes", ["ant", "bee", "cow", "dog"]),
        ("canvases", [[64]]),
        ("canvases", [[64, "96"]]),
        ("canvases", [[64, 96], [-1, 96]]),
        ("canvases", [[64.0, 96.0]]),
        ("canvases", {}),
        ("batch_sizes", 3),
        ("batch_sizes", []),
        ("batch_sizes", [True]),
        ("platforms", "cpu"),
        ("platforms", ["quantum"]),
        ("name", 3),
        ("made_with", {"jax": 1}),
        ("made_with", []),
        ("preprocessing", None),
        ("preprocessing", {"test_short": "64", "test_max": 96}),
        ("preprocessing", {"test_short": 64}),
        ("inference", {"query": "dense", "threshold": None}),
        ("inference", {"query": "sparse", "threshold": 0.1}),
        ("inference", {"query": "dense", "threshold": float("nan")}),
        ("inference", {"query": "dense", "threshold": 0.1, "nms_iou": [0.5]}),
        ("inference", {"query": "dense", "threshold": 0.1, "capacities": ["x"]}),
        ("preprocessing", {"test_short": 64, "test_max": 96, "exif": "turn"}),
        ("min_scores", []),
        ("min_scores", None),
        ("min_scores", [0.5, 0.5]),
        ("min_scores", [0.5, 0.5, float("nan")]),
        ("min_scores", [0.5, 0.5, 1.1]),
        ("min_scores", [0.5, -0.1, 1]),
        ("min_scores", [0.5, "0.5", True]),
        ("programs", []),
        ("programs", [3]),
        ("programs", [{"part": PART, "canvas": [64, 96]}]),
        ("programs", [{"part": ["x"], "canvas": [64, 96], "batch_size": None}]),
        ("programs", [{"part": "programs/other.bin", "canvas": [64, 96], "batch_size": None}]),
        ("programs", [{"part": "weights.npz", "canvas": [64, 96], "batch_size": None}]),
        ("programs", [{"part": PART, "canvas": [32, 96], "batch_size": None}]),
        ("programs", [{"part": PART, "canvas": [64, 96], "batch_size": 1}]),
        ("programs", [{"part": PART, "canvas": [64, 96], "batch_size": None}] * 2),
        ("parts", None),
        ("parts", {}),
        ("parts", {PART: {"bytes": 3, "sha256": "x"}}),
        ("parts", {"weights.npz": "x"}),
        ("parts", {"weights.npz": {"bytes": "3", "sha256": "x"}}),
    ],
)
def test_an_edited_manifest_is_refused(folder, tmp_path, field, value):
    edited = rewritten(folder / "dense.zip", tmp_path / "x.zip", {}, **{field: value})
    with pytest.raises(ArtifactError, match=f"x.zip: manifest.json, {field}[^;\n]*; copy it again from its source"):
        Artifact(edited)


@pytest.mark.parametrize(
    "field", ["classes", "canvases", "batch_sizes", "platforms", "programs", "parts", "name", "inference"]
)
def test_a_manifest_without_a_field_is_refused(folder, tmp_path, field):
    manifest = json.loads(contents(folder / "dense.zip")["manifest.json"])
    del manifest[field]
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name, data in {**contents(folder / "dense.zip"), "manifest.json": json.dumps(manifest).encode()}.items():
            archive.writestr(name, data)
    with pytest.raises(ArtifactError, match=f"x.zip: manifest.json, {field}[.a-z_]*: missing; copy it again"):
        Artifact(tmp_path / "x.zip")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"3", b"[" * 100_000, b'"\xff"', b"9" * 5000])
def test_a_manifest_that_is_none_is_refused(folder, tmp_path, text):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name, data in {**contents(folder / "dense.zip"), "manifest.json": text}.items():
            archive.writestr(name, data)
    with pytest.raises(ArtifactError, match="x.zip: .*give a file written by export.py|x.zip: damaged, cut short"):
        Artifact(tmp_path / "x.zip")


def test_bombs_are_refused(folder, tmp_path):
    """Small files that ask for much memory, without a wrong checksum."""
    whole, bomb = contents(folder / "dense.zip"), tmp_path / "x.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in {**whole, "programs/zeros.bin": bytes(10**7)}.items():
            archive.writestr(name, data)
    with pytest.raises(ArtifactError, match="x.zip: damaged.*compressed entries"):
        Artifact(bomb)

    with zipfile.ZipFile(bomb, "w") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        for name, data in [*whole.items(), *whole.items()]:
            archive.writestr(name, data)
    with pytest.raises(ArtifactError, match="x.zip: damaged.*two entries of one name"):
        Artifact(bomb)

    def npz(array: np.ndarray, header: dict | None = None, method: int = zipfile.ZIP_STORED) -> bytes:
        raw, file = io.BytesIO(), io.BytesIO()
        np.lib.format.write_array_header_1_0(raw, header or np.lib.format.header_data_from_array_1_0(array))
        with zipfile.ZipFile(file, "w", method) as archive:
            archive.writestr("head.bias.npy", raw.getvalue() + array.tobytes())
        return file.getvalue()

    huge = {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**6)}
    for weights in (
        npz(np.zeros(3, np.float32), huge),
        npz(np.zeros(3, np.float32), {**huge, "shape": (2,)}),
        npz(np.zeros(3, np.float32), {**huge, "shape": (-3,)}),
        npz(np.zeros(3, np.float32), {**huge, "descr": "|O"}),
        npz(np.zeros(3, ">f4")),  # which jax does not take
        npz(np.zeros(10**6, np.float32), method=zipfile.ZIP_DEFLATED),
        b"PK\x03\x04",
    ):
        with pytest.raises(ArtifactError, match="x.zip: damaged, cut short"):
            Artifact(resealed(folder / "dense.zip", bomb, "weights.npz", weights))


def test_another_platform_is_refused(tmp_path):
    scores = np.array([0.5, 0.25, 1], np.float32)
    given = {"canvases": [(32, 32)], "platforms": ["cuda"]}
    manifests = [
        write_artifact(tmp_path / name, detector("dense"), CONFIG, **given, min_scores=least)
        for name, least in (("gpu.zip", None), ("again.zip", None), ("scored.zip", scores))
    ]
    assert (tmp_path / "gpu.zip").read_bytes() == (tmp_path / "again.zip").read_bytes()
    before, after = contents(tmp_path / "gpu.zip"), contents(tmp_path / "scored.zip")
    assert manifests[2]["min_scores"] == [0.5, 0.25, 1] and before.pop("manifest.json") != after.pop("manifest.json")
    assert before == after  # programs and weights know no scores
    with pytest.raises(ArtifactError, match="gpu.zip: exported for cuda, but jax runs on cpu here.*--platforms cpu"):
        Artifact(tmp_path / "gpu.zip")


def test_other_input_is_refused(folder):
    detect = Artifact(folder / "csq.zip")
    assert detect.min_scores is None and min_scores("", detect.classes, detect).tolist() == [np.float32(0.3)] * 3
    with pytest.raises(
        ConfigError, match=r"--min-score best: .*csq.zip holds none; export it again with .*--min-score"
    ):
        min_scores("best", detect.classes, detect)
    assert detect.canvases == (CANVAS,) and detect.batch_sizes == (1, 2) and detect.classes == CONFIG.classes
    for batch, height, width in ((3, *CANVAS), (1, 96, 64), (0, *CANVAS)):
        with pytest.raises(ArtifactError, match=f"csq.zip: {batch} images of {height}x{width} .*1, 2 images of 64x96"):
            detect(np.zeros((batch, height, width, 3), np.uint8))
    with pytest.raises(ArtifactError, match=r"dense.zip: 0 images .*any number"):
        Artifact(folder / "dense.zip")(np.zeros((0, *CANVAS, 3), np.uint8))
    with pytest.raises(ArtifactError, match="must be uint8"):
        detect(np.zeros((1, *CANVAS, 3), np.float32))
    with pytest.raises(ArtifactError, match="give .height, width. per image"):
        detect(np.zeros((1, *CANVAS, 3), np.uint8), SIZES)
    for sizes, message in {
        ((0, 96),): r"sizes\[0\] is \[0, 96\], on a canvas of 64x96",
        ((64, 97),): r"sizes\[0\] is \[64, 97\]",
        ((-1, 5),): r"sizes\[0\] is \[-1, 5\]",
        ((64.0, 96.0),): r"sizes are float64 \[1, 2\]",
        (64, 96): r"sizes are int64 \[2\]",
        ((1,), (1, 2)): "sizes are not an array; give pictures of one shape, a size each",
    }.items():
        with pytest.raises(ArtifactError, match=message):
            detect(np.zeros((1, *CANVAS, 3), np.uint8), sizes)
    with pytest.raises(ArtifactError, match="images are not an array"):
        detect([np.zeros((64, 96, 3), np.uint8), np.zeros((32, 96, 3), np.uint8)])
    with pytest.raises(ArtifactError, match="channels 'grb': choose rgb or bgr"):
        Artifact(folder / "csq.zip", channels="grb")


def test_what_cannot_be_exported_is_refused(tmp_path):
    for message, changes in {
        "retinanet with inference.query csq has buffers whose size depends on the batch": {"batch_sizes": ()},
        "batch_sizes .0,.: must be at least 1": {"batch_sizes": (0,)},
        "canvases .*each once": {"canvases": [CANVAS, CANVAS]},
        "platforms .*at least one": {"platforms": ()},
    }.items():
        with pytest.raises(ConfigError, match=message):
            write_artifact(
                tmp_path / "x.zip", detector("csq"), CONFIG, **{"canvases": [CANVAS], "batch_sizes": (1,), **changes}
            )
    assert any_batch_size(CONFIG.inference, "retinanet") is any_batch_size(CONFIG.inference, "faster_rcnn") is False
    assert any_batch_size(detector("dense").config, "fcos") and not any_batch_size(
        detector("dense").config, "faster_rcnn"
    )
    (tmp_path / "file").touch()
    for path, message in ((tmp_path, "is a folder"), (tmp_path / "file" / "x.zip", "not writable")):
        with pytest.raises(DataError, match=message):
            write_artifact(path, detector("dense"), CONFIG, canvases=[(32, 32)], platforms=["cpu"])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_without_flatbuffers(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install -r requirements-export.txt"):
        write_artifact(tmp_path / "x.zip", detector("dense"), CONFIG, canvases=[CANVAS])
    with pytest.raises(ArtifactError, match="dense.zip: reading it needs flatbuffers; pip install flatbuffers"):
        Artifact(folder / "dense.zip")


def test_opencv_pictures(folder, monkeypatch):
    """The program sees RGB."""
    images, seen = small.pictures(2, *CANVAS), []

    def program(weights, pictures, sizes):
        seen.append(pictures)
        return {"stats": {}}

    monkeypatch.setattr(Artifact, "_program", lambda self, shape: program)
    monkeypatch.setattr(artifact_module, "ArtifactDetections", dict)
    Artifact(folder / "dense.zip")(images)
    Artifact(folder / "dense.zip", channels="bgr")(images[..., ::-1])
    for pictures in seen:
        np.testing.assert_array_equal(pictures, images)


def run_command(command, *words: object) -> None:
    command([str(word) for word in words], f"querydet {command.__name__}")


def test_predict_from_an_artifact_is_predict_from_the_run(tmp_path, monkeypatch, capsys):
    """Also of a picture smaller than its canvas."""
    config = dataclasses.replace(CONFIG, inference=dataclasses.replace(CONFIG.inference, query="dense"))
    save_config(config, tmp_path / "config.json")
    qd.export_weights(model(), tmp_path / "model.npz")
    (tmp_path / "pictures").mkdir()
    for i, shape in enumerate([(120, 180), (110, 220)]):
        Image.fromarray(small.pictures(2, *shape, seed=i)[1]).save(tmp_path / "pictures" / f"{i}.png")
    source = (tmp_path / "config.json", "--weights", tmp_path / "model.npz")
    scores = ("--min-score", "0.5,bee=0.25")
    run_command(export, *source, "--out", tmp_path / "x.zip", "--platforms", "cpu", *scores)
    assert "2 programs" in (said := capsys.readouterr().out) and "canvases 64x96, 96x64, batch size any" in said
    assert "for cpu, scores from 0.25..0.50 by class" in said
    stored = Artifact(tmp_path / "x.zip")
    for value in ("", "best"):
        assert min_scores(value, stored.classes, stored).tolist() == stored.min_scores.tolist() == [0.5, 0.25, 0.5]
    assert min_scores("0.1", stored.classes, stored).tolist() == [np.float32(0.1)] * 3

    seen = ("--images", tmp_path / "pictures", "--min-score", "0.2")
    run_command(predict, *source, *seen, "--out", tmp_path / "run")
    run_command(predict, tmp_path / "x.zip", *seen, "--out", tmp_path / "artifact")
    written = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert written == ["0_detections.jpg", "1_detections.jpg", "detections.json"]
    for name in written:
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "artifact" / name).read_bytes()
    found = json.loads((tmp_path / "run" / "detections.json").read_text())
    assert [len(entry["detections"]) > 3 for entry in found["images"]] == [True] * 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--inference.threshold 0.3", "--inference.threshold: fixed in an exported file; export again with it"),
        ("--data.no-patches", "--data.no-patches: fixed in an exported file"),
        ("--name other", "--name: fixed in an exported file"),
        ("--weights model.npz", "--weights model.npz: an exported file holds its own"),
        ("--speed 3", "--speed: unknown option"),
        ("", "--images: name at least one picture"),
    ],
)
def test_predict_refuses_what_an_artifact_cannot_do(folder, monkeypatch, words, message):
    with pytest.raises(QueryDetError, match=message):
        run_command(predict, folder / "dense.zip", *words.split())
