"""Requests as they are read, and each way to get one wrong."""

import dataclasses
import json

import pytest

from flexolmo_jax.data.tokenization.tokenizer import byte_tokenizer
from flexolmo_jax.inference.model import seeds
from flexolmo_jax.inference.request import Request
from flexolmo_jax.serving.chat import ChatTemplate
from flexolmo_jax.serving.logprobs import TokenStrings
from flexolmo_jax.serving.parsing import Served, parse, parse_chat
from flexolmo_jax.serving.schema import ApiError

EOS = 256
SERVED = Served(
    names=("tiny", "other"),
    roster=("anchor", "code", "news"),
    encode=lambda text: [EOS, *text.encode()],
    decode=lambda ids: bytes(id for id in ids if id < EOS).decode(),
    strings=TokenStrings(byte_tokenizer()),
    vocab_size=260,
    max_length=40,
    max_sequences=6,
    chat="the model has no chat template",
)


def read(**fields):
    return parse(json.dumps({"model": "tiny", "prompt": "hi"} | fields).encode(), SERVED)


def without_seed(completion):
    return [dataclasses.replace(request, seed=0) for request in completion.requests]


def test_a_request_of_nothing_but_model_and_prompt_has_the_defaults_of_openai():
    completion = read()
    expected = Request((EOS, *b"hi"), max_new_tokens=16, without=(), temperature=1.0, top_k=0, top_p=1.0, stop=())
    assert without_seed(completion) == [expected]
    assert (completion.model, completion.n, completion.echoes) == ("tiny", 1, ("",))
    assert (completion.stream, completion.include_usage, completion.experts_per_layer) == (False, False, False)


def test_null_is_the_same_as_nothing():
    names = ["max_tokens", "temperature", "top_p", "top_k", "n", "best_of", "stop", "seed", "stream", "stream_options"]
    names += ["echo", "without", "experts_per_layer", "suffix", "logprobs", "logit_bias", "presence_penalty", "user"]
    assert without_seed(read(**dict.fromkeys(names))) == without_seed(read())


def test_every_field_reaches_the_engine():
    completion = read(
        model="other",
        max_tokens=3,
        temperature=0.5,
        top_p=0.25,
        top_k=7,
        seed=11,
        stop=["a", "b"],
        min_p=0.125,
        repetition_penalty=1.25,
        presence_penalty=-2,
        frequency_penalty=0.5,
        stop_token_ids=[65, 66],
        ignore_eos=True,
        logprobs=4,
        without=["news"],
        echo=True,
        stream=True,
        stream_options={"include_usage": True},
        experts_per_layer=True,
    )
    request = Request(
        (EOS, *b"hi"), 3, ("news",), temperature=0.5, top_k=7, top_p=0.25, seed=seeds(11, 1)[0], stop=("a", "b")
    )
    request = dataclasses.replace(request, min_p=0.125, repetition_penalty=1.25, presence_penalty=-2.0)
    request = dataclasses.replace(request, frequency_penalty=0.5, stop_token_ids=(65, 66), ignore_eos=True)
    request = dataclasses.replace(request, logprobs=4, prompt_logprobs=True)
    assert completion.requests == (request,)
    assert (completion.model, completion.echoes) == ("other", ("hi",))
    assert completion.logprobs
    assert completion.stream
    assert completion.include_usage
    assert completion.experts_per_layer


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", [(EOS,)]),
        ("ï", [(EOS, 0xC3, 0xAF)]),
        (["a", ""], [(EOS, 97), (EOS,)]),
        ([1, 2], [(1, 2)]),
        ([[1], [2, 259]], [(1,), (2, 259)]),
    ],
)
def test_prompts_of_every_kind(prompt, expected):
    assert [request.token_ids for request in read(prompt=prompt).requests] == expected


def test_n_choices_of_each_prompt_have_seeds_of_their_own():
    completion = read(prompt=["a", "b"], n=3, best_of=3, seed=7)
    assert [request.token_ids[1] for request in completion.requests] == [97] * 3 + [98] * 3
    assert len({request.seed for request in completion.requests}) == 6
    # The first is that of a request that asks for it alone.
    assert completion.requests[0] == read(prompt="a", seed=7).requests[0]


def test_without_a_seed_every_request_draws_anew():
    assert len({read().requests[0].seed for _ in range(8)}) > 1


def test_one_text_where_a_list_may_stand():
    request = read(stop="end", without="news").requests[0]
    assert (request.stop, request.without) == (("end",), ("news",))


