"""What is known of a step before it runs, and what is noticed while it does."""

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
from querydet_jax.training.parallel import AXIS, carrier


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    """Pictures of two shapes, so two canvases; an evaluation and a checkpoint every second step."""
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
def test_a_step_says_what_it_needs_and_moves_nothing_by_accident(parallel, caplog):
    devices = carrier(parallel)
    state, step = start(SMALL, AXIS)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    state, batch = devices.replicate(state), a_batch()
    with contextlib.closing(CompileWatch()) as watch, caplog.at_level(logging.INFO, "querydet_jax"):
        programs = Programs(devices.compiled(step), watch)
        state, _ = programs(state, devices.split(batch))
        state, metrics = programs(state, devices.split(batch))
        memory = programs.memory["the step on 64x64"]
        assert np.isfinite(devices.unreplicate(metrics)["loss"]) and watch.recompilations == 0
        with pytest.raises(jax.errors.JaxRuntimeError, match="host-to-device"):
            split = devices.split(batch)
            programs(state, {**split, "classes": batch["classes"].reshape(split["classes"].shape)})
    assert memory is not None
    # The donated state is where the new one goes: without that a device would need room for both.
    assert size <= memory.reused <= memory.arguments and memory.outputs - memory.reused < 4096 < memory.temporaries
    said = [record.getMessage() for record in caplog.records if "compiled in" in record.getMessage()]
    assert len(said) == 1 and "the step on 64x64: compiled in" in said[0] and "GiB a device of" in said[0]


def test_a_run_compiles_what_it_needs_once(config, tmp_path, caplog, capsys):
    """Two canvases; the evaluation and the checkpoints, too, have all they need after the first."""
    seen = []
    doubled = jax.jit(lambda x: x * 2)

    def evaluate(model, dataset, between) -> dict[str, float]:
        seen.append(float(doubled(jnp.ones(5))[0]))
        return {}

    with caplog.at_level(logging.INFO, "querydet_jax"):
        train(config, tmp_path, evaluate=evaluate)
    assert len(seen) == 3 and len([r for r in caplog.records if "compiled in" in r.getMessage()]) == 2
    assert [line["recompilations"] for line in logged(tmp_path)] == [0] * 8
    assert "programs compiled in" in capsys.readouterr().out.splitlines()[-1]


def test_what_compiles_again_and_again_is_counted_and_named(config, tmp_path, caplog):
    def evaluate(model, dataset, between) -> dict[str, float]:
        jax.jit(lambda x: x * 3)(jnp.ones(5))  # a function made anew is a program made anew
        return {}

    train(override(config, {"data.train_canvases": ((96, 96),)}), tmp_path, evaluate=evaluate)
    assert logged(tmp_path)[-1]["recompilations"] == 2
    assert "evaluation compiled 1 programs again" in caplog.text


def logged(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def test_a_profile_shows_the_steps_by_number(config, tmp_path, capsys):
    train(override(config, {"train.eval_every": 0}), tmp_path, profile=True)
    assert f"wrote a trace of steps 4 to 7 to {tmp_path}/profile" in capsys.readouterr().out
    (path,) = (tmp_path / "profile").rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    steps = {event["args"]["step_num"] for event in events if event.get("name") == "train"}
    assert steps == {"4", "5", "6", "7"}
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))  # what TensorBoard reads


@pytest.mark.parametrize(("backend", "stops"), [("gpu", True), ("cpu", False)])
def test_a_step_that_cannot_fit_does_not_start(backend, stops, monkeypatch, caplog):
    devices = carrier("pmap")
    state, step = start(SMALL, AXIS)
    monkeypatch.setattr(compiled, "device_memory", lambda: 2**20)
    monkeypatch.setattr(compiled, "_backend", lambda: backend)
    with contextlib.closing(CompileWatch()) as watch:
        programs = Programs(devices.compiled(step), watch)
        with pytest.raises(ConfigError) if stops else contextlib.nullcontext() as caught:
            programs(devices.replicate(state), devices.split(a_batch()))
    said = str(caught.value) if caught is not None else caplog.text
    assert "the step on 64x64 needs" in said and "lower train.batch_size, raise train.accumulate" in said


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
