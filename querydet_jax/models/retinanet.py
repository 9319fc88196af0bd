"""RetinaNet and QueryDet: anchors, their targets, the losses of paper section 3.4, candidates."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from querydet_jax.config import ModelConfig
from querydet_jax.models.anchored import decode_chosen, match, pyramid_anchors
from querydet_jax.models.base import DenseDetector
from querydet_jax.models.candidates import Candidates, best_values
from querydet_jax.models.heads import DetectionHead
from querydet_jax.models.loss_terms import Losses, Normalization, Outputs, TrainingBatch, level_sum
from querydet_jax.ops.losses import focal_loss, smooth_l1
from querydet_jax.ops.matching import IGNORED, matched_deltas, per_image
from querydet_jax.sparse import Cells, Stack


class RetinaNet(DenseDetector):
    """RetinaNet on P_min..P_max; with P2 and a query head it is QueryDet.

    ``model(images)`` runs all heads densely; ``model.losses(...)`` is the training loss;
    `querydet_jax.Detector` compiles inference, dense or with Cascade Sparse Query.
    """

    def __init__(self, config: ModelConfig, rng: np.random.Generator):
        super().__init__(config, rng)
        self.head = DetectionHead(
            config.head, config.fpn.channels, config.anchors.per_cell, config.num_classes, self.dtype, rng
        )

    def __call__(self, images: Array, sizes: Array | None = None) -> Outputs:
        """Compute the dense outputs of uint8 RGB images ``[B, H, W, 3]`` (``sizes``: see ``DenseDetector``)."""
        features = self.features(jnp.asarray(images), sizes)
        cls, box = {}, {}
        for level, x in features.items():
            cls[level], box[level] = self._heads(x)
        return Outputs(features, cls, box, self.query_logits(features))

    def _heads(self, x: Array) -> tuple[Array, Array]:
        """Compute class logits ``[B, h, w, A, K]`` and deltas ``[B, h, w, A, 4]`` from a level's features."""
        cls, box = self.head(x)
        anchors = self.config.anchors.per_cell
        return cls.reshape(*x.shape[:3], anchors, self.config.num_classes), box.reshape(*x.shape[:3], anchors, 4)

    def batch_losses(self, batch: TrainingBatch, normalization: Normalization, *, remat: bool) -> Losses:
        """Return the losses of QueryDet eq. 4, weighted over levels as in the published code.

        loss_cls = sum_l beta_l sum focal / N, loss_box = sum_l beta_l sum smooth L1 / N, loss_query =
        sum_q w_q mean focal; total is their sum. N averages foreground anchors.
        """
        config, loss = self.config, self.config.loss
        features = self.features(batch.images, batch.sizes)
        shapes = [(x.shape[1], x.shape[2]) for x in features.values()]
        labels, targets = self.targets(shapes, batch.boxes, batch.classes)
        num_foreground, average, divisor = self.foreground_average(labels >= 0, normalization)

        def level_sums(x: Array, label: Array, target: Array) -> tuple[Array, Array]:
            cls, box = self._heads(x)
            label, target = label.reshape(cls.shape[:-1]), target.reshape(box.shape)
            one_hot = label[..., None] == jnp.arange(config.num_classes, dtype=jnp.int32)[None, None, None, None]
            focal = focal_loss(cls, one_hot, alpha=loss.focal_alpha, gamma=loss.focal_gamma)
            difference = jnp.where((label >= 0)[..., None], box - target, 0.0)
            return (
                jnp.sum(jnp.where((label != IGNORED)[..., None], focal, 0.0)),
                jnp.sum(smooth_l1(difference, beta=loss.smooth_l1_beta)),
            )

        sums: dict[str, list[Array]] = {"cls": [], "box": []}
        start = 0
        for (level, x), (height, width) in zip(features.items(), shapes, strict=True):
            end = start + height * width * config.anchors.per_cell
            cls_sum, box_sum = level_sum(level_sums, level, remat, x, labels[:, start:end], targets[:, start:end])
            sums["cls"].append(cls_sum)
            sums["box"].append(box_sum)
            start = end
        terms, per_level = self.weighted_terms(sums, divisor, self.query_losses(features, batch, remat))
        total = terms["cls"] + terms["box"] + terms["query"]
        return Losses(**terms, total=total, num_foreground=num_foreground, normalizer=average, per_level=per_level)

    def targets(self, shapes: list[tuple[int, int]], boxes: Array, classes: Array) -> tuple[Array, Array]:
        """Return labels int32 ``[B, R]`` and box targets ``[B, R, 4]`` over the anchors of all levels.

        Anchors are ordered finest level first, then y, x, anchor; labels as in ``match_anchors``.
        """
        config = self.config
        anchors = pyramid_anchors(config.anchors, dict(zip(config.levels, shapes, strict=True)))

        def assign(boxes: Array, classes: Array) -> tuple[Array, Array]:
            labels, matched = match(config.loss, anchors, boxes, classes)
            return labels, jnp.where((labels >= 0)[:, None], matched_deltas(anchors, boxes, matched), 0.0)

        return per_image(assign, boxes, classes)

    def labels(self, shapes: list[tuple[int, int]], boxes: Array, classes: Array) -> Array:
        return self.targets(shapes, boxes, classes)[0]

    def head_stacks(self) -> tuple[Stack, ...]:
        return self.head.stacks()

    def dense_heads(self, x: Array) -> tuple[Array, ...]:
        return self.head(x)

    def select(self, level: int, outputs: list[Array], cells: Cells, *, topk: int) -> Candidates:
        """Select and decode the top-k (anchor, class) pairs per image (RetinaNet section 4.1, inference).

        Args:
          outputs: class logits ``[N, A * K]`` and deltas ``[N, A * 4]``.

        Returns:
          M = min(topk, A * h * w) candidates per image. Like the published code, a level never yields more
          candidates than it has anchors (here: anchors at keys).
        """
        cls, deltas = outputs
        num_anchors, num_classes = self.config.anchors.per_cell, self.config.num_classes
        best = best_values(cls, cells, topk=topk, per_key=num_anchors)
        anchor, class_id = best.column // num_classes, best.column % num_classes
        boxes = decode_chosen(self.config.anchors, level, cells, deltas, best.row, anchor)
        scores = jnp.where(best.present, jax.nn.sigmoid(best.value), -jnp.inf)
        return Candidates(boxes, scores, class_id.astype(jnp.int32))
