"""Shards hold what the data set that they were made from holds: batches and scores are the same."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from querydet_jax.cli.prepare import prepare
from querydet_jax.config import Config, DataConfig, override
from querydet_jax.data import open_dataset, train_batches
from querydet_jax.data.prepare import shards as module
from querydet_jax.data.prepare.coco import prepare_coco
from querydet_jax.data.prepare.shards import prepare_shards
from querydet_jax.data.readers.shards import ShardsDataset
from querydet_jax.evaluation.coco import ImageDetections
from querydet_jax.evaluation.scoring import score
from querydet_jax.runtime import stores
from querydet_jax.runtime.errors import ConfigError, DataError

SIZES = [(40, 60), (64, 48), (50, 90), (33, 47)]


def write_pictures(folder: Path, suffix: str, orientation: int = 1) -> None:
    folder.mkdir(parents=True)
    for n, (h, w) in enumerate(SIZES):
        pixels = np.random.default_rng(n).integers(0, 256, (h, w, 3), dtype=np.uint8)
        exif = Image.Exif()
        exif[0x0112] = orientation if n % 2 else 1
        Image.fromarray(pixels).save(folder / f"é{n}.{suffix}", exif=exif)


def write_coco(root: Path, sideways: tuple[bool, ...] = (False,) * 4) -> DataConfig:
    """Two splits of odd numbers, in odd order: boxes beyond the image, without area, crowds, an image without any."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        write_pictures(root / f"{split}2017", "jpg", 6 if any(sideways) else 1)
        images, annotations = [], []
        for n, (h, w) in enumerate(SIZES):
            h, w = (w, h) if sideways[n] else (h, w)
            images.append({"id": 900 - n, "file_name": f"é{n}.jpg", "height": h, "width": w})
        for k in range(9):
            x, y, width, height = rng.uniform(-1, 30, 4).round(2).tolist()
            entry = {"id": k * 7, "image_id": 900 - k % 3, "category_id": (9, 4)[k % 2], "iscrowd": int(k == 5)}
            annotations.append({**entry, "bbox": [x, y, abs(width), 0 if k == 4 else abs(height) + 1]})
            if k % 3:
                annotations[-1]["area"] = 0.1 * k
        content = {"images": images, "annotations": annotations}
        content["categories"] = [{"id": 9, "name": "boat"}, {"id": 4, "name": "car"}]
        path = root / "annotations" / f"instances_{split}2017.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return DataConfig("coco", str(root))


def write_yolo(root: Path) -> DataConfig:
    for split in ("train", "val"):
        write_pictures(root / "images" / split, "png")
        (root / "labels" / split).mkdir(parents=True)
        (root / "labels" / split / "é1.txt").write_text("1 0.3 0.4 0.123 0.77\n0 0.5 0.5 0.1 0.1\n")
    (root / "data.yaml").write_text("names: [boat, car]\n")
    return DataConfig("yolo", str(root))


def write_visdrone(root: Path) -> DataConfig:
    for split in ("train", "val"):
        folder = root / f"VisDrone2019-DET-{split}"
        write_pictures(folder / "images", "jpg")
        (folder / "annotations").mkdir()
        for n in range(len(SIZES)):
            rows = "" if n == 2 else f"3,4,{9 + n},8,1,4,0,1\n0,0,20,20,0,0,0,0\n5,5,5,5,1,1,0,2\n"
            (folder / "annotations" / f"é{n}.txt").write_text(rows)
    return DataConfig("visdrone", str(root), ignore_classes=("bus",))


def write_scenes(root: Path) -> DataConfig:
    return DataConfig("scenes", str(root), scenes_train=3, scenes_val=2, scenes_size=(64, 96))


def write_tfds(root: Path) -> DataConfig:
    write_coco(root / "coco")
    prepare_coco(root / "coco", root / "tfds")
    return DataConfig("tfds", str(root / "tfds"))


def changed(data: DataConfig, **changes) -> DataConfig:
    return DataConfig(**{**vars(data), **changes})


def assert_same(found, expected) -> None:
    assert len(found) == len(expected)
    assert (found.classes, found.category_ids) == (expected.classes, expected.category_ids)
    assert (found.exif, found.exif_note) == (expected.exif, expected.exif_note)
    for i in range(len(expected)):
        for ask in ("image_id", "file_name", "size", "encoded"):
            assert getattr(found, ask)(i) == getattr(expected, ask)(i), ask
        a, b = found.annotation(i), expected.annotation(i)
        for x, y in ((found.load(i), expected.load(i)), *((getattr(a, f), getattr(b, f)) for f in vars(b))):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)
        official = expected.official_truth(i)
        assert (official is None) == (found.official_truth(i) is None)
        np.testing.assert_array_equal(found.official_truth(i), official)
    assert found.coco_ground_truth() == expected.coco_ground_truth()  # floats to the last bit
    json.dumps(found.coco_ground_truth())


