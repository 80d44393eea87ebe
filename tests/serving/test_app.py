"""The routes over HTTP, as bytes on a connection, with an engine that does as it is told."""

import contextlib
import http.client
import json
import socket
import threading
import time
from urllib.parse import urlsplit

import pytest

from flexolmo_jax.serving import app

ASK = {"model": "tiny", "prompt": "hi", "max_tokens": 3}


@pytest.fixture
def server(running, engine):
    with running(lambda: engine, queue=4) as (url, scheduler):
        yield url, scheduler
        engine.gate.set()


def call(url, method="GET", path="/v1/completions", body=None, whole=True):
    """Returns (status, headers, body: JSON or the text of a stream)."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=600)
    with contextlib.closing(connection):
        connection.request(method, path, body if isinstance(body, bytes | None) else json.dumps(body))
        answer = connection.getresponse()
        text = answer.read().decode()
        return answer.status, answer.headers, json.loads(text) if "json" in answer.headers["content-type"] else text


def ask(url, **fields):
    return call(url, "POST", body=ASK | fields)


def events(text):
    """The content of server-sent events."""
    assert text.endswith("\n\n")
    return [event.removeprefix("data: ") for event in text.removesuffix("\n\n").split("\n\n")]


def wait_for(condition):
    """Waits for what the server does in its own time."""
    for _ in range(600_000):
        if condition():
            return
        time.sleep(0.001)
    pytest.fail("it did not happen")


def test_an_answer_has_the_shape_of_openai_and_the_experts_besides(server):
    before = int(time.time())
    status, _, answer = ask(server[0])
    assert status == 200
    assert answer.pop("id").startswith("cmpl-")
    assert before <= answer.pop("created") <= time.time()
    experts = {"anchor": 0.5, "news": 0.5}
    choice = {"index": 0, "text": "xxx", "finish_reason": "length", "logprobs": None, "experts": experts}
    usage = {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6, "experts": experts}
    assert answer == {"object": "text_completion", "model": "tiny", "choices": [choice], "usage": usage}


def test_shares_of_each_layer_on_request(server):
    (choice,) = ask(server[0], experts_per_layer=True)[2]["choices"]
    assert choice["experts_per_layer"] == [{"anchor": 0.75, "news": 0.25}, {"anchor": 0.25, "news": 0.75}]


def test_a_prompt_counts_once_for_all_its_choices(server):
    answer = ask(server[0], prompt=["hi", ""], n=2, echo=True)[2]
    expected = [(0, "hixxx"), (1, "hixxx"), (2, "xxx"), (3, "xxx")]
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == expected
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (4, 12)


def test_a_stream_of_events(server):
    status, headers, text = ask(server[0], stream=True, echo=True, stream_options={"include_usage": True})
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    *chunks, done = events(text)
    assert done == "[DONE]"
    *chunks, last = map(json.loads, chunks)
    assert len({chunk["id"] for chunk in (*chunks, last)}) == 1
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["hi", "x", "x", "x"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "length"]
    assert [chunk["usage"] for chunk in chunks] == [None] * 4
    assert ["experts" in chunk["choices"][0] for chunk in chunks] == [False, False, False, True]
    assert last["choices"] == []
    assert last["usage"] == ask(server[0])[2]["usage"]


def test_a_stream_has_no_usage_unless_asked(server):
    *chunks, _ = events(ask(server[0], stream=True)[2])
    assert len(chunks) == 3
    assert not any("usage" in json.loads(chunk) for chunk in chunks)


def test_the_models_on_offer(running, engine):
    with running(lambda: engine, names=("mine", "a/b")) as (url, _):
        status, _, listed = call(url, path="/v1/models")
        assert (status, listed["object"]) == (200, "list")
        assert [model["id"] for model in listed["data"]] == ["mine", "a/b"]
        for model in listed["data"]:
            assert model["object"] == "model"
            assert model["experts"] == ["anchor", "news"]
            assert call(url, path=f"/v1/models/{model['id']}")[2] == model
        status, _, error = call(url, path="/v1/models/gpt")
        assert (status, error["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "words"),
    [
        ("POST", "/v1/completions", b"{", 400, ["not JSON"]),
        ("POST", "/v1/completions", ASK | {"max_tokens": -1}, 400, ["max_tokens", "is -1", "from 0"]),
        ("POST", "/v1/completions", ASK | {"model": "gpt"}, 404, ["gpt", "tiny"]),
        ("POST", "/v1/completions", b" " * (app.BODY_LIMIT + 1), 413, ["16777216 bytes"]),
        ("GET", "/v1/completions", None, 405, ["GET /v1/completions", "POST /v1/completions"]),
        ("POST", "/v1/chat/completions", ASK, 404, ["no chat template"]),
        ("POST", "/v1/embeddings", ASK, 404, ["/v1/embeddings", "POST /v1/completions"]),
    ],
)
def test_what_cannot_be_answered_is_told_in_the_form_of_openai(server, method, path, body, status, words):
    found, _, answer = call(server[0], method, path, body)
    assert found == status
    assert answer["error"].keys() == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error"
    for word in words:
        assert word in answer["error"]["message"]


def test_a_fault_of_the_code_itself_is_told_without_its_traceback(server, monkeypatch, caplog):
    monkeypatch.setattr(app, "parse", lambda *_: 1 / 0)
    status, _, answer = ask(server[0])
    assert (status, answer["error"]["type"]) == (500, "server_error")
    assert "ZeroDivisionError" not in json.dumps(answer)
    wait_for(lambda: "ZeroDivisionError" in caplog.text)


def test_a_fault_is_logged_in_one_line(running, engine, monkeypatch, caplog):
    """Of a handler, and of the engine; the traceback is for verbose mode."""
    with running(lambda: engine) as (url, _):
        monkeypatch.setattr(app, "parse", lambda *_: 1 / 0)
        assert ask(url)[0] == 500
        monkeypatch.undo()
        engine.error = RuntimeError("two\nlines")
        assert ask(url)[0] == 500
        wait_for(lambda: len(caplog.records) >= 2)
    assert "Traceback" not in caplog.text
    assert [record.getMessage().count("\n") for record in caplog.records] == [0, 0]
    assert "ZeroDivisionError: division by zero" in caplog.text
    assert "RuntimeError: two lines" in caplog.text
    assert f"{__file__}:" in caplog.text


def samples(url):
    """{sample: value} of the metrics."""
    status, headers, text = call(url, path="/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=")
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[0] != "#"}


def test_metrics_count_requests_tokens_and_seconds(server, engine):
    url, scheduler = server
    ask(url, n=2)
    ask(url, stream=True)
    ask(url, max_tokens=-1)
    call(url, path="/nosuch")
    engine.gate.clear()
    thread = threading.Thread(target=ask, args=(url,), kwargs={"n": 3})
    thread.start()
    wait_for(lambda: scheduler.load == {"running": 2, "waiting": 1})
    found = samples(url)
    engine.gate.set()
    thread.join()
    expected = {
        'flexolmo_requests_total{path="/v1/completions",status="200"}': 2,
        'flexolmo_requests_total{path="/v1/completions",status="400"}': 1,
        'flexolmo_requests_total{path="other",status="404"}': 1,
        "flexolmo_prompt_tokens_total": 9,
        "flexolmo_generated_tokens_total": 9,
        "flexolmo_sequences_running": 2,
        "flexolmo_sequences_waiting": 1,
        "flexolmo_time_to_first_token_seconds_count": 3,
        "flexolmo_sequence_duration_seconds_count": 3,
    }
    assert {name: found[name] for name in expected} == expected
    assert samples(url)["flexolmo_generated_tokens_total"] == 18


def test_as_many_as_slots_and_queue_hold_are_taken_at_once(server, engine):
    """None is refused because the engine has not yet fetched those before."""
    url, scheduler = server
    engine.gate.clear()
    statuses = []
    threads = [threading.Thread(target=lambda: statuses.append(ask(url)[0])) for _ in range(6)]
    for thread in threads:
        thread.start()
    wait_for(lambda: sum(scheduler.load.values()) == 6)
    assert ask(url)[0] == 429
    engine.gate.set()
    for thread in threads:
        thread.join()
    assert statuses == [200] * 6


def test_only_a_stream_is_told_each_token(running, engine):
    steps, step = [], engine.step
    engine.step = lambda max_steps: steps.append(max_steps) or step(max_steps)
    with running(lambda: engine) as (url, _):
        ask(url)
        assert set(steps) == {8}
        steps.clear()
        ask(url, stream=True)
        assert set(steps) == {1}


def test_a_full_queue_is_told_to_come_again(server, engine):
    url, scheduler = server
    engine.gate.clear()
    threads = [threading.Thread(target=ask, args=(url,), kwargs={"n": 2}) for _ in range(3)]
    for thread, load in zip(threads, [(2, 0), (2, 2), (2, 4)], strict=True):
        thread.start()
        wait_for(lambda load=load: tuple(scheduler.load.values()) == load)
    status, headers, answer = ask(url)
    assert (status, headers["retry-after"], answer["error"]["code"]) == (429, "1", "queue_full")
    assert call(url, path="/health")[2] == {"status": "ok", "running": 2, "waiting": 4}
    engine.gate.set()
    for thread in threads:
        thread.join()
    assert ask(url)[0] == 200


def test_an_engine_that_fails_is_told_and_the_server_lives_on(running, engine):
    kind = type(engine)
    engines = [engine, kind(), kind()]
    made = iter(engines)
    with running(lambda: next(made)) as (url, _):
        engines[0].error = RuntimeError("in secret places")
        status, _, answer = ask(url)
        assert (status, answer["error"]["type"]) == (500, "server_error")
        assert "secret" not in json.dumps(answer)
        engines[1].error = RuntimeError("in secret places")
        status, _, text = ask(url, stream=True)
        assert status == 200
        (event,) = events(text)
        assert json.loads(event) == answer
        assert ask(url)[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_slot(server, engine, stream):
    url, scheduler = server
    engine.gate.clear()
    body = json.dumps(ASK | {"stream": stream, "n": 3}).encode()
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        wait_for(lambda: scheduler.load == {"running": 2, "waiting": 1})
    wait_for(lambda: scheduler.load["waiting"] == 0)
    engine.gate.set()
    wait_for(lambda: scheduler.load["running"] == 0)
    assert engine.cancelled == [0, 1]
    assert ask(url)[0] == 200


def test_a_client_that_goes_away_before_it_has_asked(server, caplog):
    address = urlsplit(server[0])
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    assert ask(server[0])[0] == 200
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_ends_tells_those_who_wait(running, engine, stream):
    answers = []
    with running(lambda: engine) as (url, scheduler):
        engine.gate.clear()
        thread = threading.Thread(target=lambda: answers.append(ask(url, stream=stream)))
        thread.start()
        wait_for(lambda: scheduler.load["running"] == 1)
        # The engine's step lasts as long as the test; the answer does not wait for it.
        threading.Thread(target=lambda: (thread.join(), engine.gate.set())).start()
    ((status, _, answer),) = answers
    assert status == (200 if stream else 503)
    error = json.loads(events(answer)[0]) if stream else answer
    assert error["error"]["code"] == "shutting_down"