def test_what_does_not_change_the_answer_is_accepted():
    neutral = {"suffix": "", "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0, "user": "someone"}
    neutral |= {"min_p": 0, "repetition_penalty": 1.0, "stop_token_ids": [], "ignore_eos": False, "top_k": -1}
    neutral |= {"metadata": {"a": "b"}, "min_tokens": 0, "skip_special_tokens": True, "response_format": None}
    neutral |= {"response_format": {"type": "text"}, "tools": [], "priority": 3, "echo": False, "logprobs": None}
    assert without_seed(read(**neutral)) == without_seed(read())


def test_a_request_may_fill_the_whole_length():
    assert read(prompt="x" * 23, max_tokens=16).requests[0].max_new_tokens == 16
    assert read(prompt="x" * 39, max_tokens=0, echo=True).requests[0].max_new_tokens == 0
    with pytest.raises(ApiError):
        read(prompt="x" * 24, max_tokens=16)


def test_what_was_not_asked_for_is_never_too_long():
    requests = read(prompt=["x" * 23, "x" * 24, "x" * 38]).requests
    assert [request.max_new_tokens for request in requests] == [16, 15, 1]


BAD = [
    ({"prompt": None}, "prompt", "is missing", "a list of token ids"),
    ({"prompt": []}, "prompt", "is []"),
    ({"prompt": [[]]}, "prompt", "is [[]]"),
    ({"prompt": [1, "a"]}, "prompt", "token ids"),
    ({"prompt": ["a", [1]]}, "prompt", "token ids"),
    ({"prompt": [[1], 2]}, "prompt", "token ids"),
    ({"prompt": [1.0]}, "prompt", "token ids"),
    ({"prompt": [True]}, "prompt", "token ids"),
    ({"prompt": {"a": 1}}, "prompt", "a list of texts"),
    ({"prompt": "\ud800"}, "prompt", "\\ud800"),
    ({"prompt": [260]}, "prompt", "0 to 259"),
    ({"prompt": [[3], [-1]]}, "prompt", "0 to 259"),
    ({"prompt": "x" * 24, "max_tokens": 16}, "prompt", "25 tokens", "max_tokens=16", "41", "40", "max_length"),
    ({"prompt": "x" * 39}, "prompt", "40 tokens", "no room", "40", "max_length"),
    ({"prompt": ["a"] * 7}, "prompt", "7 times n=1", "6"),
    ({"prompt": ["a"] * 2, "n": 4}, "prompt", "2 times n=4", "6"),
    ({"max_tokens": -1}, "max_tokens", "is -1", "from 0"),
    ({"max_tokens": 2.0}, "max_tokens", "whole number"),
    ({"max_tokens": "3"}, "max_tokens", '"3"'),
    ({"max_tokens": True}, "max_tokens", "is true"),
    ({"max_tokens": 10**400}, "max_tokens", "..."),
    ({"temperature": -0.1}, "temperature", "-0.1", "from 0"),
    ({"temperature": float("nan")}, "temperature", "NaN"),
    ({"temperature": float("inf")}, "temperature", "Infinity"),
    ({"temperature": 10**400}, "temperature", "to 100"),
    ({"temperature": "warm"}, "temperature", "a number"),
    ({"temperature": False}, "temperature", "a number"),
    ({"top_p": 0}, "top_p", "above 0 and at most 1"),
    ({"top_p": 1.01}, "top_p", "1.01"),
    ({"top_k": -2}, "top_k", "from -1"),
    ({"n": 0}, "n", "from 1"),
    ({"best_of": 2}, "best_of", "the same as n"),
    ({"seed": -1}, "seed", "from 0 to 4294967295"),
    ({"seed": 2**32}, "seed", "4294967296"),
    ({"stop": ["a"] * 17}, "stop", "17 texts", "at most 16"),
    ({"stop": ""}, "stop", "not empty"),
    ({"stop": ["a", 1]}, "stop", "a text"),
    ({"stop": "\udc00"}, "stop", "a text"),
    ({"stream": 1}, "stream", "true or false"),
    ({"stream": "yes"}, "stream", "true or false"),
    ({"echo": 1.0}, "echo", "true or false"),
    ({"experts_per_layer": []}, "experts_per_layer", "true or false"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "where stream is true"),
    ({"stream": True, "stream_options": {"usage": 1}}, "stream_options", "include_usage"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "include_usage", "true or false"),
    ({"without": ["nosuch"]}, "without", '"nosuch"', "anchor, code, news"),
    ({"without": ["anchor", "code", "news"]}, "without", "at least one"),
    ({"without": {"news": 1}}, "without", "list"),
    ({"suffix": "x"}, "suffix", "not supported"),
    ({"logprobs": 21}, "logprobs", "is 21", "from 0 to 20"),
    ({"logprobs": True}, "logprobs", "is true", "from 0 to 20"),
    ({"min_p": 1.5}, "min_p", "from 0 to 1"),
    ({"repetition_penalty": 0}, "repetition_penalty", "from 0.001"),
    ({"frequency_penalty": -3}, "frequency_penalty", "from -2"),
    ({"stop_token_ids": 5}, "stop_token_ids", "is 5", "0 to 259"),
    ({"stop_token_ids": [260]}, "stop_token_ids", "[260]", "0 to 259"),
    ({"stop_token_ids": [1] * 17}, "stop_token_ids", "17 token ids", "at most 16"),
    ({"ignore_eos": 1}, "ignore_eos", "true or false"),
    ({"min_tokens": 1}, "min_tokens", "not supported"),
    ({"skip_special_tokens": False}, "skip_special_tokens", "not supported"),
    ({"use_beam_search": 0}, "use_beam_search", "not supported"),
    ({"prompt_logprobs": 1}, "prompt_logprobs", "not supported"),
    ({"messages": []}, "messages", "not a field of a completion"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
    ({"presence_penalty": 2.5}, "presence_penalty", "from -2 to 2"),
    ({"withuot": ["news"]}, "withuot", "not a field", "without"),
    ({"\ud800": 1}, "?", "not a field"),
    ({"model": None}, "model", "is missing", "tiny"),
    ({"model": 3}, "model", "is 3", "tiny"),
]


@pytest.mark.parametrize(("fields", "field", "words"), [(fields, field, words) for fields, field, *words in BAD])
def test_a_bad_field_is_named_with_what_would_be_right(fields, field, words):
    with pytest.raises(ApiError) as caught:
        read(**fields)
    error = caught.value
    assert (error.status, error.field) == (400, field)
    assert error.body["error"]["type"] == "invalid_request_error"
    assert error.body["error"]["param"] == field
    json.dumps(error.body, ensure_ascii=False).encode()  # can be sent
    assert "\n" not in error.message
    assert len(error.message) < 500
    for word in (*words, field if field != "?" else ""):
        assert word in error.message


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 100_000, b'{"n": ' + b"9" * 5000 + b"}", b"[1]", b"null"])
def test_what_is_no_json_object_is_refused(body):
    with pytest.raises(ApiError, match="the body is") as caught:
        parse(body, SERVED)
    assert caught.value.status == 400


