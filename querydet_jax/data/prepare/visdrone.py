"""Write a split of VisDrone once in the form that training reads fastest."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from querydet_jax.data.readers.coco import EXIF
from querydet_jax.data.readers.images import DEFAULT, Reading
from querydet_jax.data.readers.visdrone import PATCHES, PREPARED, VisDroneDataset
from querydet_jax.runtime.errors import DataError
from querydet_jax.runtime.files import folder_written_aside, write_json
from querydet_jax.runtime.progress import progress
from querydet_jax.runtime.stores import local_path

_CONTENTS = {PREPARED, "images", "annotations"}
_QUALITY = 95  # JPEG quality: OpenCV's default, which the published code uses for its patches


def prepare_visdrone(
    folder: str | Path,
    out: str | Path,
    *,
    patches: bool = False,
    overwrite: bool = False,
    reading: Reading = DEFAULT,
) -> str:
    """Write a split of VisDrone, or its patches, with annotations in COCO form and in VisDrone's own.

    ``out`` receives ``images/``, ``instances.json`` (file names relative to ``images/``; without
    ignored regions, see ``VisDroneDataset``) and VisDrone's ``annotations/``. With ``patches``, write
    the four patches of each image (``visdrone/data_prepare.py`` of the published code) as JPEG of
    quality 95, with the objects of each patch only; otherwise copy images and annotation files
    unchanged. Write to a temporary folder and rename it at the end.

    Args:
      folder: the split's folder, see ``VisDroneDataset``.
      out: the folder to create.
      patches: whether to cut the images.
      overwrite: whether to replace an ``out`` that this function wrote.
      reading: how files become pixels: of patches, and for the sizes in ``instances.json``.

    Returns:
      One line that reports what was written.

    Raises:
      DataError: the split is invalid, ``out`` is not empty, or ``out`` cannot be written.
    """
    out, source = local_path(out).resolve(), local_path(folder).resolve()
    _check_target(out, source, overwrite)
    dataset = VisDroneDataset(folder, patches=patches, reading=reading)
    try:
        with folder_written_aside(out) as aside:
            for name in ("images", "annotations"):
                (aside / name).mkdir()
            _write_images(dataset, aside)
            truth = {"info": {EXIF: dataset.exif}, **dataset.coco_ground_truth()}
            write_json(aside / PREPARED, truth)
    except OSError as error:
        raise DataError(
            f"{out}: not written, and no partial copy remains ({error}); make the images readable, and give --out a "
            "writable folder with space for them"
        ) from None
    return f"wrote {len(dataset)} images with {len(truth['annotations'])} boxes to {out}"


def _check_target(out: Path, source: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"{out}: exists and is not a folder; give --out a new folder")
    inside = {path.name for path in out.iterdir()}
    if not inside:
        return
    if inside != _CONTENTS:  # never delete what this command did not write
        raise DataError(f"{out}: exists and is not empty; give --out a new folder")
    if out == source or out in source.parents:
        raise DataError(f"{out}: is the source of the images; give --out another folder")
    if not overwrite:
        raise DataError(f"{out}: is prepared already; add --overwrite to replace it, or use it")


def _write_images(dataset: VisDroneDataset, out: Path) -> None:
    """Write the image and annotation files, with one thread per core."""
    step = PATCHES if dataset.patches else 1

    def write(first: int) -> None:
        for name in ("images", "annotations"):
            (out / name / dataset.file_name(first)).parent.mkdir(parents=True, exist_ok=True)
        if dataset.patches:
            _write_patches(dataset, first, out)
        else:
            shutil.copyfile(dataset.image_path(first), out / "images" / dataset.file_name(first))
            shutil.copyfile(dataset.annotation_path(first), _annotation_path(dataset, first, out))

    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        written = pool.map(write, range(0, len(dataset), step))
        for _ in progress(written, "writing", " images", total=len(dataset) // step):
            pass
    finally:  # an error or interrupt also cancels the writes that have not begun
        pool.shutdown(cancel_futures=True)


def _write_patches(dataset: VisDroneDataset, first: int, out: Path) -> None:
    whole = dataset.load_whole(first)
    for i in range(first, first + PATCHES):
        Image.fromarray(dataset.cut(whole, i)).save(out / "images" / dataset.file_name(i), quality=_QUALITY)
        np.savetxt(_annotation_path(dataset, i, out), dataset.official_truth(i), fmt="%d", delimiter=",")


def _annotation_path(dataset: VisDroneDataset, i: int, out: Path) -> Path:
    return (out / "annotations" / dataset.file_name(i)).with_suffix(".txt")
