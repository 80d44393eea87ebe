"""Requests to `/v1/completions`: read, and checked field by field."""

import dataclasses
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flexolmo_jax.inference.model import seeds
from flexolmo_jax.inference.request import Request
from flexolmo_jax.serving.errors import ApiError

_SEEDS = 2**32
_INT32_MAX = 2**31 - 1

# Fields of the OpenAI API that would change the answer and are not supported: the values that would not.
_NEUTRAL = {
    "suffix": (None, ""),
    "logprobs": (None,),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
}
_IGNORED = ("user",)
_SUPPORTED = (
    *("model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "n", "best_of", "stop", "seed"),
    *("stream", "stream_options", "echo", "without", "experts_per_layer"),
)


@dataclasses.dataclass(frozen=True)
class Served:
    """The model on offer, as far as requests are checked against it.

    Attributes:
      names: what requests may call it.
      roster: its experts, the anchor first.
      encode: the token ids of a prompt that is a text.
      decode: the text of token ids.
      vocab_size: token ids are below it.
      max_length: tokens of a prompt and its continuation together, at most.
      max_sequences: prompts times n of one request, at most.
    """

    names: tuple[str, ...]
    roster: tuple[str, ...]
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    vocab_size: int
    max_length: int
    max_sequences: int


@dataclasses.dataclass(frozen=True)
class Completion:
    """A request to `/v1/completions`, checked.

    Attributes:
      model: what the client calls the model.
      requests: for the engine, one for each choice of the answer: the n of the first prompt, those of the next.
      n: choices for each prompt.
      echoes: for each choice, the text that is put in front of its continuation.
      stream: whether text is sent as it becomes known.
      include_usage: whether a stream ends with the usage block.
      experts_per_layer: whether each choice also has the experts' shares in every layer.
    """

    model: str
    requests: tuple[Request, ...]
    n: int
    echoes: tuple[str, ...]
    stream: bool
    include_usage: bool
    experts_per_layer: bool


def parse(body: bytes, served: Served) -> Completion:
    """Reads the body of a request.

    Raises:
      ApiError: 400, the body is not what it should be; 404, it asks for another model.
    """
    given = _fields(body)
    model = given.get("model")
    if not isinstance(model, str):
        raise _bad("model", given, f"the name of the model, {_shown(served.names[0])}")
    if model not in served.names:
        message = f"model: {_shown(model)} is not served here; ask for {_shown(served.names[0])}"
        raise ApiError(404, message, "model", "model_not_found")
    _refuse_unsupported(given)

    n = _integer(given, "n", 1, 1)
    if given.get("best_of") not in (None, n):
        raise _bad("best_of", given, "the same as n: every choice is returned")
    prompts = _prompts(given, served)
    if len(prompts) * n > served.max_sequences:
        message = f"prompt: {len(prompts)} times n={n} is more than the {served.max_sequences} that one request may ask"
        raise ApiError(400, message, "prompt")
    max_tokens = _integer(given, "max_tokens", 16, 1)
    longest = max(map(len, prompts))
    if longest + max_tokens > served.max_length:
        message = (
            f"prompt: its {longest} tokens and max_tokens={max_tokens} are more than the {served.max_length} "
            "of a sequence here; shorten one or the other"
        )
        raise ApiError(400, message, "prompt", "context_length_exceeded")
    seed = _integer(given, "seed", secrets.randbelow(_SEEDS), 0, _SEEDS - 1)
    sampling = {
        "max_new_tokens": max_tokens,
        "without": _without(given, served.roster),
        "temperature": _number(given, "temperature", 1.0, 0.0, 100.0),
        "top_k": _integer(given, "top_k", 0, 0),
        "top_p": _number(given, "top_p", 1.0, 0.0, 1.0, above=True),
        "stop": tuple(_texts(given, "stop", at_most=4)),
    }
    choices = [ids for ids in prompts for _ in range(n)]
    echo, stream = _boolean(given, "echo"), _boolean(given, "stream")
    return Completion(
        model=model,
        requests=tuple(
            Request(tuple(ids), seed=choice_seed, **sampling)
            for ids, choice_seed in zip(choices, seeds(seed, len(choices)), strict=True)
        ),
        n=n,
        echoes=tuple(served.decode(ids) if echo else "" for ids in choices),
        stream=stream,
        include_usage=_include_usage(given, stream),
        experts_per_layer=_boolean(given, "experts_per_layer"),
    )


def _fields(body: bytes) -> dict[str, Any]:
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise ApiError(400, f"the body is not JSON ({reason}); send an object of fields") from error
    if not isinstance(given, dict):
        raise ApiError(400, f"the body is {_shown(given)}; send a JSON object of fields")
    return given


def _refuse_unsupported(given: Mapping[str, Any]) -> None:
    """A field that is not known is refused too: a misspelt `without` must not pass unseen."""
    for name in given:
        if name in _NEUTRAL and given[name] not in _NEUTRAL[name]:
            raise ApiError(400, f"{name}: is not supported here; leave it out", name)
        if name not in _NEUTRAL and name not in _SUPPORTED and name not in _IGNORED:
            message = f"{_shown(name)}: is not a field of a completion; use some of {', '.join(_SUPPORTED)}"
            raise ApiError(400, message, name.encode(errors="replace").decode())


def _prompts(given: Mapping[str, Any], served: Served) -> list[list[int]]:
    """The token ids of each prompt."""
    value = given.get("prompt")
    right = "a text, a list of texts, a list of token ids, or a list of such lists; none may be empty but a text"
    value = [value] if isinstance(value, str) or _is_ids(value) else value
    if isinstance(value, list) and value and all(_is_text(item) for item in value):
        return [served.encode(text) for text in value]
    if not isinstance(value, list) or not value or not all(_is_ids(item) for item in value):
        raise _bad("prompt", given, right)
    if any(not 0 <= id < served.vocab_size for ids in value for id in ids):
        raise ApiError(400, f"prompt: a token id is out of range; ids are 0 to {served.vocab_size - 1}", "prompt")
    return value


def _without(given: Mapping[str, Any], roster: Sequence[str]) -> tuple[str, ...]:
    names = tuple(_texts(given, "without"))
    for name in names:
        if name not in roster:
            message = f"without: {_shown(name)} is not on the roster, which is {', '.join(roster)}"
            raise ApiError(400, message, "without")
    if set(names) == set(roster):
        raise ApiError(400, "without: no expert would be left; keep at least one", "without")
    return names


def _include_usage(given: Mapping[str, Any], stream: bool) -> bool:
    options = given.get("stream_options")
    if options is None:
        return False
    if not stream or not isinstance(options, dict) or options.keys() - {"include_usage"}:
        raise _bad("stream_options", given, "{'include_usage': true}, and that only where stream is true")
    return _boolean(options, "include_usage")


def _texts(given: Mapping[str, Any], name: str, at_most: int | None = None) -> list[str]:
    """A list of texts that are not empty, which may be given as one text; none by default."""
    value = given.get(name)
    if value is None:
        return []
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(_is_text(text) and text for text in texts):
        raise _bad(name, given, "a text that is not empty, or a list of such")
    if at_most is not None and len(texts) > at_most:
        raise ApiError(400, f"{name}: has {len(texts)} texts; give at most {at_most}", name)
    return texts


def _integer(given: Mapping[str, Any], name: str, default: int, low: int, high: int = _INT32_MAX) -> int:
    value = default if given.get(name) is None else given[name]
    if type(value) is not int or not low <= value <= high:
        raise _bad(name, given, f"a whole number from {low} to {high}")
    return value


def _number(given: Mapping[str, Any], name: str, default: float, low: float, high: float, above: bool = False) -> float:
    """A number from `low` to `high`, or above `low`."""
    value = default if given.get(name) is None else given[name]
    if type(value) not in (int, float) or not low <= value <= high or (above and value == low):
        raise _bad(name, given, f"a number {f'above {low:g} and at most' if above else f'from {low:g} to'} {high:g}")
    return float(value)


def _boolean(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name)
    if value is not None and not isinstance(value, bool):
        raise _bad(name, given, "true or false")
    return bool(value)


def _is_text(value: Any) -> bool:
    """Whether it is a text that can be written in UTF-8: JSON can escape half a surrogate pair."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(type(id) is int for id in value)


def _shown(value: Any) -> str:
    """A value as a message shows it: as JSON says it, and not at length."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _bad(name: str, given: Mapping[str, Any], right: str) -> ApiError:
    found = f"is {_shown(given[name])}" if given.get(name) is not None else "is missing"
    return ApiError(400, f"{name}: {found}; give {right}", name)
