"""The input of a sparse level's heads: the pyramid's output, computed only where it is read.

P_l = output(lateral(C_l) + upsample(merged_{l+1})) of the feature pyramid (Lin et al. 2017). The heads read only
the active cells of a sparse level. Its output convolution, and on the finest level the lateral one too,
therefore run at those cells alone. This is exact, and no map of the fine level's size is made.
Shape letters: B batch, h w map, N capacity, C channels, T tiles, s tile side.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from querydet_jax.sparse.cells import parent_cells
from querydet_jax.sparse.conv import Conv, conv_rows, dense_conv, in_chunks, pointwise
from querydet_jax.sparse.sites import Sites, cell_table, neighbour_table, within


class CascadeLevel(NamedTuple):
    """A level computed only around keys, and what its heads' input is computed from.

    ====================================  =====================================================
    ``features``                          the input itself, ``[B, h, w, C]``
    ``features, output``                  output(features)
    ``features, output, lateral, above``  output(lateral(features) + upsample(above)), ``lateral`` with a
                                          kernel [1, 1, C_l, C], ``above`` ``[B, ceil(h/2), ceil(w/2), C]``
    ====================================  =====================================================
    """

    level: int
    features: Array
    output: Conv | None = None
    lateral: Conv | None = None
    above: Array | None = None

    @property
    def margin(self) -> int:
        """Rings of cells around the active ones that a site buffer must also hold.

        The output convolution reads the merged map one cell beyond its own result.
        """
        return 0 if self.lateral is None else 1


def dense_input(level: CascadeLevel) -> Array:
    """Compute the heads' input everywhere, ``[B, h, w, C]``."""
    x = level.features
    if level.lateral is not None and level.above is not None:
        height, width = x.shape[1:3]
        above = jnp.repeat(jnp.repeat(level.above, 2, axis=1), 2, axis=2)
        x = pointwise(x, level.lateral) + above[:, :height, :width]
    return x if level.output is None else dense_conv(x, level.output)


def input_at_sites(level: CascadeLevel, sites: Sites, context: int, chunk: int) -> tuple[Array, Sites, Array]:
    """Compute the heads' input at the sites.

    Args:
      sites: up to ``context + level.margin`` cells from a key.

    Returns:
      rows ``[N, C]``, the sites up to ``context``, and their neighbour table.
    """
    table = neighbour_table(sites)
    if level.output is None:
        return _flat(level.features).at[sites.index].get(mode="fill", fill_value=0), sites, table
    if level.lateral is None:
        source, source_table = _flat(level.features), cell_table(sites)
    else:
        source, source_table = _merged_rows(level, sites, chunk), table
    sites, table = within(sites, table, context)
    (rows,) = conv_rows(source, source_table, [level.output], sites.counts[-1], relu=False, chunk=chunk)
    return rows, sites, table


def merged_at(level: CascadeLevel, cells: Array) -> Array:
    """Compute the output convolution's input ``[..., C]`` at flat ``cells [...]``; zeros where there is no cell."""
    batch, height, width, _ = level.features.shape
    x = _flat(level.features).at[cells].get(mode="fill", fill_value=0)
    if level.lateral is None or level.above is None:
        return x
    _, above_height, above_width, _ = level.above.shape
    parents = parent_cells(cells, (batch, height, width), (above_height, above_width))
    y = pointwise(x, level.lateral) + _flat(level.above).at[parents].get(mode="fill", fill_value=0)
    return jnp.where((cells < batch * height * width)[..., None], y, 0)


def _merged_rows(level: CascadeLevel, sites: Sites, chunk: int) -> Array:
    def compute(first: Array, number: int) -> list[Array]:
        return [merged_at(level, lax.dynamic_slice_in_dim(sites.index, first, number))]

    assert level.lateral is not None, "without a lateral convolution the features are the merged map"
    rows = jnp.zeros((sites.capacity, level.lateral.kernel.shape[-1]), level.features.dtype)
    return in_chunks(sites.counts[-1], chunk, [rows], compute)[0]


def _flat(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])
