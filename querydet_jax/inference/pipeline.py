"""From images to detections, as pure functions.

The way of the data, top to bottom in `detect`: images, pyramid, cascade over the sparse levels, dense levels,
candidates, second stage (Faster R-CNN only), score threshold, NMS.
Shape letters: B batch, H W image, h w map, M candidates, D detections.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from querydet_jax.config import InferenceConfig
from querydet_jax.models.base import DenseDetector
from querydet_jax.models.candidates import Candidates, join_candidates
from querydet_jax.ops.nms import class_wise_nms, soft_nms
from querydet_jax.sparse import CascadeLevel, LevelResult, LevelStats, SparseOptions, cascade, whole_map

PyTree = Any


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["boxes", "scores", "classes", "valid", "stats"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Detections:
    """Detections of a batch, best first.

    boxes float32 ``[B, D, 4]`` xyxy px of the network input, not clipped; scores ``[B, D]``, 0 where
    not valid; classes int32 ``[B, D]``, 0..K-1, -1 where not valid; valid bool ``[B, D]``; stats
    ``{level: LevelStats}`` of the sparse levels (empty for dense inference).
    """

    boxes: Array
    scores: Array
    classes: Array
    valid: Array
    stats: dict[int, LevelStats]


class QueryTrace(NamedTuple):
    """Maps of a batch that show the cascade at work, by level.

    ``probability`` float32 ``[B, h, w]``: query probability on the start level and on the sparse
    levels, 0 outside the keys; ``keys`` and ``active`` bool ``[B, h, w]`` on the sparse levels.
    """

    probability: dict[int, Array]
    keys: dict[int, Array]
    active: dict[int, Array]


def split_for_inference(model: DenseDetector) -> tuple[nnx.GraphDef, PyTree]:
    """Return a detector's structure, in evaluation mode, and its weights: the first arguments of the functions here."""
    # A copy, so that the caller's model keeps its mode, and its buffers may be donated by a training step.
    copy = nnx.clone(model)
    copy.eval()
    graph, state = nnx.split(copy)
    return graph, state


def detect(graph: nnx.GraphDef, config: InferenceConfig, state: PyTree, images: Array, sizes: Array) -> Detections:
    """Detect objects in uint8 ``images [B, H, W, 3]`` with valid ``sizes [B, 2]``."""
    candidates, _, sparse = _candidates(nnx.merge(graph, state), config, images, sizes, config.threshold)
    return _detections(config, candidates, sparse)


def detect_and_trace(
    graph: nnx.GraphDef, config: InferenceConfig, state: PyTree, images: Array, sizes: Array, threshold: Array
) -> tuple[Detections, QueryTrace]:
    """Return what ``detect`` and ``trace_cascade`` return, for a query threshold float32 ``[]``."""
    candidates, start, sparse = _candidates(nnx.merge(graph, state), config, images, sizes, threshold)
    return _detections(config, candidates, sparse), _maps(config, start, sparse)


def _detections(config: InferenceConfig, candidates: Candidates, sparse: dict[int, LevelResult]) -> Detections:
    detections = jax.vmap(partial(_suppress, config))(*candidates)
    return Detections(*detections, stats={level: result.stats for level, result in sparse.items()})


def only_candidates(
    graph: nnx.GraphDef, config: InferenceConfig, state: PyTree, images: Array, sizes: Array
) -> Candidates:
    """Return the best boxes of all levels, before the score threshold and NMS."""
    return _candidates(nnx.merge(graph, state), config, images, sizes, config.threshold)[0]


def _candidates(
    model: DenseDetector, config: InferenceConfig, images: Array, sizes: Array, threshold: float | Array
) -> tuple[Candidates, Array | None, dict[int, LevelResult]]:
    """Return the best boxes of all levels, before NMS, and what ``_run_cascade`` returns (None, {} if dense)."""
    pyramid = make_pyramid(model, config, images, sizes)
    start, sparse = (None, {}) if config.query == "dense" else _run_cascade(model, config, pyramid, threshold)
    # In the published order of levels: sparse ones coarse to fine, then dense ones fine to coarse.
    selected = [result.selected for result in sparse.values()]
    selected += [_select_densely(model, config, level, x) for level, x in pyramid.dense.items() if level not in sparse]
    return model.refine(join_candidates(selected), pyramid.dense, sizes), start, sparse


def _select_densely(model: DenseDetector, config: InferenceConfig, level: int, x: Array) -> Candidates:
    """Run the heads on all of a level ``x [B, h, w, C]`` and select candidates."""
    outputs = [y.reshape(-1, y.shape[-1]) for y in model.dense_heads(x)]
    return model.select(level, outputs, whole_map(jnp.ones(x.shape[:3], bool)), topk=config.topk)


