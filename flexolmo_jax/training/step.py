"""The training objective, and one optimizer step: pure functions of the state, the frozen leaves and a batch."""

import ctypes
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from flexolmo_jax.model.decoder import Decoder, Output
from flexolmo_jax.model.loss import load_balancing, prediction_loss, router_z_loss, routing_by_layer, token_mask
from flexolmo_jax.model.selectors import LOG_SCALE
from flexolmo_jax.training.optimizer import SkipState

Leaves = dict[str, jax.Array]
Batch = dict[str, jax.Array]
BELOW_BLOCKS = frozenset({"embedding", LOG_SCALE})  # leaves whose gradients pass the input of the first block


class TrainState(NamedTuple):
    """Everything a step changes, and all that a checkpoint holds besides the data position."""

    step: jax.Array
    trainable: Leaves
    optimizer: optax.OptState


class Program(NamedTuple):
    """A train step before it is compiled, with the shapes, dtypes and shardings of all its arguments.

    Attributes:
      model: the decoder to train.
      trainable: paths of the trainable leaves.
      mesh: of the devices.
      optimizer: of the trainable leaves.
      step: what `make_train_step` returns.
      state: the train state, abstract.
      frozen: the frozen leaves, abstract.
      batch: a global batch, abstract: int32 [batch, length] arrays.
    """

    model: Decoder
    trainable: frozenset[str]
    mesh: Mesh
    optimizer: optax.GradientTransformation
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    state: TrainState
    frozen: dict[str, jax.ShapeDtypeStruct]
    batch: dict[str, jax.ShapeDtypeStruct]


class LossWeights(NamedTuple):
    """Weights of the regularisers, per token (docs/method.md, "Settings of the published run")."""

    z_loss: float
    router_z_loss: float
    load_balancing: float


