"""Assign objects to anchors, points and proposals, and compute the targets of the query head.

Anchors and points are matched in a loop over the ground truth, a few boxes at a time. Memory is then
a few vectors [R] instead of a matrix [G, R] (900 boxes and 800,000 anchors would take 2.9 GB).
Shape letters: G padded boxes, R anchors or points of all levels of an image, P proposals, h w map.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from querydet_jax.ops.boxes import areas, encode, pairwise_iou, rounded_product
from querydet_jax.ops.points import distances, grid_points

BACKGROUND = -1
IGNORED = -2
_BLOCK = 8  # boxes per pass over the anchors, enough work to hide its memory traffic


def match_anchors(
    anchors: Array,
    boxes: Array,
    classes: Array,
    *,
    background_iou: float = 0.4,
    foreground_iou: float = 0.5,
    matcher: Literal["loop", "standard"] = "loop",
) -> tuple[Array, Array]:
    """Match every anchor to an object, to background, or to neither (ignored).

    An anchor takes the box with the largest IoU (the first on ties): below ``background_iou`` it is
    background, below ``foreground_iou`` ignored, otherwise foreground. In addition, every box claims
    its best anchors, however small the overlap ("low-quality matches"):

    - ``loop``, the matcher of the published QueryDet code (``utils/loop_matcher.py``): a box claims
      only anchors whose own best box it is. If its best anchors overlap another box more, it gets none.
    - ``standard``, detectron2's matcher: every anchor with the box's best IoU becomes foreground, but
      keeps its own best box as target.

    A box that overlaps no anchor claims none; in the originals it would claim all anchors of IoU 0.

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
    # The loader pads boxes at the end, so skip the blocks after the last box.
    used = jnp.max(jnp.where(valid.any(axis=1), jnp.arange(1, len(blocks) + 1, dtype=jnp.int32), 0))

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
    """Match every proposal to the object with the largest IoU (the first on ties), or to background.

    Args:
      boxes: ``[P, 4]``, proposals of one image, few enough for a matrix ``[P, G]``.
      objects: ``[G, 4]``; rows with a negative class are padding.
      classes: ``[G]`` int, 0..K-1, or negative for padding.
      foreground_iou: smallest IoU of a match.

    Returns:
      ``labels`` int32 ``[P]``: class 0..K-1 or ``BACKGROUND`` (-1); and ``matched`` int32 ``[P]``: the object.
    """
    if objects.shape[0] == 0:
        return jnp.full((len(boxes),), BACKGROUND, jnp.int32), jnp.zeros((len(boxes),), jnp.int32)
    iou = pairwise_iou(boxes[:, None], objects[None])
    # Exclude NaN boxes, too: argmax takes NaN for the largest.
    iou = jnp.where((classes[None] >= 0) & (iou >= 0), iou, -1.0)
    matched = jnp.argmax(iou, axis=1).astype(jnp.int32)
    foreground = jnp.max(iou, axis=1) >= foreground_iou
    return jnp.where(foreground, classes.astype(jnp.int32)[matched], BACKGROUND), matched


def matched_deltas(anchors: Array, boxes: Array, matched: Array) -> Array:
    """Return the regression targets ``[R, 4]`` from anchors (or proposals) to ``boxes [G, 4]`` at ``matched [R]``.

    Defined for foreground only: padding boxes are empty, so their targets are infinite. Zeros if G is 0.
    """
    return encode(anchors, boxes[matched]) if boxes.shape[0] else jnp.zeros_like(anchors)


def assign_points(
    points: Array, strides: Array, ranges: Array, boxes: Array, classes: Array, *, center_radius: float = 1.5
) -> tuple[Array, Array]:
    """Match every point to an object or to background (FCOS, Tian et al. 2019, section 3.1, with centre sampling).

    A point matches a box if it lies inside it, is less than ``center_radius`` strides from its centre in x and in y,
    and its distance to the farthest side is within the range of the point's level. Of several such boxes, the point
    takes the smallest, the first on ties.

    Args:
      points: ``[R, 2]`` (x, y) px.
      strides: ``[R]``, strides of the points' levels.
      ranges: ``[R, 2]`` px; the distance to the farthest side must lie strictly between.
      boxes: ``[G, 4]``; rows with a negative class are padding.
      classes: ``[G]`` int, 0..K-1, or negative for padding.
      center_radius: in strides.

    Returns:
      ``labels`` int32 ``[R]``: class 0..K-1 or ``BACKGROUND`` (-1); and ``matched`` int32 ``[R]``: the target box, 0
      for background.
    """
    num_points, num_boxes = points.shape[0], boxes.shape[0]
    if num_boxes == 0:
        return jnp.full((num_points,), BACKGROUND, jnp.int32), jnp.zeros((num_points,), jnp.int32)
    sizes, centers = areas(boxes), 0.5 * (boxes[:, :2] + boxes[:, 2:])
    reach = center_radius * strides
    # The loader pads boxes at the end, so skip everything after the last box.
    used = jnp.max(jnp.where(classes >= 0, jnp.arange(1, num_boxes + 1, dtype=jnp.int32), 0))

    def assign(g: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        smallest, matched = state
        sides = distances(points, boxes[g][None])
        farthest = jnp.max(sides, axis=-1)
        near = jnp.max(jnp.abs(points - centers[g][None]), axis=-1) < reach
        fits = (jnp.min(sides, axis=-1) > 0) & near & (farthest > ranges[:, 0]) & (farthest < ranges[:, 1])
        better = fits & (classes[g] >= 0) & (sizes[g] < smallest)
        return jnp.where(better, sizes[g], smallest), jnp.where(better, g, matched)

    start = (jnp.full((num_points,), jnp.inf, jnp.float32), jnp.zeros((num_points,), jnp.int32))
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
    """Return the target map of a level's query head, bool ``[h, w]``.

    QueryDet eq. 2: D is the distance from a cell's middle to the centre of the nearest small object
    (the first on ties). QueryDet eq. 3: the target is true where D is below a radius, which is
    ``factor`` times that object's own scale ``sqrt(w h)`` (``object``, as in the published code) or
    ``factor`` times s_l, the upper end of ``scale_range`` (``level``, as in the paper).

    Args:
      height, width: h, w.
      stride: px per cell.
      boxes: ``[G, 4]`` px.
      classes: ``[G]`` int; a negative entry marks padding.
      scale_range: objects with lo <= ``sqrt(w h)`` < hi, in px, are small on this level.
      radius, factor: see above.
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
        # Round the squares: with a fused multiply-add, offsets (a, b) and (b, a) would not tie.
        squares = rounded_product(offset, offset)
        distance = jnp.sqrt(squares[..., 0] + squares[..., 1])
        closer = is_small & (distance < best)
        return (jnp.where(closer, distance, best), jnp.where(closer, own_radius, reach)), None

    start = (jnp.full((height, width), jnp.inf, jnp.float32), jnp.zeros((height, width), jnp.float32))
    (best, reach), _ = lax.scan(nearest, start, (centers, small, radii), unroll=min(4, boxes.shape[0]))
    return best < reach * factor


def per_image(function: Callable[..., Any], *arrays: Array) -> Any:
    """Map ``function`` over the leading batch axis, one image after another, and stop gradients.

    Use ``lax.map`` instead of ``vmap``, because the matchers' loops depend on the number of boxes:
    a vmapped loop runs every image as long as the most crowded one.
    """
    return lax.map(lambda row: function(*row), jax.tree.map(lax.stop_gradient, arrays))
