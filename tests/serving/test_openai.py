"""A tiny model served to the `openai` client, against the same model asked directly."""

import concurrent.futures
import itertools
import threading
import time

import pytest

from flexolmo_jax.combine.merge import merge
from flexolmo_jax.inference.engine import Engine
from flexolmo_jax.inference.model import load
from flexolmo_jax.serving.chat import ChatTemplate
from flexolmo_jax.serving.logprobs import TokenStrings
from tests.support import small

openai = pytest.importorskip("openai")

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
KEY = "a-key"
PROMPTS = ["", "hello", "naïve", "a prompt that is a little longer"]
SLOTS, MAX_LENGTH = 3, 64


class CountingEngine(Engine):
    """An engine that a test can hold up, and that counts what is in flight."""

    gate, most = threading.Event(), 0

    def step(self, *arguments):
        """Waits at the gate, and counts."""
        assert self.gate.wait(600)
        CountingEngine.most = max(CountingEngine.most, SLOTS - self.free)
        return super().step(*arguments)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    home = tmp_path_factory.mktemp("openai")
    small.anchor(home / "anchor")
    inputs = [small.contribution(home / name, home / "anchor", seed=i) for i, name in enumerate(["code", "news"], 1)]
    merge(home / "anchor", inputs, home / "merged", top_k=2)
    return load(home / "merged")


@pytest.fixture(scope="module")
def server(running, model):
    """(client, scheduler) of a server of the model."""
    CountingEngine.gate.set()
    served = {
        "names": ("merged",),
        "roster": tuple(model.roster),
        "encode": model.encode,
        "decode": model.tokenizer.decode,
        "strings": TokenStrings(model.tokenizer),
        "chat": ChatTemplate(TEMPLATE, model.tokenizer, {"bos_token": "<|endoftext|>"}),
        "max_length": MAX_LENGTH,
        "keys": [KEY],
    }
    with running(lambda: CountingEngine(model, SLOTS, MAX_LENGTH), queue=8, **served) as (url, scheduler):
        # The proxies that the environment may name are of no use here.
        http_client = openai.DefaultHttpxClient(trust_env=False)
        with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, http_client=http_client) as client:
            yield client, scheduler


@pytest.fixture(scope="module")
def complete(server):
    """Asks for a completion, greedy unless told otherwise."""

    def complete(prompt, **fields):
        fields = {"model": "merged", "temperature": 0, "max_tokens": 12} | fields
        return server[0].completions.create(prompt=prompt, **fields)

    return complete


def texts(completion):
    assert [choice.index for choice in completion.choices] == list(range(len(completion.choices)))
    return [choice.text for choice in completion.choices]


def wait_for(condition):
    """Waits for what the server does in its own time."""
    for _ in range(600_000):
        if condition():
            return
        time.sleep(0.001)
    pytest.fail("it did not happen")


@pytest.mark.parametrize("without", [[], ["news"], ["anchor", "code"]])
def test_greedy_text_and_shares_are_those_of_the_model(model, complete, without):
    expected = model.generate(PROMPTS, 12, without)
    completion = complete(PROMPTS, extra_body={"without": without})
    assert texts(completion) == [continuation.text for continuation in expected]
    for choice, continuation in zip(completion.choices, expected, strict=True):
        assert choice.finish_reason == continuation.finish_reason
        assert choice.experts == pytest.approx(continuation.experts, abs=1e-6)
    prompt, new = sum(1 + len(text.encode()) for text in PROMPTS), sum(len(c.token_ids) for c in expected)
    usage = completion.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (prompt, new, prompt + new)
    tokens = [1 + len(text.encode()) + len(c.token_ids) for text, c in zip(PROMPTS, expected, strict=True)]
    for name, share in usage.experts.items():
        mean = sum(count * c.experts[name] for count, c in zip(tokens, expected, strict=True)) / sum(tokens)
        assert share == pytest.approx(mean, abs=1e-6)
    assert sum(usage.experts.values()) == pytest.approx(1)
    assert [name for name, share in usage.experts.items() if share == 0] == without


def test_opting_out_changes_the_text(complete):
    assert texts(complete("hello")) != texts(complete("hello", extra_body={"without": ["news"]}))


def test_shares_of_each_layer(model, complete):
    (choice,) = complete("hello", extra_body={"experts_per_layer": True}).choices
    (continuation,) = model.generate(["hello"], 12)
    for shares, expected in zip(choice.experts_per_layer, continuation.layers, strict=True):
        assert list(shares.values()) == pytest.approx(expected.tolist(), abs=1e-6)


def test_token_ids_are_taken_as_they_are(model, complete):
    ids = [[256, *b"hello"], [104, 105]]
    assert texts(complete(ids)) == [continuation.text for continuation in model.generate(ids, 12)]
    assert texts(complete(ids[0])) == texts(complete("hello"))


