"""Choosing the next token: greedy, or drawn at a temperature from the likeliest ones; and how likely it was."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sampling(NamedTuple):
    """How each row draws, arrays [batch].

    Attributes:
      temperature_B: float32; 0 takes the likeliest token.
      top_k_B: int32; only the so many likeliest tokens are drawn from; 0: all.
      top_p_B: float32; only the fewest likeliest tokens whose probability reaches it are drawn from; 1: all.
      seed_B: uint32; with the position it fixes the draw, whatever the other rows do.
      min_p_B: float32; only tokens at least so probable as this share of the likeliest one are drawn from; 0: all.
      repetition_B: float32; what logits of tokens of the prompt and the continuation are divided by; 1: none.
      presence_B: float32; what is taken from the logits of tokens of the continuation; 0: none.
      frequency_B: float32; the same for each time that they were written.
    """

    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    seed_B: jax.Array
    min_p_B: jax.Array
    repetition_B: jax.Array
    presence_B: jax.Array
    frequency_B: jax.Array


class Scored(NamedTuple):
    """How likely tokens are and which are the likeliest, [...] and [..., K]; log probabilities in nats, float32."""

    logprob: jax.Array
    top_ids: jax.Array
    top_logprob: jax.Array


def score(logits_NxV: jax.Array, token_N: jax.Array, count: int) -> Scored:
    """How likely these tokens are at these float32 logits, next to the `count` likeliest ones."""
    normalizer_N = jax.nn.logsumexp(logits_NxV, axis=-1)
    top_NxK, ids_NxK = jax.lax.top_k(logits_NxV, count)
    token_logit_N = jnp.take_along_axis(logits_NxV, token_N[:, None], axis=-1)[:, 0]
    return Scored(token_logit_N - normalizer_N, ids_NxK, top_NxK - normalizer_N[:, None])


def penalize(
    logits_BxV: jax.Array, how: Sampling, tokens_BxT: jax.Array, start_B: jax.Array, position_B: jax.Array
) -> jax.Array:
    """The logits after the penalties for what was written: first for repetition, then for presence and frequency.

    Args:
      logits_BxV: float32.
      how: how each row draws.
      tokens_BxT: int32, each row's tokens by position.
      start_B: int32, where the continuation starts; what is before it is the prompt.
      position_B: int32, of the last token.
    """

    def count(first_B):
        at_T, rows_Bx1 = jnp.arange(tokens_BxT.shape[1]), jnp.arange(tokens_BxT.shape[0])[:, None]
        counted_BxT = (at_T >= first_B[:, None]) & (at_T <= position_B[:, None])
        return jnp.zeros(logits_BxV.shape, jnp.int32).at[rows_Bx1, tokens_BxT].add(counted_BxT)

    def apply(logits_BxV):
        factor_Bx1 = how.repetition_B[:, None]
        repeated_BxV = jnp.where(logits_BxV > 0, logits_BxV / factor_Bx1, logits_BxV * factor_Bx1)
        logits_BxV = jnp.where(count(jnp.zeros_like(start_B)) > 0, repeated_BxV, logits_BxV)
        written_BxV = count(start_B)
        taken_BxV = how.frequency_B[:, None] * written_BxV + how.presence_B[:, None] * (written_BxV > 0)
        return logits_BxV - taken_BxV

    penalized_B = (how.repetition_B != 1) | (how.presence_B != 0) | (how.frequency_B != 0)
    return jax.lax.cond(jnp.any(penalized_B), apply, lambda x: x, logits_BxV)


def sample(logits_BxV: jax.Array, how: Sampling, position_B: jax.Array) -> jax.Array:
    """The next token of each row, int32 [batch], for float32 logits at these positions."""
    # The first of the largest: twice as fast on a CPU as argmax.
    best_BxV = logits_BxV == jnp.max(logits_BxV, axis=-1, keepdims=True)
    greedy_B = jnp.min(jnp.where(best_BxV, jnp.arange(logits_BxV.shape[-1]), logits_BxV.shape[-1] - 1), axis=-1)
    drawn_B = jax.lax.cond(jnp.any(how.temperature_B > 0), _draw, lambda *_: greedy_B, logits_BxV, how, position_B)
    return jnp.where(how.temperature_B > 0, drawn_B, greedy_B)


def keep_likeliest(logits_BxV: jax.Array, top_k_B: jax.Array, top_p_B: jax.Array) -> jax.Array:
    """Sets to minus infinity all but the top k, and of these all but the top p; equal logits stay together."""

    def count(kept_BxV):
        return jnp.sum(kept_BxV, axis=-1)

    top_k_B = jnp.where(top_k_B > 0, top_k_B, logits_BxV.shape[-1])
    logits_BxV = jnp.where(_reaching(logits_BxV, count, top_k_B), logits_BxV, -jnp.inf)
    probability_BxV = jax.nn.softmax(logits_BxV, axis=-1)

    def mass(kept_BxV):
        return jnp.sum(jnp.where(kept_BxV, probability_BxV, 0), axis=-1)

    # All of it is never reached after rounding; the bound of 1 keeps everything then.
    return jnp.where(_reaching(logits_BxV, mass, top_p_B) | (top_p_B >= 1)[:, None], logits_BxV, -jnp.inf)


def _draw(logits_BxV: jax.Array, how: Sampling, position_B: jax.Array) -> jax.Array:
    # The largest stays 0, whatever the temperature; the others become minus infinity at worst.
    logits_BxV = logits_BxV - jnp.max(logits_BxV, axis=-1, keepdims=True)
    logits_BxV = logits_BxV / jnp.maximum(how.temperature_B, jnp.finfo(jnp.float32).tiny)[:, None]
    narrow = jnp.any((how.top_k_B > 0) | (how.top_p_B < 1))
    logits_BxV = jax.lax.cond(narrow, keep_likeliest, lambda x, *_: x, logits_BxV, how.top_k_B, how.top_p_B)
    # The logarithm of 0 is minus infinity, which keeps all. The likeliest is kept always.
    logits_BxV = jnp.where(logits_BxV < jnp.log(how.min_p_B)[:, None], -jnp.inf, logits_BxV)

    def draw(seed, position, logits_V):
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), position), logits_V)

    return jax.vmap(draw)(how.seed_B, position_B, logits_BxV).astype(jnp.int32)


def _reaching(x_BxV: jax.Array, measure: Callable[[jax.Array], jax.Array], target_B: jax.Array) -> jax.Array:
    """The fewest largest values whose `measure` reaches a target, bool [batch, vocab].

    Their smallest value is found by bisection over the order of float32, in 32 steps: sorting a vocabulary
    takes a CPU longer than a whole decoding step.
    """
    bits_BxV = jax.lax.bitcast_convert_type(x_BxV, jnp.int32)
    order_BxV = jnp.where(bits_BxV < 0, bits_BxV ^ jnp.iinfo(jnp.int32).max, bits_BxV)

    def halve(_, bounds):
        low_B, high_B = bounds  # reached at low, not at high
        middle_B = (low_B & high_B) + ((low_B ^ high_B) >> 1)  # of a sum that may overflow
        reached_B = measure(order_BxV >= middle_B[:, None]) >= target_B
        return jnp.where(reached_B, middle_B, low_B), jnp.where(reached_B, high_B, middle_B)

    low_B = jnp.min(order_BxV, axis=-1)
    low_B, _ = jax.lax.fori_loop(0, 32, halve, (low_B, jnp.max(order_BxV, axis=-1) + 1))
    return order_BxV >= low_B[:, None]
