"""All ways must agree before they are timed; one that does not is an error."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.speed import static_vs_dynamic as module
from benchmarks.speed.sparse_ways import CROPS, DENSE, GATHER, KEYS, TILES, Masks, Spconv, StaticWays
from benchmarks.speed.static_vs_dynamic import StaticVsDynamic, lay_out, static_vs_dynamic
from querydet_jax.runtime.errors import ConfigError, QueryDetError

SMALL = dict(
    channels=8,
    classes=2,
    height=24,
    width=40,
    active=(0.1, 0.6),
    threads=0,
    rounds=2,
    chunk=32,
    tile=4,
    crops_up_to=1.0,
)


@pytest.mark.parametrize(("subject", "ways"), [("head", [DENSE, GATHER, KEYS, TILES, CROPS]), ("layer", None)])
def test_every_way_is_measured(tmp_path, capsys, subject, ways):
    ways = ways or [DENSE, GATHER, TILES, CROPS]
    static_vs_dynamic(StaticVsDynamic(subject=subject, out=str(tmp_path), **SMALL))
    name = "static_vs_dynamic" + ("_layer" if subject == "layer" else "")
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert [row["way"] for row in found["rows"]] == 2 * ways
    for row in found["rows"]:
        assert row["ms_p50"] > 0 and row["gflop_s"] > 0 and row["speed_up"] > 0 and row["compile_s"] > 0
        assert row["compilations"] >= 1 and row["temp_mib"] >= 0
        if row["way"] in (GATHER, TILES):
            assert row["capacity"] >= row["sites"]
    few, many = found["rows"][0], found["rows"][-1]
    assert few["active"] < many["active"] <= 1
    assert "spconv: needs" in capsys.readouterr().out


def test_crops_are_left_out_where_they_would_take_forever(tmp_path, capsys):
    static_vs_dynamic(StaticVsDynamic(subject="layer", out=str(tmp_path), **{**SMALL, "crops_up_to": 0.01}))
    assert "not run: crops above 1% active: need a larger --crops-up-to" in capsys.readouterr().out


@pytest.mark.parametrize("target", [0.005, 0.03, 0.2, 0.6])
def test_masks_have_the_share_asked_for(target):
    masks = lay_out(200, 336, target)
    assert masks.share == pytest.approx(target, rel=0.03)
    assert not np.any(masks.keys & ~masks.active) and 0 < masks.keys.sum() < masks.active.sum()


def prepared(subject: str = "head"):
    arguments = StaticVsDynamic(subject=subject, **SMALL)
    rng = np.random.default_rng(0)
    stacks = module._stacks(arguments, rng)
    features = jnp.asarray(rng.normal(size=(1, 24, 40, 8)), jnp.float32)
    return arguments, stacks, features, lay_out(24, 40, 0.3)


def static_ways(arguments, stacks):
    relu_last = arguments.subject == "layer"
    return StaticWays(stacks, (24, 40), relu_last=relu_last, chunk=arguments.chunk, tile=arguments.tile)


def test_a_way_that_is_wrong_is_not_timed():
    arguments, stacks, features, masks = prepared()
    programs = static_ways(arguments, stacks)
    calls = {way: programs.get(way, programs.capacity(way, masks), features, masks)[0] for way in (DENSE, GATHER)}
    module._check(arguments, calls, stacks, features, masks)
    outputs, sites = calls[GATHER]()
    calls[GATHER] = lambda: ([outputs[0].at[3, 1].add(0.01), outputs[1]], sites)
    with pytest.raises(QueryDetError, match="gather: differs by 0.01"):
        module._check(arguments, calls, stacks, features, masks)
    fewer = dataclasses.replace(sites, is_key=sites.is_key & (jnp.arange(len(sites.index)) < 5))
    calls[GATHER] = lambda: (outputs, fewer)
    with pytest.raises(QueryDetError, match=f"gather: computed other cells than the {masks.active.sum()} asked for"):
        module._check(arguments, calls, stacks, features, masks)


def test_the_layer_has_its_relu():
    arguments, stacks, features, masks = prepared("layer")
    programs = static_ways(arguments, stacks)
    for way in (DENSE, GATHER, TILES, CROPS):
        found = programs.get(way, programs.capacity(way, masks), features, masks)[0]()
        (y,) = found if way == DENSE else found[0]
        assert float(y.min()) == 0 < float(y.max())


def test_one_program_a_buffer_size():
    arguments, stacks, features, masks = prepared("layer")
    programs = static_ways(arguments, stacks)
    capacity = programs.capacity(GATHER, masks)
    _, first = programs.get(GATHER, capacity, features, masks)
    empty = Masks(np.zeros_like(masks.keys), np.zeros_like(masks.active))
    _, again = programs.get(GATHER, capacity, features, empty)
    _, other = programs.get(GATHER, programs.capacity(GATHER, empty), features, empty)
    assert first == again and other["compilations"] == 2


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not let a process choose its cores")
def test_one_thread_is_one_thread():
    """In a process of its own: XLA makes its pool as large as the set of cores that it finds when it starts."""
    script = (
        "import os; from benchmarks.speed.static_vs_dynamic import confine; (note,) = confine(1);"
        "assert len(os.sched_getaffinity(0)) == 1 and os.environ['OMP_NUM_THREADS'] == '1';"
        "assert float(note.split()[-2]) < 1.2, note"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_more_threads_than_cores(monkeypatch):
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda pid: {5, 2, 7}, raising=False)
    with pytest.raises(ConfigError, match="--threads 4: there are only 3 cores"):
        module.confine(4)
    monkeypatch.delattr(module.os, "sched_setaffinity", raising=False)
    with pytest.raises(ConfigError, match="does not let a process choose its cores; use 0"):
        module.confine(1)


def test_spconv_is_not_run_with_more_threads():
    found, reasons = module._spconv(StaticVsDynamic(threads=2), [])
    assert found is None and "needs --threads 1" in reasons[0]


def test_spconv_that_is_absent_is_named(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    found, reasons = module._spconv(StaticVsDynamic(threads=1), [])
    assert found is None and reasons == ["spconv: needs torch and spconv (pip install -r requirements-spconv.txt)"]


@pytest.fixture
def one_thread(monkeypatch):
    """spconv's own OpenMP reads this when it is loaded; torch.set_num_threads is another library's."""
    if "spconv" not in sys.modules:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
    pytest.importorskip("torch")
    pytest.importorskip("spconv")


def test_spconv_builds_its_index_once(one_thread, monkeypatch):
    from spconv.pytorch import ops  # pyright: ignore[reportMissingImports]

    built = []
    build = ops.get_indice_pairs
    monkeypatch.setattr(ops, "get_indice_pairs", lambda *args, **more: built.append(1) or build(*args, **more))
    _, stacks, features, masks = prepared()
    dynamic = Spconv(stacks)
    dynamic.set(np.asarray(features), masks.active)
    for call, number in ((dynamic.cold, 1), (dynamic.cold, 1), (dynamic.warm, 0)):
        built.clear()
        call()
        assert len(built) == number


@pytest.mark.parametrize("subject", ["head", "layer"])
def test_spconv_computes_the_same(one_thread, subject):
    _, stacks, features, masks = prepared(subject)
    dynamic = Spconv(stacks, relu_last=subject == "layer")
    dynamic.set(np.asarray(features), masks.active)
    expected = module.masked_dense_stacks(features, jnp.asarray(masks.active), stacks)
    if subject == "layer":
        expected = [np.maximum(y, 0) for y in expected]
    cells = np.flatnonzero(masks.active)
    for outputs in (dynamic.cold(), dynamic.warm(), dynamic.warm()):
        for y, on_map in zip(outputs, expected, strict=True):
            reference = np.asarray(on_map).reshape(-1, on_map.shape[-1])[cells]
            np.testing.assert_allclose(y.numpy(), reference, rtol=0, atol=1e-4)
