"""No room in the run's folder: the run goes on, or stops with what to do, and the last good checkpoint is there."""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from small_training import SCENES

from querydet_jax.config import Config, load_config, override
from querydet_jax.errors import QueryDetError
from querydet_jax.files import Lines, write_json
from querydet_jax.training import train
from querydet_jax.training.checkpoint import restore_model_state
from querydet_jax.training.guards import LossGuard

ROOT = Path(__file__).parents[2]
# Of tensorstore's writes that end after the first one has failed.
_LATER_FAILURES = "ignore:(?s).*Event loop is closed:pytest.PytestUnraisableExceptionWarning"
SMALL = {
    **SCENES,
    "model.min_level": 4,
    "model.max_level": 5,
    "model.query.enabled": False,
    "inference.query": "dense",
    "model.backbone.width": 16,
    "model.loss.level_weighting": "uniform",
    "train.steps": 6,
    "train.checkpoint_every": 1,
    "train.eval_every": 2,
}


@contextlib.contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    """What can be done to a process anywhere: writing then fails as on a full disk, with another error number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def disk(folder: Path, size: int) -> Iterator[None]:
    """A file system of so many bytes."""
    folder.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="module")
def config(tmp_path_factory, quick_compile) -> Config:
    root = tmp_path_factory.mktemp("scenes")
    return override(load_config(ROOT / "configs" / "demo.py"), {**SMALL, "data.root": str(root)})


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    train(config, run)
    return run


def steps(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def assert_same_parameters(run: Path, whole: Path) -> None:
    found = restore_model_state(run)
    for name, value in restore_model_state(whole).items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.filterwarnings(_LATER_FAILURES)
def test_no_room_for_a_checkpoint(config, whole, tmp_path, caplog):
    """A real one, with room for two checkpoints and a half."""
    run = tmp_path / "run"
    size = sum(path.stat().st_size for path in (whole / "checkpoints" / "6").rglob("*"))
    with disk(run, int(2.5 * size)):
        with pytest.raises(QueryDetError) as error:
            train(config, run)
        assert steps(run) == ["1", "2"]
        assert str(error.value) == (
            f"{run}/checkpoints: checkpoint 3 could not be written (No space left on device), the last good one is 2: "
            f"free space there (a checkpoint takes {round(size / 1e6)} MB; train.keep_checkpoints says how many are "
            "kept), then add --resume to go on from it"
        )
        assert not [record for record in caplog.records if record.exc_info]
        assert not list(run.glob(".*"))
        assert set(restore_model_state(run)) == set(restore_model_state(whole))


@pytest.mark.filterwarnings(_LATER_FAILURES)
def test_a_checkpoint_that_cannot_be_written_ends_the_run_soon(config, whole, tmp_path):
    """In the background, long before the next one is due. The one before is still there, though one only is kept, and
    the run goes on from it when there is room again."""
    run, limit = tmp_path / "run", contextlib.ExitStack()
    changed = override(config, {"train.steps": 1000, "train.checkpoint_every": 4, "train.keep_checkpoints": 1})

    def fill(model, dataset) -> dict[str, float]:
        if (run / "checkpoints" / "4").is_dir():
            limit.enter_context(no_file_longer_than(1 << 14))
        return {}

    with limit, pytest.raises(QueryDetError, match=r"checkpoint 8 could not .* \(File too large\), the last .* is 4: "):
        train(changed, run, evaluate=fill)
    assert steps(run) == ["4"]
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] < 12
    (run / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir()  # as a run leaves it that is killed
    train(config, run, resume=True)
    assert_same_parameters(run, whole)
    assert not [name for name in steps(run) if not name.isdigit()]


def test_lines_wait_for_room(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste')  # as a crash of the machine leaves it
    lines = Lines(path)
    lines.write('{"step": 2}')
    with no_file_longer_than(30):
        lines.write('{"step": 3}')
        lines.write('{"step": 4}')
    assert path.stat().st_size == 30
    lines.write('{"step": 5}')
    lines.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]
    assert caplog.text.count("metrics.jsonl: cannot be written (File too large)") == 1


def test_files_are_whole_or_not_there(tmp_path):
    path = tmp_path / "config.json"
    write_json(path, {"a": 1})
    with no_file_longer_than(4), pytest.raises(QueryDetError, match=r"config.json: cannot be written \(File too large"):
        write_json(path, {"a": "b" * 100})
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"] and json.loads(path.read_text()) == {"a": 1}


def test_no_room_for_the_batch_of_a_loss_that_is_not_finite(tmp_path):
    """What was wrong with the loss is still said."""

    class Here:
        def unreplicate(self, tree):
            return tree

        def latest(self) -> int:
            return 3

    guard = LossGuard(tmp_path, Here(), Here())  # pyright: ignore[reportArgumentType]
    batch = {"images": np.random.default_rng(0).integers(0, 256, (1, 99, 99, 3), dtype=np.uint8)}
    guard.watch(5, {"loss": np.float32("nan")}, batch, np.array([7]))
    with (
        no_file_longer_than(64),
        pytest.raises(QueryDetError, match=r"the loss is nan at step 5 \(images \[7\];.*File too"),
    ):
        guard.check()
    assert not list(tmp_path.iterdir())