def test_another_model_is_not_found():
    with pytest.raises(ApiError, match='"gpt" is not served here; ask for "tiny"') as caught:
        read(model="gpt")
    assert (caught.value.status, caught.value.field, caught.value.code) == (404, "model", "model_not_found")


def read_chat(**fields):
    """A chat whose turns end at token 259 too."""
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", byte_tokenizer(), {}, [EOS, 259])
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]} | fields
    return parse_chat(json.dumps(body).encode(), dataclasses.replace(SERVED, chat=template))


def test_a_chat_fills_the_context_and_ends_at_every_token_that_ends_a_turn():
    (request,) = read_chat(stop_token_ids=[7], logprobs=True, top_logprobs=2).requests
    assert (request.token_ids, request.max_new_tokens, request.logprobs) == (tuple(b"hi"), 38, 2)
    assert request.stop_token_ids == (7, EOS, 259)
    (request,) = read_chat(ignore_eos=True, max_completion_tokens=3, logprobs=False).requests
    assert (request.stop_token_ids, request.max_new_tokens, request.logprobs) == ((), 3, None)


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"top_logprobs": 2}, "top_logprobs", "where logprobs is true"),
        ({"logprobs": 2}, "logprobs", "true or false"),
        ({"prompt": "x"}, "prompt", "not a field of a chat completion"),
        ({"max_completion_tokens": 39}, "messages", "max_completion_tokens=39"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages", "makes nothing"),
    ],
)
def test_a_bad_field_of_a_chat_is_named(fields, field, words):
    with pytest.raises(ApiError, match=words) as caught:
        read_chat(**fields)
    assert (caught.value.status, caught.value.field) == (400, field)
