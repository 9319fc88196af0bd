"""A run folder with a small untrained model on three generated scenes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import optax
import pytest
from flax import nnx
from small_detector import BASE, MODEL, randomize

from querydet_jax.config import Config, DataConfig, override, save_config
from querydet_jax.models import DenseDetector, build_model
from querydet_jax.training.checkpoint import Checkpoints
from querydet_jax.training.step import init_state

CONFIG = Config(
    name="small",
    model=override(MODEL, {"max_level": 5, "backbone.name": "resnet10", "loss.level_weights": (1.0, 1.4, 2.1, 2.5)}),
    data=DataConfig(
        source="scenes",
        scenes_train=1,
        scenes_val=3,
        scenes_size=(64, 96),
        test_short=64,
        test_max=96,
        test_canvases=((64, 96),),
    ),
    inference=override(BASE, {"threshold": 0.47}),
)


@pytest.fixture(scope="package")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a run folder as train.py leaves it: config.json and a checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    return leave_run(folder, CONFIG, randomize(build_model(CONFIG.model, seed=0), seed=16), folder / "data")


@pytest.fixture(scope="package")
def retinanet_folder(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a run of RetinaNet P3..P5 on the same data."""
    config = override(
        CONFIG,
        {
            "model.min_level": 3,
            "model.query.enabled": False,
            "model.loss.level_weighting": "uniform",
            "inference.query": "dense",
        },
    )
    return leave_run(
        tmp_path_factory.mktemp("retinanet"), config, build_model(config.model, seed=1), run_folder / "data"
    )


@pytest.fixture(scope="package")
def fcos_folder(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a run of QueryDet on FCOS on the same data."""
    config = override(CONFIG, {"model.detector": "fcos"})
    return leave_run(tmp_path_factory.mktemp("fcos"), config, build_model(config.model, seed=1), run_folder / "data")


def leave_run(folder: Path, config: Config, detector: DenseDetector, data: Path) -> Path:
    save_config(
        dataclasses.replace(config, data=dataclasses.replace(config.data, root=str(data))), folder / "config.json"
    )
    copy = nnx.clone(detector)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(copy, init_state(copy, optax.sgd(0.1)))
    return folder
