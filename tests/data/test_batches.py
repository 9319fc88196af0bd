"""Plans and loaders: content and order of batches, independence of workers, damaged files."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest

from querydet_jax.config import AugmentConfig, DataConfig
from querydet_jax.data import eval_batches, train_batches
from querydet_jax.data.plan import TrainPlan, choose_canvas
from querydet_jax.data.readers.coco import CocoDataset
from querydet_jax.runtime.errors import ConfigError, DataError

DATA = DataConfig(
    source="coco",
    train_short=(32, 48),
    train_max=96,
    test_short=32,
    test_max=64,
    train_canvases=((64, 96), (96, 64)),
    test_canvases=((32, 64), (64, 32)),
    max_boxes=5,
    threads=2,
)


SEED = {train_batches: {"seed": 1}, eval_batches: {}}


class Unforeseen(CocoDataset):
    def load(self, index: int) -> np.ndarray:
        if self.file_name(index) == "102.png":
            raise KeyError("of late")
        return super().load(index)


def take(dataset, n, data=DATA, **kwargs):
    kwargs = {"batch_size": 4, "seed": 1, **kwargs}
    batches = train_batches(dataset, data, **kwargs)
    out = [next(batches) for _ in range(n)]
    batches.close()
    return out


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_static_shapes_and_types(many):
    dataset = many(11).open()
    shapes = set()
    for batch in take(dataset, 8):
        assert {k: v.dtype.name for k, v in batch.items()} == {
            "images": "uint8", "sizes": "int32", "boxes": "float32", "classes": "int32", "image_ids": "int64",
        }  # fmt: skip
        h, w = batch["images"].shape[1:3]
        shapes.add((h, w))
        assert batch["images"].shape == (4, h, w, 3) and batch["sizes"].shape == (4, 2)
        assert batch["boxes"].shape == (4, 5, 4) and batch["classes"].shape == (4, 5)
        for image, (vh, vw), boxes, classes in zip(
            batch["images"], batch["sizes"], batch["boxes"], batch["classes"], strict=True
        ):
            assert not image[vh:].any() and not image[:, vw:].any() and image[:vh, :vw].any()
            real = boxes[classes >= 0]
            assert len(real) == 1 and (real[:, 2:] > real[:, :2]).all() and (real <= [vw, vh, vw, vh]).all()
            assert not boxes[classes < 0].any()
    assert shapes == {(64, 96), (96, 64)}


def test_every_image_once_per_epoch(many):
    dataset = many(11).open()
    plan = TrainPlan(dataset, DATA, 4, seed=1)
    items = [plan.item(step, row) for step in range(60) for row in range(4)]
    for step in range(60):
        assert len({items[4 * step + row].canvas for row in range(4)}) == 1
    seen = [(item.epoch, item.index) for item in items]
    assert len(set(seen)) == len(seen)
    complete = {e for e, _ in seen} - set(range(max(e for e, _ in seen) - 1, 99))
    assert len(complete) > 15
    for epoch in complete:
        assert sorted(i for e, i in seen if e == epoch) == list(range(11))
    orders = {tuple(i for e, i in seen if e == epoch) for epoch in complete}
    assert len(orders) == len(complete)
    assert {item.shape for item in items} == {(32, 64), (64, 32), (48, 96), (96, 48)}


@pytest.mark.parametrize("n", [1, 3, 11])
def test_resuming_gives_the_same_batches(many, n):
    dataset = many(n).open()
    whole = take(dataset, 14)
    resumed = take(dataset, 4, start_step=10)
    for a, b in zip(whole[10:], resumed, strict=True):
        assert_same(a, b)
    assert not np.array_equal(whole[0]["images"], take(dataset, 1, seed=2)[0]["images"])


def test_steps_of_a_plan_can_be_asked_for_in_any_order(many):
    dataset = many(5).open()
    forwards, backwards = (TrainPlan(dataset, DATA, 4, seed=0) for _ in range(2))
    steps = [0, 1, 400, 7, 399]
    expected = {s: [forwards.item(s, r) for r in range(4)] for s in sorted(steps)}
    for s in steps:
        assert [backwards.item(s, r) for r in range(4)] == expected[s]


def test_shards_divide_the_batch(many):
    dataset = many(11).open()
    whole = take(dataset, 5)
    parts = [take(dataset, 5, shard=s, num_shards=2) for s in range(2)]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert_same(batch, {k: np.concatenate([first[k], second[k]]) for k in first})


def test_workers_do_not_change_batches(many):
    dataset = many(11).open()
    expected = take(dataset, 6)
    for threads, processes in ((0, 0), (5, 0), (2, 2)):
        got = take(dataset, 6, dataclasses.replace(DATA, threads=threads, processes=processes))
        for a, b in zip(expected, got, strict=True):
            assert_same(a, b)


def test_training_leaves_out_images_without_objects(many, folder):
    folder.image(8, 40, 60)  # no boxes; image 7 has a crowd box only
    dataset = folder.open()
    plan = TrainPlan(dataset, DATA, 2, seed=0)
    assert plan.indices.tolist() == [1]
    with_empty = dataclasses.replace(DATA, keep_empty=True, train_canvases=((96, 96),))
    assert TrainPlan(dataset, with_empty, 2, seed=0).indices.tolist() == [0, 1, 2]
    batches = take(dataset, 3, with_empty, batch_size=3)
    for batch in batches:
        for image_id, classes in zip(batch["image_ids"], batch["classes"], strict=True):
            assert (classes >= 0).sum() == (1 if image_id == 3 else 0)
    folder.content["annotations"] = []
    with pytest.raises(DataError, match="no image has a box to train on; .*data.keep_empty"):
        TrainPlan(folder.open(), DATA, 2, seed=0)


@pytest.mark.parametrize(("empty", "crowd", "keep_empty"), [(0, 0, False), (2, 0, False), (1, 2, False), (1, 2, True)])
def test_images_left_out_of_training_are_counted_in_one_line(many, caplog, empty, crowd, keep_empty):
    made = many(3)
    for i in range(empty + crowd):
        made.image(i, 32, 64)
        if i >= empty:
            made.box(i, 1, [1, 1, 9, 9], iscrowd=1)
    with caplog.at_level(logging.INFO, logger="querydet_jax"):
        take(made.open(), 1, dataclasses.replace(DATA, keep_empty=keep_empty))
    lines = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    if empty + crowd == 0 or keep_empty:
        assert not lines
    else:
        (line,) = lines
        assert line.startswith(f"{empty + crowd} of {3 + empty + crowd} training images are left out")


def rare(many, n=20, first=2):
    """Class 2 on the first images alone, class 1 on all."""
    made = many(n)
    made.content["categories"].append({"id": 2, "name": "bus"})
    for i in range(first):
        made.box(100 + i, 2, [0, 0, 6, 6])
    return made.open()


def test_images_of_rare_classes_come_more_often(many):
    """A class on a tenth of the images, below 0.4: twice per epoch, each time augmented anew; the others once."""
    dataset = rare(many)
    data = dataclasses.replace(DATA, repeat_below=0.4, augment=AugmentConfig(photometric=1.0))
    plan = TrainPlan(dataset, data, 2, 1)
    assert plan.class_repeats.tolist() == [1, 2] and plan.repeats.sum() == 22
    items = [plan.item(step, row) for step in range(11) for row in range(2)]
    assert sorted((item.index, item.copy) for item in items) == sorted(
        [(i, 0) for i in range(20)] + [(0, 1), (1, 1)]
    )  # fmt: skip
    batches = take(dataset, 11, data, batch_size=2)
    seen = [image for b in batches for image, i in zip(b["images"], b["image_ids"], strict=True) if i == 100]
    assert len(seen) == 2 and not np.array_equal(*seen)
    assert_same(take(dataset, 1, data, batch_size=2, start_step=7)[0], batches[7])


def test_fractions_of_copies_average_out(many):
    """sqrt(0.225 / 0.1) = 1.5 copies: one or two, by chance."""
    plan = TrainPlan(rare(many), dataclasses.replace(DATA, repeat_below=0.225), 1, 3)
    copies = np.zeros((200, 2), int)
    for item in map(lambda step: plan.item(step, 0), range(200 * 20)):
        if item.index < 2 and item.epoch < 180:
            copies[item.epoch, item.index] += 1
    assert set(copies[:180].ravel()) == {1, 2} and 1.4 < copies[:180].mean() < 1.6
    drawn = [plan.any(np.random.default_rng(k))[0] for k in range(2000)]
    assert 0.12 < np.mean(np.array(drawn) < 2) < 0.17  # 3 of 21


def test_choose_canvas():
    canvases = ((64, 96), (96, 64), (96, 96), (64, 64))
    assert choose_canvas((60, 60), canvases) == 3
    assert choose_canvas((60, 90), canvases) == 0
    assert choose_canvas((90, 60), canvases) == 1
    assert choose_canvas((90, 90), canvases) == 2
    assert choose_canvas((97, 10), canvases) == -1


def test_images_larger_than_every_canvas(many):
    dataset = many(4).open()
    small = dataclasses.replace(DATA, train_short=(48,), train_canvases=((32, 64), (64, 32)))
    with pytest.raises(DataError, match=r"10\d.png: .* resized to .* fits no training canvas; .*data.crop"):
        train_batches(dataset, small, batch_size=2, seed=0)
    with pytest.raises(DataError, match=r"10\d.png: .* fits no test canvas; .*data.test_max"):
        eval_batches(dataset, dataclasses.replace(DATA, test_short=48, test_max=96), batch_size=2)
    for batch in take(dataset, 4, dataclasses.replace(small, crop=True), batch_size=2):
        assert batch["images"].shape[1:3] in ((32, 64), (64, 32))
        assert (batch["sizes"] == batch["images"].shape[1:3]).all()


def test_too_many_boxes_are_reported_once(many, caplog):
    made = many(4)
    for k in range(6):
        made.box(101, 1, [k, 2, 9, 9])
    with caplog.at_level(logging.WARNING, logger="querydet_jax"):
        batches = take(made.open(), 4)
    messages = [r.getMessage() for r in caplog.records]
    assert len(messages) == 1
    assert "1 of 4 training images have more than data.max_boxes 5 boxes, at most 7 (101.png)" in messages[0]
    assert max((b["classes"] >= 0).sum(axis=1).max() for b in batches) == 5


@pytest.mark.parametrize("processes", [0, 1])
def test_a_damaged_image_is_skipped_and_counted(many, caplog, processes):
    made = many(12)
    dataset = made.open()
    path = made.images / "103.png"
    path.write_bytes(path.read_bytes()[:200])
    data = dataclasses.replace(DATA, processes=processes)
    batches = train_batches(dataset, data, batch_size=4, seed=1)
    with caplog.at_level(logging.WARNING, logger="querydet_jax"):
        got = [next(batches) for _ in range(10)]
    assert batches.skipped == 1 and batches.step == 10
    batches.close()
    assert [r.getMessage().count("103.png") for r in caplog.records] == [1]
    assert all(len(b["image_ids"]) == 4 and 103 not in b["image_ids"] for b in got)
    made.image(103, 32, 64)  # restored: the other images of the batches must be unchanged
    for damaged, whole in zip(got, take(dataset, 10), strict=True):
        assert damaged["images"].shape == whole["images"].shape
        intact = whole["image_ids"] != 103
        np.testing.assert_array_equal(damaged["images"][intact], whole["images"][intact])


@pytest.mark.parametrize(("batches_of", "processes"), [(train_batches, 1), (eval_batches, 0)])
def test_an_unexpected_exception_names_the_image(many, batches_of, processes):
    dataset = many(4).open()
    dataset.__class__ = Unforeseen
    batches = batches_of(dataset, dataclasses.replace(DATA, processes=processes), batch_size=4, **SEED[batches_of])
    with pytest.raises(DataError, match=r"102.png: KeyError while it was read .* \('of late'; test_batches.py:\d+\)"):
        for _ in range(20):
            next(batches)
    batches.close()


def test_substitutes_are_the_next_of_the_canvas_then_the_others(many):
    dataset = many(12).open()
    data = dataclasses.replace(DATA, train_short=(48,))
    plan = TrainPlan(dataset, data, 1, seed=0)  # batches of one image: in the order of the permutation
    order = [plan.item(step, 0) for step in range(12)]
    for at, item in enumerate(order):
        assert item.epoch == 0
        following = [*order[at + 1 :], *order[:at]]
        expected = [o.index for o in following if o.canvas == item.canvas]
        expected += [o.index for o in following if o.canvas != item.canvas]
        got = plan.substitutes(item)
        assert [s.index for s in got] == expected
        assert {s.canvas for s in got} == {item.canvas} and {s.epoch for s in got} == {0}


def test_the_only_image_of_a_canvas_is_replaced_by_a_cropped_one(many):
    made = many(4)
    for i in (101, 103):  # the wide ones
        (made.images / f"{i}.png").unlink()
    batches = take(made.open(), 6)
    assert {b["images"].shape[1:3] for b in batches} == {(64, 96), (96, 64)}
    assert {int(i) for b in batches for i in b["image_ids"]} <= {100, 102}


def test_training_stops_when_too_many_images_fail(many):
    made = many(40)
    dataset = made.open()
    for i in range(0, 40, 4):
        (made.images / f"{100 + i}.png").unlink()
    batches = train_batches(dataset, DATA, batch_size=4, seed=0)
    with pytest.raises(DataError, match=r"\d+ of \d+ training images could not be read, the last: .*no such image"):
        for _ in range(100):
            next(batches)
    assert batches.skipped >= 8
    batches.close()
    for path in made.images.iterdir():
        path.unlink()
    batches = train_batches(dataset, DATA, batch_size=4, seed=0)
    with pytest.raises(DataError, match=r"none of \d+ training images in a row could be read"):
        next(batches)
    batches.close()


def test_evaluation_yields_every_image_once(many):
    dataset = many(11).open()
    batches = eval_batches(dataset, DATA, batch_size=4)
    got = list(batches)
    assert len(got) == len(batches) == 4  # 6 high and 5 wide images
    valid = np.concatenate([b["image_ids"][b["valid"]] for b in got])
    assert sorted(valid) == list(range(100, 111))
    assert [int(b["valid"].sum()) for b in got] == [4, 1, 4, 2]
    for batch in got:
        assert batch["images"].shape[0] == 4 and batch["images"].shape[1:3] in DATA.test_canvases
        assert {k: v.dtype.name for k, v in batch.items()} == {
            "images": "uint8", "sizes": "int32", "original_sizes": "int32", "image_ids": "int64", "valid": "bool",
        }  # fmt: skip
        for k, image_id in enumerate(batch["image_ids"]):
            np.testing.assert_array_equal(batch["images"][k], dataset.load(int(image_id) - 100))
            assert tuple(batch["original_sizes"][k]) == tuple(batch["sizes"][k]) == dataset.size(int(image_id) - 100)
    for a, b in zip(got, eval_batches(dataset, dataclasses.replace(DATA, threads=0), batch_size=4), strict=True):
        assert_same(a, b)
    chosen = list(eval_batches(dataset, DATA, batch_size=4, indices=[3, 0]))
    assert [b["image_ids"][b["valid"]].tolist() for b in chosen] == [[103], [100]]
    assert list(eval_batches(dataset, DATA, batch_size=4, indices=[])) == []


def test_evaluation_shards_have_equal_shapes_in_equal_order(many):
    dataset = many(11).open()
    shards = [list(eval_batches(dataset, DATA, batch_size=2, shard=s, num_shards=2)) for s in range(2)]
    valid = [i for shard in shards for b in shard for i in b["image_ids"][b["valid"]].tolist()]
    assert sorted(valid) == list(range(100, 111))
    assert [b["images"].shape for b in shards[0]] == [b["images"].shape for b in shards[1]]


def test_evaluation_stops_at_a_damaged_image(many):
    made = many(3)
    (made.images / "101.png").unlink()
    with pytest.raises(DataError, match="101.png: no such image file"):
        list(eval_batches(made.open(), DATA, batch_size=2))


@pytest.mark.parametrize(
    ("change", "kwargs", "message"),
    [
        ({"flip": 1.5}, {}, "data.flip 1.5"),
        ({"max_boxes": 0}, {}, "data.max_boxes 0"),
        ({"train_short": ()}, {}, "data.train_short"),
        ({"threads": -1}, {}, "data.threads -1"),
        ({}, {"batch_size": 3, "num_shards": 2}, "train.batch_size 3: not a multiple of the 2 hosts"),
        ({}, {"seed": -1}, "train.seed -1"),
        ({}, {"shard": 2, "num_shards": 2}, "shard 2 of 2"),
    ],
)
def test_bad_settings(many, change, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        train_batches(many(2).open(), dataclasses.replace(DATA, **change), **{"batch_size": 4, "seed": 0, **kwargs})


def test_closed_batches_end(many):
    batches = train_batches(many(2).open(), DATA, batch_size=2, seed=0)
    next(batches)
    batches.close()
    batches.close()
    with pytest.raises(StopIteration):
        next(batches)
