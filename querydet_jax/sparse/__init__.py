"""Fixed-capacity sparse computation on feature maps: sites, convolution on them, ladder, cascade.

Nothing here knows anchors, classes or losses; `querydet_jax.models` passes in the one callable that does, ``select``.
"""

from querydet_jax.sparse.cascade import LevelResult, LevelStats, cap_queries, cascade
from querydet_jax.sparse.cells import Cells, whole_map
from querydet_jax.sparse.conv import Conv, Stack, conv_rows, crop_stacks, masked_dense_stacks, pointwise, run_stacks
from querydet_jax.sparse.ladder import ladder_capacities, run_ladder
from querydet_jax.sparse.level import CascadeLevel
from querydet_jax.sparse.methods import Method, SparseOptions, buffer_sizes
from querydet_jax.sparse.sites import Sites, children, dilate, grow, neighbour_table, select_sites
from querydet_jax.sparse.tiles import Tiles, cells_of_tiles, run_stacks_on_tiles, select_tiles, tile_count

__all__ = [
    "CascadeLevel",
    "Cells",
    "Conv",
    "LevelResult",
    "LevelStats",
    "Method",
    "Sites",
    "SparseOptions",
    "Stack",
    "Tiles",
    "buffer_sizes",
    "cap_queries",
    "cascade",
    "cells_of_tiles",
    "children",
    "conv_rows",
    "crop_stacks",
    "dilate",
    "grow",
    "ladder_capacities",
    "masked_dense_stacks",
    "neighbour_table",
    "pointwise",
    "run_ladder",
    "run_stacks",
    "run_stacks_on_tiles",
    "select_sites",
    "select_tiles",
    "tile_count",
    "whole_map",
]
