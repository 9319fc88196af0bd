"""FLOPs of inference as XLA counts them, without weights and without running anything.

Programs are counted as lowered, before a backend optimises them or calls libraries that report no FLOPs. XLA counts a
loop's body once, and of a conditional the dearest branch. So each sparse level of CSQ is counted by itself: in one
buffer as large as its sites need, in one turn, every layer on the whole buffer. Padding is included, so the count is an
upper bound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.query_layout import LAYOUT_LEVEL, at_level
from querydet_jax.config import InferenceConfig, override
from querydet_jax.inference.detector import Detector
from querydet_jax.inference.pipeline import cascade_levels, sparse_options, split_for_inference
from querydet_jax.models import DenseDetector
from querydet_jax.ops.anchors import level_shape
from querydet_jax.runtime.errors import QueryDetError
from querydet_jax.sparse import (
    CascadeLevel,
    Sites,
    SparseOptions,
    Stack,
    children,
    crop_stacks,
    grow,
    neighbour_table,
    run_stacks,
)
from querydet_jax.sparse.conv import masked_dense_stacks
from querydet_jax.sparse.level import dense_input, input_at_sites
from querydet_jax.sparse.methods import room_needed


def gflop(function: Callable[..., Any], *arguments: Any) -> float:
    """Return the GFLOP of a function of arrays, or of their shapes.

    It is lowered for a TPU, which this machine need not have: only for a CPU are some gradients, and the convolution on
    sites, written as loops over blocks.
    """
    return counted(jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)))


def counted(program: jax.stages.Lowered) -> float:
    """Return the GFLOP of a lowered program.

    Raises:
      QueryDetError: this backend does not count FLOPs.
    """
    cost = program.cost_analysis()
    if cost is None:
        raise QueryDetError(f"backend {jax.default_backend()} counts no FLOPs: set JAX_PLATFORMS=cpu")
    return cost.get("flops", 0.0) / 1e9  # absent where there are none


def inference_gflop(
    model: DenseDetector, inference: InferenceConfig, shape: tuple[int, int], queries: np.ndarray
) -> float:
    """Return the GFLOP from one image to detections.

    Args:
      model: may be abstract (``nnx.eval_shape``).
      shape: height and width of the image.
      queries: bool ``[h, w]`` on P4; every key is a query of the next level.
    """
    if inference.query == "dense":
        return _whole(model, inference, shape)
    # CCQ runs densely, without a loop, what the other methods run on sites.
    total = _whole(model, override(inference, {"query": "ccq"}), shape)
    if inference.query == "ccq":
        return total
    options = sparse_options(inference)._replace(kernel="gather")  # no count for tiles
    for level, stacks, keys in sparse_level_shapes(model, inference, shape, queries):
        if inference.query == "cq":
            features = jax.eval_shape(dense_input, level)
            total += _crops(features, stacks, keys) - gflop(_heads_everywhere, features, stacks)
        else:
            total += sum(sparse_level_gflop(level, stacks, keys, options)) - gflop(_level_everywhere, level, stacks)
    return total


def sparse_level_gflop(
    level: CascadeLevel, stacks: Sequence[Stack], keys: jax.Array, options: SparseOptions
) -> tuple[float, float]:
    """Return upper bounds of the GFLOP of CSQ on a level: of the heads on its active cells, and of their input.

    Args:
      level, stacks: arrays or their shapes.
      keys: bool ``[B, h, w]``.
    """

    def in_chunks(cells: jax.Array) -> int:
        return -(-int(cells) // options.chunk) * options.chunk

    buffer = in_chunks(jnp.sum(grow(keys, options.context)[-1].astype(jnp.int32)))
    room = in_chunks(room_needed(keys, level.margin, options))

    def heads(stacks: list[Stack], rows: jax.Array, sites: Sites) -> Any:
        return run_stacks(rows, neighbour_table(sites), sites, stacks, chunk=buffer)

    def level_input(level: CascadeLevel, sites: Sites) -> Any:
        return input_at_sites(level, sites, options.context, room)

    if not buffer:
        return 0.0, 0.0
    rows = jax.ShapeDtypeStruct((buffer, stacks[0][0].kernel.shape[2]), level.features.dtype)
    return (
        gflop(heads, list(stacks), rows, _sites(buffer, options.context, keys.shape)),
        gflop(level_input, level, _sites(room, options.context + level.margin, keys.shape)),
    )


def _whole(model: DenseDetector, inference: InferenceConfig, shape: tuple[int, int]) -> float:
    return counted(Detector(model, inference).lower((1, *shape)))


def sparse_level_shapes(
    model: DenseDetector, inference: InferenceConfig, shape: tuple[int, int], queries: np.ndarray
) -> list[tuple[CascadeLevel, list[Stack], jax.Array]]:
    """Return, coarse to fine, each sparse level as shapes: what it is made from, its stacks, its keys."""
    graph, state = split_for_inference(model)
    image = jax.ShapeDtypeStruct((1, *shape, 3), jnp.uint8)
    size = jax.ShapeDtypeStruct((1, 2), jnp.int32)

    def levels(state: Any, images: jax.Array, sizes: jax.Array) -> dict[int, CascadeLevel]:
        return cascade_levels(nnx.merge(graph, state), inference, images, sizes)

    def stacks(state: Any) -> list[Stack]:
        merged = nnx.merge(graph, state)
        return [*merged.head_stacks(), merged.query_head.stack()]

    every = jax.eval_shape(stacks, state)
    start = inference.start_level
    keys = jnp.asarray(at_level(queries, LAYOUT_LEVEL, start, level_shape(*shape, start)))[None]
    found = []
    for number, level in sorted(jax.eval_shape(levels, state, image, size).items(), reverse=True):
        keys = children(keys, level.features.shape[1:3])
        # No level is below the finest one, so it needs no queries.
        found.append((level._replace(level=number), every[:-1] if number == model.config.min_level else every, keys))
    return found


def _heads_everywhere(features: jax.Array, stacks: list[Stack]) -> Any:
    return masked_dense_stacks(features, jnp.ones(features.shape[:3], bool), stacks)


def _level_everywhere(level: CascadeLevel, stacks: list[Stack]) -> Any:
    return _heads_everywhere(dense_input(level), stacks)


def _crops(features: Any, stacks: list[Stack], keys: jax.Array) -> float:
    """Return the GFLOP of the heads on a crop around every key."""
    count = int(jnp.sum(keys.astype(jnp.int32)))
    if not count:
        return 0.0

    def crops(features: jax.Array, stacks: list[Stack], sites: Sites) -> Any:
        return crop_stacks(features, sites, stacks, chunk=count)

    return gflop(crops, features, stacks, _sites(count, 0, keys.shape))


def _sites(capacity: int, context: int, shape: tuple[int, ...]) -> Sites:
    """Return the sites of a map ``(B, h, w)`` as shapes."""
    array: Any = jax.ShapeDtypeStruct
    batch, height, width = shape
    counts = array((context + 1,), jnp.int32)
    return Sites(array((capacity,), jnp.int32), counts, (batch, height, width))
