"""Score detections against ground truth: COCO metrics, size bins for small objects, query recall."""

from querydet_jax.evaluation.coco import (
    ImageDetections,
    evaluate,
    save_results,
    to_coco_results,
)
from querydet_jax.evaluation.metrics import DEFAULT_BINS, CocoMetrics, SizeBin
from querydet_jax.evaluation.query import QueryRecall, query_recall

__all__ = [
    "DEFAULT_BINS",
    "CocoMetrics",
    "ImageDetections",
    "QueryRecall",
    "SizeBin",
    "evaluate",
    "query_recall",
    "save_results",
    "to_coco_results",
]
