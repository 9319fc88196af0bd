"""Candidates: each level's best-scoring boxes, before NMS.

Shape letters: B batch, h w map, N rows, V values per row, M candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from querydet_jax.ops.nms import top_scores
from querydet_jax.sparse import Cells


class Candidates(NamedTuple):
    """Best-scoring boxes: boxes ``[B, M, 4]`` px, scores ``[B, M]`` (-inf: absent), classes ``[B, M]``."""

    boxes: Array
    scores: Array
    classes: Array


class Best(NamedTuple):
    """Where an image's best values are: value, row and column ``[B, M]``; a value of -inf is absent."""

    value: Array
    row: Array
    column: Array

    @property
    def present(self) -> Array:
        """Bool ``[B, M]``."""
        return self.value > -jnp.inf


def join_candidates(found: Sequence[Candidates]) -> Candidates:
    """Concatenate the candidates of all levels, in their order."""
    return Candidates(*(jnp.concatenate(parts, axis=1) for parts in zip(*found, strict=True)))


def best_values(values: Array, cells: Cells, *, topk: int, per_key: int) -> Best:
    """Find the ``topk`` best of ``values [N, V]`` at the keys, per image, best first.

    Args:
      per_key: a level yields at most ``per_key`` candidates per key.

    Returns:
      M = min(topk, per_key * h * w) per image, whatever N is.
    """
    batch, height, width = cells.shape
    k = min(topk, per_key * height * width)
    row_best = jnp.where(cells.is_key, jnp.max(values, axis=1), -jnp.inf)

    def of_image(image: Array) -> Best:
        mine = cells.is_key & (cells.batch == image)
        # At most as many rows as a map has cells. This also lets `jax.export` leave the batch symbolic: N is a
        # multiple of it.
        best, row, column = top_scores(
            values, jnp.where(mine, row_best, -jnp.inf), k, cells.index, most_rows=height * width
        )
        limit = per_key * jnp.sum(mine, dtype=jnp.int32)
        return Best(jnp.where(jnp.arange(len(row), dtype=jnp.int32) < limit, best, -jnp.inf), row, column)

    found = jax.vmap(of_image)(jnp.arange(batch, dtype=jnp.int32))
    missing = ((0, 0), (0, k - found.row.shape[1]))  # a small buffer holds fewer pairs than the dense map would
    return Best(
        jnp.pad(found.value, missing, constant_values=-jnp.inf),
        jnp.pad(found.row, missing),
        jnp.pad(found.column, missing),
    )
