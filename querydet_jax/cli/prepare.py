"""`querydet prepare`."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from querydet_jax.cli.arguments import parse
from querydet_jax.cli.main import SUMMARIES
from querydet_jax.config import DataConfig
from querydet_jax.data.readers.images import Reading
from querydet_jax.runtime.errors import ConfigError


def prepare(words: Sequence[str], program: str) -> None:
    """Write a data set once in the form that training reads fastest."""
    # Being terminated cleans up as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if words[:1] == ["shards"]:  # any data set, so with a card and its --data.* flags as those of training
        _prepare_shards(words[1:], f"{program} shards")
        return
    tyro.extras.subcommand_cli_from_dict(
        {"visdrone": _prepare_visdrone, "coco": _prepare_coco},
        args=list(words),
        prog=program,
        description=f"{SUMMARIES['prepare']} A third form, shards, is for any data set: {program} shards --help.",
    )


@dataclass(frozen=True)
class ShardsArguments:
    out: str = ""
    """Folder to create, also in a store; it appears when it is complete."""
    splits: tuple[Literal["train", "val"], ...] = ("train", "val")
    """Which halves of the data set to write."""
    overwrite: bool = False
    """Replace a folder of shards that is there."""


def _prepare_shards(words: Sequence[str], program: str) -> None:
    arguments, config, _ = parse(
        ShardsArguments,
        "Write the data set of a configuration as ArrayRecord files of about 100 MB, for --data.source shards: the "
        "form for buckets, slow and shared disks. Pictures stay as they are stored; of the other fields, those that "
        "say what the data set is count.",
        words,
        program,
    )
    if not arguments.out or not arguments.splits:
        raise ConfigError("--out, --splits: name a folder to create, and train, val or both")
    from querydet_jax.data.prepare.shards import prepare_shards

    print(prepare_shards(config.data, arguments.out, splits=arguments.splits, overwrite=arguments.overwrite))


def _prepare_visdrone(
    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SPLIT_FOLDER")],
    out: Annotated[str, tyro.conf.arg(metavar="FOLDER")],
    patches: bool = False,
    overwrite: bool = False,
    exif: Literal["auto", "apply", "ignore"] = "auto",
    bit_depth: str = "",
    max_pixels: int = DataConfig.max_pixels,
) -> None:
    """Write a split of VisDrone once for training: images, instances.json (COCO) and annotations.

    Args:
      folder: The split's folder, with images/ and annotations/.
      out: Folder to create; it appears when it is complete.
      patches: Cut each image into its four quarters, as QueryDet trains on them.
      overwrite: Replace a folder that was prepared before.
      exif: EXIF orientation, as data.exif.
      bit_depth: How more than 8 bits per channel become the 8 bits of a patch, as data.bit_depth.
      max_pixels: Refuse larger pictures (0: none), as data.max_pixels.
    """
    from querydet_jax.data.prepare.visdrone import prepare_visdrone

    reading = Reading.of(DataConfig(exif=exif, bit_depth=bit_depth, max_pixels=max_pixels))
    print(prepare_visdrone(folder, out, patches=patches, overwrite=overwrite, reading=reading))


def _prepare_coco(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="COCO_FOLDER")],
    out: Annotated[str, tyro.conf.arg(metavar="DATA_DIR")],
    overwrite: bool = False,
    exif: Literal["auto", "apply", "ignore"] = "auto",
    max_pixels: int = DataConfig.max_pixels,
    outside_root: bool = False,
) -> None:
    """Write COCO 2017 once in ArrayRecord, laid out as tensorflow_datasets' coco/2017, for --data.source tfds.

    Args:
      source: COCO as distributed (annotations/instances_train2017.json, train2017/, the same for val), or the
        folder of a copy that tensorflow_datasets made in tfrecord (DATA_DIR/coco/2017/1.1.0).
      out: The TFDS data directory to write coco/2017/1.1.0 in; it appears when it is complete.
      overwrite: Replace a copy in ArrayRecord that is there.
      exif: EXIF orientation, as data.exif; the copy remembers it.
      max_pixels: Refuse larger pictures (0: none), as data.max_pixels.
      outside_root: Pictures may lie outside the folder, as data.outside_root.
    """
    from querydet_jax.data.prepare.coco import prepare_coco

    reading = Reading.of(DataConfig(exif=exif, max_pixels=max_pixels))
    print(prepare_coco(source, out, overwrite=overwrite, reading=reading, outside_root=outside_root))
