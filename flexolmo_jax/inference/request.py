"""What is asked of the engine, and what it answers."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np

from flexolmo_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to be continued.

    Attributes:
      token_ids: the prompt, at least one token.
      max_new_tokens: at most so many tokens are written.
      without: names of experts to leave out.
      temperature: of sampling; 0 takes the likeliest token.
      top_k: only the so many likeliest tokens are drawn from; 0: all.
      top_p: only the fewest likeliest tokens whose probability reaches it are drawn from; 1: all.
      seed: of sampling.
      stop: strings that end the text, before themselves.
    """

    token_ids: Sequence[int]
    max_new_tokens: int = 64
    without: Sequence[str] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: Sequence[str] = ()

    def __post_init__(self):
        """Raises UserError where a value makes no sense."""
        rules = {
            "token_ids": (lambda ids: len(ids) > 0 and all(_is_whole(id, 0) for id in ids), "at least one token id"),
            "max_new_tokens": (lambda count: _is_whole(count, 1), "a whole number, at least 1 and below 2**31"),
            "without": (_are_texts, "a list of names"),
            "temperature": (lambda t: isinstance(t, Real) and 0 <= t < math.inf, "a number, at least 0 and finite"),
            "top_k": (lambda count: _is_whole(count, 0), "a whole number, at least 0 (no limit) and below 2**31"),
            "top_p": (lambda p: isinstance(p, Real) and 0 < p <= 1, "a number above 0 and at most 1"),
            "seed": (lambda seed: _is_whole(seed, 0, 2**32), "a whole number, at least 0 and below 2**32"),
            "stop": (lambda stop: _are_texts(stop) and all(stop), "a list of texts, none of them empty"),
        }
        for field, (holds, rule) in rules.items():
            value = getattr(self, field)
            if not holds(value):
                raise UserError(f"{field} is {value!r}; it must be {rule}")


def _is_whole(value: object, least: int, below: int = 2**31) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= value < below


def _are_texts(values: object) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(value, str) for value in values)


class Continuation(NamedTuple):
    """What became of a request.

    Attributes:
      text: the continuation, without the stop string that ended it.
      token_ids: its tokens, up to the one that completed the stop string; without EOS.
      experts: {expert: share} of the routing weight of the experts that computed each token, mean over layers and
        over the tokens that were read to write the text: the prompt and the continuation but for its last token.
      layers: the same for each layer, float64 [layers, experts].
      finish_reason: "stop" (EOS or a stop string) or "length".
    """

    text: str
    token_ids: list[int]
    experts: Mapping[str, float]
    layers: np.ndarray
    finish_reason: str


class Update(NamedTuple):
    """What a step added to a request.

    Attributes:
      id: of the request.
      text: new text that will not change.
      token_ids: new tokens.
      continuation: None, or the whole once the request has ended.
    """

    id: int
    text: str
    token_ids: list[int]
    continuation: Continuation | None
