"""A training step taken apart: forward, backward, optimiser, and the overhead of the loop around it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks import charts
from benchmarks.flops import gflop
from benchmarks.options import Options
from benchmarks.report import Column, Report, Row, decimals, ms, share
from benchmarks.timing import interleaved
from querydet_jax.config import Config, DataConfig, load_config, override
from querydet_jax.config.loading import config_path
from querydet_jax.data import open_dataset, train_batches
from querydet_jax.models import build_model
from querydet_jax.training.compiled import Memory
from querydet_jax.training.schedule import make_optimizer
from querydet_jax.training.step import TrainState, init_state, make_loss, make_step

_PICTURES = 4


@dataclass(frozen=True)
class TrainStep(Options):
    """A training step: images/s; forward, backward and optimiser; share of the peak; overhead of the loop."""

    configs: tuple[str, ...] = ("configs/coco_querydet_r50.py", "configs/coco_retinanet_r50.py")
    """Configuration files or run folders. Their data are replaced by generated scenes."""
    height: int = 800
    """Height of the images in px, a multiple of 32."""
    width: int = 1344
    """Width of the images in px, a multiple of 32."""
    batch: int = 1
    """Images per step, on one device."""
    dtype: str = ""
    """float32 or bfloat16 (default: as configured)."""
    rounds: int = 5
    """Timed rounds."""
    matrix: int = 4096
    """Side of the square matrices whose product is taken as the machine's peak."""


def train_step(arguments: TrainStep) -> None:
    rows = [_measure(arguments, source) for source in arguments.configs]
    peaks = ", ".join(f"{row['peak_gflops']:,.0f} GFLOP/s" for row in rows)
    Report(
        "train_step",
        f"Training step: generated scenes of {arguments.height}x{arguments.width}, {arguments.batch} per step, one "
        f"device, medians of {arguments.rounds} interleaved rounds",
        [
            Column("config", "config"),
            Column("images_per_s", "images/s", decimals(2)),
            *(Column(f"ms_{part}", f"{part} ms", ms) for part in ("forward", "backward", "optimiser")),
            Column("gflop", "GFLOP", decimals(0)),
            *(Column(f"of_peak_{part}", header, share) for part, header in _SHARES.items()),
            Column("outside", "outside the step", share),
            Column("gib", "GiB", decimals(2)),
        ],
        rows,
        notes=[
            "backward: loss and gradients, minus the loss alone; optimiser: the whole step, minus loss and gradients",
            f"of peak: share of the rate of a {arguments.matrix}^3 matrix product of the same type, in the same rounds "
            f"({peaks})",
            "GFLOP: XLA's count of loss and gradients before a backend optimises them",
            "outside the step: what the next batch, its transfer and reading the metrics add to the bare step, one "
            "after another; train.py does them while the devices compute",
            "GiB: temporaries, state and batch, as reported by the compiler",
        ],
        draw=lambda figure: charts.bars(
            figure,
            [row["config"] for row in rows],
            {part: [row[f"ms_{part}"] for row in rows] for part in ("forward", "backward", "optimiser")},
            x="ms per step (median)",
            title="Training step",
        ),
    ).publish(arguments.out, arguments)


_SHARES = {"forward": "forward of peak", "backward": "backward of peak", "step": "step of peak"}


def _measure(arguments: TrainStep, source: str) -> Row:
    config = _with_scenes(load_config(config_path(source)), arguments)
    model = build_model(config.model, config.train.seed)
    optimizer = make_optimizer(config.train)
    batches = train_batches(
        open_dataset(config.data, "train"), config.data, batch_size=arguments.batch, seed=config.train.seed
    )
    first = next(batches)
    first.pop("image_ids")
    fixed = jax.device_put(first)
    # Loss and gradients get copies: the step, which runs in turn with them, donates its state.
    state = init_state(model, optimizer)
    frozen = jax.tree.map(jnp.copy, state)
    loss_of = make_loss(model, None, remat=config.train.remat)

    def loss(state: TrainState, batch: dict[str, Array]) -> Any:
        return loss_of(state.params, state.rest, state.normalizer, _keyed(batch), None)

    def gradients(state: TrainState, batch: dict[str, Array]) -> Any:
        both = jax.value_and_grad(loss_of, has_aux=True)
        return both(state.params, state.rest, state.normalizer, _keyed(batch), None)

    step = make_step(model, optimizer, None, remat=config.train.remat)
    compiled = {name: jax.jit(f).lower(frozen, fixed).compile() for name, f in (("f", loss), ("fb", gradients))}
    whole = jax.jit(step, donate_argnums=0).lower(state, fixed).compile()
    current = [state]

    def bare() -> Any:
        current[0], metrics = whole(current[0], fixed)
        return metrics

    def in_loop() -> Any:
        batch = next(batches)
        batch.pop("image_ids")
        current[0], metrics = whole(current[0], jax.device_put(batch))
        return {name: float(value) for name, value in jax.device_get(metrics).items()}

    product, peak_gflop = matrix_product(arguments.matrix, config.model.dtype)
    functions: dict[str, Callable[[], Any]] = {
        "forward": lambda: compiled["f"](frozen, fixed),
        "forward and backward": lambda: compiled["fb"](frozen, fixed),
        "step": bare,
        "loop": in_loop,
        "peak": product,
    }
    times = {name: float(np.median(values)) for name, values in interleaved(functions, arguments.rounds).items()}
    batches.close()
    memory = Memory.of(whole)
    forward, both = (gflop(f, frozen, fixed) for f in (loss, gradients))
    peak = peak_gflop / times["peak"]  # GFLOP/ms
    backward = times["forward and backward"] - times["forward"]
    return {
        "config": config.name,
        "images_per_s": 1e3 * arguments.batch / times["step"],
        "ms_forward": times["forward"],
        "ms_backward": backward,
        "ms_optimiser": max(times["step"] - times["forward and backward"], 0.0),
        "ms_step": times["step"],
        "gflop": both,
        "gflop_forward": forward,
        "of_peak_forward": forward / times["forward"] / peak,
        "of_peak_backward": (both - forward) / backward / peak,
        "of_peak_step": both / times["step"] / peak,
        "peak_gflops": 1e3 * peak,
        "outside": times["loop"] / times["step"] - 1.0,
        "gib": None if memory is None else memory.total / 2**30,
    }


def matrix_product(side: int, dtype: str) -> tuple[Callable[[], Array], float]:
    """Return a product of two square matrices, and its GFLOP: its rate is taken as the machine's peak."""
    a, b = jax.random.normal(jax.random.key(0), (2, side, side), dtype)
    product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32))
    return lambda: product(a, b), 2 * side**3 / 1e9


def _keyed(batch: dict[str, Array]) -> dict[str, Array]:
    """Add the random keys that ``make_step`` adds."""
    return {**batch, "keys": jax.random.split(jax.random.key(0), len(batch["images"]))}


def _with_scenes(config: Config, arguments: TrainStep) -> Config:
    size = (arguments.height, arguments.width)
    scenes = DataConfig(
        source="scenes",
        scenes_train=_PICTURES,
        scenes_val=1,
        scenes_size=size,
        train_short=(min(size),),
        train_max=max(size),
        train_canvases=(size,),
        test_short=min(size),
        test_max=max(size),
        test_canvases=(size,),
    )
    changes = {"model.dtype": arguments.dtype} if arguments.dtype else {}
    return override(dataclasses.replace(config, data=scenes), {"train.batch_size": arguments.batch, **changes})
