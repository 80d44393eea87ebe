"""Requests to the engine, and its results."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import NamedTuple, TypeGuard

import numpy as np

from flexolmo_jax.errors import ArgumentError, UserError

DEFAULT_NEW_TOKENS = 64
MAX_STOP_TOKENS = 32
TOP_LOGPROBS = 20


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and how to continue it.

    Attributes:
      token_ids: the prompt, at least one token.
      max_new_tokens: maximum number of new tokens; 0: only read the prompt.
      without: names of experts to leave out.
      temperature: of sampling; 0: greedy.
      top_k: sample from the k most likely tokens; 0: from all.
      top_p: sample from the fewest most likely tokens whose total probability reaches it; 1: from all.
      seed: of sampling.
      stop: strings that end the text; the text excludes them.
      min_p: sample from tokens with at least this fraction of the largest probability; 0: from all.
      repetition_penalty: divides positive logits of tokens of the prompt and the continuation, and multiplies negative
        ones; 1: no penalty.
      presence_penalty: is subtracted from the logits of tokens of the continuation; 0: no penalty.
      frequency_penalty: the same, once for each occurrence.
      stop_token_ids: tokens that end the text as EOS does; the text excludes them.
      ignore_eos: whether to continue after EOS, which is then kept as a token.
      logprobs: None, or the number of most likely tokens to return with each token, at most `TOP_LOGPROBS`. Log
        probabilities are those of the model: before temperature, top k, top p and penalties.
      prompt_logprobs: whether to return those of the prompt too; requires `logprobs`.
    """

    token_ids: Sequence[int]
    max_new_tokens: int = DEFAULT_NEW_TOKENS
    without: Sequence[str] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: Sequence[str] = ()
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: bool = False

    def __post_init__(self):
        """Raises ArgumentError for an invalid value."""
        rules = {
            "token_ids": (lambda ids: len(ids) > 0 and all(_is_whole(id, 0) for id in ids), "at least one token id"),
            "max_new_tokens": (lambda count: _is_whole(count, 0), "a whole number, at least 0 and below 2**31"),
            "without": (_are_texts, "a list of names"),
            "temperature": (lambda t: _is_number(t) and 0 <= t < math.inf, "a number, at least 0 and finite"),
            "top_k": (lambda count: _is_whole(count, 0), "a whole number, at least 0 (no limit) and below 2**31"),
            "top_p": (lambda p: _is_number(p) and 0 < p <= 1, "a number above 0 and at most 1"),
            "seed": (lambda seed: _is_whole(seed, 0, 2**32), "a whole number, at least 0 and below 2**32"),
            "stop": (lambda stop: _are_texts(stop) and all(stop), "a list of texts, none of them empty"),
            "min_p": (lambda p: _is_real(p, 0, 1), "a number from 0 to 1"),
            "repetition_penalty": (lambda x: _is_real(x, 1e-3, 1e3), "a number from 0.001 to 1000; 1 is none"),
            "presence_penalty": (lambda x: _is_real(x, -100, 100), "a number from -100 to 100"),
            "frequency_penalty": (lambda x: _is_real(x, -100, 100), "a number from -100 to 100"),
            "stop_token_ids": (_are_stop_tokens, f"a list of at most {MAX_STOP_TOKENS} token ids"),
            "ignore_eos": (lambda value: isinstance(value, bool), "True or False"),
            "logprobs": (
                lambda count: count is None or _is_whole(count, 0, TOP_LOGPROBS + 1),
                f"None, or a whole number from 0 to {TOP_LOGPROBS}",
            ),
            "prompt_logprobs": (
                lambda value: isinstance(value, bool) and not (value and self.logprobs is None),
                "True or False, and False where logprobs is None",
            ),
        }
        for field, (holds, rule) in rules.items():
            value = getattr(self, field)
            if not holds(value):
                raise ArgumentError(field, repr(value), f"it must be {rule}")

    @property
    def is_greedy(self) -> bool:
        """Whether each token is the most likely one: no temperature and no penalties."""
        penalties = self.repetition_penalty - 1, self.presence_penalty, self.frequency_penalty
        return not (self.temperature or any(penalties))