@pytest.mark.parametrize("write", [write_coco, write_yolo, write_visdrone, write_scenes, write_tfds])
def test_shards_are_the_data_set_that_they_were_made_from(write, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BYTES", 5_000)
    data = write(tmp_path / "data")
    told = prepare_shards(data, tmp_path / "shards")
    assert told.endswith(f"use it with --data.source shards --data.root {tmp_path / 'shards'}")
    assert len(list((tmp_path / "shards").glob("train-*.array_record"))) > 1
    for split in ("train", "val"):
        expected = open_dataset(data, split)
        found = open_dataset(DataConfig("shards", str(tmp_path / "shards")), split)
        assert_same(found, expected)
        assert_same(pickle.loads(pickle.dumps(found)), expected)


def test_the_same_seed_gives_the_same_batches(tmp_path):
    data = changed(
        write_coco(tmp_path / "data"), train_short=(64, 96), train_max=128, train_canvases=((128, 128),),
        repeat_below=0.5, keep_empty=True,
    )  # fmt: skip
    prepare_shards(data, tmp_path / "shards")
    taken = []
    for given in (data, changed(data, source="shards", root=str(tmp_path / "shards"))):
        batches = train_batches(open_dataset(given, "train"), given, batch_size=4, seed=3)
        taken.append([next(batches) for _ in range(3)])
        batches.close()
    for expected, found in zip(*taken, strict=True):
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("write", [write_coco, write_visdrone])
def test_scores_are_the_same(write, tmp_path):
    data = write(tmp_path / "data")
    prepare_shards(data, tmp_path / "shards", splits=("val",))
    scores = []
    for given in (data, DataConfig("shards", str(tmp_path / "shards"))):
        dataset = open_dataset(given, "val")
        found = []
        for i in range(len(dataset)):
            truth = dataset.annotation(i)
            near = truth.boxes + np.float32(0.5)
            found.append(ImageDetections(dataset.image_id(i), near, np.linspace(0.9, 0.1, len(near)), truth.classes))
        scores.append(score(dataset, found).named())
    np.testing.assert_equal(scores[1], scores[0])
    assert scores[0]["AP"] > 0
    with pytest.raises(DataError, match=r"train.json: no such file; correct data.root, or write it: querydet prepare"):
        open_dataset(DataConfig("shards", str(tmp_path / "shards")), "train")


@pytest.mark.parametrize("sideways", [(False, True, False, True), (False, True, False, False)])
def test_turned_pictures_stay_turned_also_in_a_mixed_set(sideways, tmp_path):
    data = write_coco(tmp_path / "data", sideways)
    prepare_shards(data, tmp_path / "shards")
    given = DataConfig("shards", str(tmp_path / "shards"))
    expected, found = open_dataset(data, "train"), open_dataset(given, "train")
    assert_same(found, expected)
    assert found.exif_note and found.exif == "apply"
    with pytest.raises(DataError, match="EXIF orientation applied, but data.exif is ignore; set it to auto"):
        open_dataset(changed(given, exif="ignore"), "train")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("written")
    prepare_shards(write_yolo(root / "data"), root / "shards", splits=("train",))
    return root


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("train.json", lambda text: b"{}", "train.json: not readable as a description of shards .*; copy the folder"),
        ("train.json", lambda text: text.replace(b'"form": 1', b'"form": 7'), "has form 7, this version reads 1"),
        ("train.json", lambda text: text.replace(b" 1\n ]", b" 0\n ]"), "category_ids are not one for each of 2"),
        ("train.npz", lambda data: data[:-9] + b"x" + data[-8:], "train.npz: not the index of .*its checksum is anoth"),
        ("train.npz", None, "train.npz"),
        ("train-00000.array_record", lambda data: data[:-1], r"has \d+ bytes, train.json says"),
        ("train-00000.array_record", None, "train-00000.array_record: no such file, but train.json lists it"),
    ],
)
def test_damage_is_one_line(written, tmp_path, name, change, said):
    folder = shutil.copytree(written / "shards", tmp_path / "shards")
    path = folder / name
    data = path.read_bytes()
    path.unlink()
    if change is not None:
        path.write_bytes(change(data))
        assert path.read_bytes() != data
    with pytest.raises(DataError, match=said):
        ShardsDataset(folder, "train")


def test_a_damaged_record_costs_its_own_picture(written, tmp_path):
    folder = shutil.copytree(written / "shards", tmp_path / "shards")
    (path,) = folder.glob("*.array_record")
    data = path.read_bytes()
    picture = ShardsDataset(folder, "train").encoded(1)
    at = data.index(picture[1000:1100])  # not compressed a second time
    path.write_bytes(data[:at] + bytes(100) + data[at + 100 :])
    dataset = ShardsDataset(folder, "train")
    with pytest.raises(DataError, match=r"the record of é1.png is damaged \(.*\); copy the folder again"):
        dataset.load(1)
    assert dataset.load(0).shape == (*SIZES[0], 3)


