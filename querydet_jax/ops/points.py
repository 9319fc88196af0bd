"""Points of pyramid levels, and boxes seen from them (FCOS, Tian et al. 2019).

Level P_l has stride 2^l; its points are the middles of its cells. Query targets are measured from the same points.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def points_at(y: Array, x: Array, stride: int) -> Array:
    """Middles ``[..., 2]``, (x, y) in px, of the cells at rows ``y`` and columns ``x`` ``[...]``."""
    return (jnp.stack([x, y], axis=-1).astype(jnp.float32) + 0.5) * stride


def grid_points(height: int, width: int, stride: int) -> Array:
    """All points of a level of ``height`` x ``width`` cells: ``[height, width, 2]`` as (x, y) in px."""
    y, x = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
    return points_at(y, x, stride)


def distances(points: Array, boxes: Array) -> Array:
    """Distances (left, top, right, bottom) ``[..., 4]`` in px from ``points [..., 2]`` to the sides of xyxy ``boxes
    [..., 4]`` that broadcast; all are positive where the point lies inside."""
    return jnp.concatenate([points - boxes[..., :2], boxes[..., 2:] - points], axis=-1)


def boxes_around(points: Array, sides: Array) -> Array:
    """The inverse: xyxy boxes ``[..., 4]`` from ``points [..., 2]`` and ``sides [..., 4]`` in px."""
    return jnp.concatenate([points - sides[..., :2], points + sides[..., 2:]], axis=-1)


def centerness(sides: Array) -> Array:
    """sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)) (FCOS eq. 3), ``[..., 4]`` to ``[...]``: 1 in a box's
    middle, 0 on its sides and outside."""
    sides = jnp.maximum(sides, 0.0)
    low, high = jnp.minimum(sides[..., :2], sides[..., 2:]), jnp.maximum(sides[..., :2], sides[..., 2:])
    return jnp.sqrt(jnp.prod(low / jnp.where(high > 0, high, 1.0), axis=-1))
