"""Requests to `/v1/completions` and `/v1/chat/completions`: read, and checked field by field."""

import dataclasses
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flexolmo_jax.errors import UserError
from flexolmo_jax.inference.model import seeds
from flexolmo_jax.inference.request import MAX_STOP_TOKENS, TOP_LOGPROBS, ContextError, Request, new_tokens
from flexolmo_jax.serving import fields
from flexolmo_jax.serving.chat import ChatTemplate
from flexolmo_jax.serving.errors import ApiError
from flexolmo_jax.serving.fields import bad, shown
from flexolmo_jax.serving.logprobs import TokenStrings

_SEEDS = 2**32
_STOPS = 16  # texts, and tokens

# Fields that are read, in both kinds of requests.
_COMMON = (
    *("model", "max_tokens", "temperature", "top_p", "top_k", "min_p", "n", "stop", "stop_token_ids", "ignore_eos"),
    *("seed", "repetition_penalty", "presence_penalty", "frequency_penalty", "stream", "stream_options", "logprobs"),
    *("without", "experts_per_layer"),
)
_COMPLETION = (*_COMMON, "prompt", "best_of", "echo")
_CHAT = (*_COMMON, "messages", "max_completion_tokens", "top_logprobs", "add_generation_prompt")
# Fields of the OpenAI API and of vLLM that are not supported: the values that change nothing; empty: all of them.
_NEUTRAL = {
    **dict.fromkeys(("user", "metadata", "safety_identifier", "prompt_cache_key", "request_id", "priority"), ()),
    **dict.fromkeys(("logit_bias", "chat_template_kwargs"), ({},)),
    **dict.fromkeys(("tools", "functions", "documents", "bad_words"), ([],)),
    **dict.fromkeys(("use_beam_search", "include_stop_str_in_output", "continue_final_message", "store"), (False,)),
    **dict.fromkeys(("skip_special_tokens", "spaces_between_special_tokens"), (True,)),
    "suffix": ("",),
    "min_tokens": (0,),
    "length_penalty": (1, 1.0),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "service_tier": ("auto", "default"),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
}
_NEUTRAL_COMPLETION = _NEUTRAL | {"add_special_tokens": (True,)}
_NEUTRAL_CHAT = _NEUTRAL | {"add_special_tokens": (False,), "echo": (False,), "best_of": (1,)}
_NEUTRAL_NULL = ("prompt_logprobs", "truncate_prompt_tokens", "allowed_token_ids", "reasoning_effort", "verbosity")
_NEUTRAL_COMPLETION |= dict.fromkeys(_NEUTRAL_NULL, (None,))
_NEUTRAL_CHAT |= dict.fromkeys(_NEUTRAL_NULL, (None,))


