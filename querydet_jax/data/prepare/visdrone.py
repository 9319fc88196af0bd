"""Writing a split of VisDrone once in the form in which training reads it fastest."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from querydet_jax.data.readers.visdrone import PATCHES, PREPARED, VisDroneDataset
from querydet_jax.runtime.errors import DataError
from querydet_jax.runtime.files import folder_written_aside, write_json
from querydet_jax.runtime.progress import progress

_CONTENTS = {PREPARED, "images", "annotations"}
_QUALITY = 95  # JPEG, OpenCV's default, with which the published code writes its patches


def prepare_visdrone(folder: str | Path, out: str | Path, *, patches: bool = False, overwrite: bool = False) -> str:
    """Write a split of VisDrone, or its patches, as a folder of both forms: COCO and VisDrone's own.

    ``out`` then holds ``images/``, ``instances.json`` (file names relative to ``images/``; no ignored
    regions, see ``VisDroneDataset``) and ``annotations/`` as VisDrone has them. With ``patches`` the
    images are the four patches of each (specification 5.3) as JPEG of quality 95, and an annotation
    file holds a patch's objects alone; otherwise images and annotation files are copied as they are.
    The folder is written beside ``out`` and renamed at the end.

    Args:
      folder: the split's folder, see ``VisDroneDataset``.
      out: the folder to make.
      patches: whether to cut.
      overwrite: whether an ``out`` that this function has made before is replaced.

    Returns:
      A line on what was written.

    Raises:
      DataError: the split is not in order; ``out`` is not empty, or cannot be written.
    """
    out, source = Path(out).resolve(), Path(folder).resolve()
    _refuse(out, source, overwrite)
    dataset = VisDroneDataset(folder, patches=patches)
    try:
        with folder_written_aside(out) as aside:
            for name in ("images", "annotations"):
                (aside / name).mkdir()
            _write_images(dataset, aside)
            truth = dataset.coco_ground_truth()
            write_json(aside / PREPARED, truth)
    except OSError as error:
        raise DataError(
            f"{out}: not prepared, nothing is left of it ({error}); make the images readable, and give --out a folder "
            "that can be written, with space for them"
        ) from None
    return f"wrote {len(dataset)} images with {len(truth['annotations'])} boxes to {out}"


def _refuse(out: Path, source: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"{out}: is there and not a folder; give --out a new folder")
    inside = {path.name for path in out.iterdir()}
    if not inside:
        return
    if inside != _CONTENTS:  # whatever it is, not ours to delete
        raise DataError(f"{out}: is there and not empty; give --out a new folder")
    if out == source or out in source.parents:
        raise DataError(f"{out}: is where the images come from; give --out another folder")
    if not overwrite:
        raise DataError(f"{out}: has been prepared before; add --overwrite to prepare it anew, or use it")


def _write_images(dataset: VisDroneDataset, out: Path) -> None:
    """The image and annotation files, written by a thread a core."""
    step = PATCHES if dataset.patches else 1

    def write(first: int) -> None:
        for name in ("images", "annotations"):
            (out / name / dataset.file_name(first)).parent.mkdir(parents=True, exist_ok=True)
        if dataset.patches:
            _write_patches(dataset, first, out)
        else:
            shutil.copyfile(dataset.image_path(first), out / "images" / dataset.file_name(first))
            shutil.copyfile(dataset.annotation_path(first), _text(dataset, first, out))

    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        written = pool.map(write, range(0, len(dataset), step))
        for _ in progress(written, "writing", " images", total=len(dataset) // step):
            pass
    finally:  # whatever ended the loop, an interrupt included, calls off the writes that have not begun
        pool.shutdown(cancel_futures=True)


def _write_patches(dataset: VisDroneDataset, first: int, out: Path) -> None:
    whole = dataset.load_whole(first)
    for i in range(first, first + PATCHES):
        Image.fromarray(dataset.cut(whole, i)).save(out / "images" / dataset.file_name(i), quality=_QUALITY)
        np.savetxt(_text(dataset, i, out), dataset.official_truth(i), fmt="%d", delimiter=",")


def _text(dataset: VisDroneDataset, i: int, out: Path) -> Path:
    return (out / "annotations" / dataset.file_name(i)).with_suffix(".txt")
