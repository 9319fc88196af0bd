"""Fixed-capacity sparse computation on feature maps: sites, convolution on them, ladder, cascade.

Nothing here knows anchors, classes or losses; `querydet_jax.models` brings those in as callables.
"""

from querydet_jax.sparse.conv import Conv, Stack, conv_rows, crop_stacks, masked_dense_stacks, run_stacks
from querydet_jax.sparse.ladder import ladder_capacities, run_ladder
from querydet_jax.sparse.methods import CascadeLevel, SparseOptions
from querydet_jax.sparse.query import LevelResult, LevelStats, cap_queries, cascade
from querydet_jax.sparse.sites import Sites, children, dilate, grow, neighbour_table, select_sites, whole_map

__all__ = [
    "CascadeLevel",
    "Conv",
    "LevelResult",
    "LevelStats",
    "Sites",
    "SparseOptions",
    "Stack",
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
    "run_ladder",
    "run_stacks",
    "select_sites",
    "whole_map",
]
