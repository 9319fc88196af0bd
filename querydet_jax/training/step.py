"""Training state and the training step, pure functions of arrays.

The state is one pytree; the network's structure (``graph``) is static. Shape letters: B images of
one device's batch, H W image, G padded boxes.

A step's update is that of its global batch, however the batch is split over devices and over time.
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

from querydet_jax.models.base import DenseDetector
from querydet_jax.models.loss_terms import GlobalBatch

PyTree = Any
Batch = Mapping[str, Array | np.ndarray]
Metrics = dict[str, Array]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "rest", "opt_state", "normalizer", "step", "ema"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes.

    ``params`` are trained; ``rest`` is everything else in the network: frozen parameters, frozen norms, pixel
    statistics, running statistics of live batch norm. ``ema``: moving average of ``params``, or None.
    """

    params: PyTree
    rest: PyTree
    opt_state: PyTree
    normalizer: Array
    step: Array
    ema: PyTree = None


def split_model(model: DenseDetector, axis_name: str | None) -> tuple[nnx.GraphDef[Any], PyTree, PyTree]:
    """Split the model, in training mode, into (graph, params, rest).

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


def init_state(model: DenseDetector, optimizer: optax.GradientTransformation, *, ema: bool = False) -> TrainState:
    """Return the state before the first step."""
    _, params, rest = split_model(model, None)
    # Copies: the step donates its state, and the model must stay usable.
    params, rest = jax.tree.map(jnp.copy, (params, rest))
    normalizer = jnp.asarray(model.config.loss.normalizer_init, jnp.float32)
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(params, rest, optimizer.init(params), normalizer, jnp.zeros((), jnp.int32), average)


def merge_into(model: DenseDetector, state: TrainState) -> None:
    """Write a state's values into the model for evaluation and export: the moving average, if there is one."""
    params = state.params if state.ema is None else state.ema
    nnx.update(model, jax.tree.map(jnp.copy, params), jax.tree.map(jnp.copy, state.rest))


Loss = Callable[[PyTree, PyTree, Array, Batch, GlobalBatch | None], tuple[Array, tuple[PyTree, Array, Metrics]]]
"""``loss(params, rest, normalizer, batch, global_batch)`` returns the loss and (rest, normalizer, metrics) after it."""


def make_loss(model: DenseDetector, axis_name: str | None, *, remat: bool = False) -> Loss:
    """Return the loss of ``model`` as a function of its arrays; ``batch`` as for ``make_step``, plus ``keys [B]``."""
    graph, _, _ = split_model(model, axis_name)
    trainable = model.trainable()

    def loss_of(
        params: PyTree, rest: PyTree, normalizer: Array, batch: Batch, global_batch: GlobalBatch | None
    ) -> tuple[Array, tuple[PyTree, Array, Metrics]]:
        # copy: running statistics are written inside this trace, so their variables must belong to it.
        net = nnx.merge(graph, params, rest, copy=True)
        losses = net.losses(
            batch["images"],
            batch["boxes"],
            batch["classes"],
            normalizer,
            batch["sizes"],
            axis_name,
            keys=batch["keys"],
            global_batch=global_batch,
            remat=remat,
        )
        metrics = {"loss": losses.total, **losses.terms(), "foreground": losses.num_foreground}
        return losses.total, (nnx.state(net, nnx.Not(trainable)), losses.normalizer, metrics)

    return loss_of


def make_step(
    model: DenseDetector,
    optimizer: optax.GradientTransformation,
    axis_name: str | None,
    *,
    seed: int = 0,
    accumulate: int = 1,
    remat: bool = False,
    ema_decay: float = 0.0,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Return one optimisation step, to be run under a mapped axis ``axis_name`` (None: a single device).

    ``batch`` holds images uint8 ``[B, H, W, 3]``, sizes int32 ``[B, 2]``, boxes ``[B, G, 4]`` and classes int32
    ``[B, G]``. Gradients and metrics are those of all replicas' images as one batch; every replica makes the same
    update.

    Args:
      seed: seeds random samples of anchors and proposals, with the step's number and the image's place in the batch.
      accumulate: number of equal shards of the batch, computed one after another in the memory of one. Live batch norm
        takes its statistics per shard; everything else equals one shard.
      remat: see ``DenseDetector.losses``.
      ema_decay: decay of the parameters' moving average, if the state has one.
    """
    value_and_grad = jax.value_and_grad(make_loss(model, axis_name, remat=remat), has_aux=True)

    def accumulated(state: TrainState, batch: Batch) -> tuple[PyTree, PyTree, Array, Metrics]:
        """Average gradients and metrics over the shards; each divides by the global batch's foreground."""
        _, height, width, _ = batch["images"].shape
        boxes, classes = jnp.asarray(batch["boxes"]), jnp.asarray(batch["classes"])
        foreground = model.count_foreground((height, width), boxes, classes)
        global_batch = GlobalBatch(foreground, accumulate)
        if axis_name is not None:
            global_batch = GlobalBatch(lax.psum(foreground, axis_name), accumulate * lax.axis_size(axis_name))

        def add(carry: tuple[PyTree, PyTree], part: Batch) -> tuple[tuple[PyTree, PyTree], tuple[Array, Metrics]]:
            rest, total = carry
            (_, (rest, normalizer, metrics)), grads = value_and_grad(
                state.params, rest, state.normalizer, part, global_batch
            )
            return (rest, jax.tree.map(jnp.add, total, grads)), (normalizer, metrics)

        parts = {name: x.reshape(accumulate, -1, *x.shape[1:]) for name, x in batch.items()}
        nothing = jax.tree.map(jnp.zeros_like, state.params)
        (rest, total), (normalizers, metrics) = lax.scan(add, (state.rest, nothing), parts)
        grads = jax.tree.map(lambda x: x / accumulate, total)
        return grads, rest, normalizers[0], jax.tree.map(lambda x: jnp.mean(x, axis=0), metrics)

    def image_keys(step: Array, number: int) -> Array:
        first = 0 if axis_name is None else lax.axis_index(axis_name) * number
        of_step = jax.random.fold_in(jax.random.key(seed), step)
        return jax.vmap(partial(jax.random.fold_in, of_step))(first + jnp.arange(number, dtype=jnp.int32))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        batch = {**batch, "keys": image_keys(state.step, len(batch["images"]))}
        if accumulate > 1:
            grads, rest, normalizer, metrics = accumulated(state, batch)
        else:
            (_, (rest, normalizer, metrics)), grads = value_and_grad(
                state.params, state.rest, state.normalizer, batch, None
            )
        if axis_name is not None:
            grads, metrics = lax.pmean((grads, metrics), axis_name)
        metrics["grad_norm"] = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            # Otherwise the average of a short run would be mostly its random initial parameters.
            number = state.step.astype(jnp.float32)
            decay = jnp.minimum(ema_decay, (1.0 + number) / (10.0 + number))
            ema = jax.tree.map(lambda average, x: average + (1.0 - decay) * (x - average), ema, params)
        return TrainState(params, rest, opt_state, normalizer, state.step + 1, ema), metrics

    return step
