"""Queries of a chosen density, for timing with random weights.

The time of CSQ depends on where queries fire, not on the weights. Random weights fire anywhere. Here the start level's
queries are laid out in clusters, like small objects, and every key fires again on the next level, so the number of
objects alone sets the load of all levels.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array

from querydet_jax.models import DenseDetector
from querydet_jax.models.heads import QueryHead
from querydet_jax.models.layers import Frozen
from querydet_jax.models.rpn import RPNQueryHead
from querydet_jax.sparse import Conv, Stack, children, grow

LAYOUT_LEVEL = 4  # queries are laid out on P4, where the paper's cascade starts
_FIRES, _SILENT = 20.0, -20.0  # logits


class ScriptedQueries(QueryHead):
    """A query head that does all the work of the one it wraps, and returns given queries."""

    def __init__(self, head: QueryHead | RPNQueryHead, fires: np.ndarray):  # wraps a head and builds none
        self.head = head
        self.logits = Frozen(jnp.where(jnp.asarray(fires), _FIRES, _SILENT)[None])

    def __call__(self, x: Array) -> Array:
        # Not `0 * x`, which lets the compiler drop the head's work. It cannot know that no output is this large.
        return self.logits[...] + jnp.maximum(self.head(x) - 1e30, 0.0)

    def stack(self) -> Stack:
        *tower, pred = self.head.stack()
        return [*tower, Conv(pred.kernel * 0.0, jnp.full_like(pred.bias, _FIRES))]


def script_queries(model: DenseDetector, fires: np.ndarray) -> None:
    """Make the model's query head fire at ``fires`` bool ``[h, w]`` on the start level, and at every key below."""
    head = model.query_head
    assert head is not None, "only a model with a query head can be scripted"
    model.query_head = ScriptedQueries(head.head if isinstance(head, ScriptedQueries) else head, fires)


def clustered(shape: tuple[int, int], objects: int, seed: int = 0) -> np.ndarray:
    """Return the query cells, bool ``[h, w]``, of small objects in clusters on a level of stride 16.

    Objects of 8 to 48 px come in groups of one to eight within about 100 px. A cell fires if its centre is nearer to an
    object's centre than the object's size, as in the query targets (QueryDet eq. 2).
    """
    rng = np.random.default_rng(seed)
    height, width = shape
    y, x = (np.mgrid[:height, :width] + 0.5) * 16
    fires = np.zeros(shape, bool)
    placed = 0
    while placed < objects:
        middle = rng.uniform((0, 0), (height * 16, width * 16))
        for _ in range(min(int(rng.integers(1, 9)), objects - placed)):
            cy, cx = middle + rng.normal(0, 50, 2)
            size = np.exp(rng.uniform(np.log(8), np.log(48)))
            fires |= np.hypot(y - cy, x - cx) < size
            placed += 1
    return fires


def at_level(fires: np.ndarray, level: int, other: int, shape: tuple[int, int]) -> np.ndarray:
    """Carry queries to another level: all children on a finer one, the parents on a coarser one.

    Args:
      fires: bool ``[h, w]`` on ``level``.
      shape: (h, w) of level ``other``.
    """
    for _ in range(level, other):
        padded = np.pad(fires, ((0, fires.shape[0] % 2), (0, fires.shape[1] % 2)))
        fires = padded[::2, ::2] | padded[1::2, ::2] | padded[::2, 1::2] | padded[1::2, 1::2]
    for _ in range(other, level):
        fires = fires.repeat(2, 0).repeat(2, 1)
    return fires[: shape[0], : shape[1]]


def active_shares(fires: np.ndarray, shapes: list[tuple[int, int]], context: int) -> list[float]:
    """Return the share of active cells on each finer level if every key fires again."""
    shares, mask = [], jnp.asarray(fires)[None]
    for shape in shapes:
        mask = children(mask, shape)
        shares.append(float(jnp.mean(grow(mask, context)[-1].astype(jnp.float32))))
    return shares


def density(
    shape: tuple[int, int], shapes: list[tuple[int, int]], context: int, target: float, seed: int = 0
) -> np.ndarray:
    """Return queries bool ``[h, w]`` that make about the share ``target`` of the finest of ``shapes`` active."""
    low, high = 1, 4096
    while low < high:
        middle = (low + high) // 2
        if active_shares(clustered(shape, middle, seed), shapes, context)[-1] < target:
            low = middle + 1
        else:
            high = middle
    return clustered(shape, low, seed)