@dataclasses.dataclass(frozen=True)
class Served:
    """The model on offer, as far as requests are checked against it and answers are written.

    Attributes:
      names: what requests may call it.
      roster: its experts, the anchor first.
      encode: the token ids of a prompt that is a text.
      decode: the text of token ids.
      strings: the string of each token.
      vocab_size: token ids are below it.
      max_length: tokens of a prompt and its continuation together, at most.
      max_sequences: prompts times n of one request, at most.
      chat: makes the token ids of a conversation; or says why there is none.
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
    """A request to `/v1/completions` or `/v1/chat/completions`, checked.

    Attributes:
      model: what the client calls the model.
      requests: for the engine, one for each choice of the answer: the n of the first prompt, those of the next.
      n: choices for each prompt.
      echoes: for each choice, the text that is put in front of its continuation.
      logprobs: whether choices tell how likely their tokens are.
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
      ApiError: 400, the body is not what it should be; 404, it asks for another model.
    """
    given = fields.read_object(body)
    _check_names(given, served, _COMPLETION, _NEUTRAL_COMPLETION, "completion")
    n = fields.integer(given, "n", 1, 1)
    if given.get("best_of") not in (None, n):
        raise bad("best_of", given, "the same as n: every choice is returned")
    echo = fields.boolean(given, "echo")
    logprobs = fields.optional_integer(given, "logprobs", 0, TOP_LOGPROBS)
    extra = {"logprobs": logprobs, "prompt_logprobs": echo and logprobs is not None}
    prompts = _prompts(given, served)
    limits = [("max_tokens", fields.optional_integer(given, "max_tokens", 0), 16)] * len(prompts)
    return _completion(given, served, "prompt", prompts, limits, echo, extra)


def parse_chat(body: bytes, served: Served) -> Completion:
    """Reads the body of a request to `/v1/chat/completions`.

    Raises:
      ApiError: 400, the body is not what it should be; 404, it asks for another model, or the model has no template.
    """
    if isinstance(served.chat, str):
        raise ApiError(404, served.chat, code="no_chat_template")
    given = fields.read_object(body)
    _check_names(given, served, _CHAT, _NEUTRAL_CHAT, "chat completion")
    top = fields.optional_integer(given, "top_logprobs", 0, TOP_LOGPROBS)
    if top is not None and not fields.boolean(given, "logprobs"):
        raise bad("top_logprobs", given, "it only where logprobs is true")
    # What came with the model may name tokens that it does not have.
    ends = [id for id in served.chat.end_ids if id < served.vocab_size][: MAX_STOP_TOKENS - _STOPS]
    ends = [] if fields.boolean(given, "ignore_eos") else ends
    extra = {
        "logprobs": (top or 0) if fields.boolean(given, "logprobs") else None,
        "stop_token_ids": (*fields.token_ids(given, "stop_token_ids", served.vocab_size, _STOPS), *ends),
    }
    try:
        prompt = served.chat.encode(_messages(given), fields.boolean(given, "add_generation_prompt", True))
    except UserError as error:
        raise ApiError(400, f"messages: {error}", "messages") from error
    if not prompt:
        raise ApiError(400, "messages: the chat template makes nothing of them; give some that it knows", "messages")
    name = "max_tokens" if given.get("max_completion_tokens") is None else "max_completion_tokens"
    limits = [(name, fields.optional_integer(given, name, 0), served.max_length)]
    return _completion(given, served, "messages", [prompt], limits, False, extra)


def _completion(
    given: Mapping[str, Any],
    served: Served,
    field: str,
    prompts: Sequence[list[int]],
    limits: Sequence[tuple[str, int | None, int]],
    echo: bool,
    extra: Mapping[str, Any],
) -> Completion:
    """What both kinds of requests have in common.

    Args:
      given: the fields.
      served: the model.
      field: where the prompts come from.
      prompts: their token ids.
      limits: for each, what the field of the tokens to write is called, what it holds, and what it is by default.
      echo: whether the prompts are put in front of the texts.
      extra: fields of `Request` in which the kinds differ.
    """
    n = fields.integer(given, "n", 1, 1)
    if len(prompts) * n > served.max_sequences:
        message = (
            f"{field}: {len(prompts)} times n={n} is more than the {served.max_sequences} that one request may ask"
        )
        raise ApiError(400, message, field)
    counts = []
    for ids, (name, asked, default) in zip(prompts, limits, strict=True):
        try:
            counts.append(new_tokens(len(ids), asked, default, served.max_length, name))
        except ContextError as error:
            raise ApiError(400, f"{field}: {error}", field, "context_length_exceeded") from error
    seed = fields.integer(given, "seed", secrets.randbelow(_SEEDS), 0, _SEEDS - 1)
    sampling = {
        "without": _without(given, served.roster),
        "temperature": fields.number(given, "temperature", 1.0, 0.0, 100.0),
        "top_k": max(0, fields.integer(given, "top_k", 0, -1)),
        "top_p": fields.number(given, "top_p", 1.0, 0.0, 1.0, above=True),
        "min_p": fields.number(given, "min_p", 0.0, 0.0, 1.0),
        "repetition_penalty": fields.number(given, "repetition_penalty", 1.0, 0.001, 1000.0),
        "presence_penalty": fields.number(given, "presence_penalty", 0.0, -2.0, 2.0),
        "frequency_penalty": fields.number(given, "frequency_penalty", 0.0, -2.0, 2.0),
        "stop": tuple(fields.texts(given, "stop", at_most=_STOPS)),
        "stop_token_ids": fields.token_ids(given, "stop_token_ids", served.vocab_size, _STOPS),
        "ignore_eos": fields.boolean(given, "ignore_eos"),
        **extra,
    }
    choices = [(ids, count) for ids, count in zip(prompts, counts, strict=True) for _ in range(n)]
    stream = fields.boolean(given, "stream")
    return Completion(
        model=given["model"],
        requests=tuple(
            Request(tuple(ids), count, seed=choice_seed, **sampling)
            for (ids, count), choice_seed in zip(choices, seeds(seed, len(choices)), strict=True)
        ),
        n=n,
        echoes=tuple(served.decode(ids) if echo else "" for ids, _ in choices),
        logprobs=sampling["logprobs"] is not None,
        stream=stream,
        include_usage=_include_usage(given, stream),
        experts_per_layer=fields.boolean(given, "experts_per_layer"),
    )


def _check_names(
    given: Mapping[str, Any], served: Served, supported: Sequence[str], neutral: Mapping[str, tuple], kind: str
) -> None:
    """The model must be this one, and every field known."""
    model = given.get("model")
    if not isinstance(model, str):
        raise bad("model", given, f"the name of the model, {shown(served.names[0])}")
    if model not in served.names:
        message = f"model: {shown(model)} is not served here; ask for {shown(served.names[0])}"
        raise ApiError(404, message, "model", "model_not_found")
    fields.refuse_unknown(given, supported, neutral, kind)


def _prompts(given: Mapping[str, Any], served: Served) -> list[list[int]]:
    """The token ids of each prompt."""
    value = given.get("prompt")
    right = "a text, a list of texts, a list of token ids, or a list of such lists; none may be empty but a text"
    value = [value] if isinstance(value, str) or fields.is_ids(value) else value
    if isinstance(value, list) and value and all(fields.is_text(item) for item in value):
        return [served.encode(text) for text in value]
    if not isinstance(value, list) or not value or not all(fields.is_ids(item) for item in value):
        raise bad("prompt", given, right)
    if any(not 0 <= id < served.vocab_size for ids in value for id in ids):
        raise ApiError(400, f"prompt: a token id is out of range; ids are 0 to {served.vocab_size - 1}", "prompt")
    return value


def _messages(given: Mapping[str, Any]) -> list[dict[str, str]]:
    """The messages of a conversation, their contents as one text each."""
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise bad("messages", given, 'a list of messages, such as {"role": "user", "content": "..."}')
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: Mapping[str, Any], label: str) -> dict[str, str]:
    neutral = (None, [], {}) if "type" not in message else (None, [], {}, "text", "message")
    unknown = [key for key in message if key not in ("role", "content", "name") and message[key] not in neutral]
    if unknown:
        raise ApiError(400, f"{label}: {shown(unknown[0])} is not supported; give role and content", "messages")
    content = message.get("content")
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        content = "\n".join(parts) if all(map(fields.is_text, parts)) else None
    known = {"role": message.get("role"), "content": content, "name": message.get("name", "")}
    for key, value in known.items():
        if not fields.is_text(value) or (key == "role" and not value):
            right = "text, or a list of parts of type text" if key == "content" else "a text"
            raise ApiError(400, f"{label}: {key} is {shown(message.get(key))}; give {right}", "messages")
    return known if known["name"] else {"role": known["role"], "content": known["content"]}


def _without(given: Mapping[str, Any], roster: Sequence[str]) -> tuple[str, ...]:
    names = tuple(fields.texts(given, "without"))
    for name in names:
        if name not in roster:
            message = f"without: {shown(name)} is not on the roster, which is {', '.join(roster)}"
            raise ApiError(400, message, "without")
    if set(names) == set(roster):
        raise ApiError(400, "without: no expert would be left; keep at least one", "without")
    return names


def _include_usage(given: Mapping[str, Any], stream: bool) -> bool:
    options = given.get("stream_options")
    if options is None:
        return False
    ignored = {"include_obfuscation", "continuous_usage_stats"}  # where false
    if (
        not stream
        or not isinstance(options, dict)
        or options.keys() - {"include_usage"} - {name for name in ignored if options.get(name) in (None, False)}
    ):
        raise bad("stream_options", given, "{'include_usage': true}, and that only where stream is true")
    return fields.boolean(options, "include_usage")
