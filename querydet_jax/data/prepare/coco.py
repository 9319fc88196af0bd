"""Write COCO as ArrayRecord in the layout of tensorflow_datasets' ``coco/2017``, without TensorFlow.

TFDS's own builder needs TensorFlow to unpack the archives and to shuffle data larger than memory.
This module writes the same layout from a COCO folder, one shard at a time, or converts a TFDS copy
from tfrecord, TFDS's default format.
"""

from __future__ import annotations

import functools
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from querydet_jax.config import DataConfig
from querydet_jax.data.readers.coco import CocoDataset
from querydet_jax.data.readers.images import DEFAULT, Reading, read_header
from querydet_jax.data.readers.records import quiet
from querydet_jax.data.readers.tfds_coco import EXIF_KEY, IDS_KEY, SPLITS, TfdsCocoDataset
from querydet_jax.data.sources import open_dataset
from querydet_jax.runtime.errors import DataError, shown
from querydet_jax.runtime.files import folder_written_aside, reason, write_json
from querydet_jax.runtime.progress import progress
from querydet_jax.runtime.reading import read_json
from querydet_jax.runtime.stores import local_path

NAME, VERSION = "coco/2017", "1.1.0"
_INFO = "dataset_info.json"
_SHARD = 1000  # images per file, about 160 MB of COCO; TFDS holds one file in memory

Examples = Callable[[], Iterator[tuple[int, dict[str, Any]]]]


def prepare_coco(
    source: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    reading: Reading = DEFAULT,
    outside_root: bool = False,
) -> str:
    """Write ``out/coco/2017/1.1.0`` as ArrayRecord, with the features of TFDS's ``coco/2017``.

    From a COCO folder, keep the image order of the annotation file and the encoded bytes, clip boxes
    to the image and store the category ids in ``metadata.json``. As in TFDS's own copies, boxes are
    float32 fractions of the image's sides and areas are truncated to integers (see ``tfds_coco``).
    From a tfrecord copy, copy the records of train and validation unchanged, without verifying
    their checksums. Write to a temporary folder and rename it at the end.

    Args:
      source: the folder of COCO 2017 as distributed (``annotations/instances_{train,val}2017.json``,
        ``train2017/``, ``val2017/``), or the version folder of a TFDS copy (with ``dataset_info.json``).
      out: the TFDS data directory.
      overwrite: whether to replace an existing ArrayRecord copy.
      reading: whether boxes are drawn on pictures turned by their EXIF orientation, stored in ``metadata.json``.
      outside_root: whether the pictures of a COCO folder may lie outside it.

    Returns:
      One line that reports what was written.

    Raises:
      DataError: the source is invalid, a copy exists already, or ``out`` cannot be written.
    """
    source, root = local_path(source).resolve(), local_path(out).resolve()
    folder = root / NAME / VERSION
    if not source.is_dir():
        raise DataError(f"{source}: no such folder; name the folder of COCO, or of a copy that TFDS made")
    _check_target(folder, source, overwrite)
    write = functools.partial(_convert, source)
    if not (source / _INFO).is_file():
        write = functools.partial(_write, _open(source, reading, outside_root))
    try:
        with folder_written_aside(folder) as aside:
            write(aside)
    except OSError as error:
        raise DataError(
            f"{folder}: not written, and no partial copy remains ({error}); make the source readable, and give --out "
            "a writable folder with space for the images"
        ) from None
    # Opening reads every record once and writes the index that training would otherwise build first.
    counts = [f"{len(TfdsCocoDataset(root, f'{NAME}:{VERSION}', ours, reading=reading))} {ours}" for ours in SPLITS]
    return f"wrote {' and '.join(counts)} images to {folder}; use it with --data.source tfds --data.root {out}"


def _check_target(folder: Path, source: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if folder == source:
        raise DataError(f"{folder}: is the source of the images; give --out another folder")
    try:
        ours = read_json(folder / _INFO).get("fileFormat") == "array_record"
    except (DataError, AttributeError):
        ours = False
    if not ours:  # never delete what this command did not write
        raise DataError(f"{folder}: exists and is not an ArrayRecord copy; give --out another folder")
    if not overwrite:
        raise DataError(f"{folder}: is prepared already; add --overwrite to replace it, or use it")


def _open(source: Path, reading: Reading, outside_root: bool) -> dict[str, CocoDataset]:
    data = DataConfig("coco", str(source), exif=reading.exif, max_pixels=reading.max_pixels, outside_root=outside_root)
    datasets: dict[str, Any] = {theirs: open_dataset(data, ours) for ours, theirs in SPLITS.items()}
    train, val = datasets["train"], datasets["validation"]
    if (train.category_ids, train.classes) != (val.category_ids, val.classes):
        raise DataError(f"{source}: the annotation files of train and val list different categories; make them agree")
    if len(set(train.classes)) < len(train.classes):
        raise DataError(f"{source}: two categories have the same name; rename one")
    return datasets


class _Coco(tfds.core.ShardBasedBuilder, skip_registration=True):
    """COCO 2017, detection: images, boxes and labels of the train and validation splits."""

    name = "coco"
    VERSION = tfds.core.Version(VERSION)
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="2017", description="COCO 2017, train and validation.")]

    def __init__(self, datasets: dict[str, CocoDataset], data_dir: Path):
        self._datasets = datasets
        super().__init__(config="2017", data_dir=data_dir)

    def _info(self) -> tfds.core.DatasetInfo:
        train = self._datasets["train"]
        objects = {
            "area": np.int64,
            "bbox": tfds.features.BBoxFeature(),
            "id": np.int64,
            "is_crowd": np.bool_,
            "label": tfds.features.ClassLabel(names=list(train.classes)),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            homepage="https://cocodataset.org",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "image/filename": tfds.features.Text(),
                    "image/id": np.int64,
                    "objects": tfds.features.Sequence(objects),
                }
            ),
            metadata=tfds.core.MetadataDict(
                {
                    IDS_KEY: list(train.category_ids),
                    EXIF_KEY: {split: dataset.exif for split, dataset in self._datasets.items()},
                }
            ),
        )

    def _shard_iterators_per_split(self, dl_manager: tfds.download.DownloadManager) -> dict[str, list[Examples]]:
        del dl_manager  # nothing is downloaded
        total = sum(map(len, self._datasets.values()))
        bar = iter(progress(range(total), "writing", " images"))
        return {split: _shards(dataset, bar) for split, dataset in self._datasets.items()}


