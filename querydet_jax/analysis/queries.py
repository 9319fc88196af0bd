"""Count the query targets of a data set, and the cells that the cascade would compute with perfect queries.

Letters: I images, B images of a group, h w map, n boxes, S size bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from querydet_jax.analysis.views import Group, Truth, View, groups
from querydet_jax.config import Config, ModelConfig
from querydet_jax.evaluation.metrics import SizeBin
from querydet_jax.evaluation.query import query_recall
from querydet_jax.inference.pipeline import sparse_options
from querydet_jax.models.loss_terms import query_scale_range
from querydet_jax.ops.anchors import level_shape
from querydet_jax.runtime.progress import progress
from querydet_jax.sparse import SparseOptions, children, grow
from querydet_jax.sparse.methods import room_needed

CONTEXTS = tuple(range(6))


def sparse_levels(config: Config) -> tuple[int, ...]:
    """Return the levels that the cascade computes sparsely, coarse to fine; none without a query head."""
    start, model = config.inference.start_level, config.model
    if not model.query.enabled or not model.min_level < start <= model.max_level:
        return ()
    return tuple(range(start - 1, model.min_level - 1, -1))


def query_maps(
    boxes: np.ndarray,
    owner: np.ndarray,
    shape: tuple[int, int, int],
    stride: int,
    *,
    scale_range: tuple[float, float],
    radius: Literal["object", "level"] = "object",
    factor: float = 1.0,
) -> np.ndarray:
    """Compute ``ops.matching.query_targets`` of many images at once, evaluating only cells near small objects.

    An object beyond the largest radius from a cell neither makes the cell a query nor prevents it from being one, so
    only cells within the largest radius of an object are evaluated.

    Args:
      boxes: float32 [n,4] px.
      owner: int [n], each box's image, 0..B-1.
      shape: (B, h, w).
      stride: px per cell.
      scale_range, radius, factor: see ``query_targets``.

    Returns:
      bool [B,h,w].
    """
    _, height, width = shape
    found = np.zeros(shape, bool)
    sizes = boxes[:, 2:] - boxes[:, :2]
    scales = np.sqrt(sizes[:, 0] * sizes[:, 1])
    small = (scales >= scale_range[0]) & (scales < scale_range[1])
    centers, scales, owner = (0.5 * (boxes[:, :2] + boxes[:, 2:]))[small], scales[small], owner[small]
    if not len(scales):
        return found
    radii = scales if radius == "object" else np.full_like(scales, scale_range[1])
    reach = radii * np.float32(factor)
    around = int(reach.max() / stride) + 1
    cells = np.floor(centers / stride).astype(np.int64)[..., None] + np.arange(-around, around + 1)  # [n, 2, steps]
    x, y = cells[:, 0], cells[:, 1]
    # Use the same float32 operations as query_targets, so that distances near a radius compare equally.
    offsets = ((cells + 0.5) * stride).astype(np.float32) - centers[..., None]
    squares = offsets * offsets
    distance = np.sqrt(squares[:, 0, None, :] + squares[:, 1, :, None])
    inside = ((x >= 0) & (x < width))[:, None, :] & ((y >= 0) & (y < height))[:, :, None]
    cell = ((owner[:, None, None] * height + y[:, :, None]) * width + x[:, None, :])[inside]
    distance, reached = distance[inside], np.broadcast_to(reach[:, None, None], inside.shape)[inside]
    order = np.lexsort((distance, cell))  # stable: the first of equally near objects stays first
    nearest = order[np.flatnonzero(np.diff(cell[order], prepend=-1))]
    found.reshape(-1)[cell[nearest]] = distance[nearest] < reached[nearest]
    return found


def query_shares(truth: Truth, view: View, model: ModelConfig, levels: Sequence[int]) -> dict[int, np.ndarray]:
    """Return {level: share of its cells that are query targets, float [I]}."""
    shares = {level: np.zeros(len(truth.sizes)) for level in levels}
    everything = list(groups(truth, view, np.arange(len(truth.sizes)), 2 ** min(levels)))
    for group in progress(everything, "query targets", "group"):
        for level in levels:
            shares[level][group.images] = _targets(group, model, level).mean(axis=(1, 2))
    return shares


@dataclass(frozen=True)
class Demand:
    """The cascade's cost on one sparse level if queries were exactly the query targets.

    Attributes:
      active: float [I,6], share of the level's cells that are active at contexts 0..5.
      room: float [I], buffer size needed at the configured context, as a share of the level's cells.
      hits: int64 [S], number of objects whose centre is in a key cell.
      totals: int64 [S], number of objects.
    """

    active: np.ndarray
    room: np.ndarray
    hits: np.ndarray
    totals: np.ndarray


def demand(truth: Truth, view: View, images: np.ndarray, config: Config, bins: Sequence[SizeBin]) -> dict[int, Demand]:
    """Return {sparse level: its cost for ``images`` (positions [I])}, computed with inference's own functions.

    As in the cascade, a level's queries are limited to its keys.
    """
    levels, inference = sparse_levels(config), config.inference
    margins = tuple(_margin(config.model, level) for level in levels)
    options = sparse_options(inference)
    place = np.zeros(len(truth.sizes), np.int64)
    place[images] = np.arange(len(images))
    shape, counts = (len(images), len(CONTEXTS)), np.zeros(len(bins), np.int64)
    found = {level: Demand(np.zeros(shape), np.zeros(len(images)), counts.copy(), counts.copy()) for level in levels}
    everything = list(groups(truth, view, images, 2 ** levels[-1]))
    for group in progress(everything, "cascade", "group"):
        missing = ((0, group.room - len(group.images)), (0, 0), (0, 0))  # compile once per size
        fired = tuple(np.pad(_targets(group, config.model, level + 1), missing) for level in levels)
        shapes = tuple(level_shape(*group.input, level) for level in levels)
        for level, asked in zip(levels, jax.device_get(_cascade(fired, shapes, margins, options)), strict=True):
            keys, active, room = (x[: len(group.images)] for x in asked)
            cells = keys[0].size
            at = place[group.images]
            found[level].active[at], found[level].room[at] = active / cells, room / cells
            edges = np.searchsorted(group.owner, np.arange(len(group.images) + 1))
            for b in range(len(group.images)):
                hits, totals = query_recall(group.boxes[edges[b] : edges[b + 1]], keys[b], 2**level, bins)
                found[level].hits[:] += hits
                found[level].totals[:] += totals
    return found


@partial(jax.jit, static_argnums=(1, 2, 3))
def _cascade(
    fired: tuple[Array, ...], shapes: tuple[tuple[int, int], ...], margins: tuple[int, ...], options: SparseOptions
) -> list[tuple[Array, Array, Array]]:
    """Return, per sparse level, keys bool [B,h,w], active cells [B,6] by context, and the buffer size needed [B]."""
    out, keys = [], None
    for targets, shape, margin in zip(fired, shapes, margins, strict=True):
        keys = children(targets if keys is None else targets & keys, shape)
        rings = grow(keys, CONTEXTS[-1])
        active = jnp.stack([jnp.sum(ring, axis=(1, 2), dtype=jnp.int32) for ring in rings], axis=1)
        room = jax.vmap(lambda one, margin=margin: room_needed(one[None], margin, options))(keys)
        out.append((keys, active, room))
    return out


def _targets(group: Group, model: ModelConfig, level: int) -> np.ndarray:
    """Return the query targets bool [B,h,w] of a group on a level."""
    return query_maps(
        group.boxes,
        group.owner,
        (len(group.images), *level_shape(*group.input, level)),
        2**level,
        scale_range=query_scale_range(model, level),
        radius=model.loss.query_radius,
        factor=model.loss.query_radius_factor,
    )


def _margin(model: ModelConfig, level: int) -> int:
    """Return ``CascadeLevel.margin``: the finest level computes its part of the top-down path at its sites."""
    return int(level == model.min_level < 5)


def suggested_capacities(demands: dict[int, Demand], shares: Sequence[float] = (0.5, 0.99)) -> tuple[float, ...]:
    """Return the smallest ``inference.capacities`` whose k-th buffer holds ``shares[k]`` of the images.

    A buffer must hold an image on every sparse level. Values are rounded up to a thousandth, ascending and distinct.
    """
    needed = np.max([of_level.room for of_level in demands.values()], axis=0)
    least = [float(np.quantile(needed, share, method="inverted_cdf")) for share in shares]
    return tuple(sorted({min(max(np.ceil(1000 * x - 1e-9) / 1000, 0.001), 1.0) for x in least}))


def held(demands: dict[int, Demand], capacity: float) -> float:
    """Return the share of the images that a buffer of ``capacity`` holds on every sparse level."""
    return float(np.mean(np.max([of_level.room for of_level in demands.values()], axis=0) <= capacity))
