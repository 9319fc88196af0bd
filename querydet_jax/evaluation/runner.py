"""Run detectors over a data set; record scores, time per image and active cells."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from querydet_jax.config import Config, DataConfig
from querydet_jax.data import Dataset, eval_batches
from querydet_jax.data.transforms import resize_boxes
from querydet_jax.evaluation.coco import ImageDetections
from querydet_jax.evaluation.judges import Judge, check_judge
from querydet_jax.evaluation.metrics import DEFAULT_BINS, nan_to_none
from querydet_jax.evaluation.query import QueryRecall
from querydet_jax.evaluation.scoring import Scores, score
from querydet_jax.inference.detector import Detector
from querydet_jax.inference.pipeline import Detections
from querydet_jax.inference.results import in_original
from querydet_jax.inference.tiling import Tiles, run_tiled
from querydet_jax.models import DenseDetector
from querydet_jax.ops.anchors import level_shape
from querydet_jax.runtime.errors import DataError
from querydet_jax.runtime.hosts import gather, is_first
from querydet_jax.runtime.progress import progress
from querydet_jax.viz.text import percent, text_table


@dataclass
class Evaluation:
    """The results of one detector on a data set.

    Attributes:
      scores: its detections and their metrics.
      ms: milliseconds per image, one entry per batch (per image, if it is cut into windows), from uint8 pixels on the
        device to detections. Compilation is not included.
      active: {level: active share of its cells, one entry per batch}; sparse levels only.
      dense_rungs: {level: number of batches that overflowed to the dense rung}.
      recall: {level: query recall by object size and threshold}, if requested.
    """

    scores: Scores = field(init=False)
    ms: list[float] = field(default_factory=list)
    active: dict[int, list[float]] = field(default_factory=dict)
    dense_rungs: dict[int, int] = field(default_factory=dict)
    recall: dict[int, QueryRecall] = field(default_factory=dict)

    @property
    def ms_median(self) -> float:
        return float(np.median(self.ms)) if self.ms else float("nan")

    @property
    def ms_p90(self) -> float:
        """The time that nine of ten batches keep to: CSQ's depends on the picture."""
        return float(np.percentile(self.ms, 90)) if self.ms else float("nan")

    @property
    def fps(self) -> float:
        """Images per second, averaged over batches as in the paper."""
        return float(np.mean([1000.0 / ms for ms in self.ms])) if self.ms else float("nan")

    def add(self, other: Evaluation) -> None:
        """Add the results of another host on its images."""
        self.ms += other.ms
        for level, shares in other.active.items():
            self.active.setdefault(level, []).extend(shares)
        for level, count in other.dense_rungs.items():
            self.dense_rungs[level] = self.dense_rungs.get(level, 0) + count
        for level, recall in other.recall.items():
            if level in self.recall:
                self.recall[level].merge(recall)
            else:
                self.recall[level] = recall

    def active_share(self) -> dict[int, float]:
        return {level: float(np.mean(shares)) for level, shares in self.active.items()}

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.scores.to_dict(),
            "ms_per_image": nan_to_none(self.ms_median),
            "ms_per_image_p90": nan_to_none(self.ms_p90),
            "fps": nan_to_none(self.fps),
            "active_share": {f"P{level}": share for level, share in self.active_share().items()},
            "dense_rung_batches": {f"P{level}": count for level, count in self.dense_rungs.items()},
            "query_recall": {f"P{level}": recall.to_dict() for level, recall in self.recall.items()},
        }


