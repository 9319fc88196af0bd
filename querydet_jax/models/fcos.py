"""FCOS (Tian et al. 2019), and QueryDet on it (paper Table 8): points, their targets, losses, candidates."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from querydet_jax.config import HeadConfig, ModelConfig
from querydet_jax.models.base import DenseDetector
from querydet_jax.models.candidates import Candidates, best_values
from querydet_jax.models.heads import DetectionHead
from querydet_jax.models.layers import Conv, normal_init, run_tower, zeros_bias
from querydet_jax.models.loss_terms import Losses, Normalization, Outputs, TrainingBatch, level_sum
from querydet_jax.ops.losses import binary_cross_entropy, focal_loss, giou_loss
from querydet_jax.ops.matching import assign_points, per_image
from querydet_jax.ops.points import boxes_around, centerness, distances, grid_points, points_at
from querydet_jax.sparse import Cells, Stack
from querydet_jax.sparse import Conv as ConvWeights

_BOX = 4  # channels of the box branch before the centerness


@partial(
    jax.tree_util.register_dataclass, data_fields=["features", "cls", "box", "query", "centerness"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class FCOSOutputs(Outputs):
    """Dense outputs with one point per cell (A = 1).

    ``box`` is the distances (left, top, right, bottom) to the box's sides in strides, before the ReLU; centerness
    logits ``{l: [B, h, w]}``.
    """

    centerness: dict[int, Array]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["cls", "box", "query", "total", "num_foreground", "normalizer", "per_level", "centerness"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class FCOSLosses(Losses):
    """``box`` is the GIoU loss; foreground are the points assigned to an object."""

    centerness: Array

    def terms(self) -> dict[str, Array]:
        return {**super().terms(), "centerness": self.centerness}


class PointTargets(NamedTuple):
    """Targets of the R points of all levels, finest level first, then y, x.

    labels int32 ``[B, R]``, class or -1; boxes ``[B, R, 4]`` xyxy px, of the object or, for background, the point's
    cell; centerness ``[B, R]``, 0 for background.
    """

    labels: Array
    boxes: Array
    centerness: Array


class FCOSHead(DetectionHead):
    """Class and box towers shared over levels; the box tower also carries the centerness.

    The box's four channels and the centerness are one stack's output, so that the box tower runs only once on
    sites, too.
    """

    def __init__(
        self, config: HeadConfig, in_channels: int, num_classes: int, dtype: jnp.dtype, rng: np.random.Generator
    ):
        # Random biases outweigh the first features and can close the ReLU of both sides of an axis at almost every
        # point, which then gets no gradient. This happened with 2 or 3 of 8 seeds (HIT-UAV's model, the demo's).
        super().__init__(dataclasses.replace(config, box_bias="zero"), in_channels, 1, num_classes, dtype, rng)
        last = config.channels if config.num_convs else in_channels
        self.ctrness = Conv(last, 1, 3, init=normal_init(0.01), bias=zeros_bias, dtype=dtype, rng=rng)

    def __call__(self, x: Array) -> tuple[Array, Array]:
        """Map ``[B, h, w, C]`` to float32 class logits ``[B, h, w, K]`` and ``[B, h, w, 5]``.

        The five channels are distances in strides before the ReLU, then the centerness logit.
        """
        cls = self.cls_score(run_tower(self.cls_tower, x))
        shared = run_tower(self.box_tower, x)
        box = jnp.concatenate([self.bbox_pred(shared), self.ctrness(shared)], axis=-1)
        return cls.astype(jnp.float32), box.astype(jnp.float32)

    def stacks(self) -> tuple[Stack, Stack]:
        cls, box = super().stacks()
        last = [box[-1], self.ctrness.weights()]
        joint = ConvWeights(
            jnp.concatenate([conv.kernel for conv in last], axis=-1), jnp.concatenate([conv.bias for conv in last])
        )
        return cls, [*box[:-1], joint]


class FCOS(DenseDetector):
    """FCOS on P_min..P_max; with P2 and a query head it is QueryDet on FCOS.

    As in detectron2: centre sampling, distances in strides without a learnt scale per level, GIoU loss, centerness
    on the box tower, score sqrt(class * centerness).
    """

    def __init__(self, config: ModelConfig, rng: np.random.Generator):
        super().__init__(config, rng)
        self.head = FCOSHead(config.head, config.fpn.channels, config.num_classes, self.dtype, rng)

    def __call__(self, images: Array, sizes: Array | None = None) -> FCOSOutputs:
        """Compute the dense outputs of uint8 RGB images ``[B, H, W, 3]`` (``sizes``: see ``DenseDetector``)."""
        features = self.features(jnp.asarray(images), sizes)
        cls, box, center = {}, {}, {}
        for level, x in features.items():
            logits, sides = self.head(x)
            cls[level], box[level], center[level] = logits[..., None, :], sides[..., None, :_BOX], sides[..., _BOX]
        return FCOSOutputs(features, cls, box, self.query_logits(features), center)

    def batch_losses(self, batch: TrainingBatch, normalization: Normalization, *, remat: bool) -> FCOSLosses:
        """Return the losses of QueryDet eq. 4 with FCOS's terms.

        loss_cls = sum_l beta_l sum focal / N over all points, loss_box = sum_l beta_l sum (1 - GIoU) / N and
        loss_centerness = sum_l beta_l sum BCE / N over foreground points, loss_query = sum_q w_q mean focal;
        total is their sum. N averages max(1, foreground points).
        """
        config, loss = self.config, self.config.loss
        features = self.features(batch.images, batch.sizes)
        shapes = [(x.shape[1], x.shape[2]) for x in features.values()]
        targets = self.targets(shapes, batch.boxes, batch.classes)
        num_foreground, average, divisor = self.foreground_average(targets.labels >= 0, normalization, at_least=1.0)

        def level_sums(x: Array, *target: Array, stride: int) -> dict[str, Array]:
            label, box, center = (part.reshape(*x.shape[:3], *part.shape[2:]) for part in target)
            height, width = x.shape[1:3]
            logits, outputs = self.head(x)
            one_hot = label[..., None] == jnp.arange(config.num_classes, dtype=jnp.int32)[None, None, None]
            focal = focal_loss(logits, one_hot, alpha=loss.focal_alpha, gamma=loss.focal_gamma)
            sides = jax.nn.relu(outputs[..., :_BOX]) * stride
            giou = giou_loss(boxes_around(grid_points(height, width, stride)[None], sides), box)
            entropy = binary_cross_entropy(outputs[..., _BOX], center)
            return {
                "cls": jnp.sum(focal),
                "box": jnp.sum(jnp.where(label >= 0, giou, 0.0)),
                "centerness": jnp.sum(jnp.where(label >= 0, entropy, 0.0)),
            }

        by_level, start = [], 0
        for (level, x), (height, width) in zip(features.items(), shapes, strict=True):
            end = start + height * width
            of_level = partial(level_sums, stride=2**level)
            by_level.append(level_sum(of_level, level, remat, x, *(part[:, start:end] for part in targets)))
            start = end
        sums = {name: [of_level[name] for of_level in by_level] for name in by_level[0]}
        terms, per_level = self.weighted_terms(sums, divisor, self.query_losses(features, batch, remat))
        total = terms["cls"] + terms["box"] + terms["centerness"] + terms["query"]
        return FCOSLosses(**terms, total=total, num_foreground=num_foreground, normalizer=average, per_level=per_level)

    def targets(self, shapes: list[tuple[int, int]], boxes: Array, classes: Array) -> PointTargets:
        """Assign boxes ``[B, G, 4]``, classes ``[B, G]`` to the points of levels of these (h, w), the finest first."""
        config = self.config.fcos
        levels = self.config.levels
        points = jnp.concatenate(
            [grid_points(*shape, 2**level).reshape(-1, 2) for level, shape in zip(levels, shapes, strict=True)]
        )
        cells = np.array([height * width for height, width in shapes])
        strides = jnp.asarray(np.repeat(np.float32(2) ** np.array(levels, np.float32), cells))
        ranges = jnp.asarray(np.repeat(_ranges(levels, config.range_scale), cells, axis=0))
        background = boxes_around(points, 0.5 * jnp.broadcast_to(strides[:, None], (len(points), 4)))

        def assign(boxes: Array, classes: Array) -> PointTargets:
            labels, matched = assign_points(points, strides, ranges, boxes, classes, center_radius=config.center_radius)
            if boxes.shape[0] == 0:
                return PointTargets(labels, background, jnp.zeros(labels.shape, jnp.float32))
            # Background gets a non-empty box, so that its masked loss and gradients stay finite.
            foreground = labels >= 0
            target = jnp.where(foreground[:, None], boxes[matched], background)
            center = jnp.where(foreground, centerness(distances(points, target)), 0.0)
            return PointTargets(labels, target, center)

        return per_image(assign, boxes, classes)

    def labels(self, shapes: list[tuple[int, int]], boxes: Array, classes: Array) -> Array:
        return self.targets(shapes, boxes, classes).labels

    def head_stacks(self) -> tuple[Stack, ...]:
        return self.head.stacks()

    def dense_heads(self, x: Array) -> tuple[Array, ...]:
        return self.head(x)

    def select(self, level: int, outputs: list[Array], cells: Cells, *, topk: int) -> Candidates:
        """Select and decode the top-k (point, class) pairs per image, by sqrt(class probability * centerness).

        Args:
          outputs: class logits ``[N, K]`` and ``[N, 5]``, distances in strides before the ReLU and centerness.

        Returns:
          M = min(topk, K * h * w) candidates per image.
        """
        cls, box = outputs
        scores = jnp.sqrt(jax.nn.sigmoid(cls) * jax.nn.sigmoid(box[:, _BOX:]))
        best = best_values(scores, cells, topk=topk, per_key=self.config.num_classes)
        points = points_at(cells.y[best.row], cells.x[best.row], 2**level)
        sides = jax.nn.relu(box[best.row, :_BOX]) * 2**level
        return Candidates(boxes_around(points, sides), best.value, best.column.astype(jnp.int32))


def _ranges(levels: tuple[int, ...], scale: float) -> np.ndarray:
    """Return the distances ``[L, 2]`` px between which each level's points learn boxes."""
    low = scale * np.float32(2) ** np.array(levels, np.float32)
    ranges = np.stack([low, 2 * low], axis=1)
    ranges[0, 0], ranges[-1, 1] = 0.0, np.inf
    return ranges
