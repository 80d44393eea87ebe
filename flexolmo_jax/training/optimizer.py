"""AdamW, its learning rate schedule, and gradient clipping, of trainable leaves only."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

SPIKE_WINDOW = 128  # steps that a spike is compared with


def warmup_steps(config: ConfigDict, steps: int) -> int:
    """Steps of the linear warm-up: as configured, or half of a run that is no longer (a short trial)."""
    return config.warmup_steps if config.warmup_steps < steps else steps // 2


def make_schedule(config: ConfigDict, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then `cosine`, or `wsd` (constant, then a linear decay).

    Args:
      config: the section `optimizer` of the configuration.
      steps: length of the run, warm-up included.
    """
    peak, end = config.learning_rate, config.learning_rate * config.final_fraction
    rise = warmup_steps(config, steps)
    warmup = optax.linear_schedule(0.0, peak, rise)
    after = steps - rise
    if config.schedule == "cosine":
        return optax.join_schedules(
            [warmup, optax.cosine_decay_schedule(peak, after, alpha=config.final_fraction)], [rise]
        )
    decay = min(after, max(1, round(steps * config.decay_fraction)))
    stages = [warmup, optax.constant_schedule(peak), optax.linear_schedule(peak, end, decay)]
    return optax.join_schedules(stages, [rise, steps - decay])


def make_optimizer(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW on a flat dict of trainable leaves, after clipping by their global norm (0: no clipping).

    Weight decay, scaled by the learning rate, spares the paths that match a pattern of `config.no_decay`.
    """

    def decayed(leaves: Mapping[str, jax.Array]) -> dict[str, bool]:
        return {path: not any(re.fullmatch(pattern, path) for pattern in config.no_decay) for path in leaves}

    return optax.chain(
        _clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.adamw(
            schedule,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )


class SkipState(NamedTuple):
    """State of an optimizer that skips steps.

    Attributes:
      inner: of the optimizer.
      norms: float32 [2, SPIKE_WINDOW], gradient norms and losses of the last steps that were taken.
      taken: how many were.
      consecutive: how many were skipped since.
      skipped: how many were skipped in all.
    """

    inner: optax.OptState
    norms: jax.Array
    taken: jax.Array
    consecutive: jax.Array
    skipped: jax.Array


def skipping(optimizer: optax.GradientTransformation, spike: float) -> optax.GradientTransformationExtraArgs:
    """An optimizer that changes nothing in a step whose gradient norm or loss is not finite, or a spike.

    A spike is `spike` standard deviations above the mean of the last `SPIKE_WINDOW` steps that were taken; 0: none is.
    The schedule does not count skipped steps. `update` takes the loss as `value`.
    """

    def init(params):
        zero = jnp.zeros((), jnp.int32)
        return SkipState(optimizer.init(params), jnp.zeros((2, SPIKE_WINDOW)), zero, zero, zero)

    def update(gradient, state, params=None, *, value, **_):
        now = jnp.stack([optax.tree.norm(gradient), value]).astype(jnp.float32)
        is_good = jnp.isfinite(now).all()
        if spike:
            limits = jnp.mean(state.norms, axis=1) + spike * jnp.std(state.norms, axis=1)
            is_good &= (state.taken < SPIKE_WINDOW) | (now <= limits).all()
        updates, inner = optimizer.update(gradient, state.inner, params)
        updates = jax.tree.map(lambda update: jnp.where(is_good, update, 0), updates)
        inner = jax.tree.map(lambda after, before: jnp.where(is_good, after, before), inner, state.inner)
        norms = jnp.where(is_good, state.norms.at[:, state.taken % SPIKE_WINDOW].set(now), state.norms)
        taken, skipped = state.taken + is_good, state.skipped + ~is_good
        return updates, SkipState(inner, norms, taken, jnp.where(is_good, 0, state.consecutive + 1), skipped)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """As `optax.clip_by_global_norm`, but with one factor for all leaves: optax writes another copy of the gradient."""
    return optax.stateless(
        lambda gradient, _: optax.tree.scale(jnp.minimum(1.0, max_norm / optax.tree.norm(gradient)), gradient)
    )
