"""Faster R-CNN (Ren et al. 2015) on a feature pyramid, and Cascade Sparse Query in its RPN (paper Table 9).

Queries thin out the first stage: on the fine levels the RPN computes objectness and deltas at the keys only. The
second stage reads the proposals' features, so all levels of the pyramid are computed.
Shape letters: B batch, h w map, A anchors per cell, R anchors of all levels, K classes, G padded boxes, P proposals per
image, M sampled anchors or proposals per image, N rows, C channels, S bins per side.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from querydet_jax.config import ModelConfig
from querydet_jax.models.anchored import decode_chosen, match, pyramid_anchors
from querydet_jax.models.base import DenseDetector
from querydet_jax.models.candidates import Candidates, best_values, join_candidates
from querydet_jax.models.loss_terms import Losses, Normalization, Outputs, TrainingBatch, level_map
from querydet_jax.models.rpn import RPNHead, RPNQueryHead
from querydet_jax.models.second_stage import DELTA_WEIGHTS, BoxHead, sample_proposals
from querydet_jax.ops.boxes import clip, decode
from querydet_jax.ops.losses import binary_cross_entropy, smooth_l1
from querydet_jax.ops.matching import BACKGROUND, matched_deltas, per_image
from querydet_jax.ops.nms import class_wise_nms
from querydet_jax.ops.roi_align import roi_align
from querydet_jax.ops.sampling import sample_balanced
from querydet_jax.sparse import Cells, Stack, whole_map

_LAST_ROI_LEVEL = 5  # P6 is for large anchors only


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "cls", "box", "query", "total", "num_foreground", "normalizer", "per_level", "rpn_cls", "rpn_box",
    ],
    meta_fields=[],
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class FasterRCNNLosses(Losses):
    """``cls`` and ``box`` are the second stage's; foreground are its sampled proposals with an object.

    ``per_level`` has the RPN's unweighted sums ``rpn_cls`` and ``rpn_box``. ``normalizer`` is passed through.
    """

    rpn_cls: Array
    rpn_box: Array

    def terms(self) -> dict[str, Array]:
        return {"rpn_cls": self.rpn_cls, "rpn_box": self.rpn_box, **super().terms()}


class Proposals(NamedTuple):
    """Boxes ``[B, P, 4]`` px within the image; scores ``[B, P]``, objectness logits, best first; valid ``[B, P]``."""

    boxes: Array
    scores: Array
    valid: Array


class FasterRCNN(DenseDetector):
    """Faster R-CNN on P_min..P6; with a query head its RPN runs on the fine levels around queries only.

    ``model(images)`` returns the RPN's outputs with K = 1: class logits are objectness. Both stages are as in
    detectron2: one anchor size per level, proposals by NMS within each level, ROIAlign, two fully connected layers,
    softmax over K + 1 classes, one box per class.
    """

    second_stage = True

    def __init__(self, config: ModelConfig, rng: np.random.Generator):
        super().__init__(config, rng, query_branch=True)
        channels = config.fpn.channels
        self.head = RPNHead(config.head, channels, config.anchors.per_cell, self.dtype, rng)
        self.query_head: RPNQueryHead | None = (  # pyright: ignore[reportIncompatibleVariableOverride]
            RPNQueryHead(self.head, self.dtype, rng) if config.query.enabled else None
        )
        stages = config.faster_rcnn
        self.box_head = BoxHead(channels, stages.roi_size, stages.channels, config.num_classes, self.dtype, rng)

    def __call__(self, images: Array, sizes: Array | None = None) -> Outputs:
        """Compute the dense outputs of uint8 RGB images ``[B, H, W, 3]`` (``sizes``: see ``DenseDetector``)."""
        return self._first_stage(self.features(jnp.asarray(images), sizes), remat=False)

    def _first_stage(self, features: dict[int, Array], remat: bool) -> Outputs:
        def heads(x: Array) -> tuple[Array, Array, Array | None]:
            trunk = self.head.trunk_output(x)
            return *self.head.branches(trunk), None if self.query_head is None else self.query_head.branch(trunk)

        cls, box, query = {}, {}, {}
        for level, x in features.items():
            objectness, deltas, queries = level_map(heads, level, remat, x)
            cls[level] = objectness[..., None]
            box[level] = deltas.reshape(*objectness.shape, 4)
            if queries is not None and level in self.config.query.levels:
                query[level] = queries
        return Outputs(features, cls, box, query)

    def batch_losses(self, batch: TrainingBatch, normalization: Normalization, *, remat: bool) -> FasterRCNNLosses:
        """Return the losses of both stages.

        loss_rpn_cls = sum_l beta_l sum BCE / (M B), loss_rpn_box = sum_l beta_l sum smooth L1 / (M B) over the
        sampled anchors; loss_cls = mean cross-entropy, loss_box = sum smooth L1 / number over the sampled proposals;
        loss_query as for the other detectors; total is their sum.

        Without ``batch.keys`` each call draws the same sample. Replicas divide by the proposals sampled on all of
        them; accumulated shards divide by their own, which differs where an image has too few proposals.
        """
        stages = self.config.faster_rcnn
        images, boxes, classes = batch.images, batch.boxes, batch.classes
        axis_name, shards = normalization.axis_name, normalization.global_batch
        sizes = _whole_images(images) if batch.sizes is None else batch.sizes
        outputs = self._first_stage(self.features(images, sizes), remat)
        keys = jax.random.split(jax.random.key(0), len(images)) if batch.keys is None else batch.keys
        rpn_keys, roi_keys = (jax.vmap(partial(jax.random.fold_in, data=draw))(keys) for draw in (0, 1))

        # The RPN's trunk has computed the query logits already.
        query = self.query_losses(outputs.query, batch, logits=lambda x: x)
        sums = self._rpn_sums(outputs, boxes, classes, rpn_keys)
        terms, per_level = self.weighted_terms(sums, stages.rpn_samples * len(images), query)

        proposals = self.proposals(self._whole_level_candidates(outputs, stages.train_topk), sizes)
        roi, num_foreground = self._roi_losses(outputs.features, proposals, boxes, classes, roi_keys, axis_name)
        if shards is not None:  # so that the mean over accumulated shards is the sum
            num_foreground *= shards.parts / (1 if axis_name is None else lax.axis_size(axis_name))
        total = terms["rpn_cls"] + terms["rpn_box"] + roi["cls"] + roi["box"] + terms["query"]
        return FasterRCNNLosses(
            **terms, **roi, total=total, num_foreground=num_foreground,
            normalizer=normalization.average, per_level=per_level,
        )  # fmt: skip

    def count_foreground(self, size: tuple[int, int], boxes: Array, classes: Array) -> Array:
        """Return 0: no loss is divided by the foreground."""
        return jnp.zeros((), jnp.float32)

    # First stage ---------------------------------------------------------------------------

    def rpn_targets(self, anchors: Array, boxes: Array, classes: Array) -> tuple[Array, Array]:
        """Match one image's anchors: labels int32 ``[R]``, 0: foreground, else as in ``match_anchors``; box index."""
        return match(self.config.loss, anchors, boxes, jnp.where(classes >= 0, 0, BACKGROUND))

    def _rpn_sums(self, outputs: Outputs, boxes: Array, classes: Array, keys: Array) -> dict[str, list[Array]]:
        """Sum the losses over the sampled anchors of all images, by level, unweighted."""
        stages = self.config.faster_rcnn
        shapes = {level: (x.shape[1], x.shape[2]) for level, x in outputs.features.items()}
        anchors = pyramid_anchors(self.config.anchors, shapes)
        num_anchors = self.config.anchors.per_cell
        cells = np.array([height * width * num_anchors for height, width in shapes.values()])
        level_of = jnp.asarray(np.repeat(np.arange(len(cells)), cells))

        def sample(boxes: Array, classes: Array, key: Array) -> tuple[Array, Array, Array, Array]:
            labels, matched = self.rpn_targets(anchors, boxes, classes)
            found = sample_balanced(
                key, labels >= 0, labels == BACKGROUND, count=stages.rpn_samples, fraction=stages.rpn_foreground
            )
            deltas = matched_deltas(anchors[found.index], boxes, matched[found.index])
            return found.index, found.foreground, found.valid, deltas

        index, foreground, valid, targets = per_image(sample, boxes, classes, keys)
        objectness = jnp.concatenate([x.reshape(len(boxes), -1) for x in outputs.cls.values()], axis=1)
        deltas = jnp.concatenate([x.reshape(len(boxes), -1, 4) for x in outputs.box.values()], axis=1)
        logits = jnp.take_along_axis(objectness, index, axis=1)
        entropy = jnp.where(valid, binary_cross_entropy(logits, foreground.astype(jnp.float32)), 0.0)
        difference = jnp.take_along_axis(deltas, index[..., None], axis=1) - targets
        difference = jnp.where(foreground[..., None], difference, 0.0)
        regression = jnp.sum(smooth_l1(difference, beta=self.config.loss.smooth_l1_beta), axis=-1)

        def by_level(values: Array) -> list[Array]:
            return list(jnp.zeros((len(cells),), jnp.float32).at[level_of[index].reshape(-1)].add(values.reshape(-1)))

        return {"rpn_cls": by_level(entropy), "rpn_box": by_level(regression)}

    def head_stacks(self) -> tuple[Stack, ...]:
        return self.head.stacks()

    def dense_heads(self, x: Array) -> tuple[Array, ...]:
        return (self.head.before_branches(x),)

    def select(self, level: int, outputs: list[Array], cells: Cells, *, topk: int) -> Candidates:
        """Select and decode the top-k anchors per image, by objectness.

        Args:
          outputs: ``[N, C]``, what ``RPNHead.stacks`` computes.

        Returns:
          M = min(topk, A * h * w) candidates per image; scores are logits, "classes" the level.
        """
        (x,) = outputs
        objectness, deltas = self.head.branches(jax.nn.relu(x).astype(self.dtype))
        return self._best_anchors(level, objectness, deltas, cells, topk)

    def _best_anchors(self, level: int, objectness: Array, deltas: Array, cells: Cells, topk: int) -> Candidates:
        config = self.config.anchors
        best = best_values(objectness, cells, topk=topk, per_key=config.per_cell)
        boxes = decode_chosen(config, level, cells, deltas, best.row, best.column)
        return Candidates(boxes, best.value, jnp.full(best.value.shape, level, jnp.int32))

    def _whole_level_candidates(self, outputs: Outputs, topk: int) -> Candidates:
        found = []
        for level, objectness in outputs.cls.items():
            _, height, width, num_anchors, _ = objectness.shape
            rows = lax.stop_gradient((objectness.reshape(-1, num_anchors), outputs.box[level].reshape(-1, 4)))
            everywhere = whole_map(jnp.ones((len(objectness), height, width), bool))
            found.append(self._best_anchors(level, *rows, everywhere, topk))
        return join_candidates(found)

    def proposals(self, found: Candidates, sizes: Array) -> Proposals:
        """Clip boxes to the images, drop empty ones, run NMS within each level and keep the best of all levels."""
        stages = self.config.faster_rcnn

        def choose(boxes: Array, scores: Array, level: Array, size: Array) -> Proposals:
            boxes = clip(boxes, size)
            # Infinite and NaN boxes are no proposals either.
            fits = jnp.all(boxes[:, 2:] > boxes[:, :2], axis=1) & jnp.all(jnp.isfinite(boxes), axis=1)
            scores = jnp.where(fits & (scores > -jnp.inf), scores, -jnp.inf)
            keep, valid = class_wise_nms(
                boxes, scores, level, iou_threshold=stages.proposal_iou, max_detections=stages.proposals
            )
            return Proposals(
                jnp.where(valid[:, None], boxes[keep], 0.0), jnp.where(valid, scores[keep], -jnp.inf), valid
            )

        return per_image(choose, *found, sizes)

    # Second stage --------------------------------------------------------------------------

    def refine(self, found: Candidates, features: dict[int, Array], sizes: Array) -> Candidates:
        """Classify and move the proposals: one candidate per proposal and class, clipped to the image."""
        proposals = self.proposals(found, sizes)
        probability, deltas = self.classify(features, proposals.boxes, proposals.valid)
        num_classes = self.config.num_classes
        boxes = decode(proposals.boxes[:, :, None], deltas / jnp.asarray(DELTA_WEIGHTS, jnp.float32)[None, None, None])
        boxes = jax.vmap(clip)(boxes.reshape(len(boxes), -1, 4), sizes)
        scores = jnp.where(proposals.valid[..., None], probability[..., :num_classes], -jnp.inf)
        classes = jnp.broadcast_to(jnp.arange(num_classes, dtype=jnp.int32)[None, None], scores.shape)
        return Candidates(boxes, scores.reshape(len(boxes), -1), classes.reshape(len(boxes), -1))

    def classify(self, features: dict[int, Array], boxes: Array, valid: Array) -> tuple[Array, Array]:
        """Compute class probabilities ``[B, P, K + 1]``, background last, and deltas ``[B, P, K, 4]``."""
        logits, deltas = self._box_head(features, boxes, valid)
        return jax.nn.softmax(logits), deltas

    def _box_head(self, features: dict[int, Array], boxes: Array, valid: Array) -> tuple[Array, Array]:
        read = {level: x for level, x in features.items() if level <= _LAST_ROI_LEVEL}
        pooled = roi_align(read, boxes, valid, size=self.config.faster_rcnn.roi_size)
        return self.box_head(pooled)

    def _roi_losses(
        self,
        features: dict[int, Array],
        proposals: Proposals,
        boxes: Array,
        classes: Array,
        keys: Array,
        axis_name: str | None,
    ) -> tuple[dict[str, Array], Array]:
        """Compute ``cls`` and ``box`` over the sampled proposals of all images, and count their foreground."""
        config = self.config
        sample = partial(sample_proposals, config=config.faster_rcnn, num_classes=config.num_classes)
        found = per_image(sample, proposals.boxes, proposals.valid, boxes, classes, keys)
        logits, deltas = self._box_head(features, found.boxes, found.valid)
        entropy = -jnp.take_along_axis(jax.nn.log_softmax(logits), found.labels[..., None], axis=-1)[..., 0]
        learnt = jnp.minimum(found.labels, config.num_classes - 1)  # background: any class will do
        mine = jnp.take_along_axis(deltas, learnt[..., None, None], axis=2)[:, :, 0]
        foreground = found.valid & (found.labels < config.num_classes)
        difference = jnp.where(foreground[..., None], mine - found.deltas, 0.0)
        count, num_foreground, parts = jnp.sum(found.valid, dtype=jnp.int32), jnp.sum(foreground, dtype=jnp.int32), 1
        if axis_name is not None:
            count, num_foreground = lax.psum((count, num_foreground), axis_name)
            parts = lax.axis_size(axis_name)
        count = jnp.maximum(count.astype(jnp.float32), 1.0) / parts
        losses = {
            "cls": jnp.sum(jnp.where(found.valid, entropy, 0.0)) / count,
            "box": jnp.sum(smooth_l1(difference, beta=config.loss.smooth_l1_beta)) / count,
        }
        return losses, num_foreground.astype(jnp.float32)


def _whole_images(images: Array) -> Array:
    return jnp.broadcast_to(jnp.asarray(images.shape[1:3], jnp.int32)[None], (len(images), 2))
