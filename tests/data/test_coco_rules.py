"""Training and evaluation by COCO's rules: the sizes, canvases, flips and crowds of configs/coco_querydet_r50.py."""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from querydet_jax.config import load_config
from querydet_jax.data import eval_batches, train_batches
from querydet_jax.data.dataset import Annotation, Dataset
from querydet_jax.data.plan import TrainPlan, choose_canvas, eval_plan
from querydet_jax.data.transforms import resize_shape
from querydet_jax.evaluation.coco import ImageDetections, evaluate, to_coco_results

CONFIG = load_config(Path(__file__).parents[2] / "configs" / "coco_querydet_r50.py")
WIDE, HIGH = (800, 1344), (1344, 800)


class Sizes(Dataset):
    """Images of given sizes without pixels, with one box each."""

    classes, category_ids = ("car",), (1,)

    def __init__(self, sizes: list[tuple[int, int]]):
        self._sizes = sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def image_id(self, i: int) -> int:
        return i

    def file_name(self, i: int) -> str:
        return str(i)

    def size(self, i: int) -> tuple[int, int]:
        return self._sizes[i]

    def annotation(self, i: int) -> Annotation:
        return Annotation(np.array([[1, 1, 9, 9]], np.float32), np.zeros(1, np.int32), np.zeros(1, bool))

    def load(self, i: int) -> np.ndarray:
        return np.full((*self._sizes[i], 3), 100, np.uint8)


def test_every_size_that_coco_has_fits_a_canvas():
    """COCO's images have sides of 51 to 640 pixels."""
    sides = [51, 59, 100, *range(150, 640, 35), 639, 640]
    for short in (*CONFIG.data.train_short, CONFIG.data.test_short):
        for h in sides:
            for w in sides:
                shape = resize_shape(h, w, short, 1333)
                assert max(shape) <= 1333 and min(shape) <= short
                canvas = CONFIG.data.train_canvases[choose_canvas(shape, CONFIG.data.train_canvases)]
                assert canvas == (HIGH if shape[0] > 800 else WIDE)
                assert shape[0] <= canvas[0] and shape[1] <= canvas[1]
    assert (CONFIG.data.train_max, CONFIG.data.test_max, CONFIG.data.test_short) == (1333, 1333, 800)
    assert CONFIG.data.test_canvases == CONFIG.data.train_canvases == (WIDE, HIGH)


def test_batches_are_wide_or_high_and_short_sides_are_drawn_evenly():
    dataset = Sizes([(480, 640), (640, 480), (427, 640), (500, 375)] * 24)
    plan = TrainPlan(dataset, CONFIG.data, CONFIG.train.batch_size, seed=0)
    drawn: collections.Counter[int] = collections.Counter()
    seen: collections.Counter[tuple[int, int]] = collections.Counter()
    per_image = collections.defaultdict(set)
    for step in range(120):
        items = [plan.item(step, row) for row in range(CONFIG.train.batch_size)]
        (canvas,) = {item.canvas for item in items}
        seen[canvas] += 1
        for item in items:
            h, w = dataset.size(item.index)
            assert item.shape == resize_shape(h, w, min(item.shape), 1333)
            assert item.shape[0] <= canvas[0] and item.shape[1] <= canvas[1]
            assert canvas == (HIGH if item.shape[0] > 800 else WIDE)
            drawn[min(item.shape)] += 1
            per_image[item.index].add(min(item.shape))
    assert set(drawn) == {640, 672, 704, 736, 768, 800}
    assert all(250 < count < 390 for count in drawn.values())  # 320 expected, deviation 16
    assert min(seen[WIDE], seen[HIGH]) > 40
    assert all(len(sizes) >= 4 for sizes in per_image.values())  # 20 draws per image
    items = [item for batch in eval_plan(dataset, CONFIG.data, 1, list(range(4))) for item, _ in batch]
    assert [(item.index, item.shape, item.canvas) for item in items] == [
        (0, (800, 1067), WIDE),
        (2, (800, 1199), WIDE),
        (1, (1067, 800), HIGH),
        (3, (1067, 800), HIGH),
    ]


@pytest.fixture
def crowded(folder):
    """Image 3 (50x30, the left third bright) with a boat over that third and a crowd over the rest."""
    pixels = np.zeros((50, 30, 3), np.uint8)
    pixels[:, :10] = 255
    Image.fromarray(pixels).save(folder.images / "3.png")
    folder.content["annotations"] = []
    folder.box(3, 9, [10, 0, 20, 50], iscrowd=1)
    folder.box(3, 9, [0, 0, 10, 50])
    return folder.open()


def test_training_leaves_crowds_out_and_flips_half_of_the_images(crowded):
    data = dataclasses.replace(
        CONFIG.data, train_short=(60,), train_canvases=((128, 64),), max_boxes=3, threads=1
    )  # small sizes; all else as in the card
    assert data.flip == 0.5
    batches = train_batches(crowded, data, batch_size=20, seed=0)
    flipped = 0
    for _ in range(5):
        batch = next(batches)
        assert (batch["sizes"] == [100, 60]).all() and (batch["image_ids"] == 3).all()
        for image, boxes, classes in zip(batch["images"], batch["boxes"], batch["classes"], strict=True):
            assert classes.tolist() == [1, -1, -1]
            mirrored = image[50, 59, 0] == 255
            assert boxes[0].tolist() == ([40, 0, 60, 100] if mirrored else [0, 0, 20, 100])
            flipped += bool(mirrored)
    batches.close()
    assert 30 <= flipped <= 70  # 50 expected, deviation 5


def test_evaluation_ignores_detections_in_a_crowd(crowded):
    """98 boxes within the crowd, all with higher scores than the one on the boat, count neither as true nor false."""
    inside = [[12, y / 3, 25, y / 3 + 10] for y in range(98)]
    boxes = np.array([*inside, [0, 0, 10, 50]], np.float32)
    found = ImageDetections(3, boxes, np.linspace(0.9, 0.1, 99).astype(np.float32), np.ones(99, np.int64))
    truth = crowded.coco_ground_truth()
    metrics = evaluate(truth, to_coco_results([found], crowded.category_ids))
    assert metrics.metrics["AP"] == pytest.approx(100) and metrics.objects["all"] == 1
    for annotation in truth["annotations"]:
        annotation["iscrowd"] = 0
    assert evaluate(truth, to_coco_results([found], crowded.category_ids)).metrics["AP"] < 50


def test_evaluation_does_not_flip_or_jitter(crowded):
    data = dataclasses.replace(CONFIG.data, test_short=60, test_canvases=((128, 128),))
    (batch,) = list(eval_batches(crowded, data, batch_size=1, indices=[1]))
    assert batch["sizes"].tolist() == [[100, 60]] and batch["images"][0, 50, 0, 0] == 255
    assert batch["original_sizes"].tolist() == [[50, 30]]
