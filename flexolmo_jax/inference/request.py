"""What is asked of the engine, and what it answers."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np

from flexolmo_jax.errors import UserError

DEFAULT_NEW_TOKENS = 64
MAX_STOP_TOKENS = 32
TOP_LOGPROBS = 20


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to be continued.

    Attributes:
      token_ids: the prompt, at least one token.
      max_new_tokens: at most so many tokens are written; 0: the prompt is read, nothing more.
      without: names of experts to leave out.
      temperature: of sampling; 0 takes the likeliest token.
      top_k: only the so many likeliest tokens are drawn from; 0: all.
      top_p: only the fewest likeliest tokens whose probability reaches it are drawn from; 1: all.
      seed: of sampling.
      stop: strings that end the text, before themselves.
      min_p: only tokens at least so probable as this share of the likeliest one's probability are drawn; 0: all.
      repetition_penalty: logits of tokens of the prompt and of the continuation are divided by it where they are
        positive, and multiplied where they are negative; 1: none.
      presence_penalty: taken from the logits of tokens of the continuation; 0: none.
      frequency_penalty: the same, once for each time that the token was written.
      stop_token_ids: tokens that end the text as EOS does; none of them is kept.
      ignore_eos: EOS does not end the text; it is kept as a token.
      logprobs: None, or how many of the likeliest tokens are told with the log probability of each token, at most
        `TOP_LOGPROBS`. Log probabilities are those of the model itself: before temperature, limits and penalties.
      prompt_logprobs: whether the tokens of the prompt are told too; only where `logprobs` is given.
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
        """Raises UserError where a value makes no sense."""
        rules = {
            "token_ids": (lambda ids: len(ids) > 0 and all(_is_whole(id, 0) for id in ids), "at least one token id"),
            "max_new_tokens": (lambda count: _is_whole(count, 0), "a whole number, at least 0 and below 2**31"),
            "without": (_are_texts, "a list of names"),
            "temperature": (lambda t: isinstance(t, Real) and 0 <= t < math.inf, "a number, at least 0 and finite"),
            "top_k": (lambda count: _is_whole(count, 0), "a whole number, at least 0 (no limit) and below 2**31"),
            "top_p": (lambda p: isinstance(p, Real) and 0 < p <= 1, "a number above 0 and at most 1"),
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
                raise UserError(f"{field} is {value!r}; it must be {rule}")


def _is_whole(value: object, least: int, below: int = 2**31) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= value < below


def _is_real(value: object, least: float, most: float) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and least <= value <= most


def _are_stop_tokens(ids: object) -> bool:
    return isinstance(ids, list | tuple) and len(ids) <= MAX_STOP_TOKENS and all(_is_whole(id, 0) for id in ids)


def _are_texts(values: object) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(value, str) for value in values)


def new_tokens(prompt: int, asked: int | None, default: int, context: int, name: str = "max_new_tokens") -> int:
    """How many tokens a prompt of `prompt` tokens may be continued by, in a context of `context` tokens.

    Args:
      prompt: tokens of the prompt.
      asked: what the user asked for, or None.
      default: what is written where the user did not ask, as far as the context allows.
      context: tokens of a prompt and its continuation together, at most.
      name: what the user calls the tokens asked for.

    Raises:
      UserError: `context` is no such number.
      ContextError: the prompt leaves no room, or none for what was asked.
    """
    if not _is_whole(context, 1):
        raise UserError(f"max_length is {context!r}; it must be a whole number, at least 1")
    needed = prompt + (1 if asked is None else asked)
    if needed > context:
        what = (
            f"prompt of {prompt} tokens and {name}={asked}: {needed} in all, more than"
            if asked
            else (f"prompt of {prompt} tokens: leaves no room in")
        )
        shorter = f"shorten the prompt{f' or {name}' if asked else ''}"
        raise ContextError(
            f"{what} the model's context of {context}; {shorter}, or allow more with --max_length (Python: max_length)"
        )
    return min(default, context - prompt) if asked is None else asked


class ContextError(UserError):
    """A prompt and its continuation do not fit into the context."""


class TokenLogprobs(NamedTuple):
    """Log probabilities, in nats, of tokens that follow one another; N tokens, K likeliest ones.

    Attributes:
      token_ids: the tokens, one that ended the text (EOS or another) included.
      chosen_N: float32, of each token; NaN for the first of a prompt, which nothing precedes.
      top_ids_NxK: int32, the likeliest tokens at each place, the likeliest first.
      top_NxK: float32, their log probabilities.
    """

    token_ids: list[int]
    chosen_N: np.ndarray
    top_ids_NxK: np.ndarray
    top_NxK: np.ndarray


class Continuation(NamedTuple):
    """What became of a request.

    Attributes:
      text: the continuation, without the stop string that ended it.
      token_ids: its tokens, up to the one that completed the stop string; without EOS.
      experts: {expert: share} of the routing weight of the experts that computed each token, mean over layers and
        over the tokens that were read to write the text: the prompt and the continuation but for its last token;
        all 0 where none was.
      layers: the same for each layer, float64 [layers, experts].
      finish_reason: "stop" (EOS, another stop token or a stop string) or "length".
      logprobs: of the tokens that were asked for, or None; those of the prompt come first.
    """

    text: str
    token_ids: list[int]
    experts: Mapping[str, float]
    layers: np.ndarray
    finish_reason: str
    logprobs: TokenLogprobs | None = None


class Update(NamedTuple):
    """What a step added to a request.

    Attributes:
      id: of the request.
      text: new text that will not change.
      token_ids: new tokens.
      continuation: None, or the whole once the request has ended.
      logprobs: None, or of the new tokens; the first update also has those of the prompt, where asked for.
    """

    id: int
    text: str
    token_ids: list[int]
    continuation: Continuation | None
    logprobs: TokenLogprobs | None = None
