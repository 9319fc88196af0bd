"""Write any data set as ArrayRecord files of about 100 MB: a form for stores and for slow or shared disks."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import grain.python as grain
import msgspec
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from querydet_jax.config import DataConfig
from querydet_jax.data.dataset import Dataset
from querydet_jax.data.readers.images import Reading, check_header
from querydet_jax.data.readers.shards import FORM, Description, Index, Shard, ShardsDataset, shard_name
from querydet_jax.data.sources import open_dataset
from querydet_jax.runtime.errors import DataError
from querydet_jax.runtime.files import folder_written_aside, reason, write_json
from querydet_jax.runtime.progress import progress
from querydet_jax.runtime.stores import StoreError, as_path

SPLITS: tuple[Literal["train", "val"], ...] = ("train", "val")
_BYTES = 100_000_000  # of pictures in a file, before the last of them
_NAMES = re.compile(r"(train|val)(\.json|\.npz|-[0-9]{5}\.array_record)")
_THREADS, _AHEAD = 8, 32  # that read pictures, and pictures that wait to be written


def prepare_shards(
    data: DataConfig,
    out: str | Path,
    *,
    splits: Sequence[Literal["train", "val"]] = SPLITS,
    overwrite: bool = False,
) -> str:
    """Write splits of a data set to a folder that ``ShardsDataset`` reads.

    Pictures are stored as they are, byte for byte and in the data set's order; boxes and ground truth bit for bit. The
    folder is written aside and renamed; in a store it is uploaded at the end.

    Args:
      data: the data set, see ``open_dataset``.
      out: the folder to create.
      splits: which.
      overwrite: whether to replace a folder that this function wrote.

    Returns:
      One line that reports what was written.

    Raises:
      ConfigError, DataError: see ``open_dataset``; a picture is missing or its header is damaged; its images are made
        while they are loaded; ``out`` is not empty or cannot be written.
    """
    out = as_path(out).resolve()
    _check_target(out, overwrite)
    datasets = {split: open_dataset(data, split) for split in splits}
    try:
        with folder_written_aside(out) as aside:
            for split, dataset in datasets.items():
                _write(dataset, split, Reading.of(data), aside)
                ShardsDataset(aside, split)
    except StoreError:
        raise
    except OSError as error:
        raise DataError(
            f"{out}: not written, and no partial folder remains ({reason(error)}); make the images readable, and give "
            "--out a writable folder with space for them"
        ) from None
    counts = [f"{len(dataset)} {split}" for split, dataset in datasets.items()]
    return f"wrote {' and '.join(counts)} images to {out}; use it with --data.source shards --data.root {out}"


def _check_target(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"{out}: exists and is not a folder; give --out a new folder")
    inside = [path.name for path in out.iterdir()]
    if not all(map(_NAMES.fullmatch, inside)):  # never delete what this command did not write
        raise DataError(f"{out}: exists and holds other files; give --out a new folder")
    if inside and not overwrite:
        raise DataError(f"{out}: is prepared already; add --overwrite to replace it, or use it")


def _write(dataset: Dataset, split: str, reading: Reading, aside: Path) -> None:
    reading = dataclasses.replace(reading, decided=dataset.exif == "apply")

    def read(i: int) -> tuple[bytes, bool]:
        data = dataset.encoded(i)
        header = check_header(data, f"{dataset.origin} {dataset.file_name(i)}", dataset.size(i), reading)
        return data, header.orientation != 1

    pictures = (
        grain.MapDataset.range(len(dataset))
        .map(read)
        .to_iter_dataset(grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_AHEAD))
    )
    turned = 0

    def encoded() -> Iterator[bytes]:
        nonlocal turned
        for data, has_orientation in progress(pictures, f"writing {split}", " images", total=len(dataset)):
            turned += has_orientation
            yield data

    shards = _write_shards(encoded(), split, aside)
    index = aside / f"{split}.npz"
    np.savez_compressed(index, **vars(_index(dataset)))
    about = Description(
        form=FORM,
        classes=list(dataset.classes),
        category_ids=[i for i in dataset.category_ids if i is not None],
        exif=dataset.exif,
        exif_note=dataset.exif_note,
        turned=turned,
        shards=shards,
        index=hashlib.sha256(index.read_bytes()).hexdigest(),
    )
    write_json(aside / f"{split}.json", msgspec.to_builtins(about), indent=1)


def _write_shards(pictures: Iterator[bytes], split: str, aside: Path) -> list[Shard]:
    shards: list[Shard] = []
    picture = next(pictures, None)
    while picture is not None:
        path, images, size = aside / shard_name(split, len(shards)), 0, 0
        # One record a group: it is what is read at once. Pictures do not get smaller by compressing them again.
        writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        while picture is not None and size < _BYTES:
            writer.write(picture)
            images, size = images + 1, size + len(picture)
            picture = next(pictures, None)
        writer.close()
        shards.append(Shard(images=images, bytes=path.stat().st_size))
    return shards


def _index(dataset: Dataset) -> Index:
    """Return all of a data set but its pictures."""
    images, everything = range(len(dataset)), [dataset.annotation(i) for i in range(len(dataset))]
    truth = dataset.coco_ground_truth()["annotations"]
    position = {dataset.image_id(i): i for i in images}
    owner = np.array([position[entry["image_id"]] for entry in truth], np.int64)
    order = np.argsort(owner, kind="stable")
    labels = np.concatenate([np.zeros(0, np.int32), *(a.classes for a in everything)])
    found = [truth[j]["category_id"] for j in order]
    if found != [dataset.category_ids[k] for k in labels]:
        raise AssertionError(f"{dataset.origin}: the ground truth has other boxes than the annotations")
    rows = [dataset.official_truth(i) for i in images]
    official = [row for row in rows if row is not None]
    return Index(
        ids=np.array([dataset.image_id(i) for i in images], np.int64),
        names=np.array([dataset.file_name(i) for i in images], str),
        sizes=np.array([dataset.size(i) for i in images], np.int32).reshape(-1, 2),
        counts=np.array([len(a.boxes) for a in everything], np.int64),
        boxes=np.concatenate([np.zeros((0, 4), np.float32), *(a.boxes for a in everything)]),
        labels=labels,
        crowd=np.concatenate([np.zeros(0, bool), *(a.crowd for a in everything)]),
        order=order,
        truth=np.array([truth[j]["bbox"] for j in order], np.float64).reshape(-1, 4),
        areas=np.array([truth[j]["area"] for j in order], np.float64),
        official=np.concatenate([np.zeros((0, 8), np.int32), *official]),
        official_counts=np.array([len(row) for row in official], np.int64),
    )
