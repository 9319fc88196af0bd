"""A detector's dense outputs, its losses, and the parts that losses share.

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
    """Dense outputs of a detector; levels are integers 2..7.

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
    """Scalars float32.

    ``normalizer`` is the foreground average after this step, for the next one. ``per_level`` has the unweighted sums
    of ``cls``, ``box`` and any other term, ``[L]``, finest level first, and the query means ``query``, one per
    query level.
    """

    cls: Array
    box: Array
    query: Array
    total: Array
    num_foreground: Array
    normalizer: Array
    per_level: dict[str, Array]

    def terms(self) -> dict[str, Array]:
        """Return the terms that add up to ``total``, by name."""
        return {"cls": self.cls, "box": self.box, "query": self.query}


class TrainingBatch(NamedTuple):
    """What a training step computes losses from.

    images uint8 RGB ``[B, H, W, 3]``; boxes float32 ``[B, G, 4]`` xyxy px of the network input; classes int32
    ``[B, G]``, 0..K-1, -1 for padding; sizes int32 ``[B, 2]``, valid (height, width) of each image, or None;
    keys: PRNG keys ``[B]`` for detectors that learn from a random sample, or None.
    """

    images: Array
    boxes: Array
    classes: Array
    sizes: Array | None = None
    keys: Array | None = None


class GlobalBatch(NamedTuple):
    """Global batch, of which these images are one of ``parts`` equal shards (over devices and over time).

    A shard's losses are divided so that their mean over the shards is the loss of the global batch.
    ``foreground``: count over the global batch, scalar float32.
    """

    foreground: Array
    parts: int


class Normalization(NamedTuple):
    """What divides the losses: the running average of foreground before this step, and whose foreground counts.

    ``axis_name``: the mapped axis whose replicas hold the other shards, if any; ``global_batch``: given where the
    batch is also split over time.
    """

    average: Array
    axis_name: str | None = None
    global_batch: GlobalBatch | None = None


def level_sum(function: Callable[..., PyTree], level: int, remat: bool, *arrays: Array) -> PyTree:
    """Compute ``function(*arrays)``: sums over a level's images ``[B, ...]``; with ``remat``, ``image_by_image``."""
    if not remat or level > _REMAT_UP_TO:
        return function(*arrays)
    sums = image_by_image(function, *arrays)
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)


def level_map(function: Callable[[Array], PyTree], level: int, remat: bool, x: Array) -> PyTree:
    """Compute ``function(x)``, arrays ``[B, ...]``; with ``remat``, ``image_by_image``."""
    if not remat or level > _REMAT_UP_TO:
        return function(x)
    return jax.tree.map(lambda y: y[:, 0], image_by_image(function, x))


def image_by_image(function: Callable[..., PyTree], *arrays: Array) -> PyTree:
    """Apply ``function`` to one image ``[1, ...]`` after another, and again in the backward pass; stack the results.

    Only one image's intermediates are in memory at a time. Recomputing a whole level would save little: nothing
    else depends on its loss, so the compiler can compute its gradients before it starts the next level.
    """
    # A loop shares nothing with the first computation, so common-subexpression elimination needs no guard.
    of_image = jax.checkpoint(lambda *rows: function(*(row[None] for row in rows)), prevent_cse=False)
    return lax.map(lambda rows: of_image(*rows), arrays)


def query_scale_range(config: ModelConfig, level: int) -> tuple[float, float]:
    """Return [0, s_l) px, the scales of objects that are small on P_l (paper section 3.2).

    s_l is the smallest anchor on P_l, or the lower end of the distances that FCOS regresses there.
    """
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
