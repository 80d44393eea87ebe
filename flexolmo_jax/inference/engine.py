"""Continuous batching: requests join and leave at any time, and no result depends on the other requests."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from flexolmo_jax.errors import ArgumentError
from flexolmo_jax.inference.request import (
    MAX_STOP_TOKENS,
    TOP_LOGPROBS,
    Continuation,
    Request,
    TokenLogprobs,
    Update,
    new_tokens,
)
from flexolmo_jax.inference.sampling import Sampling, Scored
from flexolmo_jax.inference.steps import NO_TOKEN, State, decode, extend, prefill
from flexolmo_jax.inference.text import TextStream

MIN_BUCKET = 16
AHEAD = 256  # new tokens for which the cache has room at first
# Sampling options of a free slot: values and dtypes.
GREEDY: Sampling[tuple[float, type[np.generic]]] = Sampling(
    temperature_B=(0.0, np.float32),
    top_k_B=(0, np.int32),
    top_p_B=(1.0, np.float32),
    seed_B=(0, np.uint32),
    min_p_B=(0.0, np.float32),
    repetition_B=(1.0, np.float32),
    presence_B=(0.0, np.float32),
    frequency_B=(0.0, np.float32),
)


@dataclasses.dataclass
class _Slot:
    """A request in flight."""

    id: int
    request: Request
    stream: TextStream
    token_ids: list[int] = dataclasses.field(default_factory=list)
    reported: int = 0  # tokens, from the start of the prompt, whose log probabilities were returned


class Engine:
    """Decodes requests in one batch, each in its own slot. Not thread-safe."""

    def __init__(self, model, slots: int = 8, max_length: int | None = None):
        """Starts with all slots free.

        Args:
          model: an `inference.model.Model`; without a tokenizer its continuations have no text.
          slots: number of requests that are decoded at once.
          max_length: maximum number of tokens of a prompt and its continuation; longer requests are refused. None: no
            limit.
        """
        self._model, self._max_length = model, max_length
        devices = {device for leaf in model.params.values() if isinstance(leaf, jax.Array) for device in leaf.devices()}
        self._device = devices.pop() if len(devices) == 1 else None
        self._slots: list[_Slot | None] = [None] * slots
        self._ids = itertools.count()
        self._state: State | None = None
        # By slot: the position of the last token, where the continuation starts and must end, the tokens that end it
        # earlier, and the sampling options.
        self._position_B, self._start_B, self._end_B = np.zeros((3, slots), np.int32)
        self._stop_BxN = np.full((slots, 1 + MAX_STOP_TOKENS), NO_TOKEN, np.int32)
        self._mask_BxE = np.zeros((slots, len(model.roster)), bool)
        self._sampling: Sampling[np.ndarray] = Sampling(*(np.full(slots, *value) for value in GREEDY))
        # Sampling is half of the code of a decode step. It is compiled from the first request on that samples.
        self._samples = False

    @property
    def free(self) -> int:
        """Number of free slots."""
        return self._slots.count(None)

    def add(self, requests: Sequence[Request]) -> list[int]:
        """Adds requests, at most one per free slot, and reads their prompts; returns an id for each.

        Raises:
          ArgumentError: a request names an expert that is not on the roster, has a token that is not in the vocabulary,
            or has stop strings for a model without a tokenizer.
          ContextError: a request is longer than `max_length`.
        """
        if len(requests) > self.free:
            raise ValueError(f"{len(requests)} requests for {self.free} free slots")
        masks = [self._check(request) for request in requests]
        if not requests:
            return []
        slots = [slot for slot, taken in enumerate(self._slots) if taken is None][: len(requests)]
        lengths = [len(request.token_ids) for request in requests]
        # Padding is written to a slot that does not exist.
        batch, length = bucket(len(requests), 1), bucket(max(lengths))
        slots_b, lengths_b = np.full(batch, len(self._slots), np.int32), np.ones(batch, np.int32)
        tokens_bxS, mask_bxE = np.zeros((batch, length), np.int32), np.zeros((batch, len(self._model.roster)), bool)
        ids = []
        for i, (slot, request, mask_E) in enumerate(zip(slots, requests, masks, strict=True)):
            slots_b[i], lengths_b[i], mask_bxE[i] = slot, lengths[i], mask_E
            tokens_bxS[i, : lengths[i]] = request.token_ids
            ids.append(self._take(slot, request, mask_E))
        self._reserve(max(n + min(r.max_new_tokens, AHEAD) for n, r in zip(lengths, requests, strict=True)))
        self._state = prefill(
            self._model.decoder,
            self._model.params,
            self._state,
            slots_b,
            tokens_bxS,
            lengths_b,
            mask_bxE,
            any(request.prompt_logprobs for request in requests),
        )
        return ids

    def step(self, max_steps: int = 8) -> list[Update]:
        """Decodes up to `max_steps` tokens for every request in flight, fewer when one of them ends.

        If some requests asked for no token, it decodes nothing and returns only their results.

        Args:
          max_steps: number of tokens after which stop strings are looked for and text is returned.

        Returns:
          An update for each request in flight.
        """
        running = {slot: taken for slot, taken in enumerate(self._slots) if taken}
        if not running or self._state is None:
            return []
        finished = {slot: taken for slot, taken in running.items() if self._position_B[slot] + 1 == self._end_B[slot]}
        if finished:
            return self._collect_all(finished, self._state, np.full(len(self._slots), NO_TOKEN))
        last = int(self._position_B[list(running)].max())
        self._reserve(last + 2)
        max_steps = min(max_steps, self._length - 1 - last)
        state, position_B, stopped_B = decode(
            self._model.decoder,
            self._model.params,
            self._state,
            self._position_B,
            self._start_B,
            self._end_B,
            self._mask_BxE,
            self._stop_BxN,
            self._sampling if self._samples else None,
            max_steps,
        )
        self._state = state
        self._position_B, stopped_B = (np.array(x) for x in jax.device_get((position_B, stopped_B)))
        return self._collect_all(running, state, stopped_B)

    def run(self, requests: Sequence[Request], max_steps: int = 8) -> Iterator[tuple[int, Update]]:
        """Runs any number of requests, in their order as slots become free; yields (index of the request, update).

        Raises:
          ArgumentError, ContextError: as `add`.
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
        """Drops a request; does nothing if it has ended."""
        for slot, taken in enumerate(self._slots):
            if taken and taken.id == id:
                self._release(slot)

    @property
    def _length(self) -> int:
        return self._state.tokens_BxT.shape[1] if self._state else 0

    def _check(self, request: Request) -> np.ndarray:
        """Checks a request; returns the experts that it may use, bool [experts]."""
        if self._max_length:
            new_tokens(len(request.token_ids), request.max_new_tokens, request.max_new_tokens, self._max_length)
        size = self._model.decoder.architecture.vocab_size
        for field in ("token_ids", "stop_token_ids"):
            out_of_range = [id for id in getattr(request, field) if not 0 <= id < size]
            if out_of_range:
                raise ArgumentError(field, out_of_range[0], f"not in the vocabulary; ids are 0 to {size - 1}")
        if request.stop and not self._model.tokenizer:
            problem = "the model has no tokenizer.json, which stop strings need; use stop_token_ids"
            raise ArgumentError("stop", repr(request.stop), problem)
        return self._model.expert_mask(request.without)

    def _take(self, slot: int, request: Request, mask_E: np.ndarray) -> int:
        """Puts a request into a free slot; returns its id."""
        start = len(request.token_ids)
        stream = TextStream(self._model.tokenizer, request.stop, request.token_ids)
        reported = 0 if request.prompt_logprobs else start
        self._slots[slot] = taken = _Slot(next(self._ids), request, stream, reported=reported)
        self._position_B[slot], self._start_B[slot] = start - 1, start
        self._end_B[slot] = start + request.max_new_tokens
        self._mask_BxE[slot] = mask_E
        self._samples |= not request.is_greedy
        stops = [*request.stop_token_ids, *(() if request.ignore_eos else (self._model.manifest.eos_id,))]
        self._stop_BxN[slot, : len(stops)] = stops
        self._set_sampling(
            slot,
            Sampling(
                request.temperature,
                request.top_k,
                request.top_p,
                request.seed,
                request.min_p,
                request.repetition_penalty,
                request.presence_penalty,
                request.frequency_penalty,
            ),
        )
        return taken.id

    def _reserve(self, length: int) -> None:
        """Makes room for that many positions, and for the log probabilities that requests ask for."""
        asked = [taken.request.logprobs for taken in self._slots if taken and taken.request.logprobs is not None]
        top = next(count for count in (1, 5, TOP_LOGPROBS) if count >= max(asked)) if asked else 0
        kept = self._state.scored.top_ids.shape[-1] if self._state and self._state.scored else 0
        if self._state and kept and not top:  # the program without scores is faster
            self._state = self._state._replace(scored=None)
        if length > self._length or top > kept:
            decoder, batch = self._model.decoder, len(self._slots)
            if length > self._length:
                length = bucket(max(length, min(2 * self._length, self._max_length or 2 * self._length)))
            state = extend(decoder, self._state, batch, max(length, self._length), max(top, kept) if top else 0)
            # As the results of later steps are; otherwise `prefill` is compiled for a new state and for later ones.
            self._state = jax.device_put(state, self._device)

    def _collect_all(self, slots: Mapping[int, _Slot], state: State, stopped_B: np.ndarray) -> list[Update]:
        """What the last step added to these slots; `stopped_B` holds the stop token of each slot, or `NO_TOKEN`."""
        asked = any(taken.request.logprobs is not None for taken in slots.values())
        # Tokens and scores on the host; of the routing weights, only those of ended requests are fetched.
        fetched = state._replace(
            tokens_BxT=jax.device_get(state.tokens_BxT), scored=jax.device_get(state.scored) if asked else None
        )
        return [self._collect(slot, taken, fetched, int(stopped_B[slot])) for slot, taken in slots.items()]

    def _collect(self, slot: int, taken: _Slot, fetched: State, stop_token: int) -> Update:
        """What the last step added to a slot; frees it where the request has ended."""
        start, scored = len(taken.request.token_ids), fetched.scored
        written, ended_by = fetched.tokens_BxT[slot, start : self._position_B[slot] + 1].tolist(), [stop_token]
        if stop_token == NO_TOKEN:
            ended_by = []
        seen, text, stopped = len(taken.token_ids), "", False
        ended = bool(ended_by) or self._position_B[slot] + 1 == self._end_B[slot]
        # A stop string ends the text at one certain token; without any, all tokens are read at once.
        stops = range(seen + 1, len(written)) if taken.request.stop else ()
        for count in (*stops, len(written)):
            new, stopped = taken.stream.read(written[:count], ended and count == len(written))
            text += new
            if stopped:
                written, ended_by = written[:count], []
                break
        taken.token_ids = written
        logprobs = all_logprobs = continuation = None
        if scored is not None and taken.request.logprobs is not None:
            ids = [*taken.request.token_ids, *written, *ended_by]
            logprobs = _token_logprobs(scored, slot, ids, taken.reported, taken.request.logprobs)
            taken.reported = len(ids)
            if ended or stopped:
                first = 0 if taken.request.prompt_logprobs else start
                all_logprobs = _token_logprobs(scored, slot, ids, first, taken.request.logprobs)
        if ended or stopped:
            read = max(0, start + len(written) - 1 + len(ended_by))
            routing_TxLxE = jax.device_get(fetched.routing_BxTxLxE[slot])
            layers_LxE = routing_TxLxE[:read].sum(axis=0, dtype=np.float64) / max(read, 1)
            experts = dict(zip(self._model.roster, layers_LxE.mean(axis=0).tolist(), strict=True))
            reason = "stop" if ended_by or stopped else "length"
            continuation = Continuation(taken.stream.text, written, experts, layers_LxE, reason, all_logprobs)
            self._release(slot)
        return Update(taken.id, text, written[seen:], continuation, logprobs)

    def _release(self, slot: int) -> None:
        self._slots[slot] = None
        self._position_B[slot] = self._start_B[slot] = self._end_B[slot] = 0
        self._stop_BxN[slot] = NO_TOKEN
        self._set_sampling(slot, Sampling(*(value for value, _ in GREEDY)))

    def _set_sampling(self, slot: int, sampling: Sampling[float]) -> None:
        for values_B, value in zip(self._sampling, sampling, strict=True):
            values_B[slot] = value


