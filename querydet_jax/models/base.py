"""The base class of all dense detectors: pixels to pyramid, the query head, which parameters are trained.

A detector subclasses ``DenseDetector`` and adds its head, its targets and losses, and how head outputs at some
cells become candidates. The query cascade and compiled inference (`querydet_jax.inference.pipeline`) need no more.
Shape letters: B batch, H W image, h w map, A anchors per cell, K classes, G padded boxes, R anchors or points of all
levels, N rows, C channels, O output channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from querydet_jax.config import ModelConfig
from querydet_jax.models.backbones import build_backbone
from querydet_jax.models.candidates import Candidates
from querydet_jax.models.fpn import FPN
from querydet_jax.models.heads import QueryHead
from querydet_jax.models.layers import Frozen
from querydet_jax.models.loss_terms import (
    GlobalBatch,
    Losses,
    Normalization,
    TrainingBatch,
    level_sum,
    level_weights,
    query_scale_range,
)
from querydet_jax.models.rpn import RPNQueryHead
from querydet_jax.ops.anchors import level_shape
from querydet_jax.ops.losses import focal_loss
from querydet_jax.ops.matching import per_image, query_targets
from querydet_jax.ops.pixels import is_bgr, pixel_statistics
from querydet_jax.sparse import Cells, Stack

PyTree = Any
SIZE_DIVISOR = 32  # the stride of C5: P2..P5 are then exact halves of one another


class DenseDetector(nnx.Module):
    """Backbone, FPN and query head. Input images are uint8 RGB ``[B, H, W, 3]`` of any H and W.

    Pixels are normalised first and then padded with zeros to a multiple of 32, so padding has the mean
    colour. Where a batch holds images of different sizes on one canvas, ``sizes`` int32 ``[B, 2]`` gives
    each one's (height, width); pixels outside are treated as padding.
    """

    query_head: QueryHead | RPNQueryHead | None

    def __init__(self, config: ModelConfig, rng: np.random.Generator, *, query_branch: bool = False):
        """Build the shared parts; with ``query_branch`` the detector sets ``query_head`` itself."""
        self.config = config
        self.dtype = jnp.dtype(config.dtype)
        mean, std = pixel_statistics(config.backbone.flavor)
        self.pixel_mean, self.pixel_std = Frozen(jnp.asarray(mean, jnp.float32)), Frozen(jnp.asarray(std, jnp.float32))
        self.backbone = build_backbone(config.backbone, self.dtype, rng)
        self.fpn = FPN(config.fpn, self.backbone.out_channels, config.min_level, config.max_level, self.dtype, rng)
        if not query_branch:
            enabled = config.query.enabled
            self.query_head = QueryHead(config.query, config.fpn.channels, self.dtype, rng) if enabled else None

    # What a detector adds ------------------------------------------------------------------

    second_stage: ClassVar[bool] = False
    """Whether ``refine`` reads all levels of the pyramid everywhere."""

    def losses(
        self,
        images: Array,
        boxes: Array,
        classes: Array,
        normalizer: Array | float,
        sizes: Array | None = None,
        axis_name: str | None = None,
        *,
        keys: Array | None = None,
        global_batch: GlobalBatch | None = None,
        remat: bool = False,
    ) -> Losses:
        """Compute the training losses of a batch (paper section 3.4); ``total`` is what is minimised.

        Args:
          images: uint8 RGB ``[B, H, W, 3]``.
          boxes: ``[B, G, 4]`` xyxy px of the network input.
          classes: int ``[B, G]``, 0..K-1, -1 for padding.
          normalizer: the running average of foreground before this step (start with
            ``config.loss.normalizer_init``). N = max(1, 0.9 * normalizer + 0.1 * foreground) divides
            this step's losses; the average to pass on is returned as ``.normalizer``.
          sizes: int32 ``[B, 2]``, valid (height, width) of each image.
          axis_name: the mapped axis, if any. Foreground is then counted over all replicas, and the mean of the
            losses over replicas is the loss of all their images as one batch.
          keys: PRNG keys ``[B]``, one per image, for detectors that learn from a random sample (Faster R-CNN).
          global_batch: the batch that these images are a shard of, where the replicas' images are only part of it
            (gradient accumulation): the mean over its shards is its loss.
          remat: compute the heads of P2 and P3 (and their losses) image by image, and again in the backward pass:
            less memory, more time, the same result.
        """
        batch = TrainingBatch(
            jnp.asarray(images),
            jnp.asarray(boxes, jnp.float32),
            jnp.asarray(classes, jnp.int32),
            None if sizes is None else jnp.asarray(sizes, jnp.int32),
            keys,
        )
        normalization = Normalization(jnp.asarray(normalizer, jnp.float32), axis_name, global_batch)
        return self.batch_losses(batch, normalization, remat=remat)

    def batch_losses(self, batch: TrainingBatch, normalization: Normalization, *, remat: bool) -> Losses:
        """Compute ``losses``; each detector defines its own terms."""
        raise NotImplementedError

    def head_stacks(self) -> tuple[Stack, ...]:
        """Return the detection head's branches as convolution stacks, in the order of ``dense_heads``."""
        raise NotImplementedError

    def dense_heads(self, x: Array) -> tuple[Array, ...]:
        """Compute head outputs ``[B, h, w, O]``, float32, from a level's features ``[B, h, w, C]``."""
        raise NotImplementedError

    def labels(self, shapes: list[tuple[int, int]], boxes: Array, classes: Array) -> Array:
        """Return the class int32 ``[B, R]`` of every anchor or point of levels of these (h, w); below 0: none."""
        raise NotImplementedError

    def select(self, level: int, outputs: list[Array], cells: Cells, *, topk: int) -> Candidates:
        """Select and decode each image's ``topk`` best boxes from head outputs ``[N, O]``, read at the keys."""
        raise NotImplementedError

    def refine(self, found: Candidates, features: dict[int, Array], sizes: Array) -> Candidates:
        """Return what the final threshold and NMS choose from; a second stage replaces the selected boxes.

        Args:
          found: candidates of all levels, in the order of ``Detector``.
          features: ``{l: P_l [B, h, w, C]}``, of all levels if ``second_stage``.
          sizes: int32 ``[B, 2]``, valid (height, width) of each image.
        """
        return found

    # Shared ----------------------------------------------------------------------------------

    def normalize(self, images: Array, sizes: Array | None = None) -> Array:
        """Turn uint8 (or float, same range) RGB into the backbone's input, padded to a multiple of 32."""
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images must be [B, H, W, 3], got {images.shape}")
        x = images.astype(jnp.float32)
        if is_bgr(self.config.backbone.flavor):
            x = x[..., ::-1]
        x = (x - self.pixel_mean[...][None, None, None]) / self.pixel_std[...][None, None, None]
        height, width = x.shape[1:3]
        if sizes is not None:
            inside = (jnp.arange(height, dtype=jnp.int32)[None, :, None] < sizes[:, 0, None, None]) & (
                jnp.arange(width, dtype=jnp.int32)[None, None, :] < sizes[:, 1, None, None]
            )
            x = x * inside[..., None].astype(x.dtype)
        padding = (-height % SIZE_DIVISOR, -width % SIZE_DIVISOR)
        return jnp.pad(x, ((0, 0), (0, padding[0]), (0, padding[1]), (0, 0))).astype(self.dtype)

    def features(self, images: Array, sizes: Array | None = None) -> dict[int, Array]:
        """Compute the pyramid ``{l: P_l [B, h, w, C]}``."""
        return self.fpn(self.backbone(self.normalize(images, sizes)))

    def query_logits(self, features: dict[int, Array]) -> dict[int, Array]:
        """Compute query logits ``{l: [B, h, w]}`` on the levels the query head is trained on."""
        if self.query_head is None:
            return {}
        return {level: self.query_head(features[level]) for level in self.config.query.levels}

    def count_foreground(self, size: tuple[int, int], boxes: Array, classes: Array) -> Array:
        """Count a batch's foreground as ``losses`` does, scalar float32, from its boxes alone.

        Args:
          size: (H, W) of the images.
          boxes: ``[B, G, 4]`` xyxy px of the network input.
          classes: int ``[B, G]``, -1 for padding.
        """
        height, width = (-(-side // SIZE_DIVISOR) * SIZE_DIVISOR for side in size)
        shapes = [level_shape(height, width, level) for level in self.config.levels]

        def of_image(truth: tuple[Array, Array]) -> Array:
            return jnp.sum((self.labels(shapes, *truth) >= 0).astype(jnp.float32))

        # Image by image, so that a large batch's labels are never in memory together.
        return jnp.sum(lax.map(of_image, (boxes[:, None], classes[:, None])))

    def foreground_average(
        self,
        foreground: Array,
        normalization: Normalization,
        at_least: float = 0.0,
    ) -> tuple[Array, Array, Array]:
        """Return the global batch's foreground, the running average with it, and the divisor of this shard's losses.

        Args:
          foreground: bool, any shape, of these images.
          at_least: a smaller count enters the average as this.
        """
        shards = normalization.global_batch
        if shards is None:
            count, parts = jnp.sum(foreground.astype(jnp.float32)), 1
            if normalization.axis_name is not None:
                count = lax.psum(count, normalization.axis_name)
                parts = lax.axis_size(normalization.axis_name)
            shards = GlobalBatch(count, parts)
        momentum = self.config.loss.normalizer_momentum
        average = momentum * normalization.average
        average = average + (1.0 - momentum) * jnp.maximum(shards.foreground, at_least)
        return shards.foreground, average, jnp.maximum(average, 1.0) / shards.parts

    def weighted_terms(
        self, sums: dict[str, list[Array]], divisor: Array | float, query: Array | None
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Weight and add up the loss terms (QueryDet eq. 4); return them and their unweighted parts by level.

        Each term of ``sums``, which are by level, is sum_l beta_l sum / divisor. ``query``, the means of
        ``query_losses``, gives sum_q w_q mean (0 without a query head).
        """
        weights = jnp.asarray(level_weights(self.config), jnp.float32)
        per_level = {name: jnp.stack(values) for name, values in sums.items()}
        terms = {name: jnp.sum(weights * values) / divisor for name, values in per_level.items()}
        terms["query"] = jnp.zeros((), jnp.float32)
        if query is not None:
            per_level["query"] = query
            query_weights = jnp.asarray(self.config.loss.query_weights, jnp.float32)
            terms["query"] = jnp.sum(query_weights * query)
        return terms, per_level

    def query_losses(
        self,
        maps: dict[int, Array],
        batch: TrainingBatch,
        remat: bool = False,
        logits: Callable[[Array], Array] | None = None,
    ) -> Array | None:
        """Return the mean focal loss of each query level, unweighted, ``[levels]``; None without a query head.

        Args:
          maps: by level, ``[B, h, w, ...]``, what ``logits`` reads.
          remat: see ``losses``.
          logits: maps to query logits ``[B, h, w]``; None: the query head, which reads features.
        """
        if self.query_head is None:
            return None
        loss, read = self.config.loss, logits or self.query_head
        means = []
        for level, gamma in zip(self.config.query.levels, loss.query_gammas, strict=True):
            x = maps[level]
            target = self.query_target(level, (x.shape[1], x.shape[2]), batch.boxes, batch.classes)

            def focal_sum(x: Array, target: Array, gamma: float = gamma) -> Array:
                return jnp.sum(focal_loss(read(x), target, alpha=loss.query_alpha, gamma=gamma))

            means.append(level_sum(focal_sum, level, remat, x, target) / target.size)
        return jnp.stack(means)

    def query_target(self, level: int, shape: tuple[int, int], boxes: Array, classes: Array) -> Array:
        """Return where ``level``'s query head should fire, bool ``[B, h, w]`` (QueryDet eq. 2 and 3)."""
        config = self.config
        scale_range = query_scale_range(config, level)

        def target(boxes: Array, classes: Array) -> Array:
            return query_targets(
                *shape,
                2**level,
                boxes,
                classes,
                scale_range=scale_range,
                radius=config.loss.query_radius,
                factor=config.loss.query_radius_factor,
            )

        return per_image(target, boxes, classes)

    def trainable(self) -> nnx.filterlib.Filter:
        """Return the filter of the parameters that an optimiser may change: all but what ``freeze_at`` freezes."""
        frozen = self.backbone.frozen_parts()

        def is_frozen(path: tuple[Any, ...], value: Any) -> bool:
            return path[0] == "backbone" and path[1] in frozen

        return nnx.All(nnx.Param, nnx.Not(is_frozen))
