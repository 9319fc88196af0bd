"""Which anchor or point learns which object, and which cells are queries.

All of them walk over the ground truth in blocks of a few boxes, so memory is a few vectors of
the number of anchors, never the G x R matrix (900 boxes by 800,000 anchors would be 2.9 GB).
Shape letters: G padded boxes, R anchors or points of all levels of an image, h w map.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from querydet_jax.ops.boxes import areas, encode, pairwise_iou, rounded_product
from querydet_jax.ops.points import distances, grid_points

BACKGROUND = -1
IGNORED = -2
_BLOCK = 8  # boxes a step: enough work per pass over the anchors to hide its memory traffic


def match_anchors(
    anchors: Array,
    boxes: Array,
    classes: Array,
    *,
    background_iou: float = 0.4,
    foreground_iou: float = 0.5,
    matcher: Literal["loop", "standard"] = "loop",
) -> tuple[Array, Array]:
    """Assign every anchor an object, background, or nothing.

    An anchor takes the box it overlaps most (the first on ties): below ``background_iou`` it is
    background, below ``foreground_iou`` ignored, otherwise foreground. Besides, every box claims
    its best anchors, however small the overlap ("low-quality matches"):

    - ``loop``, the published QueryDet matcher: only among anchors whose own best box it is, so a
      box whose best anchors overlap another box more gets nothing.
    - ``standard``, detectron2's: any anchor that has the box's best IoU becomes foreground, yet
      keeps its own best box as target.

    A box that overlaps no anchor claims none (in the originals it would claim all anchors of IoU 0).

    Args:
      anchors: ``[R, 4]``, all levels of one image.
      boxes: ``[G, 4]``; rows with a negative class are padding.
      classes: ``[G]`` int, 0..K-1, or negative for padding.

    Returns:
      ``labels`` int32 ``[R]``: class 0..K-1, ``BACKGROUND`` (-1) or ``IGNORED`` (-2); and
      ``matched`` int32 ``[R]``: the box whose coordinates are the regression target.
    """
    num_boxes = boxes.shape[0]
    num_anchors = anchors.shape[0]
    if num_boxes == 0:
        empty = jnp.full((num_anchors,), BACKGROUND, jnp.int32)
        return empty, jnp.zeros((num_anchors,), jnp.int32)
    padding = -num_boxes % _BLOCK
    blocks = jnp.pad(boxes, ((0, padding), (0, 0))).reshape(-1, _BLOCK, 4)
    valid = jnp.pad(classes >= 0, (0, padding)).reshape(-1, _BLOCK)
    # Padding is at the end of a loader's batch: blocks after the last box need no pass.
    used = jnp.max(jnp.where(valid.any(axis=1), jnp.arange(len(blocks)) + 1, 0))

    def iou_with(box: Array, is_box: Array) -> Array:
        return jnp.where(is_box, pairwise_iou(anchors, box[None]), 0.0)

    def assign(block: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        best, matched, best_of_box = state
        rows = []
        for i in range(_BLOCK):
            iou = iou_with(blocks[block, i], valid[block, i])
            better = iou > best
            best = jnp.where(better, iou, best)
            matched = jnp.where(better, block * _BLOCK + i, matched)
            rows.append(jnp.max(iou))
        return best, matched, best_of_box.at[block].set(jnp.stack(rows))

    state = (
        jnp.zeros((num_anchors,), jnp.float32),
        jnp.zeros((num_anchors,), jnp.int32),
        jnp.zeros(valid.shape, jnp.float32),
    )
    best, matched, best_of_box = lax.fori_loop(0, used, assign, state)

    if matcher == "loop":
        promoted = (best == best_of_box.reshape(-1)[matched]) & (best > 0)
    else:

        def claim(block: Array, claimed: Array) -> Array:
            for i in range(_BLOCK):
                top = best_of_box[block, i]
                claimed |= (iou_with(blocks[block, i], valid[block, i]) == top) & (top > 0)
            return claimed

        promoted = lax.fori_loop(0, used, claim, jnp.zeros((num_anchors,), bool))

    foreground = (best >= foreground_iou) | promoted
    labels = jnp.where(best < background_iou, BACKGROUND, IGNORED)
    labels = jnp.where(foreground, classes.astype(jnp.int32)[matched], labels)
    return labels.astype(jnp.int32), matched


def match_proposals(boxes: Array, objects: Array, classes: Array, *, foreground_iou: float) -> tuple[Array, Array]:
    """Assign every proposal the object it overlaps most (the first on ties), if at ``foreground_iou`` or more.

    Args:
      boxes: ``[P, 4]``, proposals of one image, few enough for a matrix of P x G.
      objects: ``[G, 4]``; rows with a negative class are padding.
      classes: ``[G]`` int, 0..K-1, or negative for padding.

    Returns:
      ``labels`` int32 ``[P]``: class 0..K-1 or ``BACKGROUND``; and ``matched`` int32 ``[P]``: the object.
    """
    if objects.shape[0] == 0:
        return jnp.full((len(boxes),), BACKGROUND, jnp.int32), jnp.zeros((len(boxes),), jnp.int32)
    iou = pairwise_iou(boxes[:, None], objects[None])
    # Not of a box that is NaN either: argmax would take it for the largest.
    iou = jnp.where((classes[None] >= 0) & (iou >= 0), iou, -1.0)
    matched = jnp.argmax(iou, axis=1).astype(jnp.int32)
    foreground = jnp.max(iou, axis=1) >= foreground_iou
    return jnp.where(foreground, classes.astype(jnp.int32)[matched], BACKGROUND), matched


def matched_deltas(anchors: Array, boxes: Array, matched: Array) -> Array:
    """Regression targets ``[R, 4]`` from anchors (or proposals) to the boxes ``[G, 4]`` that ``matched [R]`` names.

    Meaningful for foreground only: padding boxes are empty, and their targets infinite. Zeros without boxes.
    """
    return encode(anchors, boxes[matched]) if boxes.shape[0] else jnp.zeros_like(anchors)


def assign_points(
    points: Array, strides: Array, ranges: Array, boxes: Array, classes: Array, *, center_radius: float = 1.5
) -> tuple[Array, Array]:
    """Assign every point an object or background (FCOS, Tian et al. 2019, section 3.1, with centre sampling).

    A point learns a box if it lies inside it, less than ``center_radius`` strides from its centre in x and in y,
    and the farthest of the four sides lies within the range of the point's level. Of several such boxes
    the smallest counts, the first one on ties.

    Args:
      points: ``[R, 2]`` (x, y) px; strides: ``[R]`` of their levels.
      ranges: ``[R, 2]``: the distance in px to the farthest side must lie strictly between.
      boxes: ``[G, 4]``; rows with a negative class are padding.
      classes: ``[G]`` int, 0..K-1, or negative for padding.

    Returns:
      ``labels`` int32 ``[R]``: class 0..K-1 or ``BACKGROUND`` (-1); and ``matched`` int32 ``[R]``: the box that is
      the target, 0 for background.
    """
    num_points, num_boxes = points.shape[0], boxes.shape[0]
    if num_boxes == 0:
        return jnp.full((num_points,), BACKGROUND, jnp.int32), jnp.zeros((num_points,), jnp.int32)
    sizes, centers = areas(boxes), 0.5 * (boxes[:, :2] + boxes[:, 2:])
    reach = center_radius * strides
    # Padding is at the end of a loader's batch: boxes after the last need no pass.
    used = jnp.max(jnp.where(classes >= 0, jnp.arange(num_boxes) + 1, 0))

    def assign(g: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        smallest, matched = state
        sides = distances(points, boxes[g][None])
        farthest = jnp.max(sides, axis=-1)
        near = jnp.max(jnp.abs(points - centers[g][None]), axis=-1) < reach
        fits = (jnp.min(sides, axis=-1) > 0) & near & (farthest > ranges[:, 0]) & (farthest < ranges[:, 1])
        better = fits & (classes[g] >= 0) & (sizes[g] < smallest)
        return jnp.where(better, sizes[g], smallest), jnp.where(better, g, matched)

    start = (jnp.full((num_points,), jnp.inf), jnp.zeros((num_points,), jnp.int32))
    smallest, matched = lax.fori_loop(0, used, assign, start)
    return jnp.where(smallest < jnp.inf, classes.astype(jnp.int32)[matched], BACKGROUND), matched


def query_targets(
    height: int,
    width: int,
    stride: int,
    boxes: Array,
    classes: Array,
    *,
    scale_range: tuple[float, float],
    radius: Literal["object", "level"] = "object",
    factor: float = 1.0,
) -> Array:
    """Return where a level's query head should fire, bool ``[h, w]``.

    QueryDet eq. 2: D is the distance from a cell's middle to the nearest small object's centre.
    QueryDet eq. 3: the target is 1 where D is below a radius: that object's own scale ``sqrt(w h)``
    (``object``, the published code), or s_l, the upper end of ``scale_range`` (``level``, the paper),
    times ``factor``. Only the nearest small object counts, the first one on ties.

    Args:
      boxes: ``[G, 4]`` px; rows with a negative ``classes`` entry are padding.
      scale_range: [lo, hi) of ``sqrt(w h)`` in px within which an object is small here.
    """
    points = grid_points(height, width, stride)
    if boxes.shape[0] == 0:
        return jnp.zeros((height, width), bool)
    sizes = boxes[:, 2:] - boxes[:, :2]
    scales = jnp.sqrt(sizes[:, 0] * sizes[:, 1])
    centers = 0.5 * (boxes[:, :2] + boxes[:, 2:])
    small = (classes >= 0) & (scales >= scale_range[0]) & (scales < scale_range[1])
    radii = scales if radius == "object" else jnp.full_like(scales, scale_range[1])

    def nearest(state: tuple[Array, Array], item: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], None]:
        best, reach = state
        center, is_small, own_radius = item
        offset = points - center[None, None]
        # Rounded squares: contracted, (a, b) and (b, a) would be unequally far, and a tie would not be one.
        squares = rounded_product(offset, offset)
        distance = jnp.sqrt(squares[..., 0] + squares[..., 1])
        closer = is_small & (distance < best)
        return (jnp.where(closer, distance, best), jnp.where(closer, own_radius, reach)), None

    start = (jnp.full((height, width), jnp.inf), jnp.zeros((height, width)))
    (best, reach), _ = lax.scan(nearest, start, (centers, small, radii), unroll=min(4, boxes.shape[0]))
    return best < reach * factor


def per_image(function, *arrays: Array):
    """``function`` over the leading batch axis, one image after another.

    ``lax.map`` rather than ``vmap``: the matchers loop as often as an image has boxes, and a
    vmapped loop runs every image as long as the most crowded one, carrying selects.
    """
    return lax.map(lambda row: function(*row), jax.tree.map(lax.stop_gradient, arrays))
