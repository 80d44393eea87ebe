"""The accounting of wall time, against hand-made lines and a clock that is set."""

import sys
import types

import pytest
from etils import epath

from flexolmo_jax.training import clock as clocks
from flexolmo_jax.training.clock import Clock, time_spent
from flexolmo_jax.training.metrics import Reported, Reporter
from tests.support import runs
from tests.training.test_metrics import metrics


@pytest.fixture
def at(monkeypatch):
    """Sets the clock."""
    now = [100.0]
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: now[0])

    def set_to(seconds):
        now[0] = seconds

    return set_to


def test_a_lap_is_steps_but_for_what_is_something_else(at):
    clock = Clock()
    at(104)
    clock.has_started()
    for moment, activity in ((105, "data"), (110, "evaluation"), (120, "checkpoint")):
        at(moment)
        with clock.spending(activity):
            at(moment + 2)
    at(130)
    assert clock.lap() == {
        "seconds/steps": 30 - 4 - 2 - 2,
        "seconds/data": 2,
        "seconds/start": 4,
        "seconds/evaluation": 2,
        "seconds/checkpoint": 2,
    }
    at(131)
    assert clock.lap() == {"seconds/steps": 1, "seconds/data": 0}


def test_steps_that_were_lost_before_the_first_checkpoint_belong_to_the_time_of_the_run():
    lines = [
        {"step": 1, "time": 1020.0, "seconds/steps": 4.0, "seconds/start": 6.0, "seconds/lost": 8.0},
        {"step": 2, "time": 1030.0, "seconds/steps": 10.0},
    ]
    assert clocks.began(lines) == 1002
    assert time_spent(lines)["away"] == 0
    assert sum(time_spent(lines).values()) == 1030 - 1002


def test_what_no_line_accounts_for_is_the_time_away():
    lines = [
        {"step": 1, "time": 1010.0, "seconds/steps": 4.0, "seconds/start": 6.0},  # began at 1000
        {"step": 2, "time": 1020.0, "seconds/steps": 8.0, "seconds/evaluation": 2.0},
        {"step": 2, "time": 1020.5, "evaluation/news": 3.0},
        {"step": 3, "time": 1100.0, "seconds/steps": 10.0, "seconds/start": 5.0, "seconds/lost": 7.0},
    ]
    assert time_spent(lines) == {
        "steps": 22,
        "start": 11,
        "evaluation": 2,
        "checkpoint": 0,
        "lost": 7,
        "away": 100 - 22 - 11 - 2 - 7,
    }
    assert sum(time_spent([]).values()) == 0


def test_steps_that_are_taken_again_are_lost(tmp_path):
    def report(first, last):
        with Reporter(epath.Path(tmp_path), Reported("news", ("anchor", "news"), 9, 1), first) as reporter:
            for step in range(first + 1, last + 1):
                reporter.step(step, metrics(step))

    report(0, 6)
    before = runs.read_metrics(tmp_path, of_machine=True)
    report(4, 9)
    lines = runs.read_metrics(tmp_path, of_machine=True)
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert lines[4]["seconds/lost"] == pytest.approx(sum(line["seconds/steps"] for line in before[4:]))
    assert "seconds/lost" not in lines[5]


def test_weights_and_biases_gets_the_same(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        log=lambda scalars, step: calls.append((step, scalars)), finish=lambda: calls.append("finish")
    )
    wandb = types.ModuleType("wandb")
    wandb.__spec__ = types.SimpleNamespace()
    wandb.init = lambda **options: calls.append(options) or run
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    reported = Reported("news", ("anchor", "news"), 2, 1, wandb="owners")
    for _ in range(2):
        with Reporter(epath.Path(tmp_path), reported, 0) as reporter:
            reporter.step(1, metrics(3.5))
    options, (step, scalars), end, again, *_ = calls
    assert (options["project"], options["name"], options["resume"]) == ("owners", "news", "allow")
    assert again["id"] == options["id"]
    assert (step, scalars["loss"], end) == (1, 3.5, "finish")
