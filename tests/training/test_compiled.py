"""What a step needs is known before it runs; what compiles again is noticed."""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_training import SCENES, SMALL, a_batch, start

from querydet_jax.config import Config, load_config, override
from querydet_jax.runtime.errors import ConfigError
from querydet_jax.training import compiled, train
from querydet_jax.training.compiled import CompileWatch, Memory, Programs, out_of_memory_explained
from querydet_jax.training.parallel import AXIS, replication


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    """Pictures of two shapes, so two canvases; an evaluation and a checkpoint every other step."""
    changes = {
        **SCENES,
        "model.min_level": 4,
        "model.max_level": 5,
        "model.loss.level_weighting": "linear",
        "model.query.levels": (5,),
        "model.loss.query_weights": (10.0,),
        "model.loss.query_gammas": (1.2,),
        "inference.start_level": 5,
        "data.train_short": (64, 96),
        "data.train_canvases": ((64, 64), (96, 96)),
        "data.root": str(tmp_path_factory.mktemp("scenes")),
        "train.steps": 8,
        "train.checkpoint_every": 2,
        "train.eval_every": 2,
    }
    return override(load_config(Path(__file__).parents[2] / "configs" / "demo.py"), changes)


@pytest.mark.parametrize("parallel", ["pmap", "shard_map"])
def test_a_step_reports_its_memory_and_moves_nothing_implicitly(parallel, caplog):
    devices = replication(parallel)
    state, step = start(SMALL, AXIS)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    state, batch = devices.replicate(state), a_batch()
    with contextlib.closing(CompileWatch()) as watch, caplog.at_level(logging.INFO, "querydet_jax"):
        programs = Programs(devices.replicate_step(step), watch)
        state, _ = programs(state, devices.split(batch))
        state, metrics = programs(state, devices.split(batch))
        memory = programs.memory["the step on 64x64"]
        assert np.isfinite(devices.unreplicate(metrics)["loss"]) and watch.recompilations == 0
        with pytest.raises(jax.errors.JaxRuntimeError, match="host-to-device"):
            split = devices.split(batch)
            programs(state, {**split, "classes": batch["classes"].reshape(split["classes"].shape)})
    assert memory is not None
    # The new state takes the place of the donated one: otherwise a device would need room for both.
    assert size <= memory.reused <= memory.arguments and memory.outputs - memory.reused < 4096 < memory.temporaries
    (line,) = [record.getMessage() for record in caplog.records if "compiled in" in record.getMessage()]
    assert "the step on 64x64: compiled in" in line and "GiB per device of" in line


def test_a_run_compiles_each_program_once(config, tmp_path, caplog, capsys):
    """Two canvases, so two steps; evaluations and checkpoints find their programs after the first time, too. What
    compiles again is counted and named. A profile shows steps 4 to 7 by their numbers."""
    doubled, calls = jax.jit(lambda x: x * 2), 0

    def evaluate(model, dataset, stop_if_told) -> dict[str, float]:
        nonlocal calls
        calls += 1
        # A function made anew is a program made anew.
        (doubled if calls < 3 else jax.jit(lambda x: x * 3))(jnp.ones(5))
        return {}

    with caplog.at_level(logging.INFO, "querydet_jax"):
        train(config, tmp_path, evaluate=evaluate, profile=True)
    assert calls == 4 and len([r for r in caplog.records if "compiled in" in r.getMessage()]) == 2
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["recompilations"] for line in lines if "loss" in line] == [0] * 6 + [1] * 2
    assert caplog.text.count("evaluation compiled 1 programs again") == 2  # after step 6 and after the last one
    printed = capsys.readouterr().out
    assert "programs compiled in" in printed.splitlines()[-1]

    assert f"wrote a trace of steps 4 to 7 to {tmp_path}/profile" in printed
    (path,) = (tmp_path / "profile").rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert {event["args"]["step_num"] for event in events if event.get("name") == "train"} == {"4", "5", "6", "7"}
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))  # what TensorBoard reads


@pytest.mark.parametrize(("backend", "stops"), [("gpu", True), ("cpu", False)])
def test_a_step_that_cannot_fit_does_not_start(backend, stops, monkeypatch, caplog):
    monkeypatch.setattr(compiled, "device_memory", lambda: 2**10)
    monkeypatch.setattr(compiled, "_backend", lambda: backend)
    with contextlib.closing(CompileWatch()) as watch:
        programs = Programs(jax.jit(lambda state, batch: (state, {"loss": batch["images"].mean()})), watch)
        with pytest.raises(ConfigError) if stops else contextlib.nullcontext() as caught:
            programs(jnp.zeros(()), {"images": jnp.zeros((1, 64, 64, 3))})  # pyright: ignore[reportArgumentType]
    line = str(caught.value) if caught is not None else caplog.text
    assert "the step on 64x64 needs" in line and "lower train.batch_size, raise train.accumulate" in line


def test_the_devices_memory_running_out_is_one_line():
    with pytest.raises(ConfigError, match="the step does not fit .*trying to allocate 9.*lower train.batch_size"):
        with out_of_memory_explained("the step"):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory trying to allocate 9 bytes.\nmore")
    with pytest.raises(jax.errors.JaxRuntimeError), out_of_memory_explained("the step"):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_memory_adds_up():
    program = jax.jit(lambda x: x + 1, donate_argnums=0).lower(jnp.zeros(1024)).compile()
    assert Memory.of(program) == Memory(4096, 4096, 4096, 0)
    assert Memory(10, 8, 6, 5).total == 17
