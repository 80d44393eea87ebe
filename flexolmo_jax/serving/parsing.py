"""Bodies of requests become requests to the engine, once they are found valid for the served model."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import pydantic

from flexolmo_jax.errors import UserError
from flexolmo_jax.inference.model import seeds
from flexolmo_jax.inference.request import MAX_STOP_TOKENS, ContextError, Request, new_tokens
from flexolmo_jax.serving.chat import ChatTemplate
from flexolmo_jax.serving.logprobs import TokenStrings
from flexolmo_jax.serving.schema import (
    BEST_OF,
    MAX_STOPS,
    STREAM_OPTIONS,
    ApiError,
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    Message,
    StreamOptions,
)

R = TypeVar("R", bound=GenerationRequest)


@dataclasses.dataclass(frozen=True)
class Served:
    """The served model, as far as requests and responses need it.

    Attributes:
      names: names by which requests may call it.
      roster: its experts, the anchor first.
      encode: the token ids of a prompt that is a text.
      decode: the text of token ids.
      strings: the string of each token.
      vocab_size: token ids are below it.
      max_length: maximum number of tokens of a prompt and its continuation together.
      max_sequences: maximum number of sequences, prompts times n, of one request.
      chat: the chat template; or why there is none.
    """

    names: tuple[str, ...]
    roster: tuple[str, ...]
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    strings: TokenStrings
    vocab_size: int
    max_length: int
    max_sequences: int
    chat: ChatTemplate | str


@dataclasses.dataclass(frozen=True)
class Completion:
    """A valid request to `/v1/completions` or `/v1/chat/completions`.

    Attributes:
      model: the client's name of the model.
      requests: for the engine, one for each choice: n of the first prompt, then n of the next.
      n: choices for each prompt.
      echoes: for each choice, the text before its continuation.
      logprobs: whether choices have log probabilities.
      stream: whether text is sent as it becomes known.
      include_usage: whether a stream ends with the usage block.
      experts_per_layer: whether each choice also has the experts' shares in every layer.
    """

    model: str
    requests: tuple[Request, ...]
    n: int
    echoes: tuple[str, ...]
    logprobs: bool
    stream: bool
    include_usage: bool
    experts_per_layer: bool


def parse(body: bytes, served: Served) -> Completion:
    """Reads the body of a request to `/v1/completions`.

    Raises:
      ApiError: 400, a field is invalid; 404, another model is asked for.
    """
    request = _validate(CompletionRequest, body, served)
    if request.best_of not in (None, request.n):
        raise _invalid("best_of", request.best_of, BEST_OF)
    prompts = _prompts(request.prompt, served)
    counts = _new_tokens(prompts, "prompt", "max_tokens", request.max_tokens, 16, served)
    options = {
        "logprobs": request.logprobs,
        "prompt_logprobs": request.echo and request.logprobs is not None,
        "stop_token_ids": tuple(request.stop_token_ids),
    }
    return _completion(request, served, "prompt", prompts, counts, request.echo, options)


def parse_chat(body: bytes, served: Served) -> Completion:
    """Reads the body of a request to `/v1/chat/completions`.

    Raises:
      ApiError: 400, a field is invalid; 404, another model is asked for, or the model has no chat template.
    """
    if isinstance(served.chat, str):
        raise ApiError(404, served.chat, code="no_chat_template")
    request = _validate(ChatRequest, body, served)
    if request.top_logprobs is not None and not request.logprobs:
        raise _invalid("top_logprobs", request.top_logprobs, "it only where logprobs is true")
    try:
        messages = [message.for_template() for message in request.messages]
        prompt = served.chat.encode(messages, request.add_generation_prompt)
    except UserError as error:
        raise ApiError(400, f"messages: {error}", "messages") from error
    if not prompt:
        raise ApiError(400, "messages: the chat template makes nothing of them; give some that it knows", "messages")
    name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    counts = _new_tokens([prompt], "messages", name, getattr(request, name), served.max_length, served)
    # The template's end tokens come with the model and may be outside its vocabulary.
    ends = [id for id in served.chat.end_ids if id < served.vocab_size][: MAX_STOP_TOKENS - MAX_STOPS]
    options = {
        "logprobs": (request.top_logprobs or 0) if request.logprobs else None,
        "stop_token_ids": (*request.stop_token_ids, *([] if request.ignore_eos else ends)),
    }
    return _completion(request, served, "messages", [prompt], counts, False, options)


def _completion(
    request: GenerationRequest,
    served: Served,
    field: str,
    prompts: Sequence[list[int]],
    counts: Sequence[int],
    echo: bool,
    options: Mapping[str, Any],
) -> Completion:
    """Makes the engine's requests; `counts` are maxima of new tokens, `options` the fields in which kinds differ."""
    n = request.n
    if len(prompts) * n > served.max_sequences:
        message = (
            f"{field}: {len(prompts)} times n={n} is more than the {served.max_sequences} that one request may ask"
        )
        raise ApiError(400, message, field)
    shared = {
        "without": tuple(request.without),
        "temperature": float(request.temperature),
        "top_k": max(0, request.top_k),
        "top_p": float(request.top_p),
        "min_p": float(request.min_p),
        "repetition_penalty": float(request.repetition_penalty),
        "presence_penalty": float(request.presence_penalty),
        "frequency_penalty": float(request.frequency_penalty),
        "stop": tuple(request.stop),
        "ignore_eos": request.ignore_eos,
        **options,
    }
    choices = [(ids, count) for ids, count in zip(prompts, counts, strict=True) for _ in range(n)]
    return Completion(
        model=request.model,
        requests=tuple(
            Request(tuple(ids), count, seed=seed, **shared)
            for (ids, count), seed in zip(choices, seeds(request.seed, len(choices)), strict=True)
        ),
        n=n,
        echoes=tuple(served.decode(ids) if echo else "" for ids, _ in choices),
        logprobs=options["logprobs"] is not None,
        stream=request.stream,
        include_usage=request.stream_options.include_usage,
        experts_per_layer=request.experts_per_layer,
    )


