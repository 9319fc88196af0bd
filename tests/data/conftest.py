"""A small COCO folder that tests can modify."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from querydet_jax.data.readers.coco import CocoDataset


class Folder:
    """Write images and a COCO JSON file, and open them."""

    def __init__(self, root: Path):
        self.root, self.images = root, root / "images"
        self.images.mkdir()
        self.content: dict[str, Any] = {"images": [], "annotations": [], "categories": []}

    def image(self, identifier: int, height: int, width: int, name: str = "") -> np.ndarray:
        """Add an image whose pixels are drawn from its id."""
        name = name or f"{identifier}.png"
        pixels = np.random.default_rng(identifier).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(self.images / name)
        self.content["images"].append({"id": identifier, "file_name": name, "height": height, "width": width})
        return pixels

    def box(self, image_id: int, category_id: int, bbox: list[float], **more: Any) -> None:
        identifier = len(self.content["annotations"])
        entry = {"id": identifier, "image_id": image_id, "category_id": category_id, "bbox": bbox, **more}
        self.content["annotations"].append(entry)

    def open(self) -> CocoDataset:
        path = self.root / "instances.json"
        path.write_text(json.dumps(self.content))
        return CocoDataset(path, self.images)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Images 7 (40x60) and 3 (50x30), categories 9 "boat" and 4 "car", two boxes."""
    made = Folder(tmp_path)
    made.image(7, 40, 60)
    made.image(3, 50, 30)
    made.content["categories"] = [{"id": 9, "name": "boat"}, {"id": 4, "name": "car"}]
    made.box(3, 9, [1, 2, 10, 20])
    made.box(7, 4, [5, 6, 7, 8], iscrowd=1, area=50)
    return made


@pytest.fixture
def many(tmp_path: Path) -> Callable[[int], Folder]:
    """A folder of n images, alternately 32x64 and 64x32 (height x width), with ids 100, 101, ... and one box each."""

    def make(n: int) -> Folder:
        made = Folder(tmp_path)
        made.content["categories"] = [{"id": 1, "name": "car"}]
        for i in range(n):
            made.image(100 + i, *((32, 64) if i % 2 else (64, 32)))
            made.box(100 + i, 1, [4, 8, 16, 12])
        return made

    return make
