"""The compiled steps of the engine: prefill, which reads prompts into slots, and decode, which writes tokens."""

import functools
import math
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp

from flexolmo_jax.inference.sampling import Sampling, Scored, most_likely, penalize, sample, score
from flexolmo_jax.model import selectors
from flexolmo_jax.model.attention import KVCache
from flexolmo_jax.model.decoder import Decoder, Output
from flexolmo_jax.model.moe import top_k_weights

CHUNK = 256  # tokens of a prompt that are read at once
SCORE_BATCH = 256  # positions of prompts whose logits are in memory at once
NO_TOKEN = -1


class State(NamedTuple):
    """The engine's arrays on the device, by slot B and position T.

    Attributes:
      tokens_BxT: int32, prompts and continuations.
      routing_BxTxLxE: float32, the routing weights of the chosen experts.
      cache: keys and values of each layer.
      scored: log probabilities of the token *after* each position, while a request in flight asks for them.
      selector: of a model with a selector, its state after the tokens that were read; () without.
    """

    tokens_BxT: jax.Array
    routing_BxTxLxE: jax.Array
    cache: tuple[KVCache, ...]
    scored: Scored | None
    selector: selectors.State | tuple[()]


@functools.partial(jax.jit, static_argnums=(0, 2, 3, 4))
def extend(decoder: Decoder, state: State | None, batch: int, length: int, top: int) -> State:
    """The state with room for `length` positions, and for the `top` most likely tokens at each; 0: no scores."""
    arch, experts = decoder.architecture, decoder.layout.num_experts
    selector = selectors.selector_of(decoder.layout.selection)
    shape, dtype = (batch, arch.num_kv_heads, length, arch.head_dim), decoder.compute.dtype
    new = State(
        jnp.zeros((batch, length), jnp.int32),
        jnp.zeros((batch, length, arch.num_layers, experts), jnp.float32),
        tuple(KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(arch.num_layers)),
        scored=None,
        selector=selectors.new_state(selector, arch, batch, experts) if selector else (),
    )
    scored = None
    if top:
        scored = Scored(
            jnp.zeros((batch, length), jnp.float32),
            jnp.zeros((batch, length, top), jnp.int32),
            jnp.zeros((batch, length, top), jnp.float32),
        )

    def fill(new, old):
        return jax.lax.dynamic_update_slice(new, old, (0,) * old.ndim)

    if state is not None:
        if state.scored is not None and top:
            scored = jax.tree.map(fill, scored, state.scored)
        new = jax.tree.map(fill, new, state._replace(scored=None))
    return new._replace(scored=scored)


