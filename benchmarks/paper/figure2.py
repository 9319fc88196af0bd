"""Figure 2 of the paper: the work of each module in RetinaNet, RetinaNet with P2, and QueryDet with CSQ.

FLOPs are XLA's count; on sparse levels it is an upper bound (``benchmarks.flops``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import charts
from benchmarks.flops import gflop, sparse_level_gflop
from benchmarks.options import RandomImage
from benchmarks.report import Column, Report, Row, ms
from benchmarks.subjects import laid_out_queries, random_image, random_model
from benchmarks.timing import interleaved
from querydet_jax.config import InferenceConfig
from querydet_jax.inference.pipeline import sparse_options, split_for_inference
from querydet_jax.models import DenseDetector
from querydet_jax.sparse import Cells, SparseOptions, children, grow
from querydet_jax.sparse.methods import cascade_sparse_query

RETINANET, WITH_P2, CSQ = "RetinaNet", "RetinaNet + P2", "QueryDet, CSQ"
MODULES = ("backbone", "FPN", "heads P4..P7", "heads P3", "heads P2", "query head P4")


@dataclass(frozen=True)
class Figure2(RandomImage):
    """Figure 2: FLOPs and time of each module, for RetinaNet, RetinaNet with P2, and CSQ."""

    rounds: int = 10
    """Timed rounds."""


@dataclass(frozen=True)
class Part:
    """A compiled piece of inference, its arguments, and its GFLOP."""

    run: Any
    arguments: tuple[Any, ...]
    gflop: float

    def __call__(self) -> Any:
        return self.run(*self.arguments)


def figure2(arguments: Figure2) -> None:
    model = random_model(arguments.backbone, arguments.classes, arguments.channels)
    queries = laid_out_queries(arguments.height, arguments.width, arguments.active)
    parts, shares = _parts(model, random_image(arguments.height, arguments.width), queries)
    measured = interleaved({name: part for name, part in parts.items()}, arguments.rounds)
    times = {name: float(np.median(values)) for name, values in measured.items()}
    systems = {
        RETINANET: {"FPN": "FPN P3..P7", "heads P2": None, "query head P4": None},
        WITH_P2: {"FPN": "FPN P2..P7", "query head P4": None},
        CSQ: {"FPN": "FPN P4..P7", "heads P3": "CSQ P3", "heads P2": "CSQ P2"},
    }
    rows: list[Row] = []
    for module in MODULES:
        row: Row = {"module": module}
        for system, names in systems.items():
            part = names.get(module, module)
            row[f"{system} GFLOP"] = None if part is None else parts[part].gflop
            row[f"{system} ms"] = None if part is None else times[part]
        rows.append(row)
    keys = [key for key in rows[0] if key != "module"]
    rows.append({"module": "sum", **{key: sum(row[key] or 0.0 for row in rows) for key in keys}})
    dense = parts["heads P2"].gflop + parts["heads P3"].gflop
    ratio = (parts["heads only CSQ P2"].gflop + parts["heads only CSQ P3"].gflop) / dense
    Report(
        "figure2",
        f"Figure 2, work by module: {arguments.backbone}, {arguments.classes} classes, "
        f"{arguments.height}x{arguments.width}, batch 1, float32, medians of {arguments.rounds} interleaved rounds",
        [Column("module", "module"), *(Column(key, key, ms) for key in keys)],
        rows,
        notes=[
            f"CSQ: {shares[3]:.1%} of P3 and {shares[2]:.1%} of P2 active. The FPN makes P4..P7, the sparse levels "
            "their own input, counted with their heads",
            f"heads of P2 and P3: {dense:.0f} GFLOP dense, CSQ at most {ratio:.2%} of that with padding",
            "each module is timed as a program of its own; compiled together they share passes over memory",
        ],
        results={"p2_p3_head_flop_share": ratio, "active": {f"P{level}": value for level, value in shares.items()}},
        draw=lambda figure: charts.bars(
            figure,
            list(systems),
            {module: [row[f"{system} GFLOP"] or 0.0 for system in systems] for module, row in _by_module(rows)},
            x="GFLOP",
            title="Work by module",
        ),
    ).publish(arguments.out, arguments)


def _by_module(rows: list[Row]) -> list[tuple[str, Row]]:
    return [(row["module"], row) for row in rows if row["module"] != "sum"]


def _parts(model: DenseDetector, image: jax.Array, queries: np.ndarray) -> tuple[dict[str, Part], dict[int, float]]:
    """Return the pieces by name, and the active share of each sparse level."""
    graph, state = split_for_inference(model)

    def part(function: Callable[..., Any], *values: Any) -> Part:
        run = jax.jit(lambda state, *values: function(nnx.merge(graph, state), *values))
        return Part(run, (state, *values), gflop(run, state, *values))

    def fpn(finest: int, model: DenseDetector, stages: dict[int, jax.Array]) -> tuple[dict[int, jax.Array], jax.Array]:
        merged = model.fpn.merge(stages, min(finest, 3))
        # The sparse levels make their input from the merged map of P3; no output of P4..P7 needs it.
        return model.fpn.outputs(stages, merged, finest), merged[3]

    found = {
        "backbone": part(lambda model, image: model.backbone(model.normalize(image)), image),
    }
    stages = found["backbone"]()
    for finest in (2, 3, 4):
        found[f"FPN P{finest}..P7"] = part(partial(fpn, finest), stages)
    pyramid, _ = found["FPN P2..P7"]()
    coarse = {level: x for level, x in pyramid.items() if level >= 4}
    found["heads P4..P7"] = part(lambda model, pyramid: [model.dense_heads(x) for x in pyramid.values()], coarse)
    for level in (3, 2):
        found[f"heads P{level}"] = part(lambda model, x: model.dense_heads(x), pyramid[level])
    found["query head P4"] = part(lambda model, x: model.query_head(x), pyramid[4])

    shares, fired = {}, jnp.asarray(queries)[None]
    inference = InferenceConfig()
    options = sparse_options(inference)
    merged = jax.jit(lambda state, stages: nnx.merge(graph, state).fpn.merge(stages, 3))(state, stages)
    for level in (3, 2):
        keys = children(fired, pyramid[level].shape[1:3])
        active = int(jnp.sum(grow(keys, options.context)[-1].astype(jnp.int32)))
        shares[level] = active / keys.size
        found[f"heads only CSQ P{level}"], found[f"CSQ P{level}"] = _sparse_parts(
            graph, state, level, stages, merged, keys, options
        )
        fired = keys
    return found, shares


def _sparse_parts(
    graph: nnx.GraphDef,
    state: Any,
    level: int,
    stages: dict[int, jax.Array],
    merged: dict[int, jax.Array],
    keys: jax.Array,
    options: SparseOptions,
) -> tuple[Part, Part]:
    """Return the level with the GFLOP of its heads alone, and with those of its input and heads."""
    query = level == 3  # no level is below the finest one

    def stacks(model: DenseDetector) -> list[Any]:
        assert model.query_head is not None
        return [*model.head_stacks(), *([model.query_head.stack()] if query else [])]

    def whole(state: Any, stages: dict[int, jax.Array], merged: dict[int, jax.Array], keys: jax.Array) -> Any:
        model = nnx.merge(graph, state)

        def select(outputs: list[jax.Array], cells: Cells) -> Any:
            *heads, last = outputs if query else [*outputs, None]
            return model.select(level, heads, cells, topk=1000), None if last is None else jnp.max(last)

        sparse = model.fpn.sparse_level(level, stages, merged)
        return cascade_sparse_query(sparse, keys, stacks(model), select, options).selected

    run = jax.jit(whole)
    source = jax.eval_shape(lambda: nnx.merge(graph, state).fpn.sparse_level(level, stages, merged))
    every = jax.eval_shape(lambda: stacks(nnx.merge(graph, state)))
    heads, level_input = sparse_level_gflop(source, every, keys, options)
    arguments = (state, stages, merged, keys)
    return Part(run, arguments, heads), Part(run, arguments, heads + level_input)
