"""Fixed-capacity sparse computation on feature maps: sites, convolution on them, ladder, cascade.

Nothing here knows anchors, classes or losses; `querydet_jax.models` brings those in as callables.
"""

from querydet_jax.sparse.conv import Conv, Stack, conv_rows, masked_dense_stacks, run_stacks
from querydet_jax.sparse.ladder import ladder_capacities, run_ladder
from querydet_jax.sparse.query import CascadeLevel, LevelResult, LevelStats, SparseOptions, cascade
from querydet_jax.sparse.sites import Sites, children, dilate, grow, neighbour_table, select_sites, whole_map

__all__ = [
    "CascadeLevel",
    "Conv",
    "LevelResult",
    "LevelStats",
    "Sites",
    "SparseOptions",
    "Stack",
    "cascade",
    "children",
    "conv_rows",
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
