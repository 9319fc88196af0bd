"""Reading text and JSON: encodings, damage, and values that no reader should take for numbers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from querydet_jax.config import load_config
from querydet_jax.data.readers.coco import CocoDataset
from querydet_jax.data.readers.yolo import read_names
from querydet_jax.evaluation.standalone import score_coco
from querydet_jax.evaluation.visdrone_files import read_result_file
from querydet_jax.runtime.errors import DataError, QueryDetError, shown
from querydet_jax.runtime.reading import numbers, parse_json, read_text

TRUTH = """{"images": [{"id": 1, "file_name": "é.jpg", "width": 9, "height": 9}],
 "categories": [{"id": 1, "name": "bâteau"}],
 "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5]}]}"""


def _coco_truth(path: Path) -> Any:
    (path.parent / "found.json").write_text("[]")
    return score_coco(path.parent / "found.json", path).num_images


def _coco_results(path: Path) -> Any:
    (path.parent / "truth.json").write_text(TRUTH)
    return score_coco(path, path.parent / "truth.json").num_detections


# Every reader of text: file name, a content, what reads it.
READERS: list[tuple[str, str, Callable[[Path], Any]]] = [
    ("a.txt", "é\n", read_text),
    ("config.json", '{"name": "é"}', load_config),
    ("data.yaml", "names: [é]", lambda path: read_names(path.parent)),
    ("classes.txt", "é\nb", lambda path: read_names(path.parent)),
    ("a.json", TRUTH, lambda path: CocoDataset(path, path.parent).classes),
    ("a.json", TRUTH, _coco_truth),
    ("a.json", '[{"image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5], "score": 1, "note": "é"}]', _coco_results),
    ("a.txt", "1,2,3,4,1,1,0,0\n", lambda path: read_result_file(path).tolist()),
]


@pytest.mark.parametrize(("name", "text", "read"), READERS)
def test_every_reader_takes_the_same_encodings(tmp_path, name, text, read):
    found = []
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / name).write_bytes(text.encode(encoding))
        found.append(read(tmp_path / name))
    assert found[0] == found[1] == found[2]
    assert found[0]


@pytest.mark.parametrize(("name", "text", "read"), READERS)
def test_every_reader_refuses_what_is_no_text(tmp_path, name, text, read):
    path = tmp_path / name
    for content in (b"\xe9\xff", text.encode("utf-16-le"), text.encode() + b"\0", b"\xff\xfe\x00"):
        path.write_bytes(content)
        with pytest.raises(QueryDetError, match=rf"{name}: not text in UTF-8.*at byte [0-9]+\); restore") as error:
            read(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path), lambda path: None])
def test_what_is_no_file_is_refused_at_once(tmp_path, make):
    make(tmp_path / "a.txt")
    with pytest.raises(DataError, match=r"a.txt: not readable \((not a regular file|No such file)"):
        read_text(tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "a" * 300])
def test_a_path_that_no_file_can_have(name):
    with pytest.raises(DataError, match="not readable"):
        read_text(name)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' * 100_000, "nested too deeply"),
        ('[{"id": 7, "bbox": 1, "bbox": 2}]', r"an object \(id 7\) has the key 'bbox' twice"),
        ("[1, 2", "line 1 column 6"),
    ],
    ids=shown,
)
def test_json_that_is_refused(text, problem):
    with pytest.raises(DataError, match=rf"^a.json: not readable as JSON \(.*{problem}.*\); correct or restore"):
        parse_json(text, "a.json")


def test_numbers_of_any_length():
    assert parse_json(f"[1{'0' * 5000}, -1{'0' * 5000}, 12]", "a") == [float("inf"), float("-inf"), 12]


@pytest.mark.parametrize("word", ["1_000", "\u0661", "0x10", "nan", "-inf", "1e999", "", "1.2.3", "1\u00b2", "True"])
def test_words_that_are_no_numbers(word):
    assert numbers(["1", word]) == []


def test_words_that_are_numbers():
    assert numbers(["1", " -2.5 ", "+.5", "1e3", "7."]) == [1, -2.5, 0.5, 1000, 7]


@pytest.mark.parametrize(
    "value", [10**5000, "x\n" * 1000, [[[[[[1]]]]]] * 50, {"a\x1b": "\ud800"}, float("nan")], ids=shown
)
def test_values_in_messages_are_short(value):
    text = shown(value)
    assert len(text) <= 400 and text.isprintable()