def _suppress(
    config: InferenceConfig, boxes: Array, scores: Array, classes: Array
) -> tuple[Array, Array, Array, Array]:
    """Threshold one image's candidates ``[M]`` and run NMS; return boxes, scores, classes and valid ``[D]``."""
    scores = jnp.where(scores > config.score_threshold, scores, -jnp.inf)
    common: dict[str, Any] = dict(iou_threshold=config.nms_iou, max_detections=config.max_detections)
    if config.nms == "hard":
        keep, valid = class_wise_nms(boxes, scores, classes, **common)
        kept_scores = scores[keep]
    else:
        keep, valid, kept_scores = soft_nms(
            boxes, scores, classes, method=config.nms, sigma=config.soft_sigma, prune=config.soft_prune, **common
        )
    return (
        jnp.where(valid[:, None], boxes[keep], 0.0),
        jnp.where(valid, kept_scores, 0.0),
        jnp.where(valid, classes[keep], -1),
        valid,
    )


class Pyramid(NamedTuple):
    """The levels whose features are computed densely, and what the sparse levels are made from. By level."""

    dense: dict[int, Array]  # P_l [B, h, w, C]
    stages: dict[int, Array]  # C_l
    merged: dict[int, Array]  # of the top-down path


def make_pyramid(model: DenseDetector, config: InferenceConfig, images: Array, sizes: Array) -> Pyramid:
    """Run backbone and FPN, densely as far as ``config.query`` asks for it."""
    finest = model.config.min_level
    everywhere = config.query == "dense" or model.second_stage
    dense_from = finest if everywhere else config.start_level
    stages = model.backbone(model.normalize(images, sizes))
    # A sparse finest level computes its part of the top-down path itself, at its sites.
    merged = model.fpn.merge(stages, min(finest if everywhere else finest + 1, 5))
    # Levels above P5 are made from C5 or P5. As sparse levels, too, they are computed densely.
    return Pyramid(model.fpn.outputs(stages, merged, dense_from if dense_from <= 5 else 6), stages, merged)


def _run_cascade(
    model: DenseDetector, config: InferenceConfig, pyramid: Pyramid, threshold: float | Array
) -> tuple[Array, dict[int, LevelResult]]:
    """Return the start level's query logits ``[B, h, w]`` and each sparse level's result, coarse to fine."""
    query_head = model.query_head
    assert query_head is not None, "Detector has checked that the model has a query head"
    start = query_head(pyramid.dense[config.start_level])
    levels = _cascade_levels(model, config, pyramid)
    results = cascade(
        start,
        levels,
        model.head_stacks(),
        query_head.stack(),
        partial(model.select, topk=config.topk),
        sparse_options(config)._replace(threshold=threshold),
    )
    return start, {level.level: result for level, result in zip(levels, results, strict=True)}


def _cascade_levels(model: DenseDetector, config: InferenceConfig, pyramid: Pyramid) -> list[CascadeLevel]:
    return [
        CascadeLevel(level, pyramid.dense[level])
        if level in pyramid.dense
        else model.fpn.sparse_level(level, pyramid.stages, pyramid.merged)
        for level in range(config.start_level - 1, model.config.min_level - 1, -1)
    ]


def cascade_levels(
    model: DenseDetector, config: InferenceConfig, images: Array, sizes: Array
) -> dict[int, CascadeLevel]:
    """Return what the levels below the start level are computed from, by level, coarse to fine."""
    pyramid = make_pyramid(model, config, images, sizes)
    return {level.level: level for level in _cascade_levels(model, config, pyramid)}


def sparse_options(config: InferenceConfig) -> SparseOptions:
    """Return the cascade's part of the configuration; for dense inference, that of CSQ."""
    return SparseOptions(
        config.threshold,
        config.context,
        config.capacities,
        config.chunk,
        "csq" if config.query == "dense" else config.query,
        config.overflow,
        config.kernel,
        config.tile,
    )


def dense_part(graph: nnx.GraphDef, config: InferenceConfig, state: PyTree, images: Array, sizes: Array) -> Pyramid:
    """Run ``make_pyramid``, which all query thresholds share."""
    return make_pyramid(nnx.merge(graph, state), config, images, sizes)


def trace_cascade(
    graph: nnx.GraphDef, config: InferenceConfig, state: PyTree, pyramid: Pyramid, threshold: Array
) -> QueryTrace:
    """Return the maps of the cascade for a query threshold float32 ``[]``."""
    return _maps(config, *_run_cascade(nnx.merge(graph, state), config, pyramid, threshold))


def _maps(config: InferenceConfig, start: Array | None, results: dict[int, LevelResult]) -> QueryTrace:
    probability = {} if start is None else {config.start_level: jax.nn.sigmoid(start)}
    for level, result in results.items():
        if result.query_logits is not None:
            probability[level] = jax.nn.sigmoid(result.query_logits)
    return QueryTrace(
        probability,
        {level: result.keys for level, result in results.items()},
        {level: result.active for level, result in results.items()},
    )