def _prompts(prompt: str | list[str] | list[int] | list[list[int]], served: Served) -> list[list[int]]:
    """The token ids of each prompt."""
    texts = [prompt] if isinstance(prompt, str) else [text for text in prompt if isinstance(text, str)]
    if texts:
        return [served.encode(text) for text in texts]
    prompts = [ids for ids in prompt if isinstance(ids, list)] or [[id for id in prompt if isinstance(id, int)]]
    if any(not 0 <= id < served.vocab_size for ids in prompts for id in ids):
        raise ApiError(400, f"prompt: a token id is out of range; ids are 0 to {served.vocab_size - 1}", "prompt")
    return prompts


def _new_tokens(
    prompts: Sequence[list[int]], field: str, name: str, count: int | None, default: int, served: Served
) -> list[int]:
    """The maximum number of new tokens of each prompt; `name` is the field of `count`."""
    try:
        return [new_tokens(len(ids), count, default, served.max_length, name) for ids in prompts]
    except ContextError as error:
        raise ApiError(400, f"{field}: {error}", field, "context_length_exceeded") from error


def _validate(kind: type[R], body: bytes, served: Served) -> R:
    """The body of a request, valid for the served model."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise ApiError(400, f"the body is not JSON ({reason}); send an object of fields") from error
    if not isinstance(fields, dict):
        raise ApiError(400, f"the body is {_shown(fields)}; send a JSON object of fields")
    fields = {name: value for name, value in fields.items() if value is not None}
    for name in [name for name in fields if name not in kind.model_fields]:
        _check_unsupported(name, fields.pop(name), kind)
    if isinstance(fields.get("stream_options"), dict):
        fields["stream_options"] = {k: v for k, v in fields["stream_options"].items() if v is not None}
    try:
        request = kind.model_validate(fields)
    except pydantic.ValidationError as error:
        raise _api_error(error.errors()[0], kind, fields, served) from error
    _check_served(request, served)
    if "stream_options" in fields and not request.stream:
        raise _invalid("stream_options", fields["stream_options"], STREAM_OPTIONS.format())
    messages: Sequence[Message] = getattr(request, "messages", ())
    for i, message in enumerate(messages):
        extra = message.model_extra or {}
        ignored = (None, [], {}) if "type" not in extra else (None, [], {}, "text", "message")
        unknown = [key for key, value in extra.items() if value not in ignored]
        if unknown:
            text = f"messages[{i}]: {_shown(unknown[0])} is not supported; give role and content"
            raise ApiError(400, text, "messages")
    return request


def _check_unsupported(name: str, value: Any, kind: type[GenerationRequest]) -> None:
    """Refuses unknown fields, so that a misspelt `without` is noticed, and unsupported values of known ones."""
    if name not in kind.neutral:
        message = f"{_shown(name)}: is not a field of a {kind.kind}; use some of {', '.join(kind.model_fields)}"
        raise ApiError(400, message, name.encode(errors="replace").decode())
    # JSON's true is not 1.
    neutral = kind.neutral[name]
    if neutral and not any(type(value) is type(same) and value == same for same in neutral):
        raise ApiError(400, f"{name}: is not supported here; leave it out", name)


def _check_served(request: GenerationRequest, served: Served) -> None:
    """Refuses names and ids that the served model does not have."""
    if request.model not in served.names:
        message = f"model: {_shown(request.model)} is not served here; ask for {_shown(served.names[0])}"
        raise ApiError(404, message, "model", "model_not_found")
    for name in request.without:
        if name not in served.roster:
            message = f"without: {_shown(name)} is not on the roster, which is {', '.join(served.roster)}"
            raise ApiError(400, message, "without")
    if set(request.without) == set(served.roster):
        raise ApiError(400, "without: no expert would be left; keep at least one", "without")
    if any(not 0 <= id < served.vocab_size for id in request.stop_token_ids):
        right = f"a list of token ids from 0 to {served.vocab_size - 1}"
        raise _invalid("stop_token_ids", request.stop_token_ids, right)


def _api_error(error: Any, kind: type[GenerationRequest], fields: Mapping[str, Any], served: Served) -> ApiError:
    """The first error of pydantic in the words of this API: "FIELD: is VALUE; give ..."."""
    name, *rest = error["loc"]
    value, field = fields.get(name), kind.model_fields[name]
    if name == "messages" and len(rest) > 1 and isinstance(value, list) and isinstance(value[rest[0]], dict):
        message, key = value[rest[0]], rest[1]
        right = Message.model_fields[key].description
        return ApiError(400, f"messages[{rest[0]}]: {key} is {_shown(message.get(key))}; give {right}", "messages")
    if error["type"] == "too_long":
        noun = "texts" if isinstance(error["input"][0], str) else "token ids"
        count, limit = error["ctx"]["actual_length"], error["ctx"]["max_length"]
        return ApiError(400, f"{name}: has {count} {noun}; give at most {limit}", name)
    if rest == ["include_usage"] and isinstance(value, dict):
        name, value, field = rest[0], value[rest[0]], StreamOptions.model_fields[rest[0]]
    right = str(field.description).format(model=_shown(served.names[0]), last_id=served.vocab_size - 1)
    return _invalid(name, value, right)


def _invalid(name: str, value: Any, right: str) -> ApiError:
    found = "is missing" if value is None else f"is {_shown(value)}"
    return ApiError(400, f"{name}: {found}; give {right}", name)


def _shown(value: Any) -> str:
    """A value as JSON, not at length."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
