"""The fields of requests to `/v1/completions` and `/v1/chat/completions`, and errors in OpenAI's form."""

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field

from flexolmo_jax.inference.request import TOP_LOGPROBS

MAX_STOPS = 16  # stop strings, and stop tokens
_INT32_MAX = 2**31 - 1
_SEEDS = 2**32
BEST_OF = "the same as n: every choice is returned"
STREAM_OPTIONS = "{{'include_usage': true}}, and that only where stream is true"


class ApiError(Exception):
    """An error for a client, as the OpenAI API reports it.

    Attributes:
      status: HTTP status; 4xx if the client can fix it.
      message: one line: the field, what is wrong, and what would be right.
      field: the invalid field of the request, or None.
      code: a word for programs, or None.
      headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        field: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        """Keeps the arguments as attributes."""
        super().__init__(message)
        self.status, self.message, self.field, self.code, self.headers = status, message, field, code, headers

    @property
    def body(self) -> dict[str, Any]:
        """The body of the response; also the event that ends a failed stream."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.field, "code": self.code}}


# Descriptions complete the error "FIELD: is VALUE; give ...". They may name {model}, the served model, and {last_id},
# the largest token id.


def _whole(low: int, high: int = _INT32_MAX) -> Any:
    return Field(ge=low, le=high, description=f"a whole number from {low} to {high}")


def _number(low: float, high: float) -> Any:
    return Field(ge=low, le=high, description=f"a number from {low:g} to {high:g}")


def _list_of_one(value: Any) -> Any:
    """A single string as a list."""
    return [value] if isinstance(value, str) else value


def _encodable(text: str) -> str:
    text.encode()  # JSON can escape half a surrogate pair; UnicodeEncodeError is a ValueError
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Bool = Annotated[bool, Field(description="true or false")]
Strings = Annotated[
    list[Annotated[Text, Field(min_length=1)]],
    BeforeValidator(_list_of_one),
    Field(description="a text that is not empty, or a list of such"),
]
Ids = Annotated[list[int], Field(min_length=1)]
Prompt = Annotated[
    Text | Annotated[list[Text], Field(min_length=1)] | Ids | Annotated[list[Ids], Field(min_length=1)],
    Field(
        description="a text, a list of texts, a list of token ids, or a list of such lists; "
        "none may be empty but a text"
    ),
]


class _Model(BaseModel):
    """No coercion: "3", 3.0 and true are not 3."""

    model_config = pydantic.ConfigDict(strict=True, allow_inf_nan=False)


class StreamOptions(_Model):
    """`stream_options`; options that are not supported may be false."""

    model_config = pydantic.ConfigDict(extra="forbid")

    include_usage: Bool = False
    include_obfuscation: Literal[False] = False
    continuous_usage_stats: Literal[False] = False


# Fields of the OpenAI API and of vLLM that are not supported, with the values that do not change the answer. An empty
# tuple: any value.
_NEUTRAL: dict[str, tuple] = {
    **dict.fromkeys(("user", "metadata", "safety_identifier", "prompt_cache_key", "request_id", "priority"), ()),
    **dict.fromkeys(("logit_bias", "chat_template_kwargs"), ({},)),
    **dict.fromkeys(("tools", "functions", "documents", "bad_words"), ([],)),
    **dict.fromkeys(("use_beam_search", "include_stop_str_in_output", "continue_final_message", "store"), (False,)),
    **dict.fromkeys(("skip_special_tokens", "spaces_between_special_tokens"), (True,)),
    **dict.fromkeys(
        ("prompt_logprobs", "truncate_prompt_tokens", "allowed_token_ids", "reasoning_effort", "verbosity"), (None,)
    ),
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


class GenerationRequest(_Model):
    """The fields of both kinds of requests; null is the same as an absent field.

    Class attributes:
      kind: names the kind of request in errors.
      neutral: {unsupported field: values that do not change the answer}.
    """

    kind: ClassVar[str]
    neutral: ClassVar[Mapping[str, tuple]]

    model: Annotated[str, Field(description="the name of the model, {model}")]
    max_tokens: Annotated[int | None, _whole(0)] = None
    temperature: Annotated[float, _number(0, 100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1, description="a number above 0 and at most 1")] = 1.0
    top_k: Annotated[int, _whole(-1)] = 0
    min_p: Annotated[float, _number(0, 1)] = 0.0
    n: Annotated[int, _whole(1)] = 1
    stop: Annotated[Strings, Field(max_length=MAX_STOPS)] = []
    stop_token_ids: Annotated[
        list[int], Field(max_length=MAX_STOPS, description="a list of token ids from 0 to {last_id}")
    ] = []
    ignore_eos: Bool = False
    seed: Annotated[int, _whole(0, _SEEDS - 1)] = Field(default_factory=lambda: secrets.randbelow(_SEEDS))
    repetition_penalty: Annotated[float, _number(0.001, 1000)] = 1.0
    presence_penalty: Annotated[float, _number(-2, 2)] = 0.0
    frequency_penalty: Annotated[float, _number(-2, 2)] = 0.0
    stream: Bool = False
    stream_options: Annotated[StreamOptions, Field(description=STREAM_OPTIONS)] = StreamOptions()
    without: Strings = []
    experts_per_layer: Bool = False


class CompletionRequest(GenerationRequest):
    """The body of a request to `/v1/completions`."""

    kind = "completion"
    neutral = _NEUTRAL | {"add_special_tokens": (True,)}

    prompt: Prompt
    best_of: Annotated[int | None, Field(description=BEST_OF)] = None
    echo: Bool = False
    logprobs: Annotated[int | None, _whole(0, TOP_LOGPROBS)] = None


class TextPart(_Model):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


class Message(_Model):
    """A message of a conversation."""

    model_config = pydantic.ConfigDict(extra="allow")

    role: Annotated[Text, Field(min_length=1, description="a text")]
    content: Annotated[Text | list[TextPart], Field(description="text, or a list of parts of type text")]
    name: Annotated[Text, Field(description="a text")] = ""

    def for_template(self) -> dict[str, str]:
        """The message as chat templates take it: the content is one text."""
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return {"role": self.role, "content": content} | ({"name": self.name} if self.name else {})


class ChatRequest(GenerationRequest):
    """The body of a request to `/v1/chat/completions`."""

    kind = "chat completion"
    neutral = _NEUTRAL | {"add_special_tokens": (False,), "echo": (False,), "best_of": (1,)}

    messages: Annotated[
        list[Message],
        Field(min_length=1, description='a list of messages, such as {{"role": "user", "content": "..."}}'),
    ]
    max_completion_tokens: Annotated[int | None, _whole(0)] = None
    logprobs: Bool = False
    top_logprobs: Annotated[int | None, _whole(0, TOP_LOGPROBS)] = None
    add_generation_prompt: Bool = True
