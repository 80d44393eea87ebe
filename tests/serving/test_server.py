"""The command in a process of its own, and the addresses it listens on."""

import http.client
import json
import signal
import socket
import subprocess
import sys
from urllib.parse import urlsplit

import pytest

from flexolmo_jax.errors import UserError
from flexolmo_jax.serving.server import address, listen
from tests.support import small
from tests.support.small import assert_refused, flexolmo


@pytest.fixture(scope="module")
def anchor(tmp_path_factory):
    path = small.anchor(tmp_path_factory.mktemp("server") / "tiny")
    manifest = json.loads((path / "model.json").read_text())
    manifest["experts"][0]["card"]["sequence_length"] = 100
    (path / "model.json").write_text(json.dumps(manifest))
    small.reseal(path / "model.json")
    return path


@pytest.fixture
def taken():
    """A port that something listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def request(url, method, path, body=None):
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=600)
    connection.request(method, path, None if body is None else json.dumps(body))
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_until_it_is_told_to_end(anchor, end):
    command = [sys.executable, "-m", "flexolmo_jax", "serve", f"--model={anchor}", "--port=0", "--name=mine"]
    command += ["--verbose"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            ready = process.stdout.readline()
            start = f"serving {anchor} at http://127.0.0.1:"
            assert ready.startswith(start)
            assert ready.endswith("/v1\n")
            url = ready.split()[-1]
            models = request(url, "GET", "/v1/models")[1]["data"]
            assert [(model["id"], model["max_length"]) for model in models] == [("mine", 100), ("tiny", 100)]
            for name in ("mine", "tiny"):
                body = {"model": name, "prompt": "hi", "max_tokens": 2}
                status, answer = request(url, "POST", "/v1/completions", body)
                assert (status, answer["model"], answer["usage"]["experts"]) == (200, name, {"anchor": 1.0})
            process.send_signal(end)
            out, err = process.communicate(timeout=600)
        finally:
            process.kill()
    assert (process.returncode, out) == (0, "")
    lines = err.splitlines()
    assert len(lines) == 3
    assert '"GET /v1/models HTTP/1.1" 200' in lines[0]


def test_bad_flags_are_refused(anchor, taken, tmp_path):
    options = [f"--model={anchor}"]
    assert_refused(flexolmo("serve", *options, f"--port={taken}"), "serve", f"--port={taken}", "in use", "0 for any")
    assert_refused(flexolmo("serve", *options, "--port=65536"), "serve", "--port=65536")
    assert_refused(flexolmo("serve", *options, "--slots=0"), "serve", "--slots=0")
    assert_refused(flexolmo("serve", *options, "--port=0", "--host=no.such.invalid"), "serve", "no.such.invalid")
    assert_refused(flexolmo("serve", f"--model={tmp_path}/nosuch", "--port=0"), "serve", f"--model={tmp_path}/nosuch")


def test_a_model_without_a_tokenizer_is_refused(tmp_path):
    small.anchor(tmp_path / "mute")
    (tmp_path / "mute/tokenizer.json").unlink()
    assert_refused(flexolmo("serve", f"--model={tmp_path}/mute", "--port=0"), "serve", "mute", "tokenizer.json")


def test_signals_are_handled_as_before_when_serving_is_refused(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    flexolmo("serve", f"--model={tmp_path}/nosuch", "--port=0")
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_addresses(taken, capsys):
    with listen("127.0.0.1", 0) as listener:
        assert address(listener) == f"http://127.0.0.1:{listener.getsockname()[1]}"
    with listen("localhost", 0) as listener:
        assert address(listener).startswith("http://127.0.0.1:")
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match=f"port={taken}: is in use"):
        listen("127.0.0.1", taken)
    for host in ("no.such.invalid", "x" * 70):
        with pytest.raises(UserError, match=f"host={host}.*cannot be listened on"):
            listen(host, 0)


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
def test_an_address_of_ipv6(capsys):
    try:
        listener = listen("::1", 0)
    except UserError:
        pytest.skip("this machine has no IPv6 loopback")
    with listener:
        assert address(listener) == f"http://[::1]:{listener.getsockname()[1]}"
    assert capsys.readouterr().err == ""


def test_an_address_that_others_reach_is_warned_of(caplog):
    with listen("0.0.0.0", 0, has_keys=True):
        assert not caplog.records
    with listen("0.0.0.0", 0):
        warning = caplog.text
    assert warning.count("\n") == 1
    assert " host=0.0.0.0: " in warning
    assert "no authentication" in warning


def test_the_command_warns_with_its_flag(tmp_path):
    command = [sys.executable, "-m", "flexolmo_jax", "serve", f"--model={tmp_path}/none", "--host=0.0.0.0", "--port=0"]
    warning, error = subprocess.run(command, capture_output=True, text=True, check=False).stderr.splitlines()
    assert warning.startswith("flexolmo serve: --host=0.0.0.0: other machines may connect")
    assert f"--model={tmp_path}/none" in error
