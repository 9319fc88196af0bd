"""Candidates: each level's best-scoring boxes, before NMS.

Shape letters: B batch, h w map, N sites, V values a site, M candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from querydet_jax.ops.nms import top_scores
from querydet_jax.sparse import Sites


class Candidates(NamedTuple):
    """A level's best-scoring boxes: boxes ``[B, M, 4]``, scores ``[B, M]`` (-inf: absent), classes ``[B, M]``."""

    boxes: Array
    scores: Array
    classes: Array


def join_candidates(found: Sequence[Candidates]) -> Candidates:
    """Of all levels as one, in their order."""
    return Candidates(*(jnp.concatenate(parts, axis=1) for parts in zip(*found, strict=True)))


def best_candidates(
    values: Array,
    sites: Sites,
    *,
    topk: int,
    per_key: int,
    describe: Callable[[Array, Array, Array], Candidates],
) -> Candidates:
    """The ``topk`` best of ``values [N, V]`` at the keys, for each image.

    Args:
      per_key: a level gives at most so many candidates as this times its keys.
      describe: values, rows and columns ``[M]`` of one image's best to its candidates.

    Returns:
      M = min(topk, per_key * h * w) candidates an image, whatever N is.
    """
    batch, height, width = sites.shape
    k = min(topk, per_key * height * width)
    row_best = jnp.where(sites.is_key, jnp.max(values, axis=1), -jnp.inf)

    def of_image(image: Array) -> Candidates:
        mine = sites.is_key & (sites.batch == image)
        # No more rows than a map has cells: also what lets `jax.export` leave the batch open, of which N is a multiple.
        best, row, column = top_scores(
            values, jnp.where(mine, row_best, -jnp.inf), k, sites.index, most_rows=height * width
        )
        limit = per_key * jnp.sum(mine.astype(jnp.int32))
        present = (best > -jnp.inf) & (jnp.arange(len(row)) < limit)
        found = describe(best, row, column)
        return found._replace(scores=jnp.where(present, found.scores, -jnp.inf))

    found = jax.vmap(of_image)(jnp.arange(batch))
    missing = k - found.scores.shape[1]  # a small buffer holds fewer pairs than the dense map would
    if missing == 0:
        return found
    return Candidates(
        jnp.pad(found.boxes, ((0, 0), (0, missing), (0, 0))),
        jnp.pad(found.scores, ((0, 0), (0, missing)), constant_values=-jnp.inf),
        jnp.pad(found.classes, ((0, 0), (0, missing))),
    )
