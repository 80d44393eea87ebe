"""Batched decoding with a cache: requests join and leave at any time, and none depends on the others."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax.errors import UserError
from flexolmo_jax.inference.request import Continuation, Request, Update
from flexolmo_jax.inference.sampling import Sampling, sample
from flexolmo_jax.inference.text import TextStream
from flexolmo_jax.model.attention import KVCache
from flexolmo_jax.model.decoder import Decoder
from flexolmo_jax.model.mixture import chosen_weights

SHORTEST = 16
AHEAD = 256
CHUNK = 256
GREEDY = Sampling((0.0, np.float32), (0, np.int32), (1.0, np.float32), (0, np.uint32))


class _State(NamedTuple):
    """What lives on the device: tokens, their routing, and each layer's cache, all by slot and position."""

    tokens_BxT: jax.Array
    routing_BxTxLxE: jax.Array
    cache: tuple[KVCache, ...]


@dataclasses.dataclass
class _Slot:
    """A request in flight, in one row of the batch."""

    id: int
    request: Request
    stream: TextStream
    token_ids: list[int] = dataclasses.field(default_factory=list)


class Engine:
    """Decodes requests side by side, each in a slot of its own. One thread may use it."""

    def __init__(self, model, slots: int = 8, max_length: int | None = None):
        """Starts with all slots free.

        Args:
          model: an `inference.model.Model`; without a tokenizer its continuations have no text.
          slots: how many requests are decoded at once.
          max_length: refuse requests whose prompt and continuation might be longer; None: no limit.
        """
        self._model, self._max_length = model, max_length
        self._slots: list[_Slot | None] = [None] * slots
        self._ids = itertools.count()
        self._state: _State | None = None
        # By slot: the position of the last token, where the text must end, and how the next token is drawn.
        self._position_B, self._end_B = np.zeros(slots, np.int32), np.zeros(slots, np.int32)
        self._mask_BxE = np.zeros((slots, len(model.roster)), bool)
        self._sampling = Sampling(*(np.full(slots, *value) for value in GREEDY))

    @property
    def free(self) -> int:
        """How many requests may be added now."""
        return self._slots.count(None)

    def add(self, requests: Sequence[Request]) -> list[int]:
        """Takes requests, at most as many as slots are free, and reads their prompts; returns an id for each.

        Raises:
          UserError: a request is longer than `max_length`, names an expert that is not on the roster, holds a token
            that is not in the vocabulary, or stop strings for a model without a tokenizer.
        """
        if len(requests) > self.free:
            raise ValueError(f"{len(requests)} requests for {self.free} free slots")
        masks = [self._check(request) for request in requests]
        if not requests:
            return []
        slots = [slot for slot, taken in enumerate(self._slots) if taken is None][: len(requests)]
        lengths = [len(request.token_ids) for request in requests]
        self._reserve(max(n + min(r.max_new_tokens, AHEAD) for n, r in zip(lengths, requests, strict=True)))
        # Rows beyond the requests are written to a slot that does not exist.
        rows, length = bucket(len(requests), 1), bucket(max(lengths))
        slots_b, lengths_b = np.full(rows, len(self._slots), np.int32), np.ones(rows, np.int32)
        tokens_bxS, mask_bxE = np.zeros((rows, length), np.int32), np.zeros((rows, len(self._model.roster)), bool)
        for row, (slot, request, mask_E) in enumerate(zip(slots, requests, masks, strict=True)):
            slots_b[row], lengths_b[row], mask_bxE[row] = slot, lengths[row], mask_E
            tokens_bxS[row, : lengths[row]] = request.token_ids
            self._position_B[slot], self._end_B[slot] = lengths[row] - 1, lengths[row] + request.max_new_tokens
            self._mask_BxE[slot] = mask_E
            self._draw(slot, request.temperature, request.top_k, request.top_p, request.seed)
            stream = TextStream(self._model.tokenizer, request.stop)
            self._slots[slot] = _Slot(next(self._ids), request, stream)
        params = self._model.params
        self._state = _admit(self._model.decoder, params, self._state, slots_b, tokens_bxS, lengths_b, mask_bxE)
        return [self._slots[slot].id for slot in slots]

    def step(self, max_steps: int = 8) -> list[Update]:
        """Writes up to `max_steps` tokens for every request in flight, fewer when one of them ends.

        Args:
          max_steps: how often to look for stop strings, and for text to hand out.

        Returns:
          What is new, for each request in flight.
        """
        if self.free == len(self._slots):
            return []
        running = [slot for slot, taken in enumerate(self._slots) if taken]
        last = int(self._position_B[running].max())
        self._reserve(last + 2)
        max_steps = min(max_steps, self._length - 1 - last)
        self._state, position_B, eos_B = _decode(
            self._model.decoder,
            self._model.params,
            self._state,
            self._position_B,
            self._end_B,
            self._mask_BxE,
            self._sampling,
            self._model.manifest.eos_id,
            max_steps,
        )
        tokens_BxT, position_B, eos_B = jax.device_get((self._state.tokens_BxT, position_B, eos_B))
        self._position_B = np.array(position_B)
        return [self._collect(slot, tokens_BxT[slot], bool(eos_B[slot])) for slot in running]

    def run(self, requests: Sequence[Request], max_steps: int = 8) -> Iterator[tuple[int, Update]]:
        """Takes any number of requests through, in their order as slots free up; yields (index of a request, update).

        Raises:
          UserError: as `add`.
        """
        waiting, in_flight = list(enumerate(requests)), {}
        while waiting or in_flight:
            joining, waiting = waiting[: self.free], waiting[self.free :]
            ids = self.add([request for _, request in joining])
            in_flight |= {id: index for id, (index, _) in zip(ids, joining, strict=True)}
            for update in self.step(max_steps):
                yield in_flight[update.id], update
                if update.continuation:
                    del in_flight[update.id]

    def cancel(self, id: int) -> None:
        """Drops a request; nothing happens where it has ended."""
        for slot, taken in enumerate(self._slots):
            if taken and taken.id == id:
                self._release(slot)

    @property
    def _length(self) -> int:
        return self._state.tokens_BxT.shape[1] if self._state else 0

    def _check(self, request: Request) -> np.ndarray:
        """The experts that a request leaves on, bool [experts]."""
        needed = len(request.token_ids) + request.max_new_tokens
        if self._max_length and needed > self._max_length:
            raise UserError(
                f"prompt of {len(request.token_ids)} tokens and max_new_tokens {request.max_new_tokens}: "
                f"{needed} in all; at most {self._max_length} are allowed"
            )
        out_of_range = [id for id in request.token_ids if not 0 <= id < self._model.decoder.architecture.vocab_size]
        if out_of_range:
            raise UserError(f"token_ids holds {out_of_range[0]}; the vocabulary has no such token")
        if request.stop and not self._model.tokenizer:
            raise UserError(f"stop is {request.stop!r}; the model has no tokenizer.json, which text needs")
        return self._model.expert_mask(request.without)

    def _reserve(self, length: int) -> None:
        """Makes room for that many positions."""
        if length > self._length:
            decoder, rows = self._model.decoder, len(self._slots)
            length = max(length, min(2 * self._length, self._max_length or 2 * self._length))
            self._state = _extend(decoder, self._state, rows, bucket(length))

    def _collect(self, slot: int, tokens_T: np.ndarray, eos: bool) -> Update:
        """What the last step added to a slot; frees it where the request has ended."""
        taken, start = self._slots[slot], len(self._slots[slot].request.token_ids)
        written = tokens_T[start : self._position_B[slot] + 1].tolist()
        seen, text = len(taken.token_ids), ""
        ended = eos or self._position_B[slot] + 1 == self._end_B[slot]
        # A stop string ends the text at one certain token; without any, all tokens are read at once.
        stops = range(seen + 1, len(written)) if taken.request.stop else ()
        for count in (*stops, len(written)):
            new, stopped = taken.stream.read(written[:count], ended and count == len(written))
            text += new
            if stopped:
                written, eos = written[:count], False
                break
        taken.token_ids = written
        continuation = None
        if ended or stopped:
            read = start + len(written) - 1 + eos
            routing_TxLxE = jax.device_get(self._state.routing_BxTxLxE[slot])
            layers_LxE = routing_TxLxE[:read].mean(axis=0, dtype=np.float64)
            experts = dict(zip(self._model.roster, layers_LxE.mean(axis=0).tolist(), strict=True))
            reason = "stop" if eos or stopped else "length"
            continuation = Continuation(taken.stream.text, written, experts, layers_LxE, reason)
            self._release(slot)
        return Update(taken.id, text, written[seen:], continuation)

    def _release(self, slot: int) -> None:
        self._slots[slot] = None
        self._position_B[slot] = self._end_B[slot] = 0
        self._draw(slot, *(value for value, _ in GREEDY))

    def _draw(self, slot: int, *how: float) -> None:
        for values_B, value in zip(self._sampling, how, strict=True):
            values_B[slot] = value


