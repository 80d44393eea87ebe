"""SIGTERM at every stage of a run."""

import os
import shutil
import signal
from unittest import mock

import pytest

from flexolmo_jax.checkpoint.train_state import Checkpoints
from flexolmo_jax.training import loop
from flexolmo_jax.training.workdir import Terminated, handle_sigterm
from tests.support import runs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return runs.journey(tmp_path_factory.getbasetemp())


@pytest.fixture
def begun(made, tmp_path):
    """A run that was interrupted after its checkpoint of step 9."""
    shutil.copytree(made.expert.workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "contribution")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "12")
    return tmp_path / "run"


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def before(function, times=1):
    """The same function, before which SIGTERM comes."""

    def terminated(*args, **kwargs):
        for _ in range(times):
            terminate()
        return function(*args, **kwargs)

    return terminated


def train(made, workdir):
    handler = signal.getsignal(signal.SIGTERM)
    output = loop.train(runs.make_config("pair", **made.expert_values), workdir)
    assert signal.getsignal(signal.SIGTERM) is handler
    return output


@pytest.mark.parametrize("stage", ["initial_leaves", "compile_step", "verify_corpora", "publish"])
def test_outside_the_steps_it_stops_at_once_and_leaves_nothing_half_written(made, begun, stage):
    with mock.patch.object(loop, stage, before(getattr(loop, stage))):
        assert train(made, begun) is None
    assert not (begun / "contribution").exists()
    assert not [path for path in begun.rglob("*") if "incomplete" in path.name or "tmp" in path.name]
    expected = {"9", "12"} if stage in ("verify_corpora", "publish") else {"9"}
    assert {path.name for path in (begun / "checkpoints").iterdir()} - {"6"} == expected


def test_in_the_last_step_it_lets_the_run_end(made, begun):
    step = loop.Reporter.step

    def last(self, at, metrics):
        step(self, at, metrics)
        if at == runs.STEPS:
            terminate()

    with mock.patch.object(loop.Reporter, "step", last):
        assert train(made, begun) == begun / "contribution"


def test_a_second_one_does_not_keep_the_checkpoint_from_being_saved(made, begun):
    step, save = loop.Reporter.step, Checkpoints.save
    with (
        mock.patch.object(loop.Reporter, "step", before(step)),
        mock.patch.object(Checkpoints, "save", before(save)),
        mock.patch.object(Checkpoints, "__exit__", before(Checkpoints.__exit__)),
    ):
        assert train(made, begun) is None
    assert (begun / "checkpoints" / "10").exists()


def test_the_handler_raises_once():
    with handle_sigterm() as sigterm:
        with pytest.raises(Terminated):
            terminate()
        terminate()
        assert sigterm.received
    with handle_sigterm() as sigterm:
        with sigterm.waiting():
            assert not sigterm.received
            terminate()
        assert sigterm.received


def test_a_first_signal_while_the_last_checkpoint_is_written_lets_it_be_written(made, begun):
    with mock.patch.object(Checkpoints, "__exit__", before(Checkpoints.__exit__)):
        assert train(made, begun) == begun / "contribution"
    assert (begun / "checkpoints" / "12").exists()