def test_nothing_else_is_deleted_or_half_written(written, tmp_path):
    data, out = DataConfig("yolo", str(written / "data")), tmp_path / "out"
    prepare_shards(data, out)
    with pytest.raises(DataError, match="out: is prepared already; add --overwrite"):
        prepare_shards(data, out)
    prepare_shards(data, out, splits=("val",), overwrite=True)
    assert not (out / "train.json").exists()
    (out / "notes").touch()
    with pytest.raises(DataError, match="out: exists and holds other files; give --out a new folder"):
        prepare_shards(data, out, overwrite=True)
    broken = shutil.copytree(written / "data", tmp_path / "broken")
    (broken / "images" / "val" / "é0.png").write_bytes(b"\xff\xd8")
    with pytest.raises(DataError, match="é0.png: not readable as an image"):
        prepare_shards(DataConfig("yolo", str(broken)), tmp_path / "new")
    visdrone = write_visdrone(tmp_path / "visdrone")
    with pytest.raises(DataError, match="patches are cut while they are loaded; write them first: querydet prepare"):
        prepare_shards(changed(visdrone, patches=True), tmp_path / "new", splits=("train",))
    assert not (tmp_path / "new").exists()
    with pytest.raises(ConfigError, match="source shards reads the shards in data.root; leave them empty"):
        override(Config(), {"data.source": "shards", "data.val_images": "val"})


def test_the_command(written, tmp_path, capsys):
    data = ["--data.source", "yolo", "--data.root", str(written / "data")]
    prepare(["shards", "demo", *data, "--out", str(tmp_path / "out")], "querydet prepare")
    assert capsys.readouterr().out.startswith(f"wrote 4 train and 4 val images to {tmp_path / 'out'}; use it with")
    assert len(ShardsDataset(tmp_path / "out", "val")) == 4
    with pytest.raises(ConfigError, match="--out, --splits: name a folder to create"):
        prepare(["shards", "demo", *data], "querydet prepare")


@pytest.fixture
def asked(memory_store, monkeypatch) -> list[str]:
    """What is read of the store in memory."""
    memory, asked = stores._file_system("s3"), []
    for name in ("cat_file", "get_file"):
        real = getattr(memory, name)
        monkeypatch.setattr(memory, name, lambda path, *a, real=real, **k: asked.append(path) or real(path, *a, **k))
    return asked


def epoch(dataset) -> None:
    for i in range(len(dataset)):
        dataset.load(i)


@pytest.mark.parametrize("write", [write_coco, write_yolo, write_visdrone, write_tfds, "shards"])
def test_of_a_store_everything_is_read_once(write, asked, tmp_path):
    """Folders, TFDS's copies and shards, from a store through the cache: the data set is the same."""
    url = "s3://bucket/data"
    if write == "shards":
        data = write_coco(tmp_path / "data")
        prepare_shards(data, url)
        given = DataConfig("shards", url, str(tmp_path / "cache"))
    else:
        data = write(tmp_path / "data")
        stores.upload(Path(data.root), stores.as_path(url))
        given = changed(data, root=url, cache=str(tmp_path / "cache"))
    asked.clear()
    found = open_dataset(given, "train")
    assert_same(found, open_dataset(data, "train"))
    assert asked and len(asked) == len(set(asked))
    asked.clear()
    epoch(found)
    epoch(pickle.loads(pickle.dumps(found)))
    epoch(open_dataset(given, "train"))
    assert asked == []


@pytest.mark.parametrize("source", ["shards", "tfds"])
def test_records_in_a_store_need_a_cache_that_they_fit_in(source, memory_store, tmp_path):
    data, url = write_tfds(tmp_path / "data"), "s3://bucket/data"
    if source == "shards":
        prepare_shards(data, url)
    else:
        stores.upload(Path(data.root), stores.as_path(url))
    given = DataConfig(source, url)
    with pytest.raises(ConfigError, match=r"s3://bucket/data.*: is read from a store .* set data.cache to a folder"):
        open_dataset(given, "train")
    with pytest.raises(ConfigError, match=r"data.cache_gb 5e-06: s3://bucket/.* is read at random and takes"):
        open_dataset(changed(given, cache=str(tmp_path / "cache"), cache_gb=5e-6), "train")


def test_scenes_are_drawn_here(memory_store):
    with pytest.raises(ConfigError, match="s3://bucket/a: scenes are drawn on this machine; set data.root to a folder"):
        open_dataset(DataConfig("scenes", "s3://bucket/a"), "train")
