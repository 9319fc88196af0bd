"""Packing a run: the card's facts come from its evaluation, and what was lost is measured."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import packaged_weights
from benchmarks.packaged_weights import PackArguments, compare, pack
from querydet_jax.config import BackboneConfig, Config, FPNConfig, HeadConfig, ModelConfig, QueryConfig, save_config
from querydet_jax.inference import runs
from querydet_jax.models import build_model
from querydet_jax.runtime.errors import ConfigError
from querydet_jax.weights.packaged import read_card

TEXTS = {name: f"the {name}" for name in ("title", "data", "licence", "attribution", "recipe", "limits")}
CONFIG = Config(
    classes=("ant", "bee", "cow"),
    model=ModelConfig(
        num_classes=3,
        backbone=BackboneConfig(name="resnet10", width=8),
        fpn=FPNConfig(channels=8),
        head=HeadConfig(channels=8, num_convs=1),
        query=QueryConfig(channels=8, num_convs=1),
    ),
)


def found(image: int, category: int, x: float, score: float) -> dict:
    return {"image_id": image, "category_id": category, "bbox": [x, 10.0, 8.0, 8.0], "score": score}


def test_how_lists_of_results_differ() -> None:
    one = [found(1, 1, 20, 0.9), found(1, 1, 60, 0.5), found(1, 2, 20, 0.4), found(2, 1, 20, 0.3), found(1, 1, 0, 0.05)]
    other = [found(1, 1, 20.25, 0.89), found(1, 1, 60, 0.53), found(1, 2, 90, 0.4), found(3, 1, 20, 0.3)]
    assert compare(one, other, least=0.1) == (
        "4 detections from 0.1 on: boxes differ by at most 0.25 px, scores by 0.0300; 2 are in one list alone"
    )
    assert "2 detections from 0.5 on: boxes differ by at most 0.00 px, scores by 0.0000; 0" in compare(one, one, 0.5)


def test_a_run_becomes_packaged_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, model = tmp_path / "run", build_model(CONFIG.model, seed=1)
    save_config(CONFIG, run / "config.json")
    entry = {"score": 0.25, "f1": 0.5, "precision": 0.5, "recall": 0.5}
    method = {
        "metrics": {"AP": 30.0, "AP50": 60.0, "AR300": 9.0},
        "per_class": {"ant": {"AP": 1.0, "AP50": 2.0, "APs": None, "AR": 3.0, "objects": 7}},
        "num_images": 5,
        "best_thresholds": dict.fromkeys(CONFIG.classes, entry),
    }
    machine = {"processor": "a processor", "cores": 2, "jax": "0.10", "python": "3.11"}
    (run / "report.json").write_text(json.dumps({"methods": {"csq": method}, "machine": machine}))
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))

    def open_model(config: Config, source: Path):
        return model if source == run else runs.open_model(config, source)

    evaluation = SimpleNamespace(scores=SimpleNamespace(results=[found(1, 1, 20, 0.9)]))
    monkeypatch.setattr(packaged_weights, "open_model", open_model)
    monkeypatch.setattr(packaged_weights, "open_split", lambda *_: [])
    monkeypatch.setattr(
        packaged_weights, "evaluate_detectors", lambda detectors, *_, **__: {next(iter(detectors)): evaluation}
    )
    monkeypatch.setattr(packaged_weights, "comparison_table", lambda runs: ", ".join(runs))
    arguments = PackArguments(str(run), str(tmp_path / "zoo" / "toy"), str(tmp_path / "texts.json"))
    pack(arguments)
    printed = capsys.readouterr().out
    assert "toy: 0." in printed and "weights.safetensors" in printed and "run, packaged" in printed
    assert "1 detections from 0.1 on: boxes differ by at most 0.00 px" in printed
    relative = float(printed.split("largest value: ")[1].split()[0])
    assert 0 < relative < 2**-10  # float16 has 11 bits
    card = read_card(tmp_path / "zoo" / "toy")
    assert {name: getattr(card, name) for name in TEXTS} == TEXTS
    assert card.metrics["csq"]["AP50"] == 60 and "AR300" not in card.metrics["csq"]
    assert card.classes["ant"]["objects"] == 7 and card.min_scores == dict.fromkeys(CONFIG.classes, 0.25)
    assert "5 validation pictures" in card.measured and "a processor, 2 cores, jax 0.10" in card.measured

    (tmp_path / "texts.json").write_text(json.dumps(TEXTS | {"extra": "x"}))
    with pytest.raises(ConfigError, match="texts.json: give these texts and no others: title, data, licence"):
        pack(arguments)
