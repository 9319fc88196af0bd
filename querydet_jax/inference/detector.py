"""The compiled function from images to detections.

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
from querydet_jax.sparse import CascadeLevel, LevelResult, LevelStats, Method, SparseOptions, cascade, whole_map

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
    """What a picture of the cascade shows. Maps of a batch, by level.

    ``probability`` float32 ``[B, h, w]``: query probability on the start level and on the sparse
    levels, where it is 0 outside the keys; ``keys`` and ``active`` bool ``[B, h, w]`` on the sparse levels.
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
      model: a detector of ``querydet_jax.models``. Its weights are read at construction and again
        whenever ``update`` is called.
      config: what to do at inference.
      method: another way to compute a sparse level than the one that ``config.query`` names.

    Raises:
      ConfigError: the model lacks what ``config`` asks for.
    """

    def __init__(self, model: DenseDetector, config: InferenceConfig, method: Method | None = None):
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
        self._method = method
        self._graph, self._state = split_for_inference(model)
        self._run = jax.jit(partial(_detect, self._graph, config, method))
        self._dense_part = jax.jit(partial(_dense_part, self._graph, config))
        self._trace = jax.jit(partial(_trace, self._graph, config, method))

    def update(self, model: DenseDetector) -> None:
        """Take the weights of ``model``, of the same configuration; nothing is compiled again."""
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
        """``trace`` at other query thresholds than the configured one, a trace a threshold.

        At each the cascade itself runs, since a level's query probabilities exist only at the keys that the
        level above leaves it, and depend on which cells are active around these. What lies before it is
        computed once, and the threshold is an argument of the compiled program: all share one.
        """
        if self.config.query == "dense":
            raise ConfigError("inference.query dense computes no queries; use inference.query csq")
        pyramid = self._dense_part(self._state, *_inputs(images, sizes))
        return (self._trace(self._state, pyramid, jnp.float32(threshold)) for threshold in thresholds)

    def function(self) -> tuple[Callable[[PyTree, Array, Array], Detections], PyTree]:
        """What a call runs, a pure function of (state, images, sizes), and its state: for other compilers than jit."""
        return partial(_detect, self._graph, self.config, self._method), self._state

    def lower(self, shape: tuple[int, int, int]) -> jax.stages.Lowered:
        """The program for images ``[B, H, W, 3]``, for cost analysis or compilation ahead of time."""
        batch, height, width = shape
        return self._run.lower(
            self._state,
            jax.ShapeDtypeStruct((batch, height, width, 3), jnp.uint8),
            jax.ShapeDtypeStruct((batch, 2), jnp.int32),
        )

    def compilations(self) -> int:
        """How many programs have been compiled: one an input shape and dtype."""
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


def _detect(
    graph: nnx.GraphDef, config: InferenceConfig, method: Method | None, state: PyTree, images: Array, sizes: Array
) -> Detections:
    model = nnx.merge(graph, state)
    pyramid = _pyramid(model, config, images, sizes)
    found, results = _candidates(model, config, pyramid, method)
    joined = model.refine(join_candidates(found), pyramid.dense, sizes)
    scores = jnp.where(joined.scores > config.score_threshold, joined.scores, -jnp.inf)

    def finish(boxes: Array, scores: Array, classes: Array) -> tuple[Array, Array, Array, Array]:
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

    detections = jax.vmap(finish)(joined.boxes, scores, joined.classes)
    return Detections(*detections, stats={level: result.stats for level, result in results.items()})


def _dense_part(graph: nnx.GraphDef, config: InferenceConfig, state: PyTree, images: Array, sizes: Array) -> Pyramid:
    return _pyramid(nnx.merge(graph, state), config, images, sizes)


def _trace(
    graph: nnx.GraphDef,
    config: InferenceConfig,
    method: Method | None,
    state: PyTree,
    pyramid: Pyramid,
    threshold: Array,
) -> QueryTrace:
    start, results = _run_cascade(nnx.merge(graph, state), config, pyramid, threshold, method)
    probability = {config.start_level: jax.nn.sigmoid(start)}
    for level, result in results.items():
        if result.query_logits is not None:
            probability[level] = jax.nn.sigmoid(result.query_logits)
    return QueryTrace(
        probability,
        {level: result.keys for level, result in results.items()},
        {level: result.active for level, result in results.items()},
    )


class Pyramid(NamedTuple):
    """The levels whose features are computed densely, and what the others are made from. By level."""

    dense: dict[int, Array]  # P_l [B, h, w, C]
    stages: dict[int, Array]  # C_l
    merged: dict[int, Array]  # of the top-down path


def _pyramid(model: DenseDetector, config: InferenceConfig, images: Array, sizes: Array) -> Pyramid:
    finest = model.config.min_level
    everywhere = config.query == "dense" or model.second_stage
    dense_from = finest if everywhere else config.start_level
    stages = model.backbone(model.normalize(images, sizes))
    # A sparse finest level makes its part of the top-down path itself, at its sites.
    merged = model.fpn.merge(stages, min(finest if everywhere else finest + 1, 5))
    # Levels above P5 are made from C5 or P5; as sparse levels they are taken as they come.
    return Pyramid(model.fpn.outputs(stages, merged, dense_from if dense_from <= 5 else 6), stages, merged)


def _candidates(
    model: DenseDetector, config: InferenceConfig, pyramid: Pyramid, method: Method | None
) -> tuple[list[Candidates], dict[int, LevelResult]]:
    """Candidates in the published order of levels: sparse ones coarse to fine, then dense fine to coarse."""
    results: dict[int, LevelResult] = {}
    if config.query != "dense":
        _, results = _run_cascade(model, config, pyramid, config.threshold, method)
    found = [result.reduced for result in results.values()]
    for level, x in pyramid.dense.items():
        if level in results:
            continue
        outputs = [y.reshape(-1, y.shape[-1]) for y in model.dense_heads(x)]
        everywhere = whole_map(jnp.ones(x.shape[:3], bool))
        found.append(model.candidates(level, outputs, everywhere, topk=config.topk))
    return found, results


def sparse_levels(
    model: DenseDetector, config: InferenceConfig, images: Array, sizes: Array
) -> dict[int, CascadeLevel]:
    """What the levels below the start level are computed from, by level, coarse to fine."""
    pyramid = _pyramid(model, config, images, sizes)
    return {level.level: level for level in _sparse_levels(model, config, pyramid)}


def _sparse_levels(model: DenseDetector, config: InferenceConfig, pyramid: Pyramid) -> list[CascadeLevel]:
    return [
        CascadeLevel(level, pyramid.dense[level])
        if level in pyramid.dense
        else model.fpn.sparse_level(level, pyramid.stages, pyramid.merged)
        for level in range(config.start_level - 1, model.config.min_level - 1, -1)
    ]


def sparse_options(config: InferenceConfig) -> SparseOptions:
    """The cascade's part of the configuration; of dense inference, what CSQ would take."""
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


def _run_cascade(
    model: DenseDetector, config: InferenceConfig, pyramid: Pyramid, threshold: float | Array, method: Method | None
) -> tuple[Array, dict[int, LevelResult]]:
    query_head = model.query_head
    assert query_head is not None, "Detector has checked that the model has a query head"
    start = query_head(pyramid.dense[config.start_level])
    levels = _sparse_levels(model, config, pyramid)
    results = cascade(
        start,
        levels,
        model.head_stacks(),
        query_head.stack(),
        partial(model.candidates, topk=config.topk),
        sparse_options(config)._replace(threshold=threshold),
        method,
    )
    return start, {level.level: result for level, result in zip(levels, results, strict=True)}
