"""Several hosts, real processes over loopback, give the run that one process gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from several_hosts import finished, hosts, started
from small_training import assert_same_run

from querydet_jax.runtime.errors import ConfigError
from querydet_jax.runtime.hosts import Hosts, check
from querydet_jax.weights import read_tensors

# Sums over four devices are in another order than over one. Which instructions a processor has decides how far four
# steps carry that: 3e-6 of a layer's norm on some.
_ROUNDING = 1e-5


def result(run: Path) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Return the exported parameters and the metrics of every step, but for times."""
    logged = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        logged |= {
            f"{values['step']}/{name}": value
            for name, value in values.items()
            if value is not None and name not in ("images_per_s", "data_wait_share", "seconds", "dense/ms_per_image")
        }
    return read_tensors(run), logged


def test_two_hosts_of_two_devices_equal_one_device(tmp_path):
    """From scratch, and from a checkpoint of another number of hosts that only the first one sees: losses, moving
    average of the parameters, metrics of an evaluation, with 11 images in batches of 4."""
    one, first, second = (tmp_path / name for name in ("one", "first", "second"))
    for folder in (one, first, second):
        folder.mkdir()
    data, best = tmp_path / "scenes", ["--train.best-metric", "dense/AR100", "--train.patience", "2"]
    pair = zip((first, second), hosts(2), strict=True)
    together = [started(cwd, data, 2, *flags, *best) for cwd, flags in pair]
    *outputs, _ = finished(*together, started(one, data, 1, *best))
    expected = result(one / "run")
    kept = [json.loads((folder / "run" / "best.json").read_text())["step"] for folder in (one, first)]
    assert kept[0] == kept[1] and f"at step {kept[0]}, the best" in outputs[0]
    assert {"4/loss", "3/dense/AP"} < set(expected[1])
    assert_same_run(result(first / "run"), expected, rtol=_ROUNDING)

    # Only the first host writes and prints.
    assert "step 4/4  loss" in outputs[0] and "trained; evaluate with" in outputs[0]
    assert "step" not in outputs[1].replace("steps 0 to 4", "") and "trained" not in outputs[1]
    assert not list(second.iterdir())

    shutil.rmtree(first / "run")
    shutil.copytree(one / "run", first / "run")
    shutil.rmtree(first / "run" / "checkpoints" / "4")
    pair = zip((first, second), hosts(2), strict=True)
    finished(
        *(started(cwd, data, 2, *flags, *best, "--resume", "--train.parallel", "shard_map") for cwd, flags in pair)
    )
    assert_same_run(result(first / "run"), expected, rtol=_ROUNDING)
    assert not list(second.iterdir())


def test_what_one_host_lacks_stops_all_with_its_name(tmp_path):
    pair = zip((tmp_path, tmp_path), hosts(2), strict=True)
    missing = ["--data.source", "yolo"]
    processes = [
        started(cwd, tmp_path / ("scenes", "none")[i], 1, *flags, *(missing if i else []))
        for i, (cwd, flags) in enumerate(pair)
    ]
    for output in finished(*processes, status=2):
        assert "error: host 1 of 2: " in output and "Traceback" not in output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (Hosts(count=2), "--hosts.count 2: add --hosts.coordinator HOST:PORT"),
        (Hosts(coordinator="10.0.0.1", count=2), "--hosts.coordinator 10.0.0.1: must be HOST:PORT"),
        (Hosts(coordinator="10.0.0.1:99999", count=2), "must be HOST:PORT"),
        (
            Hosts(coordinator="10.0.0.1:99", count=2, index=2),
            "--hosts.index 2, --hosts.count 2: the index",
        ),
        (Hosts(auto=True, count=2), "--hosts.auto finds coordinator, count and index itself"),
        (Hosts(timeout=0), "--hosts.timeout 0: must be at least 1"),
    ],
)
def test_flags_that_contradict_each_other(flags, message):
    with pytest.raises(ConfigError) as error:
        check(flags)
    assert message in str(error.value)