def objective(
    model: Decoder, params: dict[str, jax.Array], batch: dict[str, jax.Array], weights: LossWeights
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The training loss of a batch, summed over its tokens.

    Args:
      model: the decoder.
      params: flat dict of all leaves.
      batch: int32 [batch, length] arrays `tokens`, `targets`, `segment_ids` (0 is padding), `positions`.
      weights: weights of the regularisers.

    Returns:
      (loss, sums): `sums` holds `tokens`, `cross_entropy` (nats) and the regularisers before their
      weights, each a sum over tokens, and those of `loss.routing_by_layer`.
    """
    out: Output = model.apply_flat(params, batch["tokens"], batch["segment_ids"], batch["positions"])
    mask_BxS = token_mask(batch)
    tokens = jnp.sum(mask_BxS)
    router = {
        "router_z_loss": router_z_loss(out.router_logits_LxBxSxE, mask_BxS),
        "load_balancing": load_balancing(out.router_weights_LxBxSxE, mask_BxS, model.layout.top_k) * tokens,
    }
    head = prediction_loss(model, params, out, batch, weights.z_loss)
    loss = head.loss + sum(getattr(weights, name) * value for name, value in router.items())
    sums = {"tokens": tokens, "cross_entropy": head.cross_entropy, "z_loss": head.z_loss, **router}
    weights_LxBxSxE = jax.lax.stop_gradient(out.router_weights_LxBxSxE)
    return loss, {**sums, **routing_by_layer(weights_LxBxSxE, mask_BxS)}


def make_train_step(
    model: Decoder,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    weights: LossWeights,
    grad_accum_steps: int,
) -> Callable[[TrainState, Leaves, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Builds the step `(state, frozen, batch) -> (state, metrics)`.

    Gradients are taken with respect to the trainable leaves only: none of a frozen leaf is computed. The batch is
    computed in `grad_accum_steps` micro-batches whose sums are added, so the gradient is that of the mean over all
    tokens of the batch, however it is divided (load balancing is computed per micro-batch).

    Metrics, float32: `loss`, `cross_entropy`, `z_loss`, `router_z_loss`, `load_balancing` (means per token),
    `gradient_norm` before clipping, `update_norm`, `learning_rate` (of `schedule`, for the log), `tokens`, and
    `routing_LxE` and `router_entropy_L`, means over tokens; of an optimizer that skips steps also `skipped` and
    `consecutive_skipped`.
    """
    update = optax.with_extra_args_support(optimizer).update

    def micro_batch_loss(trainable: Leaves, frozen: Leaves, tokens: jax.Array, micro_batch: Batch):
        """(contribution to the mean over `tokens`, vjp with respect to the trainable leaves, sums) of a micro-batch."""
        differentiated = _ending_at_blocks(model) if trainable.keys().isdisjoint(BELOW_BLOCKS) else model

        def loss_fn(trainable):
            loss, sums = objective(differentiated, {**frozen, **trainable}, micro_batch, weights)
            return loss / tokens, {"loss": loss, **sums}

        return jax.vjp(loss_fn, trainable, has_aux=True)

    def train_step(state: TrainState, frozen: Leaves, batch: Batch):
        # The loss is divided, not its gradient: that would be one more pass over the memory of all trainable leaves.
        tokens = jnp.maximum(jnp.sum(batch["segment_ids"] > 0), 1).astype(jnp.float32)
        loss_of = functools.partial(micro_batch_loss, state.trainable, frozen, tokens)
        if grad_accum_steps == 1:
            # No sum of gradients, which would be held beside each layer's gradient.
            loss, vjp, sums = loss_of(batch)
            (gradient,) = vjp(jnp.ones_like(loss))
        else:
            # Micro-batch i takes sequences i, i + grad_accum_steps, ...: each then spans all devices.
            micro_batches = jax.tree.map(lambda x: x.reshape(-1, grad_accum_steps, *x.shape[1:]).swapaxes(0, 1), batch)
            # Each layer's gradient is added in place: that of one micro-batch is never held whole.
            total = jax.tree.map(lambda leaf: jax.new_ref(jnp.zeros_like(leaf)), state.trainable)

            def accumulate(_, micro_batch):
                loss, vjp, sums = loss_of(micro_batch)
                vjp.with_refs(total)(jnp.ones_like(loss))
                return None, sums

            _, sums = jax.lax.scan(accumulate, None, micro_batches)
            sums = jax.tree.map(functools.partial(jnp.sum, axis=0), sums)
            gradient = jax.tree.map(jax.freeze, total)
        metrics = {name: value / tokens for name, value in sums.items()}
        metrics |= {"tokens": tokens, "gradient_norm": optax.tree.norm(gradient)}
        metrics["learning_rate"] = schedule(state.step)
        updates, optimizer_state = update(gradient, state.optimizer, state.trainable, value=metrics["loss"])
        if isinstance(optimizer_state, SkipState):
            metrics |= {"consecutive_skipped": optimizer_state.consecutive, "skipped": optimizer_state.skipped}
        metrics["update_norm"] = optax.tree.norm(updates)
        trainable: Any = optax.apply_updates(state.trainable, updates)
        return TrainState(state.step + 1, trainable, optimizer_state), metrics

    return train_step


def _ending_at_blocks(model: Decoder) -> Decoder:
    """The model with no gradient below its blocks; as is on accelerators: conditionals in their loops may cost more."""
    if model.compute.platform != "cpu":
        return model
    return model.clone(compute=dataclasses.replace(model.compute, input_gradient=False))


def initial_state(trainable: Leaves, optimizer: optax.GradientTransformation, abstract: TrainState) -> TrainState:
    """The train state of step 0 around leaves, with the shardings of `abstract`."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract.optimizer)
    step = jax.jit(lambda: jnp.zeros((), jnp.int32), out_shardings=abstract.step.sharding)()
    return TrainState(step, trainable, jax.jit(optimizer.init, out_shardings=shardings)(trainable))


def compile_step(step: Callable, *arguments: Any) -> jax.stages.Compiled:
    """Compiles a step of arguments that may be abstract; the first, the state, is donated to it."""
    compiled = jax.jit(step, donate_argnums=0).lower(*arguments).compile()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):  # of glibc, which would keep hundreds of megabytes from compiling
        ctypes.CDLL(None).malloc_trim(0)
    return compiled
