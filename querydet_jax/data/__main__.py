"""Preparing data: `python -m querydet_jax.data --help`."""

from __future__ import annotations

import signal
from typing import Annotated

import tyro

from querydet_jax.cli import run
from querydet_jax.data.prepare import prepare_visdrone


def main() -> None:
    """Do what the command line names."""
    # Being ended is to clean up as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    tyro.extras.subcommand_cli_from_dict(
        {"prepare-visdrone": _prepare_visdrone}, prog="python -m querydet_jax.data", description="Prepare data."
    )


def _prepare_visdrone(
    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SPLIT_FOLDER")],
    out: Annotated[str, tyro.conf.arg(metavar="FOLDER")],
    patches: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a split of VisDrone once for training: images, instances.json (COCO) and annotations.

    Args:
      folder: The split's folder, with images/ and annotations/.
      out: Folder to make; it appears when it is complete.
      patches: Cut each image into its four quarters, as QueryDet trains on them.
      overwrite: Replace a folder that was prepared before.
    """
    print(prepare_visdrone(folder, out, patches=patches, overwrite=overwrite))


if __name__ == "__main__":
    run(main)
