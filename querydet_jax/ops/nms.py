"""Candidate selection and non-maximum suppression with static shapes.

Shape letters: S rows (sites), M scores a row, or candidates, D detections, N boxes of any number.
"""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jax import Array, lax

from querydet_jax.ops.boxes import pairwise_iou

# A turn of `class_wise_nms` looks at so many of the best candidates and settles so many of those
# that no kept box suppresses. Measured on clustered detections, 6000 candidates: the first turns
# must not pay for many, and later ones must get past the many that are suppressed already.
_LOOKED_AT = 256
_SETTLED = 128


def top_scores(
    scores: Array, row_best: Array, k: int, position: Array | None = None, most_rows: int | None = None
) -> tuple[Array, Array, Array]:
    """The ``k`` best of ``scores [S, M]`` without sorting all of them.

    The k best entries lie within the k rows with the best maxima, so one selection over S row maxima
    and one over k rows give the exact result: on a dense P2 at 800x1344 that is 67,200 maxima in
    place of a selection over 48 million scores.

    Args:
      row_best: ``[S]``, the rows' maxima; -inf excludes a row.
      position: int ``[S]``, the rows' places on the map, where the rows do not lie in map order.
      most_rows: at most so many rows are not excluded; None: S.

    Returns:
      ``values [k']``, descending, -inf where there are fewer; ``row [k']`` and ``column [k']``, with
      k' = min(k, min(S, most_rows) * M). Equal scores keep their order by position, then column.
    """
    num_rows, num_columns = scores.shape
    most = k if most_rows is None else min(k, most_rows)
    best, rows = lax.top_k(row_best, min(most, num_rows))
    # Back in map order, so that ties go to the earlier cell.
    order = jnp.argsort(rows if position is None else position[rows])
    rows, best = rows[order], best[order]
    chosen = jnp.where((best > -jnp.inf)[:, None], scores[rows], -jnp.inf)
    values, flat = lax.top_k(chosen.reshape(-1), min(k, chosen.size))
    return values, rows[flat // num_columns], flat % num_columns


def suppressed_by(boxes: Array, classes: Array, others: Array, other_classes: Array, *, iou_threshold: float) -> Array:
    """Bool ``[N', N]``: box n' of ``others [N', 4]`` is of the class of box n of ``boxes [N, 4]`` and overlaps
    it above ``iou_threshold``."""
    overlap = pairwise_iou(boxes[None], others[:, None])
    return (classes[None] == other_classes[:, None]) & (overlap > iou_threshold)


def settle(boxes: Array, classes: Array, present: Array, *, iou_threshold: float) -> Array:
    """Exact greedy class-wise NMS among candidates in order, the best first, without a turn for each.

    All assume that they are kept; then every one whose better ones are kept and overlap it goes, and again
    from the result, until nothing changes. The first n are right after n rounds, so this ends, and it ends
    with the greedy result; in practice it takes the few rounds of the longest chain of overlaps.

    Args:
      boxes: ``[N, 4]``; classes: ``[N]`` int; present: bool ``[N]``, absent ones suppress nothing.

    Returns:
      bool ``[N]``, which are kept.
    """
    order = jnp.arange(len(classes))
    beats = suppressed_by(boxes, classes, boxes, classes, iou_threshold=iou_threshold)
    # 0 and 1 in float32: "any" over a column as a matrix product, which every backend does fast.
    beats = (beats & (order[:, None] < order[None])).astype(jnp.float32)

    def again(state: tuple[Array, Array]) -> Array:
        return state[1]

    def once_more(state: tuple[Array, Array]) -> tuple[Array, Array]:
        kept, _ = state
        settled = present & (kept.astype(jnp.float32) @ beats == 0)
        return settled, jnp.any(settled != kept)

    return lax.while_loop(again, once_more, (present, jnp.bool_(True)))[0]


def class_wise_nms(
    boxes: Array, scores: Array, classes: Array, *, iou_threshold: float, max_detections: int
) -> tuple[Array, Array]:
    """Exact greedy class-wise NMS of one image: the best candidate is kept and those of its class whose
    IoU with it is above ``iou_threshold`` are dropped, then the best of the rest, and so on.

    A turn takes the best candidates that have not been looked at, drops those that a box kept in former
    turns suppresses, and settles the best of the others among themselves. Turns end at
    ``max_detections`` or when nothing is left. The candidates are never sorted as a whole, the work is at
    most O(M D), and an image with few candidates needs one turn.

    Args:
      boxes: ``[M, 4]``; scores: ``[M]``, ``-inf`` for absent candidates; classes: ``[M]`` int.

    Returns:
      ``keep`` int32 ``[D]``, indices by descending score (the first on ties), and ``valid`` bool
      ``[D]``; entries that are not valid point at 0.
    """
    if not len(scores):
        return _nothing(max_detections)
    looked_at = min(_LOOKED_AT, len(scores))
    settled = min(_SETTLED, looked_at)
    order = jnp.arange(len(scores))

    def again(state: tuple[Array, ...]) -> Array:
        count, remaining, *_ = state
        return (count < max_detections) & (jnp.max(remaining) > -jnp.inf)

    def turn(state: tuple[Array, ...]) -> tuple[Array, ...]:
        count, remaining, keep, kept_boxes, kept_classes = state
        values, best = lax.top_k(remaining, looked_at)
        overlaps = suppressed_by(boxes[best], classes[best], kept_boxes, kept_classes, iou_threshold=iou_threshold)
        free = (values > -jnp.inf) & ~jnp.any(overlaps, axis=0)

        # The first free ones; where there are fewer, past the end.
        place = jnp.searchsorted(jnp.cumsum(free), jnp.arange(1, settled + 1))
        present = place < looked_at
        place = jnp.minimum(place, looked_at - 1)
        chosen = best[place]
        chosen_boxes, chosen_classes = boxes[chosen], classes[chosen]
        kept = settle(chosen_boxes, chosen_classes, present, iou_threshold=iou_threshold)
        slot = jnp.where(kept, count + jnp.cumsum(kept) - 1, max_detections)

        # What comes after the last one that was decided on remains.
        last_value, last = values[place[-1]], best[place[-1]]
        after = (remaining < last_value) | ((remaining == last_value) & (order > last))
        return (
            jnp.minimum(count + jnp.sum(kept), max_detections),
            jnp.where(after, remaining, -jnp.inf),
            keep.at[slot].set(chosen.astype(jnp.int32), mode="drop"),
            kept_boxes.at[slot].set(chosen_boxes, mode="drop"),
            kept_classes.at[slot].set(chosen_classes, mode="drop"),
        )

    start = (
        jnp.int32(0),
        # top_k puts 0 above -0, which would be no tie.
        jnp.where(scores > -jnp.inf, jnp.where(scores == 0, 0.0, scores), -jnp.inf),
        jnp.zeros((max_detections,), jnp.int32),
        # Slots not in use hold empty boxes, which overlap nothing.
        jnp.zeros((max_detections, 4), boxes.dtype),
        jnp.zeros((max_detections,), classes.dtype),
    )
    count, _, keep, *_ = lax.while_loop(again, turn, start)
    return keep, jnp.arange(max_detections) < count


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
    """Class-wise soft-NMS of one image (Bodla et al. 2017).

    Each turn keeps the best remaining candidate and multiplies the scores of the others of its class by a
    weight that falls with their IoU: ``linear`` 1 - IoU where the IoU is above ``iou_threshold``, ``gaussian``
    exp(-IoU^2 / sigma) (``iou_threshold`` is not used). Candidates whose score is then not above ``prune`` are
    dropped. Turns end at ``max_detections`` or when nothing is left, so the work is O(D M). They cannot be
    taken several at a time as in ``class_wise_nms``: each changes the order of the rest.

    Args:
      boxes: ``[M, 4]``; scores: ``[M]``, not negative, ``-inf`` for absent candidates; classes: ``[M]`` int.

    Returns:
      ``keep`` int32 ``[D]``, indices by descending decayed score (the first on ties); ``valid`` bool ``[D]``;
      the decayed scores float32 ``[D]``. Entries that are not valid point at 0 and have score 0.

    Raises:
      ValueError: ``method`` is neither.
    """
    if method not in ("linear", "gaussian"):
        raise ValueError(f"method {method!r}: choose linear or gaussian")
    if not len(scores):
        return *_nothing(max_detections), jnp.zeros((max_detections,), jnp.float32)
    order = jnp.arange(len(scores), dtype=jnp.int32)

    def best_of(remaining: Array) -> tuple[Array, Array]:
        # Two plain reductions are faster than argmax, which reduces values and indices together.
        value = jnp.max(remaining)
        return value, jnp.min(jnp.where(remaining == value, order, len(scores)))

    def again(state: tuple[Array, ...]) -> Array:
        turn, value, *_ = state
        return (turn < max_detections) & (value > -jnp.inf)

    def turn(state: tuple[Array, ...]) -> tuple[Array, ...]:
        turn, value, best, remaining, keep, decayed = state
        overlap = pairwise_iou(boxes, boxes[best][None])
        if method == "linear":
            weight = jnp.where(overlap > iou_threshold, 1.0 - overlap, 1.0)
        else:
            weight = jnp.exp(-(overlap**2) / sigma)
        rest = jnp.where(classes == classes[best], remaining * weight, remaining)
        # Also drops what the infinite boxes of absent candidates have made NaN.
        rest = jnp.where((rest > prune) & (order != best), rest, -jnp.inf)
        return turn + 1, *best_of(rest), rest, keep.at[turn].set(best), decayed.at[turn].set(value)

    remaining = jnp.where(scores > prune, scores, -jnp.inf).astype(jnp.float32)
    start = (
        jnp.int32(0),
        *best_of(remaining),
        remaining,
        jnp.zeros((max_detections,), jnp.int32),
        jnp.zeros((max_detections,), jnp.float32),
    )
    count, _, _, _, keep, decayed = lax.while_loop(again, turn, start)
    return keep, jnp.arange(max_detections) < count, decayed


def _nothing(max_detections: int) -> tuple[Array, Array]:
    return jnp.zeros((max_detections,), jnp.int32), jnp.zeros((max_detections,), bool)
