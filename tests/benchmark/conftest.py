"""A run folder with a small untrained model on three generated scenes; fast compilation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import optax
import pytest
from flax import nnx
from small_detector import BASE, MODEL, model

from querydet_jax.config import Config, DataConfig, save_config
from querydet_jax.training.checkpoint import Checkpoints
from querydet_jax.training.step import init_state

CONFIG = Config(
    name="small",
    model=MODEL,
    data=DataConfig(
        source="scenes",
        scenes_train=1,
        scenes_val=3,
        scenes_size=(64, 96),
        test_short=64,
        test_max=96,
        test_canvases=((64, 96),),
    ),
    inference=BASE,
)


@pytest.fixture(scope="package", autouse=True)
def _compile_in_a_hurry() -> Iterator[None]:
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="package")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As train.py leaves it: config.json and a checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, root=str(folder / "data")))
    save_config(config, folder / "config.json")
    copy = nnx.clone(model(max_level=MODEL.max_level))
    checkpoints = Checkpoints(folder)
    checkpoints.save(copy, init_state(copy, optax.sgd(0.1)))
    checkpoints.close()
    return folder