def test_a_stream_adds_up_to_the_whole(complete):
    whole = complete(PROMPTS, max_tokens=30)
    received, shares = [[] for _ in PROMPTS], {}
    *chunks, last = complete(PROMPTS, max_tokens=30, stream=True, stream_options={"include_usage": True})
    for chunk in chunks:
        (choice,) = chunk.choices
        assert choice.index not in shares
        received[choice.index].append(choice.text)
        if choice.finish_reason:
            assert choice.finish_reason == whole.choices[choice.index].finish_reason
            shares[choice.index] = choice.experts
    assert ["".join(texts) for texts in received] == texts(whole)
    assert max(map(len, received)) > 2
    for choice in whole.choices:
        assert shares[choice.index] == pytest.approx(choice.experts, abs=1e-6)
    assert last.choices == []
    assert last.usage.total_tokens == whole.usage.total_tokens
    assert last.usage.experts == pytest.approx(whole.usage.experts, abs=1e-6)


def test_a_stop_string_ends_the_text_before_itself(complete):
    (whole,) = texts(complete("hello", max_tokens=30))
    # Two characters that come here for the first time; the text goes on behind them, so that they are whole.
    found = [i for i in range(4, len(whole) - 6) if whole.find(whole[i : i + 2]) == i]
    whole_characters = [i for i in found if "\ufffd" not in whole[i : i + 2]]
    first, second = (whole_characters or found)[:2]
    for stop in (whole[first : first + 2], [whole[second : second + 2], whole[first : first + 2], "not there"]):
        (choice,) = complete("hello", max_tokens=30, stop=stop).choices
        assert (choice.text, choice.finish_reason) == (whole[:first], "stop")
        chunks = list(complete("hello", max_tokens=30, stop=stop, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole[:first]


def test_echo_puts_the_prompt_in_front(complete):
    (plain,) = texts(complete("naïve"))
    assert texts(complete("naïve", echo=True)) == [f"naïve{plain}"]


def test_a_seed_fixes_what_is_drawn(model, complete):
    def draw(seed, **fields):
        return texts(complete("hello", temperature=1.0, n=3, seed=seed, **fields))

    first = draw(5)
    assert draw(5) == first
    assert len(set(first)) == 3
    assert first == [c.text for c in model.generate(["hello"] * 3, 12, temperature=1.0, seed=5)]
    assert draw(6) != first
    greedy = texts(complete("hello")) * 3
    assert draw(5, extra_body={"top_k": 1}) == draw(5, top_p=1e-6) == greedy


def test_requests_at_once_are_batched_and_answered_as_if_alone(server, complete):
    jobs = [(prompt, {"max_tokens": 5 + i, "without": ["code"] if i % 2 else []}) for i, prompt in enumerate(PROMPTS)]
    jobs += [("hello", {"temperature": 1.0, "seed": 3}), ("x", {"stop": "e", "max_tokens": 30})]

    def ask(job):
        prompt, extra = job
        return texts(complete(prompt, extra_body=extra))

    CountingEngine.most = 0
    alone = [ask(job) for job in jobs]
    assert CountingEngine.most == 1
    CountingEngine.gate.clear()
    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        answers = [pool.submit(ask, job) for job in jobs]
        wait_for(lambda: sum(server[1].load.values()) == len(jobs))
        CountingEngine.gate.set()
        assert [answer.result() for answer in answers] == alone
    assert CountingEngine.most == SLOTS


def test_a_client_that_stops_reading_frees_its_slots(server, complete):
    CountingEngine.gate.clear()
    stream = complete("hello", n=4, temperature=1.0, max_tokens=40, stream=True)
    wait_for(lambda: server[1].load == {"running": 3, "waiting": 1})
    stream.close()
    wait_for(lambda: server[1].load["waiting"] == 0)
    CountingEngine.gate.set()
    wait_for(lambda: server[1].load["running"] == 0)
    assert texts(complete("hello", temperature=1.0, seed=1)) == texts(complete("hello", temperature=1.0, seed=1))


def test_models(server, model):
    (listed,) = server[0].models.list()
    assert (listed.id, listed.object, listed.experts) == ("merged", "model", model.roster)
    assert server[0].models.retrieve("merged") == listed


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"extra_body": {"without": ["nosuch"]}}, openai.BadRequestError, ["without", "nosuch", "anchor, code, news"]),
        ({"max_tokens": MAX_LENGTH}, openai.BadRequestError, ["max_tokens=64", "64"]),
        ({"logprobs": 30}, openai.BadRequestError, ["logprobs", "30", "20"]),
        ({"model": "gpt"}, openai.NotFoundError, ["gpt", "merged"]),
        ({"n": 9}, openai.BadRequestError, ["n=9", "8"]),
    ],
)
def test_errors_are_those_that_the_client_knows(complete, fields, error, words):
    for stream in (False, True):
        with pytest.raises(error) as caught:
            complete("hello", stream=stream, **fields)
        for word in words:
            assert word in caught.value.message


