"""Programs to compile for a chip that is absent: inference, dense and with CSQ, and the training step.

Models are abstract: shapes without values. XLA counts of a conditional the dearest branch (on a TPU, all branches),
so the capacity ladder would be miscounted. Here each sparse level has one buffer, as large as its sites need, and no
dense rung. Accelerators compute a buffer in one turn, padding included. The results are those of CSQ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.accelerators.chips import Devices, Program
from benchmarks.flops import sparse_level_shapes
from querydet_jax.config import DataConfig, InferenceConfig, TrainConfig
from querydet_jax.inference.compiling import cast_kernels
from querydet_jax.inference.detector import Detector
from querydet_jax.inference.pipeline import sparse_options
from querydet_jax.models import DenseDetector
from querydet_jax.sparse import CascadeLevel, SparseOptions, Stack
from querydet_jax.sparse.methods import METHODS, Computed, cascade_sparse_query, room_needed
from querydet_jax.sparse.tiles import grid_shape
from querydet_jax.training.parallel import AXIS, ShardMap
from querydet_jax.training.schedule import make_optimizer
from querydet_jax.training.step import init_state, make_step


def inference_program(
    model: DenseDetector, inference: InferenceConfig, shape: tuple[int, int, int], rooms: Mapping[int, int]
) -> Program:
    """Return the program from images ``[B, H, W, 3]`` of ``shape`` (B, H, W) to detections.

    Args:
      rooms: buffer sizes of CSQ in cells, by level (see ``rooms_needed``); ``{}`` for dense inference.
    """
    detect, state = Detector(model, inference).function()

    def detect_with_one_buffer_per_level(*arguments: Any) -> Any:
        # Active while the program is traced: the configuration has one ladder for all levels.
        with mock.patch.dict(METHODS, csq=partial(_csq_in_one_buffer, rooms)):
            return detect(*arguments)

    array = jax.ShapeDtypeStruct
    images = (array((*shape, 3), jnp.uint8), array((shape[0], 2), jnp.int32))
    return Program(detect_with_one_buffer_per_level if rooms else detect, state, images)


def shipped_program(model: DenseDetector, inference: InferenceConfig, shape: tuple[int, int, int]) -> Program:
    """Return the program from images of ``shape`` (B, H, W) to detections as ``Detector`` runs it, ladder included."""
    function, state = Detector(model, inference).function()
    array = jax.ShapeDtypeStruct
    images = (array((*shape, 3), jnp.uint8), array((shape[0], 2), jnp.int32))
    return Program(function, cast_kernels(state, model.dtype), images)


def rooms_needed(
    model: DenseDetector, inference: InferenceConfig, shape: tuple[int, int, int], queries: np.ndarray
) -> dict[int, int]:
    """Return the buffer size of each sparse level, in cells and whole chunks, by level.

    Args:
      queries: bool ``[h, w]`` on P4, the same for each image.
    """
    batch, *size = shape
    options = sparse_options(inference)
    rooms = {}
    for level, _, keys in sparse_level_shapes(model, inference, (size[0], size[1]), queries):
        cells = batch * int(room_needed(keys, level.margin, options))
        unit = inference.tile**2 if inference.kernel != "gather" else 1
        turn = max(1, inference.chunk // unit) * unit
        rooms[level.level] = max(1, -(-cells // turn)) * turn
    return rooms


def _csq_in_one_buffer(
    rooms: Mapping[int, int],
    level: CascadeLevel,
    keys: jax.Array,
    stacks: Sequence[Stack],
    select: Any,
    options: SparseOptions,
) -> Computed:
    """Run CSQ with one buffer of ``rooms[level]`` cells and no dense rung. Cells that do not fit are lost."""
    cells = keys.size
    if options.kernel != "gather":
        batch, height, width = keys.shape
        cells = options.tile**2 * math.prod(grid_shape((batch, height, width), options.tile))
    fraction = min(1.0, (rooms[level.level] - 0.5) / cells)  # half a cell less: sizes are rounded up
    return cascade_sparse_query(level, keys, stacks, select, options._replace(capacities=(fraction,), overflow="cap"))


def train_program(
    build: Callable[[], DenseDetector], chips: Devices, shape: tuple[int, int, int], *, remat: bool
) -> Program:
    """Return the training step on all ``chips`` together, collectives included.

    Args:
      build: makes the model.
      shape: (B, H, W) of one chip's images.
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
    return Program(ShardMap(chips).replicate_step(step), state, (batch,), donates=True)
