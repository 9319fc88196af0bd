"""ROIAlign over a feature pyramid, with two interpolation matrices per box.

The mean of bilinear interpolations over the sampling points of a bin is separable. Let A [S, y] and B [S, x] hold, per
bin along one axis, the mean interpolation weights of its points; the result for a box is A F B^T. Both matrices are
zero outside the box's cells, so F is read in windows of T x T cells. Boxes are processed in groups, and the loop over
windows runs as often as the largest box of the group needs.
Shape letters: B batch, h w map, C channels, P boxes per image, R boxes of the batch, S bins per side, T side of a
window.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

_WINDOW = 16  # T; one window covers boxes of up to 15 cells
_BOXES = 16  # boxes per group
_CANONICAL_SIZE, _CANONICAL_LEVEL = 224.0, 4  # FPN eq. 1 (Lin et al. 2017): a box of 224 px is read from P4


def box_levels(boxes: Array, min_level: int, max_level: int) -> Array:
    """Return the pyramid level int32 ``[...]`` from which to read boxes ``[..., 4]`` (FPN eq. 1)."""
    sizes = jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0.0)
    scale = jnp.sqrt(sizes[..., 0] * sizes[..., 1])
    level = jnp.floor(_CANONICAL_LEVEL + jnp.log2(scale / _CANONICAL_SIZE + 1e-8))
    return jnp.clip(level, min_level, max_level).astype(jnp.int32)


def roi_align(features: dict[int, Array], boxes: Array, valid: Array, *, size: int) -> Array:
    """Pool the features of boxes, each from the level of its scale.

    This is ROIAlign (He et al. 2017) with half-pixel offset (detectron2's ``aligned``, "ROIAlignV2"). The number of
    sampling points per side of a bin is the bin's length in cells, rounded up. Points more than one cell outside the
    map contribute zero. Gradients reach the features, but not the boxes.

    Args:
      features: ``{l: P_l [B, h, w, C]}``, consecutive levels.
      boxes: ``[B, P, 4]`` px of the network input, within it.
      valid: bool ``[B, P]``; false gives zeros.
      size: S.

    Returns:
      ``[B, P, S, S, C]``, in the features' dtype.
    """
    batch, number = boxes.shape[:2]
    rows, levels = _flatten(features)
    flat, is_box = lax.stop_gradient(jnp.asarray(boxes)).reshape(-1, 4), jnp.asarray(valid).reshape(-1)
    level = box_levels(flat, levels.finest, levels.finest + len(levels.height) - 1) - levels.finest
    height, width = levels.height[level], levels.width[level]
    image = jnp.arange(batch * number, dtype=jnp.int32) // number
    scale = jnp.exp2(-(level + levels.finest).astype(jnp.float32))
    places = _Places(
        first=levels.start[level] + image * height * width,
        width=width,
        y=_axis(flat[:, 1] * scale, flat[:, 3] * scale, height, size),
        x=_axis(flat[:, 0] * scale, flat[:, 2] * scale, width, size),
        valid=is_box,
    )
    most = -(-max(max(x.shape[1:3]) for x in features.values()) // size)
    # Sort by number of windows, so that no group of small boxes waits for a large one. Absent boxes come first.
    order = jnp.argsort(jnp.where(is_box, _windows(places.y) * _windows(places.x), 0))
    padding = -len(order) % _BOXES
    order = jnp.pad(order, (padding, 0), constant_values=len(order))
    places = jax.tree.map(lambda x: x.at[order].get(mode="fill", fill_value=0), places)
    pooled = _pool(_Bins(size, most, (rows.shape[0], rows.shape[1]), rows.dtype), rows, places)
    out = jnp.zeros((batch * number, size, size, rows.shape[1]), rows.dtype).at[order].set(pooled, mode="drop")
    return out.reshape(batch, number, size, size, -1)


class _Levels(NamedTuple):
    """First row of each level among the rows of all levels, and the levels' sizes; int32 ``[L]``."""

    finest: int
    start: Array
    height: Array
    width: Array


class _Axis(NamedTuple):
    """A box along one axis, in cells; ``[R]`` each."""

    start: Array  # start of the first bin
    bin: Array  # length of a bin
    points: Array  # sampling points per bin, int32
    extent: Array  # length of the map, int32
    origin: Array  # first cell to read, int32
    cells: Array  # number of cells to read, int32


class _Places(NamedTuple):
    """The cells to read for each box; ``[R]`` each."""

    first: Array  # row of the first cell of the box's image and level
    width: Array  # width of that map
    y: _Axis
    x: _Axis
    valid: Array


class _Bins(NamedTuple):
    size: int  # S
    points: int  # largest number of sampling points per side of a bin
    rows: tuple[int, int]  # shape of the flattened features of all levels
    dtype: jnp.dtype


def _flatten(features: dict[int, Array]) -> tuple[Array, _Levels]:
    finest = min(features)
    shapes = [features[level].shape for level in range(finest, finest + len(features))]
    counts = [shape[0] * shape[1] * shape[2] for shape in shapes]
    start, height, width = (
        jnp.asarray(np.asarray(values, np.int32))
        for values in (np.cumsum([0, *counts[:-1]]), [s[1] for s in shapes], [s[2] for s in shapes])
    )
    rows = jnp.concatenate([features[level].reshape(-1, shapes[0][-1]) for level in sorted(features)])
    return rows, _Levels(finest, start, height, width)


def _axis(first: Array, last: Array, extent: Array, size: int) -> _Axis:
    start = first - 0.5
    length = jnp.maximum(last - first, 0.0)
    points = jnp.ceil(length / size)
    end = (extent - 1).astype(jnp.float32)
    low = jnp.floor(jnp.clip(start, 0.0, end))
    high = jnp.floor(jnp.clip(start + length, 0.0, end)) + 1.0
    low, high = low.astype(jnp.int32), jnp.minimum(high.astype(jnp.int32), extent - 1)
    return _Axis(start, length / size, points.astype(jnp.int32), extent, low, high - low + 1)


def _windows(axis: _Axis) -> Array:
    return (axis.cells + _WINDOW - 1) // _WINDOW


def _weights(axis: _Axis, window: Array, bins: _Bins) -> Array:
    """Return the interpolation weights ``[R, S, T]`` of a window's cells, averaged over each bin's sampling points."""
    step = jnp.arange(bins.points, dtype=jnp.float32)[None, None, :]
    points = jnp.maximum(axis.points, 1)[:, None, None].astype(jnp.float32)
    number = jnp.arange(bins.size, dtype=jnp.float32)[None, :, None]
    at = axis.start[:, None, None] + (number + (step + 0.5) / points) * axis.bin[:, None, None]
    extent = axis.extent[:, None, None].astype(jnp.float32)
    counts = (step < axis.points[:, None, None]) & (at >= -1.0) & (at <= extent)
    at = jnp.clip(at, 0.0, extent - 1.0)
    cell = (axis.origin + window * _WINDOW)[:, None] + jnp.arange(_WINDOW, dtype=jnp.int32)[None]
    near = jnp.maximum(1.0 - jnp.abs(at[..., None] - cell[:, None, None].astype(jnp.float32)), 0.0)
    return jnp.sum(jnp.where(counts[..., None], near, 0.0), axis=2) / points


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pool(bins: _Bins, rows: Array, places: _Places) -> Array:
    """Return the pooled features ``[R, S, S, C]``; R is a multiple of the boxes per group."""
    size, channels = bins.size, bins.rows[1]

    def pool_group(places: _Places) -> Array:
        def window(i: Array, out: Array) -> Array:
            index, down, across = _window(places, i, bins)
            crop = rows.at[index].get(mode="clip")
            y = jnp.einsum("rsy,ryxc->rsxc", down.astype(crop.dtype), crop, preferred_element_type=jnp.float32)
            return out + jnp.einsum("rtx,rsxc->rstc", across, y, preferred_element_type=jnp.float32)

        start = jnp.zeros((_BOXES, size, size, channels), jnp.float32)
        return lax.fori_loop(0, _most_windows(places), window, start).astype(bins.dtype)

    return lax.map(pool_group, _grouped(places)).reshape(-1, size, size, channels)


def _pool_forward(bins: _Bins, rows: Array, places: _Places) -> tuple[Array, _Places]:
    return _pool(bins, rows, places), places


def _pool_backward(bins: _Bins, places: _Places, gradient: Array) -> tuple[Array, _Places]:
    gradient = gradient.reshape(-1, _BOXES, *gradient.shape[1:]).astype(jnp.float32)

    def add_group(total: Array, group: tuple[_Places, Array]) -> tuple[Array, None]:
        places, gradient = group

        def window(i: Array, total: Array) -> Array:
            index, down, across = _window(places, i, bins)
            y = jnp.einsum("rtx,rstc->rsxc", across, gradient)
            return total.at[index].add(jnp.einsum("rsy,rsxc->ryxc", down, y), mode="drop")

        return lax.fori_loop(0, _most_windows(places), window, total), None

    total, _ = lax.scan(add_group, jnp.zeros(bins.rows, jnp.float32), (_grouped(places), gradient))
    return total.astype(bins.dtype), jax.tree.map(_no_gradient, places)


_pool.defvjp(_pool_forward, _pool_backward)


def _no_gradient(x: Array) -> np.ndarray | Array:
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.zeros_like(x)
    return np.zeros(x.shape, jax.dtypes.float0)


def _grouped(places: _Places) -> _Places:
    return jax.tree.map(lambda x: x.reshape(-1, _BOXES), places)


def _most_windows(places: _Places) -> Array:
    return jnp.max(jnp.where(places.valid, _windows(places.y) * _windows(places.x), 0))


def _window(places: _Places, i: Array, bins: _Bins) -> tuple[Array, Array, Array]:
    """Return the rows ``[R, T, T]`` of the boxes' i-th windows, and the weights ``[R, S, T]`` down and across.

    Boxes with fewer windows get zero weights.
    """
    columns = jnp.maximum(_windows(places.x), 1)
    down, across = i // columns, i % columns
    present = places.valid & (down < _windows(places.y))
    step = jnp.arange(_WINDOW, dtype=jnp.int32)[None]
    # Clamp at the map's edge: beyond it the weights are zero, so the row does not matter.
    y = jnp.minimum((places.y.origin + down * _WINDOW)[:, None] + step, places.y.extent[:, None] - 1)
    x = jnp.minimum((places.x.origin + across * _WINDOW)[:, None] + step, places.x.extent[:, None] - 1)
    index = places.first[:, None, None] + y[:, :, None] * places.width[:, None, None] + x[:, None, :]
    weights_down = jnp.where(present[:, None, None], _weights(places.y, down, bins), 0.0)
    return index, weights_down, _weights(places.x, across, bins)