def _write(datasets: dict[str, CocoDataset], aside: Path) -> None:
    """Write the splits ``datasets`` to the folder ``aside``."""
    with quiet():
        builder = _Coco(datasets, aside / "build")
        builder.download_and_prepare(
            file_format="array_record", download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    made = Path(builder.data_dir)
    for file in made.iterdir():
        os.rename(file, aside / file.name)
    shutil.rmtree(aside / "build")


def _shards(dataset: CocoDataset, bar: Iterator[int]) -> list[Examples]:
    def examples(first: int) -> Iterator[tuple[int, dict[str, Any]]]:
        for i in range(first, min(first + _SHARD, len(dataset))):
            next(bar)
            yield i, _example(dataset, i)

    return [functools.partial(examples, first) for first in range(0, len(dataset), _SHARD)]


def _example(dataset: CocoDataset, i: int) -> dict[str, Any]:
    path, encoded, (h, w) = dataset.image_path(i), dataset.encoded(i), dataset.size(i)
    upright = dataset.reading.upright
    found = read_header(encoded, str(path), dataset.reading).size(upright=upright)
    if found != (h, w):
        raise DataError(
            f"{path}: the image is {found[1]}x{found[0]} (width x height, EXIF orientation "
            f"{'applied' if upright else 'ignored'}) but the annotations say {w}x{h}; correct width and height there, "
            "or store the image upright, without EXIF orientation"
        )
    truth, objects = dataset.annotation(i), []
    for entry, k, crowd in zip(dataset.entries(i), truth.classes.tolist(), truth.crowd.tolist(), strict=True):
        x, y, width, height = entry.bbox
        y0, x0, y1, x1 = (min(max(v, 0.0), 1.0) for v in (y / h, x / w, (y + height) / h, (x + width) / w))
        objects.append(
            {
                "area": int(entry.size),
                "bbox": tfds.features.BBox(ymin=y0, xmin=x0, ymax=y1, xmax=x1),
                "id": entry.id,
                "is_crowd": crowd,
                "label": k,
            }
        )
    return {
        "image": encoded,
        "image/filename": dataset.file_name(i),
        "image/id": dataset.image_id(i),
        "objects": objects,
    }


def _convert(source: Path, aside: Path) -> None:
    """Convert the train and validation records of a tfrecord copy to ArrayRecord in the folder ``aside``."""
    path = source / _INFO
    info = read_json(path)
    try:
        stored = info.get("fileFormat", "tfrecord")
        splits = {s["name"]: s for s in info["splits"] if s["name"] in SPLITS.values()}
        lengths = {name: [int(n) for n in s["shardLengths"]] for name, s in splits.items()}
        name = info["name"]
        if not name.isidentifier():  # it begins the names of files
            raise ValueError(f"name {shown(name)}")
        if not all(0 <= count < 2**31 for counts in lengths.values() for count in counts):
            raise ValueError(f"shardLengths {shown(lengths)}")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DataError(
            f"{path}: not readable as TFDS's description of a data set ({reason(error)}); restore it"
        ) from None
    if stored != "tfrecord":
        raise DataError(f"{path}: the copy is stored as {stored}; give a copy in tfrecord, the only convertible format")
    if set(splits) != set(SPLITS.values()):
        raise DataError(f"{path}: lists the splits {', '.join(splits)}; need {', '.join(SPLITS.values())}")
    bar = iter(progress(range(sum(map(sum, lengths.values()))), "converting", " images"))
    for split, shards in lengths.items():
        of = len(shards)
        files = [f"{name}-{split}.{{}}-{k:05d}-of-{of:05d}" for k in range(of)]
        for file, count in zip(files, shards, strict=True):
            writer = ArrayRecordWriter(str(aside / file.format("array_record")), "group_size:1")
            found = 0
            for record in _tfrecords(source / file.format("tfrecord")):
                writer.write(record)
                found += 1
                next(bar, None)
            writer.close()
            if found != count:
                raise DataError(
                    f"{source / file.format('tfrecord')}: holds {found} records instead of {count}; restore the file"
                )
    for other in source.iterdir():
        if other.is_file() and other.name != _INFO and ".tfrecord" not in other.name:
            shutil.copyfile(other, aside / other.name)
    write_json(aside / _INFO, {**info, "fileFormat": "array_record", "splits": list(splits.values())}, indent=2)


def _tfrecords(path: Path) -> Iterator[bytes]:
    """Yield the records of a tfrecord file: length (8 bytes), its checksum (4), the record, its checksum (4)."""
    try:
        with path.open("rb") as file:
            left = os.fstat(file.fileno()).st_size
            while left:
                header = file.read(12)
                (length,) = struct.unpack("<Q4x", header) if len(header) == 12 else (left,)
                left -= 12 + length + 4
                if left < 0:
                    raise DataError(f"{path}: ends within a record; restore the file")
                yield file.read(length)
                file.seek(4, os.SEEK_CUR)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; restore the copy") from None
