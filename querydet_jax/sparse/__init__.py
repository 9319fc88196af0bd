"""Fixed-capacity sparse computation on feature maps: sites, convolution on them, ladder, cascade.

Nothing here knows anchors, classes or losses; `querydet_jax.models` brings those in as callables.
"""

from querydet_jax.sparse.cascade import LevelResult, LevelStats, cap_queries, cascade
from querydet_jax.sparse.conv import Conv, Stack, conv_rows, crop_stacks, masked_dense_stacks, pointwise, run_stacks
from querydet_jax.sparse.ladder import ladder_capacities, run_ladder
from querydet_jax.sparse.level import CascadeLevel
from querydet_jax.sparse.methods import Method, SparseOptions, buffer_sizes
from querydet_jax.sparse.sites import Sites, children, dilate, grow, neighbour_table, select_sites, whole_map
from querydet_jax.sparse.tiles import Tiles, run_stacks_on_tiles, select_tiles, tile_count, tile_sites

__all__ = [
    "CascadeLevel",
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
    "tile_sites",
    "whole_map",
]
