"""One optimizer step: a pure function of the state, the frozen leaves and a batch."""

import ctypes
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flexolmo_jax.model.decoder import Decoder
from flexolmo_jax.training.objective import LossWeights, objective

Leaves = dict[str, jax.Array]
Batch = dict[str, jax.Array]


class TrainState(NamedTuple):
    """Everything a step changes, and all that a checkpoint holds besides the data position."""

    step: jax.Array
    trainable: Leaves
    optimizer: optax.OptState


def make_train_step(
    model: Decoder,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    weights: LossWeights,
    accumulate: int,
) -> Callable[[TrainState, Leaves, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Builds the step `(state, frozen, batch) -> (state, metrics)`.

    Gradients are taken with respect to the trainable leaves only: none of a frozen leaf is computed. The batch is
    computed in `accumulate` parts whose sums are added, so the gradient is that of the mean over all tokens of the
    batch, however it is divided (load balancing is computed per part).

    Metrics, float32: `loss`, `cross_entropy`, `z_loss`, `router_z_loss`, `load_balancing` (means per token),
    `gradient_norm` before clipping, `learning_rate` (of `schedule`, for the log), `tokens`, and `routing_E`, each
    expert's share of the routing weight.
    """

    def part_loss(trainable: Leaves, frozen: Leaves, tokens: jax.Array, part: Batch):
        """What the part adds to the mean over `tokens`, the vjp toward the trainable leaves, and sums over the part."""
        differentiated = model if "embedding" in trainable else _ending_at_blocks(model)

        def loss_fn(trainable):
            loss, sums = objective(differentiated, {**frozen, **trainable}, part, weights)
            return loss / tokens, {"loss": loss, **sums}

        return jax.vjp(loss_fn, trainable, has_aux=True)

    def train_step(state: TrainState, frozen: Leaves, batch: Batch):
        # The loss is divided, not its gradient: that would be one more pass over the memory of all trainable leaves.
        tokens = jnp.maximum(jnp.sum(batch["segment_ids"] > 0), 1).astype(jnp.float32)
        loss_of = functools.partial(part_loss, state.trainable, frozen, tokens)
        if accumulate == 1:
            # Nothing to add to: a sum would be cleared first, and each layer's gradient held beside it.
            loss, vjp, sums = loss_of(batch)
            (gradient,) = vjp(jnp.ones_like(loss))
        else:
            # Part i takes rows i, i + accumulate, ...: every part then spans all devices.
            parts = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
            # Each layer's gradient is added in place: none of a part alone is ever held.
            total = jax.tree.map(lambda leaf: jax.new_ref(jnp.zeros_like(leaf)), state.trainable)

            def add_part(_, part):
                loss, vjp, sums = loss_of(part)
                vjp.with_refs(total)(jnp.ones_like(loss))
                return None, sums

            _, sums = jax.lax.scan(add_part, None, parts)
            sums = jax.tree.map(functools.partial(jnp.sum, axis=0), sums)
            gradient = jax.tree.map(jax.freeze, total)
        metrics = {name: value / tokens for name, value in sums.items()}
        metrics |= {"tokens": tokens, "gradient_norm": optax.tree.norm(gradient)}
        metrics["learning_rate"] = schedule(state.step)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        return TrainState(state.step + 1, trainable, optimizer_state), metrics

    return train_step


def _ending_at_blocks(model: Decoder) -> Decoder:
    """The model with no gradient below its blocks; as is on accelerators: conditionals in their loops may cost more."""
    if model.compute.platform != "cpu":
        return model
    return model.clone(compute=dataclasses.replace(model.compute, input_gradient=False))


def compile_step(step: Callable, *arguments: Any) -> jax.stages.Compiled:
    """Compiles a step of arguments that may be abstract; the first, the state, is donated to it."""
    compiled = jax.jit(step, donate_argnums=0).lower(*arguments).compile()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):  # of glibc, which would keep hundreds of megabytes from compiling
        ctypes.CDLL(None).malloc_trim(0)
    return compiled