@functools.partial(jax.jit, static_argnums=(0, 7), donate_argnums=2)
def prefill(
    decoder: Decoder,
    params: dict[str, jax.Array],
    state: State,
    slots_b: jax.Array,
    tokens_bxS: jax.Array,
    lengths_b: jax.Array,
    mask_bxE: jax.Array,
    scoring: bool,
) -> State:
    """Reads prompts into slots, except their last token, which the first decode step reads.

    Long prompts are read in chunks, so that the memory of attention is linear in the length of a prompt.

    Args:
      decoder: with separate layers.
      params: {path: leaf}.
      state: of all slots; donated.
      slots_b: int32, the slot of each prompt; one beyond the last slot is padding.
      tokens_bxS: int32, prompts padded at the end.
      lengths_b: int32, tokens of each prompt.
      mask_bxE: bool, the experts that each prompt may use.
      scoring: whether to score the tokens of the prompts, `SCORE_BATCH` at once.
    """
    batch, length = tokens_bxS.shape
    size = length if length <= CHUNK else math.gcd(length, CHUNK)
    last_b = lengths_b - 1
    top = state.scored.top_ids.shape[-1] if state.scored else 0
    following_bxS = jnp.roll(tokens_bxS, -1, axis=1)

    def score_chunk(hidden_bxCxD, following_bxC):
        head_DxV = decoder.head(params)

        def score_one(at):
            hidden_D, token = at
            logits_V = jnp.dot(hidden_D, head_DxV, preferred_element_type=jnp.float32)
            return jax.tree.map(lambda x: x[0], score(logits_V[None], token[None], top))

        flat = hidden_bxCxD.reshape(batch * size, -1), following_bxC.reshape(batch * size)
        scored = jax.lax.map(score_one, flat, batch_size=SCORE_BATCH)
        return jax.tree.map(lambda x: x.reshape(batch, size, *x.shape[1:]), scored)

    def read(chunk, new):
        def put(all_bxS, new_bxC):
            return jax.lax.dynamic_update_slice_in_dim(all_bxS, new_bxC, chunk * size, axis=1)

        positions_bxC = jnp.broadcast_to(chunk * size + jnp.arange(size), (batch, size))
        chunk_bxC = jax.lax.dynamic_slice_in_dim(tokens_bxS, chunk * size, size, axis=1)
        mask_bxCxE = mask_bxE[:, None] & (positions_bxC < last_b[:, None])[..., None]
        out = decoder.apply_flat(
            params,
            chunk_bxC,
            positions_BxS=positions_bxC,
            expert_mask=mask_bxCxE,
            cache=new.cache,
            selector_state=new.selector or None,
        )
        chosen_bxCxLxE = jnp.moveaxis(_chosen(decoder, out.router_weights_LxBxSxE), 0, 2)
        scored = new.scored
        if scoring:
            following_bxC = jax.lax.dynamic_slice_in_dim(following_bxS, chunk * size, size, axis=1)
            scored = jax.tree.map(put, scored, score_chunk(out.hidden_BxSxD, following_bxC))
        return State(tokens_bxS, put(new.routing_BxTxLxE, chosen_bxCxLxE), _cache(out), scored, _selector(out))

    new = extend(decoder, None, batch, length, top)._replace(tokens_BxT=tokens_bxS)
    new = jax.lax.fori_loop(0, -(-jnp.max(last_b) // size), read, new)

    def insert(old, new):
        within = tuple(slice(size) for size in new.shape[1:])
        return old.at[(slots_b, *within)].set(new, mode="drop")

    return jax.tree.map(insert, state, new)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode(
    decoder: Decoder,
    params: dict[str, jax.Array],
    state: State,
    position_B: jax.Array,
    start_B: jax.Array,
    end_B: jax.Array,
    mask_BxE: jax.Array,
    stop_BxN: jax.Array,
    sampling: Sampling[jax.Array] | None,
    max_steps: int | jax.Array,
) -> tuple[State, jax.Array, jax.Array]:
    """Writes one token per step into every running slot, until one of them ends.

    Args:
      decoder: with separate layers.
      params: {path: leaf}.
      state: of all slots; donated.
      position_B: int32, of the last token.
      start_B: int32, of the first token after the prompt.
      end_B: int32, one beyond the last position to write; a slot with position + 1 = end is not running.
      mask_BxE: bool, the experts that each slot may use.
      stop_BxN: int32, tokens that end a slot; padded with `NO_TOKEN`.
      sampling: how each slot samples; None: all are greedy.
      max_steps: maximum number of steps.

    Returns:
      (state, position_B of the last tokens, stopped_B: the stop token with which a slot ended, which is not kept, or
      `NO_TOKEN`).
    """
    batch, length = state.tokens_BxT.shape
    slots_B = jnp.arange(batch)
    running_B = position_B + 1 < end_B
    mask_BxE = mask_BxE & running_B[:, None]

    def write(carry):
        step, (tokens_BxT, routing_BxTxLxE, cache, scored, selector), position_B, _ = carry
        positions_Bx1 = position_B[:, None]
        token_Bx1 = tokens_BxT[slots_B[:, None], positions_Bx1]
        out = decoder.apply_flat(
            params,
            token_Bx1,
            positions_BxS=positions_Bx1,
            expert_mask=mask_BxE,
            cache=cache,
            selector_state=selector or None,
        )
        logits_BxV = out.logits_BxSxV[:, 0]
        if sampling is None:
            next_B = most_likely(logits_BxV)
        else:
            next_B = sample(penalize(logits_BxV, sampling, tokens_BxT, start_B, position_B), sampling, position_B)
        if scored is not None:
            new = score(logits_BxV, next_B, scored.top_ids.shape[-1])
            scored = jax.tree.map(lambda old, new: old.at[slots_B, position_B].set(new), scored, new)
        chosen_BxLxE = jnp.moveaxis(_chosen(decoder, out.router_weights_LxBxSxE)[:, :, 0], 0, 1)
        routing_BxTxLxE = routing_BxTxLxE.at[slots_B, position_B].set(chosen_BxLxE)
        stops_B = running_B & jnp.any(next_B[:, None] == stop_BxN, axis=1)
        wrote_B = running_B & ~stops_B
        tokens_BxT = tokens_BxT.at[slots_B, jnp.where(wrote_B, position_B + 1, length)].set(next_B, mode="drop")
        state = State(tokens_BxT, routing_BxTxLxE, _cache(out), scored, _selector(out))
        return step + 1, state, position_B + wrote_B, jnp.where(stops_B, next_B, NO_TOKEN)

    def continues(carry):
        step, _, position_B, stopped_B = carry
        return (step < max_steps) & jnp.all((position_B + 1 < end_B) == running_B) & jnp.all(stopped_B == NO_TOKEN)

    carry = (jnp.int32(0), state, position_B, jnp.full(batch, NO_TOKEN, jnp.int32))
    return jax.lax.while_loop(continues, write, carry)[1:]


def _cache(out: Output) -> tuple[KVCache, ...]:
    """The updated cache of a decoder that was given one."""
    return cast(tuple[KVCache, ...], out.cache)  # None only without a cache


def _selector(out: Output) -> selectors.State | tuple[()]:
    """The updated state of the selector, if the model has one."""
    return () if out.selector_state is None else out.selector_state


def _chosen(decoder: Decoder, weights: jax.Array) -> jax.Array:
    """The share of each expert [..., experts].

    Of a router: 0 outside the top k, and the top k normalized to sum 1. Of a selector: its posterior.
    """
    if selectors.selector_of(decoder.layout.selection):
        return weights
    weights_K, experts_K = top_k_weights(weights, decoder.layout.top_k, normalize=True)
    return jnp.sum(weights_K[..., None] * jax.nn.one_hot(experts_K, weights.shape[-1]), axis=-2)
