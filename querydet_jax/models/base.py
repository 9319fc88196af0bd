"""What all dense detectors share: pixels to pyramid, the query head, the split of parameters.

A detector subclasses ``DenseDetector`` and adds its head, its targets and losses, and how head
outputs at some cells become candidates; the query cascade and the compiled inference
(`querydet_jax.inference.detector`) work on that alone.
Shape letters: B batch, H W image, h w map, A anchors per cell, K classes, G padded boxes, N sites,
C channels.
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
from querydet_jax.models.loss_terms import Losses, Whole, level_sum, level_weights, query_scale_range
from querydet_jax.models.rpn import RPNQueryHead
from querydet_jax.ops.anchors import level_shape
from querydet_jax.ops.losses import focal_loss
from querydet_jax.ops.matching import per_image, query_targets
from querydet_jax.ops.pixels import is_bgr, pixel_statistics
from querydet_jax.sparse import Sites, Stack

PyTree = Any
SIZE_DIVISOR = 32  # the stride of C5: P2..P5 are then exact halves of one another


class DenseDetector(nnx.Module):
    """Backbone, FPN and query head. Input images are uint8 RGB ``[B, H, W, 3]`` of any H and W.

    Pixels are normalised first and padded with zeros to a multiple of 32 afterwards, so padding has
    the mean colour. Where a batch holds images of different sizes on one canvas, ``sizes`` int32
    ``[B, 2]`` gives each one's (height, width): what lies outside is treated as padding.
    """

    query_head: QueryHead | RPNQueryHead | None

    def __init__(self, config: ModelConfig, rng: np.random.Generator, *, query_branch: bool = False):
        """``query_branch``: the detector sets ``query_head`` itself, a branch of its own head."""
        self.config = config
        self.dtype = jnp.dtype(config.dtype)
        mean, std = pixel_statistics(config.backbone.flavor)
        self.pixel_mean, self.pixel_std = Frozen(jnp.asarray(mean)), Frozen(jnp.asarray(std))
        self.backbone = build_backbone(config.backbone, self.dtype, rng)
        self.fpn = FPN(config.fpn, self.backbone.out_channels, config.min_level, config.max_level, self.dtype, rng)
        if not query_branch:
            enabled = config.query.enabled
            self.query_head = QueryHead(config.query, config.fpn.channels, self.dtype, rng) if enabled else None

    # What a detector adds ------------------------------------------------------------------

    second_stage: ClassVar[bool] = False
    """The detector reads all levels of the pyramid everywhere once more, in ``refine``."""

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
        whole: Whole | None = None,
        remat: bool = False,
    ) -> Losses:
        """Training losses of a batch (paper section 3.4); ``total`` is what is minimised.

        Args:
          images: uint8 RGB ``[B, H, W, 3]``.
          boxes: ``[B, G, 4]`` xyxy px of the network input.
          classes: int ``[B, G]``, 0..K-1, -1 for padding.
          normalizer: the running average of foreground before this step (start with
            ``config.loss.normalizer_init``). N = max(1, 0.9 * normalizer + 0.1 * foreground) divides
            this step's losses; the average to pass on is returned as ``.normalizer``.
          sizes: int32 ``[B, 2]``, valid (height, width) of each image.
          axis_name: the mapped axis, if any: foreground is then that of all replicas, and the mean over
            replicas of the losses is the loss of all their images as one batch.
          keys: PRNG keys ``[B]``, one an image, for detectors that learn from a random sample (Faster R-CNN).
          whole: the batch that these images are a part of, where it is more than the replicas': the same
            holds for the mean over its parts.
          remat: compute the heads of P2 and P3 (and their losses) image by image, and again in the backward pass:
            less memory, more time, the same result.
        """
        raise NotImplementedError

    def head_stacks(self) -> tuple[Stack, ...]:
        """The detection head's branches as convolution stacks, in the order of ``dense_heads``."""
        raise NotImplementedError

    def dense_heads(self, x: Array) -> tuple[Array, ...]:
        """Head outputs ``[B, h, w, O]``, float32, of a level's features ``[B, h, w, C]``."""
        raise NotImplementedError

    def labels(self, shapes: list[tuple[int, int]], boxes: Array, classes: Array) -> Array:
        """Class int32 ``[B, R]`` of every anchor or point of levels of these (h, w), below 0 where none."""
        raise NotImplementedError

    def candidates(self, level: int, outputs: list[Array], sites: Sites, *, topk: int) -> Candidates:
        """The ``topk`` best boxes of each image from head outputs ``[N, O]`` at the keys of ``sites``."""
        raise NotImplementedError

    def refine(self, found: Candidates, features: dict[int, Array], sizes: Array) -> Candidates:
        """What the final threshold and NMS choose from: with a second stage, other boxes than ``candidates`` found.

        Args:
          found: of all levels, in the order of ``Detector``.
          features: ``{l: P_l [B, h, w, C]}``, of all levels if ``second_stage`` says so.
          sizes: int32 ``[B, 2]``, valid (height, width) of each image.
        """
        return found

    # Shared ----------------------------------------------------------------------------------

    def normalize(self, images: Array, sizes: Array | None = None) -> Array:
        """uint8 (or float, same range) RGB to the backbone's input, padded to a multiple of 32."""
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images must be [B, H, W, 3], got {images.shape}")
        x = images.astype(jnp.float32)
        if is_bgr(self.config.backbone.flavor):
            x = x[..., ::-1]
        x = (x - self.pixel_mean[...][None, None, None]) / self.pixel_std[...][None, None, None]
        height, width = x.shape[1:3]
        if sizes is not None:
            inside = (jnp.arange(height)[None, :, None] < sizes[:, 0, None, None]) & (
                jnp.arange(width)[None, None, :] < sizes[:, 1, None, None]
            )
            x = x * inside[..., None].astype(x.dtype)
        padding = (-height % SIZE_DIVISOR, -width % SIZE_DIVISOR)
        return jnp.pad(x, ((0, 0), (0, padding[0]), (0, padding[1]), (0, 0))).astype(self.dtype)

    def features(self, images: Array, sizes: Array | None = None) -> dict[int, Array]:
        """Pyramid ``{l: P_l [B, h, w, C]}``."""
        return self.fpn(self.backbone(self.normalize(images, sizes)))

    def query_logits(self, features: dict[int, Array]) -> dict[int, Array]:
        if self.query_head is None:
            return {}
        return {level: self.query_head(features[level]) for level in self.config.query.levels}

    def count_foreground(self, size: tuple[int, int], boxes: Array, classes: Array) -> Array:
        """Foreground of a batch as ``losses`` counts it, scalar float32, without looking at its images.

        Args:
          size: (H, W) of the images.
          boxes: ``[B, G, 4]`` xyxy px of the network input.
          classes: int ``[B, G]``, -1 for padding.
        """
        height, width = (-(-side // SIZE_DIVISOR) * SIZE_DIVISOR for side in size)
        shapes = [level_shape(height, width, level) for level in self.config.levels]

        def of_image(truth: tuple[Array, Array]) -> Array:
            return jnp.sum((self.labels(shapes, *truth) >= 0).astype(jnp.float32))

        # An image at a time: of the labels of a large batch only the counts are kept.
        return jnp.sum(lax.map(of_image, (boxes[:, None], classes[:, None])))

    def foreground_average(
        self,
        foreground: Array,
        normalizer: Array | float,
        axis_name: str | None,
        whole: Whole | None,
        at_least: float = 0.0,
    ) -> tuple[Array, Array, Array]:
        """Foreground of the whole batch, the running average with it, and what divides the losses of this part.

        Args:
          foreground: bool, any shape, of the images at hand.
          normalizer: the running average before this step.
          axis_name: the mapped axis, if any, whose replicas' images together are the whole batch.
          whole: the whole batch where it is more than that.
          at_least: a smaller count goes into the average as this.
        """
        if whole is None:
            count, parts = jnp.sum(foreground.astype(jnp.float32)), 1
            if axis_name is not None:
                count, parts = lax.psum(count, axis_name), lax.axis_size(axis_name)
            whole = Whole(count, parts)
        momentum = self.config.loss.normalizer_momentum
        average = momentum * jnp.asarray(normalizer, jnp.float32)
        average = average + (1.0 - momentum) * jnp.maximum(whole.foreground, at_least)
        return whole.foreground, average, jnp.maximum(average, 1.0) / whole.parts

    def weigh(
        self, sums: dict[str, list[Array]], divisor: Array | float, query: Array | None
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Loss terms and their parts by level (QueryDet eq. 4): sum_l beta_l sum / divisor for each of ``sums``,
        which are by level; ``query``: sum_q w_q mean focal of ``query_losses`` (0 without a query head)."""
        weights = jnp.asarray(level_weights(self.config), jnp.float32)
        per_level = {name: jnp.stack(values) for name, values in sums.items()}
        terms = {name: jnp.sum(weights * values) / divisor for name, values in per_level.items()}
        terms["query"] = jnp.zeros(())
        if query is not None:
            per_level["query"] = query
            query_weights = jnp.asarray(self.config.loss.query_weights, jnp.float32)
            terms["query"] = jnp.sum(query_weights * query)
        return terms, per_level

    def query_losses(
        self, features: dict[int, Array], boxes: Array, classes: Array, remat: bool = False
    ) -> Array | None:
        """Unweighted mean focal loss a query level, ``[levels]`` (paper section 3.4); None without a query head.

        ``remat``: see ``losses``.
        """
        query_head = self.query_head
        if query_head is None:
            return None

        def sum_over_cells(level: int, target: Array, gamma: float) -> Array:
            def focal(x: Array, target: Array) -> Array:
                return self.query_focal(query_head(x), target, gamma)

            return level_sum(focal, level, remat, features[level], target)

        return self.query_means(features, boxes, classes, sum_over_cells)

    def query_means(
        self,
        maps: dict[int, Array],
        boxes: Array,
        classes: Array,
        sum_over_cells: Callable[[int, Array, float], Array],
    ) -> Array:
        """``query_losses`` from the sums of a level, its targets ``[B, h, w]`` and gamma; ``maps [B, h, w, ...]``."""
        means = []
        for level, gamma in zip(self.config.query.levels, self.config.loss.query_gammas, strict=True):
            target = self.query_target(level, (maps[level].shape[1], maps[level].shape[2]), boxes, classes)
            means.append(sum_over_cells(level, target, gamma) / target.size)
        return jnp.stack(means)

    def query_focal(self, logits: Array, target: Array, gamma: float) -> Array:
        """Sum of the query loss over cells."""
        return jnp.sum(focal_loss(logits, target, alpha=self.config.loss.query_alpha, gamma=gamma))

    def query_target(self, level: int, shape: tuple[int, int], boxes: Array, classes: Array) -> Array:
        """Bool ``[B, h, w]``: where ``level``'s query head should fire."""
        config = self.config
        scale_range = self.query_scale_range(level)

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

    def query_scale_range(self, level: int) -> tuple[float, float]:
        """See the function of this name."""
        return query_scale_range(self.config, level)

    def trainable(self) -> nnx.filterlib.Filter:
        """Filter of the parameters an optimiser may change: all but what ``freeze_at`` freezes."""
        frozen = self.backbone.frozen_parts()

        def is_frozen(path: tuple[Any, ...], value: Any) -> bool:
            return path[0] == "backbone" and path[1] in frozen

        return nnx.All(nnx.Param, nnx.Not(is_frozen))
