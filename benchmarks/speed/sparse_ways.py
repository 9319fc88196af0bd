"""Ways to compute the same convolutions at the active cells of a map: static programs of jax, and spconv.

Shape letters: h w map, C channels, N sites, T tiles.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.report import Row
from querydet_jax.sparse import (
    CascadeLevel,
    Conv,
    SparseOptions,
    Stack,
    buffer_sizes,
    cells_of_tiles,
    conv_rows,
    crop_stacks,
    grow,
    ladder_capacities,
    masked_dense_stacks,
    neighbour_table,
    run_stacks,
    run_stacks_on_tiles,
    select_sites,
    select_tiles,
    tile_count,
)

CONTEXT = 2
LADDER = (0.01, 0.03, 0.06, 0.12, 0.25, 0.5)
DENSE, GATHER, KEYS, TILES, CROPS = "dense", "gather", "gather, keys only", "tiles", "crops"
COLD, WARM = "spconv cold", "spconv warm"


@dataclass(frozen=True)
class Masks:
    """Keys and active cells of one share, bool ``[1, h, w]``."""

    keys: np.ndarray
    active: np.ndarray

    @property
    def share(self) -> float:
        return float(self.active.mean())


class StaticWays:
    """The static ways, compiled once per buffer size.

    Args:
      shape: (h, w) of the map.
      relu_last: end each stack with a ReLU, which a head's stacks do not have.
      chunk: rows per turn of the gather convolution.
      tile: side of a tile in cells.
    """

    def __init__(self, stacks: Sequence[Stack], shape: tuple[int, int], *, relu_last: bool, chunk: int, tile: int):
        self._stacks, self._cells, self._relu_last = stacks, shape[0] * shape[1], relu_last
        self._wanted_chunk, self._tile = chunk, tile
        self._compiled: dict[tuple[str, int], tuple[Any, float, float | None]] = {}
        self._functions: dict[str, Callable[..., Any]] = {
            DENSE: self._dense, GATHER: self._gather, KEYS: self._keys_only, TILES: self._tiles, CROPS: self._crops,
        }  # fmt: skip

    def get(self, way: str, capacity: int, features: jax.Array, masks: Masks) -> tuple[Callable[[], Any], Row]:
        """Return a call of ``way``, and what it took: seconds to compile, programs so far, temporary MiB."""
        values = (self._stacks, features, jnp.asarray(masks.active), jnp.asarray(masks.keys))
        if (way, capacity) not in self._compiled:
            begun = time.perf_counter()
            program = jax.jit(lambda *values: self._functions[way](capacity, *values)).lower(*values).compile()
            seconds = time.perf_counter() - begun
            memory = program.memory_analysis()
            self._compiled[way, capacity] = program, seconds, memory and memory.temp_size_in_bytes / 2**20
        program, seconds, mib = self._compiled[way, capacity]
        count = sum(name == way for name, _ in self._compiled)
        return lambda: program(*values), {"compile_s": seconds, "compilations": count, "temp_mib": mib}

    def _dense(self, capacity: int, stacks: Any, features: jax.Array, active: jax.Array, keys: jax.Array) -> Any:
        return self._finished(masked_dense_stacks(features, jnp.ones_like(active), stacks))

    def _gather(self, capacity: int, stacks: Any, features: jax.Array, active: jax.Array, keys: jax.Array) -> Any:
        return self._on_sites([active], capacity, stacks, features)

    def _keys_only(self, capacity: int, stacks: Any, features: jax.Array, active: jax.Array, keys: jax.Array) -> Any:
        return self._on_sites(grow(keys, CONTEXT), capacity, stacks, features)

    def _on_sites(self, rings: list[jax.Array], capacity: int, stacks: Any, features: jax.Array) -> Any:
        sites = select_sites(rings, capacity)
        rows = features.reshape(-1, features.shape[-1]).at[sites.index].get(mode="fill", fill_value=0)
        table = neighbour_table(sites)
        if not self._relu_last:
            return run_stacks(rows, table, sites, stacks, chunk=self._chunk()), sites.cells
        # The ReLU is inside the loop over chunks: no pass of its own over the buffer.
        layer = [conv for stack in stacks for conv in stack]
        return conv_rows(rows, table, layer, sites.counts[-1], relu=True, chunk=self._chunk()), sites.cells

    def _tiles(self, capacity: int, stacks: Any, features: jax.Array, active: jax.Array, keys: jax.Array) -> Any:
        side = self._tile
        tiles = select_tiles(active, capacity // side**2, side)
        _, chunk = buffer_sizes(self.options("tiles"), active.shape)
        outputs = run_stacks_on_tiles(CascadeLevel(2, features), active, tiles, stacks, chunk=chunk)
        return self._finished(outputs), cells_of_tiles(tiles, active)

    def _crops(self, capacity: int, stacks: Any, features: jax.Array, active: jax.Array, keys: jax.Array) -> Any:
        sites = select_sites([keys], capacity)
        return self._finished(crop_stacks(features, sites, stacks, chunk=self._chunk(8))), sites

    def _finished(self, outputs: list[jax.Array]) -> list[jax.Array]:
        """Add the last ReLU where the ways have one."""
        return [jax.nn.relu(y) for y in outputs] if self._relu_last else outputs

    def _chunk(self, divisor: int = 1) -> int:
        return ladder_capacities(LADDER, self._cells, max(8, self._wanted_chunk // divisor))[1]

    def options(self, kernel: Literal["gather", "tiles"]) -> SparseOptions:
        return SparseOptions(0.5, CONTEXT, (*LADDER, 1.0), self._wanted_chunk, kernel=kernel, tile=self._tile)

    def capacity(self, way: str, masks: Masks) -> int:
        """Return the smallest buffer of the ladder, in cells, that holds what ``way`` computes."""
        if way == DENSE:
            return 0
        shape = masks.active.shape
        if way == TILES:
            sizes = buffer_sizes(self.options("tiles"), shape)[0]
            needed = self._tile**2 * int(tile_count(jnp.asarray(masks.active), self._tile))
        elif way == CROPS:
            sizes = ladder_capacities((*LADDER, 1.0), masks.keys.size, max(8, self._wanted_chunk // 8))[0]
            needed = int(masks.keys.sum())
        else:
            sizes, needed = buffer_sizes(self.options("gather"), shape)[0], int(masks.active.sum())
        return min(size for size in sizes if size >= needed)


class Spconv:
    """The stacks as submanifold convolutions of spconv, on one thread.

    spconv's kernels are [out, kh, kw, in], its coordinates int32 ``[N, 3]`` (image, y, x). They must be contiguous:
    spconv misreads others without an error. A layer does not change its input's dictionary of indices, but gives the
    filled one to its output. Unless it is carried over, every tower and every call builds the index again.
    """

    def __init__(self, stacks: Sequence[Stack], *, relu_last: bool = False):
        self._torch: Any = importlib.import_module("torch")
        self._spconv: Any = importlib.import_module("spconv.pytorch")
        self._torch.set_num_threads(1)
        self.versions = f"torch {self._torch.__version__}, spconv {importlib.metadata.version('spconv')}"
        self._relu_last = relu_last
        self._layers = [[self._layer(conv) for conv in stack] for stack in stacks]

    def _layer(self, conv: Conv) -> Any:
        _, _, inputs, outputs = conv.kernel.shape
        # spconv's CPU kernels refuse a bias: it is added afterwards.
        layer = self._spconv.SubMConv2d(inputs, outputs, 3, bias=False, indice_key="sites")
        kernel = self._torch.from_numpy(np.ascontiguousarray(np.asarray(conv.kernel).transpose(3, 0, 1, 2)))
        layer.weight.data.copy_(kernel)
        return layer.eval(), self._torch.from_numpy(np.array(conv.bias))

    def set(self, features: np.ndarray, active: np.ndarray) -> None:
        """Take a dense map ``[1, h, w, C]`` and the active cells bool ``[1, h, w]``."""
        self._features = self._torch.from_numpy(np.array(features))
        self._active = self._torch.from_numpy(np.array(active))
        self._ready = self._sites()
        self._run(self._ready)  # builds the index that `warm` reuses

    def cold(self) -> list[Any]:
        """Compute from the dense map and the mask, building the index."""
        return self._run(self._sites())

    def warm(self) -> list[Any]:
        """Compute from the features at the sites, with the index built before."""
        return self._run(self._ready)

    def _sites(self) -> Any:
        index = self._active.nonzero().int().contiguous()
        rows = self._features[self._active]
        return self._spconv.SparseConvTensor(rows, index, list(self._active.shape[1:]), 1)

    def _run(self, sites: Any) -> list[Any]:
        outputs = []
        with self._torch.inference_mode():
            for stack in self._layers:
                x = sites
                for number, (layer, bias) in enumerate(stack):
                    x = layer(x)
                    sites.indice_dict = x.indice_dict
                    y = x.features.add_(bias)
                    x = x.replace_feature(y.relu_() if number < len(stack) - 1 or self._relu_last else y)
                outputs.append(x.features)
        return outputs