def test_log_probabilities_of_prompt_and_text(model, complete):
    """As the model's own scores say; a stream adds up to the whole."""
    (choice,) = complete("naïve", echo=True, logprobs=2, max_tokens=6).choices
    (continuation,) = model.generate(["naïve"], 6, ignore_eos=True)
    ids = [256, *"naïve".encode(), *continuation.token_ids]
    told = choice.logprobs
    assert told.token_logprobs[0] is None
    assert told.token_logprobs[1:] == pytest.approx(model.score([ids]).log_likelihood_BxS[0, 1:].tolist(), abs=1e-4)
    assert told.top_logprobs[0] is None
    for value, top in zip(told.token_logprobs[1:], told.top_logprobs[1:], strict=True):
        assert value in top.values()
        assert len(top) in (2, 3)
    assert told.tokens[:5] == ["<|endoftext|>", "n", "a", "bytes:\\xc3", "bytes:\\xaf"]
    assert told.text_offset[:7] == [0, 0, 1, 2, 2, 3, 4]
    assert choice.text.startswith("naïve")
    chunks = [c.choices[0] for c in complete("naïve", echo=True, logprobs=2, max_tokens=6, stream=True)]
    assert "".join(chunk.text for chunk in chunks) == choice.text
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        parts = [getattr(chunk.logprobs, name) for chunk in chunks if chunk.logprobs]
        assert [*itertools.chain(*parts)] == getattr(told, name)
    assert [len(chunk.logprobs.tokens) for chunk in chunks] == [7 + 1, 1, 1, 1, 1, 1]


def test_a_prompt_may_be_scored_alone(complete):
    (whole,) = complete("hello", echo=True, logprobs=1, max_tokens=2).choices
    (choice,) = complete("hello", echo=True, logprobs=1, max_tokens=0).choices
    assert (choice.text, choice.finish_reason) == ("hello", "length")
    assert choice.logprobs.token_logprobs == whole.logprobs.token_logprobs[:6]
    assert complete("hello", max_tokens=0).choices[0].text == ""


def test_a_stream_sends_each_token_when_it_is_written(complete):
    chunks = [chunk.choices[0] for chunk in complete("hello", max_tokens=9, logprobs=0, stream=True)]
    assert [len(choice.logprobs.tokens) for choice in chunks] == [1] * 9


def chat(server, messages, **fields):
    fields = {"model": "merged", "temperature": 0, "max_tokens": 7} | fields
    return server[0].chat.completions.create(messages=messages, **fields)


MESSAGES = [{"role": "system", "content": "be"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
PROMPT = [256, *b"system: be\nuser: hi\n"]


def test_a_chat_is_the_completion_of_its_template(server, model):
    (expected,) = model.generate([PROMPT], 7)
    answer = chat(server, MESSAGES, logprobs=True, top_logprobs=3, extra_body={"repetition_penalty": 1.0})
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert choice.finish_reason == expected.finish_reason
    assert (answer.object, answer.usage.prompt_tokens) == ("chat.completion", len(PROMPT))
    ids = PROMPT + expected.token_ids
    scores = model.score([ids]).log_likelihood_BxS[0, len(PROMPT) :].tolist()
    content = choice.logprobs.content
    assert [entry.logprob for entry in content] == pytest.approx(scores, abs=1e-4)
    assert bytes(byte for entry in content for byte in entry.bytes) == bytes(expected.token_ids)
    for entry in content:
        assert entry.logprob == entry.top_logprobs[0].logprob  # greedy
        assert len(entry.top_logprobs) == 3
    assert chat(server, MESSAGES).choices[0].logprobs is None


def test_a_streamed_chat_adds_up(server):
    (whole,) = chat(server, MESSAGES, logprobs=True).choices
    *chunks, last = chat(server, MESSAGES, logprobs=True, stream=True, stream_options={"include_usage": True})
    choices = [chunk.choices[0] for chunk in chunks]
    assert choices[0].delta.role == "assistant"
    assert "".join(choice.delta.content or "" for choice in choices) == whole.message.content
    assert [choice.finish_reason for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    entries = [choice.logprobs.content for choice in choices if choice.logprobs]
    assert [*itertools.chain(*entries)] == whole.logprobs.content
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert (last.choices, last.usage.completion_tokens) == ([], 7)


def test_a_chat_without_a_limit_fills_the_context(server):
    body = {"ignore_eos": True}
    answer = chat(server, MESSAGES, max_tokens=None, extra_body=body)
    assert answer.usage.total_tokens == MAX_LENGTH
    assert (
        chat(server, MESSAGES, max_tokens=None, max_completion_tokens=2, extra_body=body).usage.completion_tokens == 2
    )
    with pytest.raises(openai.BadRequestError, match="max_completion_tokens=60"):
        chat(server, MESSAGES, max_tokens=None, max_completion_tokens=60)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "a list of messages"),
        ([{"role": "user"}], r"messages\[0\]: content is null"),
        ([{"role": "", "content": "x"}], r"messages\[0\]: role"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "of type text"),
        ([{"role": "user", "content": "x", "tool_calls": [1]}], '"tool_calls" is not supported'),
    ],
)
def test_messages_that_are_none_are_refused(server, messages, words):
    with pytest.raises(openai.BadRequestError, match=words):
        chat(server, messages)


def test_a_client_without_the_key_is_refused(server):
    with pytest.raises(openai.AuthenticationError, match="Authorization: Bearer"):
        server[0].with_options(api_key="other").models.list()
