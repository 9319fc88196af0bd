"""Training state and the training step, pure functions of arrays.

The state is one pytree; the network's structure (``graph``) is static. Shape letters: B images of
one device's batch, H W image, G padded boxes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array, lax

from querydet_jax.models.skeleton import DenseDetector

PyTree = Any
Batch = Mapping[str, Array | np.ndarray]
Metrics = dict[str, Array]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "rest", "opt_state", "normalizer", "step"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes. ``params`` are trained; ``rest`` is everything else in the network:
    frozen parameters, frozen norms, pixel statistics, running statistics of live batch norm."""

    params: PyTree
    rest: PyTree
    opt_state: PyTree
    normalizer: Array
    step: Array


def split_model(model: DenseDetector, axis_name: str | None) -> tuple[nnx.GraphDef, PyTree, PyTree]:
    """The model in training mode as (graph, params, rest).

    With ``axis_name``, live batch norm averages its statistics over that axis.
    """
    model.train()
    if axis_name is not None:
        model.set_attributes(nnx.BatchNorm, axis_name=axis_name, raise_if_not_found=False)
    graph, params, rest = nnx.split(model, model.trainable(), ...)
    if axis_name is not None:
        model.set_attributes(nnx.BatchNorm, axis_name=None, raise_if_not_found=False)
    model.eval()
    return graph, params, rest


def init_state(model: DenseDetector, optimizer: optax.GradientTransformation) -> TrainState:
    _, params, rest = split_model(model, None)
    # Copies: the step donates its state, and the model must stay usable.
    params, rest = jax.tree.map(jnp.copy, (params, rest))
    normalizer = jnp.asarray(model.config.loss.normalizer_init, jnp.float32)
    return TrainState(params, rest, optimizer.init(params), normalizer, jnp.zeros((), jnp.int32))


def merge_into(model: DenseDetector, state: TrainState) -> None:
    """Write a state's values into the model."""
    nnx.update(model, jax.tree.map(jnp.copy, state.params), jax.tree.map(jnp.copy, state.rest))


def make_step(
    model: DenseDetector, optimizer: optax.GradientTransformation, axis_name: str | None, seed: int = 0
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """One optimisation step, to be run under a mapped axis ``axis_name`` (None: a single device).

    ``batch`` holds images uint8 ``[B, H, W, 3]``, sizes int32 ``[B, 2]``, boxes ``[B, G, 4]`` and
    classes int32 ``[B, G]``. Gradients and metrics are means over the axis; every replica makes the
    same update. ``seed`` and the step's number decide what detectors sample that learn from a sample.
    """
    graph, _, _ = split_model(model, axis_name)
    trainable = model.trainable()

    def loss_of(params: PyTree, state: TrainState, batch: Batch) -> tuple[Array, tuple[Any, PyTree]]:
        # copy: running statistics are written inside this trace, so their variables must belong to it.
        net = nnx.merge(graph, params, state.rest, copy=True)
        losses = net.losses(
            batch["images"],
            batch["boxes"],
            batch["classes"],
            state.normalizer,
            batch["sizes"],
            axis_name,
            jax.random.fold_in(jax.random.key(seed), state.step),
        )
        return losses.total, (losses, nnx.state(net, nnx.Not(trainable)))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        (_, (losses, rest)), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params, state, batch)
        metrics = {
            "loss": losses.total,
            **losses.terms(),
            "foreground": losses.num_foreground,
        }
        if axis_name is not None:
            grads, metrics = lax.pmean((grads, metrics), axis_name)
        metrics["grad_norm"] = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, rest, opt_state, losses.normalizer, state.step + 1), metrics

    return step