# `int` and `float` stand for NumPy's numbers too.
def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, Real)


def _is_whole(value: object, least: int, below: int = 2**31) -> bool:
    return _is_integer(value) and least <= value < below


def _is_real(value: object, least: float, most: float) -> bool:
    return not isinstance(value, bool) and _is_number(value) and least <= value <= most


def _are_stop_tokens(ids: object) -> bool:
    return isinstance(ids, list | tuple) and len(ids) <= MAX_STOP_TOKENS and all(_is_whole(id, 0) for id in ids)


def _are_texts(values: object) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(value, str) for value in values)


def new_tokens(prompt: int, asked: int | None, default: int, context: int, name: str = "max_new_tokens") -> int:
    """The maximum number of new tokens after a prompt of `prompt` tokens, in a context of `context` tokens.

    Args:
      prompt: tokens of the prompt.
      asked: the number that the user asked for, or None.
      default: the number if the user did not ask; the context may reduce it.
      context: maximum number of tokens of a prompt and its continuation together.
      name: the user's name of `asked`.

    Raises:
      ArgumentError: `context` is not a positive integer.
      ContextError: the prompt leaves no room, or none for what was asked.
    """
    if not _is_whole(context, 1):
        raise ArgumentError("max_length", repr(context), "it must be a whole number, at least 1")
    needed = prompt + (1 if asked is None else asked)
    if needed > context:
        what = (
            f"prompt of {prompt} tokens and {name}={asked}: {needed} in all, more than"
            if asked
            else (f"prompt of {prompt} tokens: leaves no room in")
        )
        shorter = f"shorten the prompt{f' or {name}' if asked else ''}"
        raise ContextError(f"{what} the model's context of {context}; {shorter}, or raise max_length")
    return min(default, context - prompt) if asked is None else asked


class ContextError(UserError, ValueError):
    """A prompt and its continuation do not fit into the context."""


class TokenLogprobs(NamedTuple):
    """Log probabilities, in nats, of consecutive tokens N and of the top K tokens at each.

    Attributes:
      token_ids: the tokens, including the stop token (EOS or another) that ended the text.
      chosen_N: float32, of each token; NaN for the first token of a prompt.
      top_ids_NxK: int32, the most likely tokens, in descending order.
      top_NxK: float32, their log probabilities.
    """

    token_ids: list[int]
    chosen_N: np.ndarray
    top_ids_NxK: np.ndarray
    top_NxK: np.ndarray


class Continuation(NamedTuple):
    """The result of a request.

    Attributes:
      text: the continuation, without the stop string.
      token_ids: its tokens, up to the one that completed the stop string; without EOS.
      experts: {expert: share of the routing weight}, mean over layers and over the tokens that the model read: the
        prompt and the continuation without its last token; all 0 if it read none.
      layers: the same for each layer, float64 [layers, experts].
      finish_reason: "stop" (EOS, another stop token or a stop string) or "length".
      logprobs: as requested, those of the prompt first; or None.
    """

    text: str
    token_ids: list[int]
    experts: Mapping[str, float]
    layers: np.ndarray
    finish_reason: str
    logprobs: TokenLogprobs | None = None


class Update(NamedTuple):
    """What a step added to a sequence.

    Attributes:
      id: of the request, from `Engine.add`.
      text: new text, which is final.
      token_ids: new tokens.
      continuation: the whole result once the request has ended; else None.
      logprobs: of the new tokens, if requested; the first update includes those of the prompt, if requested.
    """

    id: int
    text: str
    token_ids: list[int]
    continuation: Continuation | None
    logprobs: TokenLogprobs | None = None