def _token_logprobs(scored: Scored, slot: int, ids: Sequence[int], first: int, count: int) -> TokenLogprobs:
    """The log probabilities of `ids[first:]`; `ids` are all tokens of a slot."""
    before = slice(max(first - 1, 0), max(len(ids) - 1, 0))
    chosen_N, top_ids_NxK, top_NxK = (x[slot, before] for x in scored)
    top_ids_NxK, top_NxK = top_ids_NxK[:, :count], top_NxK[:, :count]
    if first == 0:  # the first token has no log probability
        chosen_N, top_NxK = (
            np.pad(x, [(1, 0)] + [(0, 0)] * (x.ndim - 1), constant_values=np.nan) for x in (chosen_N, top_NxK)
        )
        top_ids_NxK = np.pad(top_ids_NxK, ((1, 0), (0, 0)), constant_values=NO_TOKEN)
    # Copies, since the device may overwrite the fetched arrays.
    return TokenLogprobs(list(ids[first:]), np.array(chosen_N), np.array(top_ids_NxK), np.array(top_NxK))


def bucket(length: int, minimum: int | None = None) -> int:
    """`length` rounded up to a power of two or three quarters of one, to limit the number of compiled shapes."""
    minimum = MIN_BUCKET if minimum is None else minimum
    power = max(minimum, 1 << (length - 1).bit_length())
    return power * 3 // 4 if power > minimum and length <= power * 3 // 4 else power
