"""Programs to be compiled for a chip that is not there: inference dense and with CSQ, and the training step.

Models are abstract, shapes without values. XLA counts of a conditional the dearest branch (on TPU: adds up all) and a
loop's body once, so CSQ's ladder and its turns would be miscounted: here each sparse level has one buffer, as large as
its sites need, and is computed in one turn, padding included. Results are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.accelerators.chips import Devices, Program
from benchmarks.flops import sparse_level_shapes
from querydet_jax.config import DataConfig, InferenceConfig, TrainConfig
from querydet_jax.inference.detector import Detector, sparse_options
from querydet_jax.models import DenseDetector
from querydet_jax.sparse import (
    CascadeLevel,
    Method,
    SparseOptions,
    Stack,
    grow,
    run_stacks,
    run_stacks_on_tiles,
    select_sites,
    select_tiles,
    tile_sites,
)
from querydet_jax.sparse.level import input_at_sites
from querydet_jax.sparse.methods import Computed, Finish, room_needed
from querydet_jax.training.parallel import AXIS, ShardMap
from querydet_jax.training.schedule import make_optimizer
from querydet_jax.training.step import init_state, make_step


def inference_program(
    model: DenseDetector, inference: InferenceConfig, shape: tuple[int, int, int], rooms: Mapping[int, int]
) -> Program:
    """Images ``[B, H, W, 3]`` of ``shape`` (B, H, W) to detections.

    Args:
      rooms: of CSQ, cells by level, see ``rooms_needed``; ``{}`` for dense inference.
    """
    function, state = Detector(model, inference, one_turn(rooms) if rooms else None).function()
    array = jax.ShapeDtypeStruct
    return Program(function, state, (array((*shape, 3), jnp.uint8), array((shape[0], 2), jnp.int32)))


def rooms_needed(
    model: DenseDetector, inference: InferenceConfig, shape: tuple[int, int, int], queries: np.ndarray
) -> dict[int, int]:
    """Cells of the buffer of each sparse level, whole turns, where each image has P4's ``queries`` bool ``[h, w]``."""
    batch, *size = shape
    options = sparse_options(inference)
    rooms = {}
    for level, _, keys in sparse_level_shapes(model, inference, (size[0], size[1]), queries):
        cells = batch * int(room_needed(keys, level.margin, options))
        unit = inference.tile**2 if inference.kernel == "tiles" else 1
        turn = max(1, inference.chunk // unit) * unit
        rooms[level.level] = max(1, -(-cells // turn)) * turn
    return rooms


def one_turn(rooms: Mapping[int, int]) -> Method:
    """CSQ in a buffer of ``rooms[level]`` cells, all in one turn. What has no room there is lost."""

    def compute(
        level: CascadeLevel, keys: jax.Array, stacks: Sequence[Stack], finish: Finish, options: SparseOptions
    ) -> Computed:
        room = rooms[level.level]
        rings = grow(keys, options.context + level.margin)
        active = rings[options.context]
        if options.kernel == "tiles":
            number = room // options.tile**2
            tiles = select_tiles(active, number, options.tile)
            outputs, sites = run_stacks_on_tiles(level, active, tiles, stacks, chunk=number), tile_sites(tiles, keys)
        else:
            rows, sites, table = input_at_sites(level, select_sites(rings, room), options.context, room)
            outputs = run_stacks(rows, table, sites, stacks, chunk=room)
        count = jnp.sum(active.astype(jnp.int32))
        return Computed(finish(outputs, sites), active, count, jnp.int32(room), jnp.asarray(False))

    return compute


def train_program(
    build: Callable[[], DenseDetector], chips: Devices, shape: tuple[int, int, int], *, remat: bool
) -> Program:
    """The training step on all ``chips`` together, with what passes between them.

    Args:
      build: makes the model.
      shape: (B, H, W), images of one chip.
    """
    optimizer, boxes = make_optimizer(TrainConfig()), DataConfig().max_boxes
    state = jax.eval_shape(lambda: init_state(build(), optimizer))
    step = make_step(nnx.eval_shape(build), optimizer, AXIS, remat=remat)
    images, height, width = shape
    total = images * len(chips)
    array = jax.ShapeDtypeStruct
    batch = {
        "images": array((total, height, width, 3), jnp.uint8),
        "sizes": array((total, 2), jnp.int32),
        "boxes": array((total, boxes, 4), jnp.float32),
        "classes": array((total, boxes), jnp.int32),
    }
    return Program(ShardMap(chips).compiled(step), state, (batch,), donates=True)
