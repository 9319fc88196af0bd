"""Paths in object stores, on fsspec's file system in memory, which needs no driver."""

import errno
import io
import os
import pickle
import time
from pathlib import Path

import pytest

from querydet_jax.data.readers.folders import list_files, open_regular
from querydet_jax.runtime import files, stores
from querydet_jax.runtime.errors import ConfigError, QueryDetError
from querydet_jax.runtime.files import LineFile, check_writable, folder_written_aside, write_json, written_aside
from querydet_jax.runtime.reading import read_json
from querydet_jax.runtime.stores import NoSuchObject, StoreError, as_path, is_url, local_copy


@pytest.fixture
def run(memory_store):
    return as_path("s3://bucket/runs/one")


def test_a_url_stays_one_through_every_part_of_a_path(run):
    assert str(run / "checkpoints" / "20" / "a.json") == "s3://bucket/runs/one/checkpoints/20/a.json"
    assert str((run / "a.json").with_stem("b").with_suffix(".csv")) == "s3://bucket/runs/one/b.csv"
    assert (str(run.parent), run.name, (run / "a.b.json").stem) == ("s3://bucket/runs", "one", "a.b")
    assert str(run.parent.parent.parent) == "s3://bucket"
    assert str((run / ".." / "two").resolve()) == "s3://bucket/runs/two"
    assert (run / "a" / "b").relative_to(run).as_posix() == "a/b" and (run / "a").is_relative_to(run)
    assert as_path(run) is run and as_path(str(run)) == run and is_url(run) and not is_url(Path("s3"))
    assert pickle.loads(pickle.dumps(run)) == run  # to a loader's worker


def test_what_is_for_files_alone_refuses_a_url_instead_of_making_a_folder(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for take in (Path, open, os.listdir, os.makedirs):
        with pytest.raises(TypeError):
            take(run)
    with pytest.raises(io.UnsupportedOperation, match="written as a whole"):
        (run / "a").open("w")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("http://host/a.zip", "http:// is not read; give gs://, s3:// or a path on this machine"),
        ("s3:/bucket/a", "begins with s3://"),
        (Path("gs://bucket/a"), "a pathlib.Path loses a slash of a URL: give the string gs://"),
        ("s3://", "names no bucket; give s3://BUCKET/NAME"),
    ],
)
def test_another_address_is_one_line(given, said):
    with pytest.raises(ConfigError, match=said):
        as_path(given)


def test_a_missing_driver_names_its_requirements(monkeypatch):
    monkeypatch.setitem(stores._DRIVERS, "gs", ("no_such_driver", "gcs"))
    with pytest.raises(ConfigError, match="gs://: cannot be read here .*; pip install -r requirements-gcs.txt"):
        as_path("gs://bucket/a")


def test_files_appear_whole_or_not_at_all(run):
    write_json(run / "a.json", {"a": 1})
    with pytest.raises(RuntimeError), written_aside(run / "a.json") as aside:
        aside.write_text("half")
        raise RuntimeError
    assert read_json(run / "a.json") == {"a": 1} and [path.name for path in run.iterdir()] == ["a.json"]

    for names in (["b", "c/d"], ["c/e", "b"]):
        with folder_written_aside(run / "page") as folder:
            for name in names:
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(name)
        assert stores.files_below(run / "page") == sorted(names)
    with pytest.raises(RuntimeError), folder_written_aside(run / "page") as folder:
        raise RuntimeError
    assert (run / "page" / "c" / "e").read_text() == "c/e"

    check_writable(run)
    assert sorted(stores.files_below(run)) == ["a.json", "page/b", "page/c/e"]


def test_files_folders_and_neither(run):
    write_json(run / "a.json", {})
    assert (run / "a.json").is_file() and run.is_dir() and not (run / "b").exists()
    with pytest.raises(
        NoSuchObject, match="s3://bucket/runs/one/b: there is no such object or folder; correct the add"
    ):
        (run / "b").read_bytes()
    with pytest.raises(FileNotFoundError), local_copy(run / "b"):
        pass
    with pytest.raises(QueryDetError, match="s3://other: there is no such bucket"):
        as_path("s3://other/run").is_dir()


def test_local_copies(run, tmp_path):
    write_json(run / "a.json", {})
    write_json(run / "in" / "b.json", {})
    with local_copy(run / "a.json") as copy:
        assert copy.name == "a.json" and copy.read_bytes() == b"{}\n"
    with local_copy(run) as copy:
        assert sorted(p.relative_to(copy).as_posix() for p in copy.rglob("*.json")) == ["a.json", "in/b.json"]
    assert not copy.exists()
    with local_copy(tmp_path) as same:
        assert same is tmp_path


def test_lines_are_uploaded_and_gone_on_with(run, monkeypatch):
    lines = LineFile(run / "metrics.jsonl")
    lines.write("1")
    assert not (run / "metrics.jsonl").exists()
    lines.upload()
    assert (run / "metrics.jsonl").read_text() == "1\n"
    lines.write("2")
    monkeypatch.setattr(files, "_UPLOAD_EVERY", 0)
    lines.write("3")  # in the background
    lines.close()
    again = LineFile(run / "metrics.jsonl")
    again.write("4")
    again.close()
    assert (run / "metrics.jsonl").read_text() == "1\n2\n3\n4\n"


def test_pictures_are_listed_as_in_a_folder(run, caplog):
    caplog.set_level("INFO", "querydet_jax")
    for name in ("b.JPG", "a.jpg", "in/c.jpg", ".hidden/d.jpg", "notes.txt"):
        write_json(run / name, {})
    assert list_files(run, {".jpg"}) == ["a.jpg", "b.JPG", "in/c.jpg"]
    assert "passed over 1 hidden, 1 .txt; took 3" in caplog.text
    assert list_files(run, {".jpg"}, deep=False) == ["a.jpg", "b.JPG"]
    with open_regular(run / "a.jpg") as file:
        assert file.read() == b"{}\n"


class _Failing:
    """A file system that fails a number of times."""

    def __init__(self, error, times):
        self.error, self.times, self.asked = error, times, 0

    def cat_file(self, path):
        self.asked += 1
        if self.asked <= self.times:
            raise self.error
        return b"data"


def test_reads_are_repeated_after_a_pause(memory_store, monkeypatch, caplog):
    caplog.set_level("INFO", "querydet_jax")
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    silent = _Failing(ConnectionResetError("connection lost\nand more"), 2)
    monkeypatch.setattr(stores, "_file_system", lambda scheme: silent)
    assert as_path("s3://bucket/a").read_bytes() == b"data" and len(pauses) == 2 and pauses[0] < pauses[1]
    assert "s3://bucket/a: the store does not answer (connection lost); asked again" in caplog.text

    silent.asked, silent.times = 0, 100
    with pytest.raises(StoreError, match=r"the store does not answer \(connection lost\); check the network") as caught:
        as_path("s3://bucket/a").read_bytes()
    assert silent.asked == 3 and caught.value.errno == errno.EIO
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # to other hosts


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError("Access Denied"), r"the store refuses \(Access Denied\); check the store's credentials"),
        (OSError("Forbidden: gs://b"), r"the store refuses \(Forbidden"),
        (type("NoCredentialsError", (Exception,), {})("Unable"), r"the store gets no credentials \(Unable\); check"),
    ],
)
def test_a_refusal_is_not_repeated(memory_store, monkeypatch, error, said):
    refusing = _Failing(error, 1)
    monkeypatch.setattr(stores, "_file_system", lambda scheme: refusing)
    with pytest.raises(StoreError, match=said):
        as_path("s3://bucket/a").read_bytes()
    assert refusing.asked == 1
