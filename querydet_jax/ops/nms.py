"""Candidate selection and non-maximum suppression with static shapes.

Shape letters: S rows (sites), M scores per row or number of candidates, D detections, N boxes.
"""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
from jax import Array, lax

from querydet_jax.ops.boxes import pairwise_iou

# Each iteration of `class_wise_nms` takes the _CONSIDERED best candidates, drops those that a kept
# box suppresses, and settles the first _SETTLED of the others. Tuned on 6000 clustered candidates:
# few keep the first iterations cheap, many let later ones pass the suppressed candidates.
_CONSIDERED = 256
_SETTLED = 128

# Scores from here down are those of absent candidates, -inf. OpenVINO turns -inf into this number, and loops that
# compare with -inf would not end there.
_ABSENT = jnp.finfo(jnp.float32).min

# `largest` selects among groups above this many values.
_SORTED = 32_768


def top_scores(
    scores: Array, row_best: Array, k: int, position: Array | None = None, most_rows: int | None = None
) -> tuple[Array, Array, Array]:
    """Return the ``k`` largest of ``scores [S, M]`` without sorting all of them.

    The k largest entries lie within the k rows with the largest maxima. A selection among S row maxima
    and one among k rows thus give the exact result; on a dense P2 at 800x1344, the first selects among
    67,200 maxima instead of 48 million scores.

    Args:
      scores: ``[S, M]``.
      row_best: ``[S]``, the rows' maxima; -inf excludes a row.
      k: how many to return.
      position: int ``[S]``, the rows' positions on the map; None if the rows are in map order.
      most_rows: upper bound on the number of rows not excluded; None is S.

    Returns:
      ``values [k']``, descending, filled up with -inf; ``row [k']`` and ``column [k']``, with
      k' = min(k, min(S, most_rows) * M). Equal scores are ordered by position, then column.
    """
    num_rows, num_columns = scores.shape
    most = k if most_rows is None else min(k, most_rows)
    best, rows = largest(row_best, min(most, num_rows))
    # Restore map order, so that ties go to the earlier cell.
    order = jnp.argsort(rows if position is None else position[rows])
    rows, best = rows[order], best[order]
    chosen = jnp.where((best > -jnp.inf)[:, None], scores[rows], -jnp.inf)
    values, flat = largest(chosen.reshape(-1), min(k, chosen.size))
    return values, rows[flat // num_columns], flat % num_columns


def largest(values: Array, k: int) -> tuple[Array, Array]:
    """Return what ``lax.top_k`` returns for ``values [N]``, descending ``[k]`` and their indices, by shorter sorts.

    XLA sorts all N on a GPU. The k largest lie within the k groups with the largest maxima, so that groups of g =
    sqrt(N / k) neighbours leave two selections among sqrt(N k) entries: among 26,667 and 27,000 in place of 720,000.
    On a CPU, whose top_k does not sort, groups neither win nor lose: 1.9 and 1.7 ms for 720,000, 0.7 and 0.5 ms for
    67,200 (medians, 2 cores of an AMD EPYC, jax 0.10.2).
    """
    count: Any = values.shape[0]
    symbolic = not isinstance(count, int)  # in an artifact for any batch size
    if symbolic or count <= _SORTED or count < 2 * k:
        return lax.top_k(values, k)
    size = max(2, round((count / max(k, 1)) ** 0.5))
    groups = jnp.pad(values, (0, -count % size), constant_values=-jnp.inf).reshape(-1, size)
    _, best = lax.top_k(groups.max(axis=1), k)
    best = jnp.sort(best)  # ties go to the first
    found, flat = lax.top_k(groups[best].reshape(-1), k)
    return found, best[flat // size] * size + flat % size


def suppressed_by(boxes: Array, classes: Array, others: Array, other_classes: Array, *, iou_threshold: float) -> Array:
    """Return bool ``[N', N]``: whether box n' of ``others [N', 4]`` suppresses box n of ``boxes [N, 4]``.

    It does if both have the same class and their IoU is above ``iou_threshold``.
    """
    overlap = pairwise_iou(boxes[None], others[:, None])
    return (classes[None] == other_classes[:, None]) & (overlap > iou_threshold)


def settle(boxes: Array, classes: Array, present: Array, *, iou_threshold: float) -> Array:
    """Run exact greedy class-wise NMS on candidates sorted best first, with all candidates in parallel.

    Start with all kept. In each round, drop every candidate that a better one, kept in the previous round,
    suppresses; stop when nothing changes. After n rounds the first n candidates are final, so the loop ends
    with the greedy result. In practice the number of rounds is the longest chain of overlaps.

    Args:
      boxes: ``[N, 4]``.
      classes: ``[N]`` int.
      present: bool ``[N]``; absent candidates are not kept and suppress nothing.
      iou_threshold: a larger IoU suppresses.

    Returns:
      bool ``[N]``, true for kept candidates.
    """
    order = jnp.arange(len(classes), dtype=jnp.int32)
    beats = suppressed_by(boxes, classes, boxes, classes, iou_threshold=iou_threshold)
    # 0 and 1 in float32, so that "any" over a column is a matrix product, which is fast on every backend.
    beats = (beats & (order[:, None] < order[None])).astype(jnp.float32)

    def unfinished(state: tuple[Array, Array]) -> Array:
        return state[1]

    def suppress(state: tuple[Array, Array]) -> tuple[Array, Array]:
        kept, _ = state
        settled = present & (kept.astype(jnp.float32) @ beats == 0)
        return settled, jnp.any(settled != kept)

    return lax.while_loop(unfinished, suppress, (present, jnp.bool_(True)))[0]


def class_wise_nms(
    boxes: Array, scores: Array, classes: Array, *, iou_threshold: float, max_detections: int
) -> tuple[Array, Array]:
    """Run exact greedy class-wise NMS on one image.

    Greedy NMS keeps the best candidate, drops those of its class whose IoU with it is above
    ``iou_threshold``, and repeats with the rest.

    Each iteration takes the best remaining candidates, drops those that a box kept earlier suppresses, and
    runs ``settle`` on the best of the others. It stops at ``max_detections`` or when no candidate remains.
    The candidates are never sorted as a whole, the work is at most O(M D), and an image with few
    candidates needs one iteration.

    Args:
      boxes: ``[M, 4]``.
      scores: ``[M]``, ``-inf`` for absent candidates.
      classes: ``[M]`` int.
      iou_threshold: a larger IoU suppresses.
      max_detections: D.

    Returns:
      ``keep`` int32 ``[D]``, indices by descending score (the first on ties), and ``valid`` bool
      ``[D]``; invalid entries of ``keep`` are 0.
    """
    if not len(scores):
        return _no_detections(max_detections)
    considered = min(_CONSIDERED, len(scores))
    settled = min(_SETTLED, considered)
    order = jnp.arange(len(scores), dtype=jnp.int32)

    def unfinished(state: tuple[Array, ...]) -> Array:
        count, remaining, *_ = state
        return (count < max_detections) & (jnp.max(remaining) > _ABSENT)

    def iterate(state: tuple[Array, ...]) -> tuple[Array, ...]:
        count, remaining, keep, kept_boxes, kept_classes = state
        values, best = lax.top_k(remaining, considered)
        overlaps = suppressed_by(boxes[best], classes[best], kept_boxes, kept_classes, iou_threshold=iou_threshold)
        free = (values > _ABSENT) & ~jnp.any(overlaps, axis=0)

        # Positions of the first free candidates; past the end if there are fewer.
        # By comparison, because a binary search is a loop, for whose turns a GPU waits on the host.
        before = jnp.cumsum(free, dtype=jnp.int32)[None] < jnp.arange(1, settled + 1, dtype=jnp.int32)[:, None]
        place = jnp.sum(before, axis=1, dtype=jnp.int32)
        present = place < considered
        place = jnp.minimum(place, considered - 1)
        chosen = best[place]
        chosen_boxes, chosen_classes = boxes[chosen], classes[chosen]
        kept = settle(chosen_boxes, chosen_classes, present, iou_threshold=iou_threshold)
        slot = jnp.where(kept, count + jnp.cumsum(kept, dtype=jnp.int32) - 1, max_detections)

        # Candidates after the last decided one remain.
        last_value, last = values[place[-1]], best[place[-1]]
        after = (remaining < last_value) | ((remaining == last_value) & (order > last))
        return (
            jnp.minimum(count + jnp.sum(kept, dtype=jnp.int32), max_detections),
            jnp.where(after, remaining, -jnp.inf),
            keep.at[slot].set(chosen.astype(jnp.int32), mode="drop"),
            kept_boxes.at[slot].set(chosen_boxes, mode="drop"),
            kept_classes.at[slot].set(chosen_classes, mode="drop"),
        )

    start = (
        jnp.int32(0),
        # Replace -0 by 0: top_k sorts 0 above -0, although they tie.
        jnp.where(scores > -jnp.inf, jnp.where(scores == 0, 0.0, scores), -jnp.inf),
        jnp.zeros((max_detections,), jnp.int32),
        # Unused slots hold empty boxes, which overlap nothing.
        jnp.zeros((max_detections, 4), boxes.dtype),
        jnp.zeros((max_detections,), classes.dtype),
    )
    count, _, keep, *_ = lax.while_loop(unfinished, iterate, start)
    return keep, jnp.arange(max_detections, dtype=jnp.int32) < count


def soft_nms(
    boxes: Array,
    scores: Array,
    classes: Array,
    *,
    method: Literal["linear", "gaussian"],
    iou_threshold: float,
    sigma: float,
    prune: float,
    max_detections: int,
) -> tuple[Array, Array, Array]:
    """Run class-wise soft-NMS on one image (Bodla et al. 2017).

    Each iteration keeps the best remaining candidate and multiplies the scores of the others of its class by a
    weight that falls with their IoU: for ``linear`` 1 - IoU if the IoU is above ``iou_threshold``, for
    ``gaussian`` exp(-IoU^2 / sigma). It then drops candidates whose score is not above ``prune``. The loop stops
    at ``max_detections`` or when no candidate remains; the work is O(D M). Unlike in ``class_wise_nms``, an
    iteration can keep only one candidate, because it changes the order of the rest.

    Args:
      boxes: ``[M, 4]``.
      scores: ``[M]``, not negative, ``-inf`` for absent candidates.
      classes: ``[M]`` int.
      method, iou_threshold, sigma, prune: see above.
      max_detections: D.

    Returns:
      ``keep`` int32 ``[D]``, indices by descending decayed score (the first on ties); ``valid`` bool ``[D]``;
      the decayed scores float32 ``[D]``. Invalid entries have index 0 and score 0.

    Raises:
      ValueError: ``method`` is neither.
    """
    if method not in ("linear", "gaussian"):
        raise ValueError(f"method {method!r}: choose linear or gaussian")
    if not len(scores):
        return *_no_detections(max_detections), jnp.zeros((max_detections,), jnp.float32)
    order = jnp.arange(len(scores), dtype=jnp.int32)

    def best_of(remaining: Array) -> tuple[Array, Array]:
        # Two separate reductions are faster than argmax, which reduces values and indices together.
        value = jnp.max(remaining)
        return value, jnp.min(jnp.where(remaining == value, order, len(scores)))

    def unfinished(state: tuple[Array, ...]) -> Array:
        step, value, *_ = state
        return (step < max_detections) & (value > _ABSENT)

    def iterate(state: tuple[Array, ...]) -> tuple[Array, ...]:
        step, value, best, remaining, keep, decayed = state
        overlap = pairwise_iou(boxes, boxes[best][None])
        if method == "linear":
            weight = jnp.where(overlap > iou_threshold, 1.0 - overlap, 1.0)
        else:
            weight = jnp.exp(-(overlap**2) / sigma)
        rest = jnp.where(classes == classes[best], remaining * weight, remaining)
        # Also drops scores that are NaN because absent candidates have infinite boxes.
        rest = jnp.where((rest > prune) & (order != best), rest, -jnp.inf)
        return step + 1, *best_of(rest), rest, keep.at[step].set(best), decayed.at[step].set(value)

    remaining = jnp.where(scores > prune, scores, -jnp.inf).astype(jnp.float32)
    start = (
        jnp.int32(0),
        *best_of(remaining),
        remaining,
        jnp.zeros((max_detections,), jnp.int32),
        jnp.zeros((max_detections,), jnp.float32),
    )
    count, _, _, _, keep, decayed = lax.while_loop(unfinished, iterate, start)
    return keep, jnp.arange(max_detections, dtype=jnp.int32) < count, decayed


def _no_detections(max_detections: int) -> tuple[Array, Array]:
    return jnp.zeros((max_detections,), jnp.int32), jnp.zeros((max_detections,), bool)
