"""What a detector returns and the parts its losses share.

Shape letters: B batch, h w map, A anchors per cell, K classes, C channels, L levels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from querydet_jax.config import ModelConfig

PyTree = Any
_REMAT_UP_TO = 3  # P2 and P3; all above together have about a fifteenth of their cells


@partial(jax.tree_util.register_dataclass, data_fields=["features", "cls", "box", "query"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Outputs:
    """Dense outputs of a detector; levels are the ints 2..7.

    features ``{l: [B, h, w, C]}``; cls logits ``{l: [B, h, w, A, K]}``; box regression
    ``{l: [B, h, w, A, 4]}``; query logits ``{l: [B, h, w]}`` on the levels the query head is trained on
    (empty without a query head).
    """

    features: dict[int, Array]
    cls: dict[int, Array]
    box: dict[int, Array]
    query: dict[int, Array]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["cls", "box", "query", "total", "num_foreground", "normalizer", "per_level"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Losses:
    """Scalars float32. ``normalizer`` is the foreground average after this step, to hand to the
    next one; ``per_level`` has the unweighted sums ``cls``, ``box`` and any other term's ``[L]`` (finest level first)
    and the query means ``query`` ``[number of query levels]``."""

    cls: Array
    box: Array
    query: Array
    total: Array
    num_foreground: Array
    normalizer: Array
    per_level: dict[str, Array]

    def terms(self) -> dict[str, Array]:
        """What ``total`` is the sum of, by name."""
        return {"cls": self.cls, "box": self.box, "query": self.query}


class Whole(NamedTuple):
    """The batch that the images at hand are one of ``parts`` equal parts of (over devices, over time).

    A part's losses are divided so that their mean over the parts is the loss of the whole batch. ``foreground``:
    the whole's, scalar float32.
    """

    foreground: Array
    parts: int


def level_sum(function: Callable[..., PyTree], level: int, remat: bool, *arrays: Array) -> PyTree:
    """``function(*arrays)``, sums over the images ``[B, ...]`` of a level; with ``remat`` as ``image_by_image``."""
    if not remat or level > _REMAT_UP_TO:
        return function(*arrays)
    sums = image_by_image(function, *arrays)
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)


def level_map(function: Callable[[Array], PyTree], level: int, remat: bool, x: Array) -> PyTree:
    """``function(x)``, arrays ``[B, ...]``; with ``remat`` as ``image_by_image``."""
    if not remat or level > _REMAT_UP_TO:
        return function(x)
    return jax.tree.map(lambda y: y[:, 0], image_by_image(function, x))


def image_by_image(function: Callable[..., PyTree], *arrays: Array) -> PyTree:
    """``function`` of one image ``[1, ...]`` after another, and again in the backward pass, stacked.

    Of all that it computes only one image's is in memory at a time. (To compute a level again as a whole would save
    little: its loss depends on nothing after it, so the compiler can make its gradients before the next level's.)
    """
    # Inside a loop nothing can be shared with the first computation, so nothing need be done to prevent it.
    of_image = jax.checkpoint(lambda *rows: function(*(row[None] for row in rows)), prevent_cse=False)
    return lax.map(lambda rows: of_image(*rows), arrays)


def query_scale_range(config: ModelConfig, level: int) -> tuple[float, float]:
    """[0, s_l) in px: objects of such a scale are small on P_l. s_l is the smallest anchor there, or the lower end
    of the distances that FCOS regresses there (paper section 3.2)."""
    scale = config.fcos.range_scale if config.detector == "fcos" else config.anchors.scale
    return 0.0, scale * 2**level


def level_weights(config: ModelConfig) -> tuple[float, ...]:
    """Return the weights beta_l that re-balance the levels (QueryDet eq. 4 summed over levels), finest level first."""
    loss, count = config.loss, len(config.levels)
    if loss.level_weighting == "table":
        return loss.level_weights
    if loss.level_weighting == "uniform":
        return (1.0,) * count
    return tuple(float(w) for w in np.linspace(1.0, loss.linear_max, count))