def evaluate_detectors(
    detectors: dict[str, Detector],
    dataset: Dataset,
    data: DataConfig,
    *,
    batch_size: int = 1,
    indices: Sequence[int] | None = None,
    query_recall: bool = False,
    show_progress: bool = True,
    size_bins: Sequence[tuple[float, float]] = DEFAULT_BINS,
    between: Callable[[], None] = lambda: None,
    judge: Judge = "pycocotools",
) -> dict[str, Evaluation]:
    """Evaluate detectors side by side.

    Every batch goes through all detectors in turn, so their times stay comparable if the machine's
    speed drifts. Several hosts share the images; each returns the results over all images.

    Args:
      detectors: {name: detector}.
      dataset: images and ground truth.
      data: resize rule and canvases.
      batch_size: images per batch on each host.
      indices: positions of the images to use; None selects all.
      query_recall: also measure query recall at ``THRESHOLDS`` and at the detector's own threshold, in a
        second, untimed pass.
      between: called after every batch, equally often on all hosts; may raise to stop the evaluation.
      judge: see ``evaluate``.

    Raises:
      ConfigError: see ``check_judge``.
      DataError: an image cannot be read.
    """
    check_judge(judge)
    batches = eval_batches(
        dataset,
        data,
        batch_size=batch_size,
        indices=indices,
        shard=jax.process_index(),
        num_shards=jax.process_count(),
    )
    position = {dataset.image_id(i): i for i in range(len(dataset))}
    found: dict[str, list[ImageDetections]] = {name: [] for name in detectors}
    runs = {name: Evaluation() for name in detectors}
    timed = {name: _Timed(detector, runs[name]) for name, detector in detectors.items()}
    try:
        for batch in progress(batches, "evaluating", "batch", total=len(batches), show=show_progress and is_first()):
            images, sizes = jax.device_put((batch["images"], batch["sizes"]))
            for name, detector in detectors.items():
                result = timed[name](images, sizes)
                # Divide by all rows: images repeated to fill up the batch cost time, too.
                runs[name].ms.append(timed[name].taken() / len(batch["valid"]))
                found[name] += _detections(result, batch)
                if query_recall and detector.config.query != "dense":
                    _count_recall(runs[name], detector, images, sizes, batch, dataset, position)
            between()
    finally:
        batches.close()
    return _scored(detectors, runs, found, dataset, indices, size_bins, judge)


def evaluate_tiled(
    detectors: dict[str, Detector],
    dataset: Dataset,
    data: DataConfig,
    tiles: Tiles,
    *,
    batch_size: int = 1,
    indices: Sequence[int] | None = None,
    show_progress: bool = True,
    judge: Judge = "pycocotools",
) -> dict[str, Evaluation]:
    """Evaluate detectors side by side on pictures that are cut into windows; see ``run_tiled``.

    Every picture goes through all detectors in turn. Times are of all its windows. Several hosts share the pictures;
    each returns the results over all.

    Args:
      detectors: {name: detector}.
      data: resize rule and canvases.
      batch_size: windows per call.
      indices: positions of the images to use; None selects all.
      judge: see ``evaluate``.

    Raises:
      ConfigError: see ``check_judge``.
      DataError: an image cannot be read, or is not cut and fits no canvas.
    """
    check_judge(judge)
    chosen = list(range(len(dataset)) if indices is None else indices)[jax.process_index() :: jax.process_count()]
    found: dict[str, list[ImageDetections]] = {name: [] for name in detectors}
    runs = {name: Evaluation() for name in detectors}
    timed = {name: _Timed(detector, runs[name]) for name, detector in detectors.items()}
    results = zip(
        *(
            run_tiled(
                detector, dataset, data, tiles,
                min_scores=0.0, nms_iou=detectors[name].config.nms_iou, batch_size=batch_size, indices=chosen,
            )
            for name, detector in timed.items()
        ),
        strict=True,
    )  # fmt: skip
    for of_each in progress(results, "evaluating", "image", total=len(chosen), show=show_progress and is_first()):
        for name, result in zip(detectors, of_each, strict=True):
            image_id = dataset.image_id(result.index)
            found[name].append(ImageDetections(image_id, result.boxes, result.scores, result.classes))
            runs[name].ms.append(timed[name].taken())
    return _scored(detectors, runs, found, dataset, indices, DEFAULT_BINS, judge)


class _Timed:
    """A detector that counts milliseconds and active cells; the first call of a shape, which compiles, is repeated."""

    def __init__(self, detector: Detector, run: Evaluation):
        self._detector, self._run, self._ms = detector, run, 0.0
        self._seen: set[tuple[int, ...]] = set()

    def __call__(self, images: jax.Array | np.ndarray, sizes: jax.Array | np.ndarray) -> Detections:
        there = jax.device_put((images, sizes))
        if images.shape not in self._seen:
            jax.block_until_ready(self._detector(*there))
            self._seen.add(images.shape)
        begun = time.perf_counter()
        result = jax.block_until_ready(self._detector(*there))
        self._ms += (time.perf_counter() - begun) * 1e3
        result = jax.device_get(result)
        _count_cells(self._run, result, images.shape)
        return result

    def taken(self) -> float:
        """Return the milliseconds since the last time."""
        ms, self._ms = self._ms, 0.0
        return ms


