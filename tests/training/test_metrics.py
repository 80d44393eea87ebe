"""The reporter, given made-up metrics."""

import json
import threading

import jax.numpy as jnp
import pytest
from etils import epath

from flexolmo_jax.training.metrics import Reported, Reporter
from tests.support import runs


def open_reporter(workdir, first=0, steps=100, every=1):
    return Reporter(epath.Path(workdir), Reported("news", ("anchor", "news"), steps, every, by_layer=True), first)


def metrics(loss):
    return {
        "loss": jnp.float32(loss),
        "tokens": jnp.float32(64),
        "routing_LxE": jnp.array([[1, 0], [0.5, 0.5]]),
        "router_entropy_L": jnp.array([0, 0.5]),
    }


def report(workdir, *, first, last, every=1, steps=100):
    """Reports steps `first` + 1 to `last`, each with its number as the loss."""
    with open_reporter(workdir, first, steps, every) as reporter:
        for step in range(first + 1, last + 1):
            reporter.step(step, metrics(step))


def test_a_step_is_written_once_the_next_one_is_under_way(tmp_path):
    with open_reporter(tmp_path) as reporter:
        reporter.step(1, metrics(5.5))
        assert not (tmp_path / "metrics.jsonl").exists()
        reporter.step(2, metrics(4.5))
        (line,) = runs.read_metrics(tmp_path)
        assert line == {
            "step": 1,
            "loss": 5.5,
            "tokens": 64,
            "routing/anchor": 0.75,
            "routing/news": 0.25,
            "router_entropy": 0.25,
            "layers/router_entropy": [0, 0.5],
            "layers/routing/anchor": [1, 0.5],
            "layers/routing/news": [0, 0.5],
        }
    assert runs.losses(tmp_path) == {1: 5.5, 2: 4.5}


def test_the_first_the_last_and_every_so_many_steps_are_written(tmp_path):
    report(tmp_path, first=0, last=11, every=4, steps=11)
    assert list(runs.losses(tmp_path)) == [1, 4, 8, 11]


def test_lines_after_the_step_resumed_from_and_a_torn_one_are_dropped(tmp_path):
    report(tmp_path, first=0, last=6)
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 7, "lo')
    report(tmp_path, first=4, last=8)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))


def test_an_evaluation_is_written_after_the_step_it_follows(tmp_path):
    with open_reporter(tmp_path) as reporter:
        reporter.step(1, metrics(3))
        reporter.evaluation(1, {"legal": 2.5})
    assert [line.get("loss") for line in runs.read_metrics(tmp_path)] == [3, None]
    assert runs.read_metrics(tmp_path)[1] == {"step": 1, "evaluation/legal": 2.5}


def refreshing(timeout=0):
    """Threads of rich that still refresh a bar after `timeout` seconds."""
    threads = [thread for thread in threading.enumerate() if type(thread).__name__ == "_RefreshThread"]
    for thread in threads:
        thread.join(timeout)  # rich tells them to stop, and does not wait
    return [thread for thread in threads if thread.is_alive()]


@pytest.fixture
def terminal(monkeypatch):
    """Makes rich take standard error for a terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")


def test_an_error_ends_the_progress_bar(tmp_path, terminal):
    def fail():
        with open_reporter(tmp_path) as reporter:
            reporter.step(1, metrics(1))
            assert refreshing()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert not refreshing(timeout=30)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_an_error_of_the_last_step_ends_the_progress_bar(tmp_path, terminal):
    def fail():
        with open_reporter(tmp_path) as reporter:
            reporter.step(1, {})

    with pytest.raises(KeyError, match="tokens"):
        fail()
    assert not refreshing(timeout=30)


def test_the_progress_bar_is_on_standard_error_alone(tmp_path, capsys, terminal):
    report(tmp_path, first=0, last=3)
    out, err = capsys.readouterr()
    assert out == ""
    assert "loss 3.000" in err


def test_a_log_gets_a_plain_line_now_and_then(tmp_path, capsys):
    report(tmp_path, first=0, last=runs.STEPS)
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split()[1] for line in err.splitlines()] == ["10/100"]


def test_what_was_taken_of_each_source_is_written(tmp_path):
    reported = Reported(
        "news", ("anchor", "news"), 100, 2, data=lambda steps: {"web": (64 * steps, steps / 8), "code": (0, 0.0)}
    )
    with Reporter(epath.Path(tmp_path), reported, 0) as reporter:
        for step in range(1, 5):
            reporter.step(step, metrics(step))
    taken = [{name: line[name] for name in line if name.startswith("data/")} for line in runs.read_metrics(tmp_path)]
    assert taken == [
        {
            "data/tokens/web": 64 * step,
            "data/tokens/code": 0,
            "data/epochs/web": step / 8,
            "data/epochs/code": 0,
        }
        for step in (1, 2, 4)
    ]
