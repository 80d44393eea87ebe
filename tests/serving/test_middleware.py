"""API keys and other origins, over HTTP, with an engine that does as it is told."""

import http.client
import json
import re
from urllib.parse import urlsplit

import pytest

from flexolmo_jax.errors import UserError
from flexolmo_jax.serving.middleware import check_origins, read_keys
from tests.support import small

KEYS, ORIGIN = ("first-key", "second-key"), "http://localhost:3000"
ASK = {"model": "tiny", "prompt": "hi", "max_tokens": 1}


@pytest.fixture(scope="module")
def url(running, obedient):
    """A server with keys that pages of one origin may ask."""
    with running(obedient, keys=KEYS, origins=[ORIGIN]) as (url, _):
        yield url


def call(url, method, path, headers=None, body=None):
    """Returns (status, headers, text)."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=600)
    connection.request(method, path, None if body is None else json.dumps(body), headers or {})
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read().decode()


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_each_key_opens_every_path(url, key, scheme):
    sent = {"Authorization": f"{scheme} {key}"}
    assert call(url, "POST", "/v1/completions", sent, ASK)[0] == 200
    assert [call(url, "GET", path, sent)[0] for path in ("/v1/models", "/metrics", "/health")] == [200] * 3


@pytest.mark.parametrize(
    "sent",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer first-key2",
        "Bearer first-ke",
        "Basic first-key",
        "first-key",
        "Bearer \xff",
    ],
)
def test_without_a_key_only_the_health_is_told(url, sent):
    headers = {} if sent is None else {"Authorization": sent}
    for method, path in (("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/nosuch")):
        status, answered, text = call(url, method, path, headers, ASK if method == "POST" else None)
        assert (status, answered["www-authenticate"]) == (401, "Bearer")
        error = json.loads(text)["error"]
        assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
        assert "first" not in text
    assert call(url, "GET", "/health", headers)[0] == 200


def test_a_browser_asks_before_it_sends_a_key(url):
    asked = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    asked["Access-Control-Request-Headers"] = "authorization,content-type"
    status, answered, _ = call(url, "OPTIONS", "/v1/chat/completions", asked)
    assert (status, answered["access-control-allow-origin"]) == (200, ORIGIN)
    assert "authorization" in answered["access-control-allow-headers"]
    assert call(url, "OPTIONS", "/v1/completions", asked | {"Origin": "http://other"})[0] == 400


def test_pages_of_the_origin_may_read_answers_and_errors(url):
    for sent, expected in (({}, 401), ({"Authorization": "Bearer first-key"}, 200)):
        status, answered, _ = call(url, "GET", "/v1/models", sent | {"Origin": ORIGIN})
        assert (status, answered["access-control-allow-origin"]) == (expected, ORIGIN)
        status, answered, _ = call(url, "GET", "/v1/models", sent | {"Origin": "http://other"})
        assert (status, answered["access-control-allow-origin"]) == (expected, None)


def test_keys_are_read_from_a_file_and_a_variable(tmp_path):
    file = tmp_path / "keys"
    file.write_text("\n# who\n one \r\n\ntwo\n")
    assert read_keys(file, None, "KEY") == ["one", "two"]
    assert read_keys(file, "three", "KEY") == ["one", "two", "three"]
    assert read_keys(None, "three", "KEY") == ["three"]
    assert read_keys(None, None, "KEY") == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "has no key"),
        (b"# none\n\n", "has no key"),
        (b"ok\nt\xc3\xa9\n", "line 2"),
        (b"a b\n", "line 1"),
        (b"\xff", "text"),
    ],
)
def test_what_is_no_key_is_refused(tmp_path, content, words):
    (tmp_path / "keys").write_bytes(content)
    with pytest.raises(UserError, match=f"keys: .*{words}"):
        read_keys(tmp_path / "keys", None, "KEY")


def test_files_and_variables_that_hold_nothing_are_refused(tmp_path):
    for file in (tmp_path / "nosuch", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            read_keys(file, None, "KEY")
    for value in ("", "a b", "é"):
        with pytest.raises(UserError, match="KEY: is no key"):
            read_keys(None, value, "KEY")


def test_origins_that_no_page_has_are_refused():
    check_origins(["*", "http://localhost:3000", "https://example.org", "http://[::1]:80"])
    for origin in ("localhost:3000", "http://a/", "example.org", "", "http://a/path", "HTTP://A", "http://"):
        with pytest.raises(UserError, match=re.escape(f"origins={origin}: is no origin")):
            check_origins([origin])


def test_the_command_reads_keys_before_anything_else(tmp_path, monkeypatch):
    arguments = ["serve", f"--model={tmp_path}/nosuch", "--port=0"]
    small.assert_refused(
        small.flexolmo(*arguments, f"--api_key_file={tmp_path}/none"), "serve", "--api_key_file", "none"
    )
    small.assert_refused(small.flexolmo(*arguments, "--cors_origin=x"), "serve", "--cors_origin=x")
    monkeypatch.setenv("FLEXOLMO_API_KEY", "")
    small.assert_refused(small.flexolmo(*arguments), "serve", "FLEXOLMO_API_KEY")
