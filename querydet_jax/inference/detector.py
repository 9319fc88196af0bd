"""The compiled function from images to detections.

The way of the data, top to bottom in `_detect`: images, pyramid, cascade over the sparse levels, dense levels,
candidates, second stage (Faster R-CNN only), score threshold, NMS.
Shape letters: B batch, H W image, h w map, M candidates, D detections.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from querydet_jax.config import InferenceConfig
from querydet_jax.models.base import DenseDetector
from querydet_jax.models.candidates import Candidates, join_candidates
from querydet_jax.ops.nms import class_wise_nms, soft_nms
from querydet_jax.runtime.errors import ConfigError
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


class Detector:
    """Image to detections, compiled once per input shape.

    ``config.query`` chooses how the fine levels are computed: ``dense`` runs the heads on every
    level everywhere (the query head not at all); ``csq`` runs them densely from
    ``config.start_level`` up and, below it, only around queries (paper section 3.3); ``cq`` and
    ``ccq`` are the paper's other two ways to read the same keys (Table 5).

    Args:
      model: a detector of ``querydet_jax.models``. Its weights are read at construction and by ``update``.
      config: inference options.

    Raises:
      ConfigError: the model lacks what ``config`` asks for.
    """

    def __init__(self, model: DenseDetector, config: InferenceConfig):
        if config.query != "dense":
            if model.query_head is None:
                raise ConfigError(
                    f"inference.query {config.query}: this model has no query head; use inference.query dense"
                )
            if model.config.head.norm != "none":
                raise ConfigError(
                    f"inference.query {config.query}: this model's heads have {model.config.head.norm} norm, which "
                    "needs the whole map; use inference.query dense"
                )
            if not model.config.min_level < config.start_level <= model.config.max_level:
                raise ConfigError(
                    f"inference.start_level {config.start_level}: the model has "
                    f"P{model.config.min_level}..P{model.config.max_level}; choose one above P{model.config.min_level}"
                )
        self.config = config
        self._graph, self._state = split_for_inference(model)
        self._run = jax.jit(partial(_detect, self._graph, config))
        self._dense_part = jax.jit(partial(_dense_part, self._graph, config))
        self._trace = jax.jit(partial(_trace, self._graph, config))

    def update(self, model: DenseDetector) -> None:
        """Take the weights of ``model``, which must have the same configuration; nothing is recompiled."""
        self._graph, self._state = split_for_inference(model)

    def __call__(self, images: Array | np.ndarray, sizes: Array | np.ndarray | None = None) -> Detections:
        """Detect in uint8 RGB ``images [B, H, W, 3]``; ``sizes`` int32 ``[B, 2]`` gives the valid
        (height, width) of each, where images are padded to a canvas."""
        return self._run(self._state, *_inputs(images, sizes))

    def trace(self, images: Array | np.ndarray, sizes: Array | np.ndarray | None = None) -> QueryTrace:
        """Query probabilities, keys and active cells by level, for pictures and statistics."""
        (trace,) = self.traces(images, sizes, (self.config.threshold,))
        return trace

    def traces(
        self, images: Array | np.ndarray, sizes: Array | np.ndarray | None, thresholds: Sequence[float]
    ) -> Iterator[QueryTrace]:
        """Yield one ``trace`` per query threshold.

        The cascade itself runs for each threshold, since a level's query probabilities exist only at its keys and
        depend on the active cells around them. The pyramid is computed once, and the threshold is an argument of
        the compiled program, so all thresholds share one.
        """
        if self.config.query == "dense":
            raise ConfigError("inference.query dense computes no queries; use inference.query csq")
        pyramid = self._dense_part(self._state, *_inputs(images, sizes))
        return (self._trace(self._state, pyramid, jnp.float32(threshold)) for threshold in thresholds)

    def function(self) -> tuple[Callable[[PyTree, Array, Array], Detections], PyTree]:
        """Return what a call runs, a pure function of (state, images, sizes), and its state, for other compilers."""
        return partial(_detect, self._graph, self.config), self._state

    def lower(self, shape: tuple[int, int, int]) -> jax.stages.Lowered:
        """Lower the program for images ``[B, H, W, 3]``, for cost analysis or ahead-of-time compilation."""
        batch, height, width = shape
        return self._run.lower(
            self._state,
            jax.ShapeDtypeStruct((batch, height, width, 3), jnp.uint8),
            jax.ShapeDtypeStruct((batch, 2), jnp.int32),
        )

    def compilations(self) -> int:
        """Return how many programs have been compiled: one per input shape and dtype."""
        return self._run._cache_size()  # pyright: ignore[reportAttributeAccessIssue]


def _inputs(images: Array | np.ndarray, sizes: Array | np.ndarray | None) -> tuple[Array, Array]:
    images = jnp.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must be [B, H, W, 3], got {images.shape}")
    if sizes is None:
        sizes = np.broadcast_to(np.asarray(images.shape[1:3], np.int32), (images.shape[0], 2))
    return images, jnp.asarray(sizes, jnp.int32)


def split_for_inference(model: DenseDetector) -> tuple[nnx.GraphDef, PyTree]:
    # A copy, so that the caller's model keeps its mode, and its buffers may be donated by a training step.
    copy = nnx.clone(model)
    copy.eval()
    graph, state = nnx.split(copy)
    return graph, state


def _detect(graph: nnx.GraphDef, config: InferenceConfig, state: PyTree, images: Array, sizes: Array) -> Detections:
    model = nnx.merge(graph, state)
    pyramid = _pyramid(model, config, images, sizes)
    sparse: dict[int, LevelResult] = {}
    if config.query != "dense":
        _, sparse = _run_cascade(model, config, pyramid, config.threshold)
    # In the published order of levels: sparse ones coarse to fine, then dense ones fine to coarse.
    selected = [result.selected for result in sparse.values()]
    selected += [_select_densely(model, config, level, x) for level, x in pyramid.dense.items() if level not in sparse]
    candidates = model.refine(join_candidates(selected), pyramid.dense, sizes)
    detections = jax.vmap(partial(_suppress, config))(*candidates)
    return Detections(*detections, stats={level: result.stats for level, result in sparse.items()})


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


def _pyramid(model: DenseDetector, config: InferenceConfig, images: Array, sizes: Array) -> Pyramid:
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
    pyramid = _pyramid(model, config, images, sizes)
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


def _dense_part(graph: nnx.GraphDef, config: InferenceConfig, state: PyTree, images: Array, sizes: Array) -> Pyramid:
    return _pyramid(nnx.merge(graph, state), config, images, sizes)


def _trace(
    graph: nnx.GraphDef, config: InferenceConfig, state: PyTree, pyramid: Pyramid, threshold: Array
) -> QueryTrace:
    start, results = _run_cascade(nnx.merge(graph, state), config, pyramid, threshold)
    probability = {config.start_level: jax.nn.sigmoid(start)}
    for level, result in results.items():
        if result.query_logits is not None:
            probability[level] = jax.nn.sigmoid(result.query_logits)
    return QueryTrace(
        probability,
        {level: result.keys for level, result in results.items()},
        {level: result.active for level, result in results.items()},
    )