def bucket(length: int, shortest: int = SHORTEST) -> int:
    """`length` rounded up to a power of two or three quarters of one, so that few shapes are compiled."""
    power = max(shortest, 1 << (length - 1).bit_length())
    return power * 3 // 4 if power > shortest and length <= power * 3 // 4 else power


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _extend(decoder: Decoder, state: _State | None, rows: int, length: int) -> _State:
    """The state with room for `length` positions."""
    arch, experts = decoder.architecture, decoder.layout.num_experts
    shape, dtype = (rows, arch.num_kv_heads, length, arch.head_dim), decoder.compute.dtype
    empty = _State(
        jnp.zeros((rows, length), jnp.int32),
        jnp.zeros((rows, length, arch.num_layers, experts), jnp.float32),
        tuple(KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(arch.num_layers)),
    )
    if state is None:
        return empty
    return jax.tree.map(lambda new, old: jax.lax.dynamic_update_slice(new, old, (0,) * old.ndim), empty, state)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _admit(decoder, params, state: _State, slots_b, tokens_bxS, lengths_b, mask_bxE) -> _State:
    """Reads prompts into slots, all but their last token, which the first decoding step reads.

    Long prompts are read in chunks: attention's memory then grows with the length of a prompt, not its square.
    """
    rows, length = tokens_bxS.shape
    size = length if length <= CHUNK else math.gcd(length, CHUNK)
    last_b = lengths_b - 1

    def read(chunk, new):
        positions_bxC = jnp.broadcast_to(chunk * size + jnp.arange(size), (rows, size))
        chunk_bxC = jax.lax.dynamic_slice_in_dim(tokens_bxS, chunk * size, size, axis=1)
        mask_bxCxE = mask_bxE[:, None] & (positions_bxC < last_b[:, None])[..., None]
        out = decoder.apply_flat(
            params, chunk_bxC, positions_BxS=positions_bxC, expert_mask=mask_bxCxE, cache=new.cache
        )
        chosen_bxCxLxE = jnp.moveaxis(_chosen(decoder, out.router_weights_LxBxSxE), 0, 2)
        routing = jax.lax.dynamic_update_slice_in_dim(new.routing_BxTxLxE, chosen_bxCxLxE, chunk * size, axis=1)
        return _State(tokens_bxS, routing, out.cache)

    new = _extend(decoder, None, rows, length)._replace(tokens_BxT=tokens_bxS)
    new = jax.lax.fori_loop(0, -(-jnp.max(last_b) // size), read, new)

    def insert(old, new):
        within = tuple(slice(size) for size in new.shape[1:])
        return old.at[(slots_b, *within)].set(new, mode="drop")

    return jax.tree.map(insert, state, new)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(decoder, params, state: _State, position_B, end_B, mask_BxE, how: Sampling, eos, max_steps):
    """Writes a token a step into every row that has not come to its end, until one of them does.

    Returns:
      (state, position_B of the last tokens, eos_B: whether a row wrote EOS, which is not kept).
    """
    rows, length = state.tokens_BxT.shape
    rows_B = jnp.arange(rows)
    running_B = position_B + 1 < end_B
    mask_BxE = mask_BxE & running_B[:, None]

    def write(carry):
        step, (tokens_BxT, routing_BxTxLxE, cache), position_B, _ = carry
        positions_Bx1 = position_B[:, None]
        token_Bx1 = tokens_BxT[rows_B[:, None], positions_Bx1]
        out = decoder.apply_flat(params, token_Bx1, positions_BxS=positions_Bx1, expert_mask=mask_BxE, cache=cache)
        next_B = sample(out.logits_BxSxV[:, 0], how, position_B)
        chosen_BxLxE = jnp.moveaxis(_chosen(decoder, out.router_weights_LxBxSxE)[:, :, 0], 0, 1)
        routing_BxTxLxE = routing_BxTxLxE.at[rows_B, position_B].set(chosen_BxLxE)
        eos_B = running_B & (next_B == eos)
        moved_B = running_B & ~eos_B
        tokens_BxT = tokens_BxT.at[rows_B, jnp.where(moved_B, position_B + 1, length)].set(next_B, mode="drop")
        return step + 1, _State(tokens_BxT, routing_BxTxLxE, out.cache), position_B + moved_B, eos_B

    def going_on(carry):
        step, _, position_B, eos_B = carry
        return (step < max_steps) & jnp.all((position_B + 1 < end_B) == running_B) & ~jnp.any(eos_B)

    carry = (jnp.int32(0), state, position_B, jnp.zeros_like(running_B))
    return jax.lax.while_loop(going_on, write, carry)[1:]


def _chosen(decoder: Decoder, weights: jax.Array) -> jax.Array:
    """Routing weights [..., experts] with those outside the top-k set to 0 and the others summing to 1."""
    weights_K, experts_K = chosen_weights(weights, decoder.layout.top_k, normalize=True)
    return jnp.sum(weights_K[..., None] * jax.nn.one_hot(experts_K, weights.shape[-1]), axis=-2)