def detectors_to_compare(model: DenseDetector, config: Config, methods: Sequence[str] = ()) -> dict[str, Detector]:
    """Build one detector per query method, the dense one first, so that speed-ups are over it.

    Args:
      methods: of dense, csq, cq, ccq; none: dense and, with a query head and heads without group norm,
        ``inference.query`` (csq if that is dense).

    Raises:
      DataError: another method.
    """
    if not methods:
        configured = config.inference.query if config.inference.query != "dense" else "csq"
        sparse = model.query_head is not None and model.config.head.norm == "none"  # group norm needs whole maps
        methods = ("dense", configured) if sparse else ("dense",)
    known = ("dense", "csq", "cq", "ccq")
    for name in methods:
        if name not in known:
            raise DataError(f"--methods {name}: is not one of {', '.join(known)}")
    return {
        name: Detector(
            model, dataclasses.replace(config.inference, query=name), max_shapes=len(config.data.test_canvases)
        )
        for name in sorted(methods, key=known.index)
    }


def first_images(dataset: Dataset, count: int) -> list[int] | None:
    """Return the positions of the first ``count`` images, or None (all images) if ``count`` is 0."""
    return list(range(min(count, len(dataset)))) if count else None


def comparison_table(runs: dict[str, Evaluation]) -> str:
    """Return a text table, one row per detector: accuracy, time, speed-up over the first, active cells."""
    first = next(iter(runs.values()))
    header = ["method", *first.scores.headline(), "ms/image", "p90", "FPS", "speed-up", "active cells"]
    rows = []
    for name, run in runs.items():
        shares = ", ".join(f"P{level} {share:.1%}" for level, share in sorted(run.active_share().items()))
        rows.append(
            [
                name,
                *map(percent, run.scores.headline().values()),
                f"{run.ms_median:.1f}",
                f"{run.ms_p90:.1f}",
                f"{run.fps:.2f}",
                f"{first.ms_median / run.ms_median:.2f}x",
                shares or "all",
            ]
        )
    return text_table(header, rows)


def _scored(
    detectors: dict[str, Detector],
    runs: dict[str, Evaluation],
    found: dict[str, list[ImageDetections]],
    dataset: Dataset,
    indices: Sequence[int] | None,
    size_bins: Sequence[tuple[float, float]],
    judge: Judge,
) -> dict[str, Evaluation]:
    """Put the results of all hosts together and score them."""
    (runs, found), *others = gather((runs, found))
    for of_other, found_there in others:
        for name in detectors:
            runs[name].add(of_other[name])
            found[name] += found_there[name]
    for name, run in runs.items():
        most = detectors[name].config.max_detections
        run.scores = score(dataset, found[name], indices=indices, size_bins=size_bins, max_detections=most, judge=judge)
    return runs


def _count_cells(run: Evaluation, result: Detections, shape: tuple[int, ...]) -> None:
    for level, stats in result.stats.items():
        cells = shape[0] * _cells(shape, level)
        run.active.setdefault(level, []).append(float(stats.active) / cells)
        run.dense_rungs[level] = run.dense_rungs.get(level, 0) + int(stats.overflowed)


def _detections(result: Any, batch: dict[str, np.ndarray]) -> list[ImageDetections]:
    return [
        ImageDetections(int(batch["image_ids"][row]), *in_original(result, batch, row))
        for row in np.flatnonzero(batch["valid"])
    ]


def _count_recall(
    run: Evaluation,
    detector: Detector,
    images: jax.Array,
    sizes: jax.Array,
    batch: dict[str, np.ndarray],
    dataset: Dataset,
    position: dict[int, int],
) -> None:
    configured = detector.config.threshold
    thresholds = QueryRecall(configured).thresholds
    traces = jax.device_get(list(detector.traces(images, sizes, thresholds)))
    for i in np.flatnonzero(batch["valid"]):
        truth = dataset.annotation(position[int(batch["image_ids"][i])])
        boxes = resize_boxes(
            truth.boxes[~truth.crowd], tuple(batch["original_sizes"][i].tolist()), tuple(batch["sizes"][i].tolist())
        )
        for level in traces[0].keys:
            keys = np.stack([trace.keys[level][i] for trace in traces])
            active = np.stack([trace.active[level][i] for trace in traces])
            run.recall.setdefault(level, QueryRecall(configured)).add(boxes, keys, active, 2**level)


def _cells(shape: tuple[int, ...], level: int) -> int:
    height, width = level_shape(shape[1], shape[2], level)
    return height * width
