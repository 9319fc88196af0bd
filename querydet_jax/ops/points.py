"""Points of pyramid levels, and boxes relative to them (FCOS, Tian et al. 2019).

Level P_l has stride 2^l; its points are the middles of its cells. Query targets use the same points.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def points_at(y: Array, x: Array, stride: int) -> Array:
    """Return the middles ``[..., 2]``, (x, y) in px, of the cells at rows ``y`` and columns ``x`` ``[...]``."""
    return (jnp.stack([x, y], axis=-1).astype(jnp.float32) + 0.5) * stride


def grid_points(height: int, width: int, stride: int) -> Array:
    """Return all points ``[height, width, 2]``, (x, y) in px, of a level of ``height`` x ``width`` cells."""
    y, x = jnp.meshgrid(jnp.arange(height, dtype=jnp.int32), jnp.arange(width, dtype=jnp.int32), indexing="ij")
    return points_at(y, x, stride)


def distances(points: Array, boxes: Array) -> Array:
    """Return the distances (left, top, right, bottom) ``[..., 4]`` in px from points to the sides of boxes.

    ``points [..., 2]`` and xyxy ``boxes [..., 4]`` broadcast. All four are positive if the point lies inside.
    """
    return jnp.concatenate([points - boxes[..., :2], boxes[..., 2:] - points], axis=-1)


def boxes_around(points: Array, sides: Array) -> Array:
    """Return the xyxy boxes ``[..., 4]`` of ``points [..., 2]`` and ``sides [..., 4]`` (inverse of ``distances``)."""
    return jnp.concatenate([points - sides[..., :2], points + sides[..., 2:]], axis=-1)


def centerness(sides: Array) -> Array:
    """Return sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)) ``[...]`` of ``sides [..., 4]`` (FCOS eq. 3).

    It is 1 in the middle of a box, and 0 on its sides and outside.
    """
    sides = jnp.maximum(sides, 0.0)
    low, high = jnp.minimum(sides[..., :2], sides[..., 2:]), jnp.maximum(sides[..., :2], sides[..., 2:])
    return jnp.sqrt(jnp.prod(low / jnp.where(high > 0, high, 1.0), axis=-1))
