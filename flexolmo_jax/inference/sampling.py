"""Choice of the next token, greedy or sampled, with penalties; and log probabilities."""

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

T = TypeVar("T")


class Sampling(NamedTuple, Generic[T]):
    """Sampling options of each sequence, arrays [batch] on the device (`jax.Array`) or the host (`np.ndarray`).

    Attributes:
      temperature_B: float32; 0: greedy.
      top_k_B: int32; sample from the k most likely tokens; 0: from all.
      top_p_B: float32; sample from the fewest most likely tokens whose total probability reaches it; 1: from all.
      seed_B: uint32; together with the position it determines the sample, whatever the other sequences do.
      min_p_B: float32; sample from tokens with at least this fraction of the largest probability; 0: from all.
      repetition_B: float32; divides positive logits of tokens of the prompt and the continuation, and multiplies
        negative ones; 1: no penalty.
      presence_B: float32; is subtracted from the logits of tokens of the continuation; 0: no penalty.
      frequency_B: float32; the same, once for each occurrence.
    """

    temperature_B: T
    top_k_B: T
    top_p_B: T
    seed_B: T
    min_p_B: T
    repetition_B: T
    presence_B: T
    frequency_B: T


class Scored(NamedTuple):
    """Log probabilities of tokens [...] and of the top K tokens [..., K], in nats, float32; ids are int32."""

    logprob: jax.Array
    top_ids: jax.Array
    top_logprob: jax.Array


def score(logits_NxV: jax.Array, token_N: jax.Array, count: int) -> Scored:
    """The log probabilities of these tokens and of the `count` most likely ones, from float32 logits."""
    normalizer_N = jax.nn.logsumexp(logits_NxV, axis=-1)
    top_NxK, ids_NxK = jax.lax.top_k(logits_NxV, count)
    token_logit_N = jnp.take_along_axis(logits_NxV, token_N[:, None], axis=-1)[:, 0]
    return Scored(token_logit_N - normalizer_N, ids_NxK, top_NxK - normalizer_N[:, None])


def penalize(
    logits_BxV: jax.Array,
    sampling: Sampling[jax.Array],
    tokens_BxT: jax.Array,
    start_B: jax.Array,
    position_B: jax.Array,
) -> jax.Array:
    """Applies the penalties to logits: first repetition, then presence and frequency.

    Args:
      logits_BxV: float32.
      sampling: options of each sequence.
      tokens_BxT: int32, the tokens of each sequence by position.
      start_B: int32, the position of the first token after the prompt.
      position_B: int32, the position of the last token.
    """

    def count(first_B):
        at_T, sequence_Bx1 = jnp.arange(tokens_BxT.shape[1]), jnp.arange(tokens_BxT.shape[0])[:, None]
        counted_BxT = (at_T >= first_B[:, None]) & (at_T <= position_B[:, None])
        return jnp.zeros(logits_BxV.shape, jnp.int32).at[sequence_Bx1, tokens_BxT].add(counted_BxT)

    def apply(logits_BxV):
        factor_Bx1 = sampling.repetition_B[:, None]
        repeated_BxV = jnp.where(logits_BxV > 0, logits_BxV / factor_Bx1, logits_BxV * factor_Bx1)
        logits_BxV = jnp.where(count(jnp.zeros_like(start_B)) > 0, repeated_BxV, logits_BxV)
        written_BxV = count(start_B)
        taken_BxV = sampling.frequency_B[:, None] * written_BxV + sampling.presence_B[:, None] * (written_BxV > 0)
        return logits_BxV - taken_BxV

    penalized_B = (sampling.repetition_B != 1) | (sampling.presence_B != 0) | (sampling.frequency_B != 0)
    return jax.lax.cond(jnp.any(penalized_B), apply, lambda x: x, logits_BxV)


def most_likely(logits_BxV: jax.Array) -> jax.Array:
    """The token with the largest logit, the first of equal ones, int32 [batch]."""
    # Twice as fast on a CPU as argmax.
    best_BxV = logits_BxV == jnp.max(logits_BxV, axis=-1, keepdims=True)
    return jnp.min(jnp.where(best_BxV, jnp.arange(logits_BxV.shape[-1]), logits_BxV.shape[-1] - 1), axis=-1)


def sample(logits_BxV: jax.Array, sampling: Sampling[jax.Array], position_B: jax.Array) -> jax.Array:
    """The next token of each sequence, int32 [batch], from float32 logits at these positions."""
    greedy_B = most_likely(logits_BxV)
    is_sampled_B = sampling.temperature_B > 0
    sampled_B = jax.lax.cond(jnp.any(is_sampled_B), _draw, lambda *_: greedy_B, logits_BxV, sampling, position_B)
    return jnp.where(is_sampled_B, sampled_B, greedy_B)


def mask_logits(logits_BxV: jax.Array, top_k_B: jax.Array, top_p_B: jax.Array) -> jax.Array:
    """Sets logits outside the top k, then outside the top p, to minus infinity; keeps all or none of equal logits."""

    def count(kept_BxV):
        return jnp.sum(kept_BxV, axis=-1)

    top_k_B = jnp.where(top_k_B > 0, top_k_B, logits_BxV.shape[-1])
    logits_BxV = jnp.where(_smallest_set(logits_BxV, count, top_k_B), logits_BxV, -jnp.inf)
    probability_BxV = jax.nn.softmax(logits_BxV, axis=-1)

    def mass(kept_BxV):
        return jnp.sum(jnp.where(kept_BxV, probability_BxV, 0), axis=-1)

    # Rounding may keep the sum below 1; a top_p of 1 keeps everything.
    return jnp.where(_smallest_set(logits_BxV, mass, top_p_B) | (top_p_B >= 1)[:, None], logits_BxV, -jnp.inf)


def _draw(logits_BxV: jax.Array, sampling: Sampling[jax.Array], position_B: jax.Array) -> jax.Array:
    # The largest logit stays 0 at any temperature; others may become minus infinity.
    logits_BxV = logits_BxV - jnp.max(logits_BxV, axis=-1, keepdims=True)
    logits_BxV = logits_BxV / jnp.maximum(sampling.temperature_B, jnp.finfo(jnp.float32).tiny)[:, None]
    narrow = jnp.any((sampling.top_k_B > 0) | (sampling.top_p_B < 1))
    logits_BxV = jax.lax.cond(narrow, mask_logits, lambda x, *_: x, logits_BxV, sampling.top_k_B, sampling.top_p_B)
    # A min_p of 0 gives minus infinity, which keeps all tokens. The most likely token is always kept.
    logits_BxV = jnp.where(logits_BxV < jnp.log(sampling.min_p_B)[:, None], -jnp.inf, logits_BxV)

    def draw(seed, position, logits_V):
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), position), logits_V)

    return jax.vmap(draw)(sampling.seed_B, position_B, logits_BxV).astype(jnp.int32)


def _smallest_set(x_BxV: jax.Array, measure: Callable[[jax.Array], jax.Array], target_B: jax.Array) -> jax.Array:
    """Mask of the fewest largest values whose `measure` reaches a target, bool [batch, vocab].

    Finds their smallest value by bisection over the order of float32, in 32 steps. Sorting a vocabulary takes a CPU
    longer than a whole decode step.
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
