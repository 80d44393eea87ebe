"""Held-out stopping: the leaves of the best evaluation are published, exactly, however the run was interrupted."""

import json
import os
import shutil
import signal
from unittest import mock

import numpy as np
import orbax.checkpoint as ocp
import pytest

from flexolmo_jax.checkpoint.train_state import Checkpoints
from flexolmo_jax.errors import ArgumentError, UserError
from flexolmo_jax.training import loop
from flexolmo_jax.training.metrics import Reporter
from tests.support import runs, small

STEPS, EVERY, PATIENCE = 16, 2, 2
BATCH_TOKENS = 8 * 32


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with runs.one_device():
        yield


@pytest.fixture(scope="module")
def configure(tmp_path_factory):
    """Makes configurations of a run that overfits its three documents; overrides are `section__key=value`."""
    root = tmp_path_factory.mktemp("corpora")
    few, *held_out = (
        runs.write_words(root / name, *of) for name, of in {"a": (5, 3), "b": (0, 9), "c": (1, 9)}.items()
    )

    def make(**overrides):
        values = {
            "data__train": str(few.path),
            "evaluation__data": ",".join(str(corpus.path) for corpus in held_out),
            "evaluation__every": EVERY,
            "evaluation__keep_best": True,
            "steps": STEPS,
            "optimizer__learning_rate": 3e-2,
            "checkpoint__every": 7,
            "checkpoint__keep": 1,
        }
        return runs.make_config("anchor", **values | overrides)

    return make


@pytest.fixture(scope="module")
def best(configure, tmp_path_factory):
    """The workdir of a run that nothing interrupts."""
    workdir = tmp_path_factory.mktemp("runs") / "best"
    loop.train(configure(evaluation__patience=STEPS), workdir)  # a patience that is not used up
    return workdir


@pytest.fixture(scope="module")
def last(configure, tmp_path_factory):
    """The workdir of the same run, which publishes its last step and keeps the checkpoint of every evaluation."""
    workdir = tmp_path_factory.mktemp("runs") / "last"
    loop.train(configure(evaluation__keep_best=False, checkpoint__every=EVERY, checkpoint__keep=STEPS), workdir)
    return workdir


def evaluations(workdir):
    """{step: mean of the held-out losses}."""
    found = {}
    for line in runs.read_metrics(workdir):
        losses = [value for name, value in line.items() if name.startswith("evaluation/")]
        if losses:
            assert len(losses) == 2
            found[line["step"]] = float(np.mean(losses))
    return found


def best_step(workdir):
    losses = evaluations(workdir)
    return min(losses, key=losses.__getitem__)


def card(workdir):
    return json.loads((workdir / "model" / "model.json").read_text())["experts"][0]["card"]


def test_the_run_overfits(last):
    losses = evaluations(last)
    assert list(losses) == list(range(EVERY, STEPS + 1, EVERY))
    assert EVERY < best_step(last) < STEPS - PATIENCE * EVERY
    assert losses[STEPS] > losses[best_step(last)] + 0.05


def test_the_leaves_of_the_best_evaluation_are_published(best, last):
    state = ocp.StandardCheckpointer().restore(last / "checkpoints" / str(best_step(last)) / "state")
    published = runs.read_params(best / "model")
    for path, leaf in state["trainable"].items():
        np.testing.assert_array_equal(published[path].view(np.uint32), np.asarray(leaf).view(np.uint32), err_msg=path)
    final = runs.read_params(last / "model")
    assert any(not np.array_equal(final[leaf], x) for leaf, x in published.items())


def test_card_and_metrics_name_the_step(best, last):
    step = best_step(last)
    assert card(best) == card(last) | {"best_step": step, "trained_tokens": step * BATCH_TOKENS}
    assert card(last)["trained_tokens"] == STEPS * BATCH_TOKENS
    lines = [line for line in runs.read_metrics(best) if "best_step" in line]
    losses = evaluations(last)
    for line in lines:
        so_far = {step: loss for step, loss in losses.items() if step <= line["step"]}
        assert line["best_step"] == min(so_far, key=so_far.__getitem__)
        assert line["best_loss"] == pytest.approx(min(so_far.values()))
    assert [line["step"] for line in lines] == list(losses)


def test_the_best_checkpoint_is_kept_beside_the_latest(best, last):
    steps = {int(path.name) for path in (best / "checkpoints").iterdir()}
    assert steps == {best_step(last), STEPS}


def interrupted(owner, name, at, action):
    """Has a method of a run do something else at a step, after or in place of what it does."""
    original = getattr(owner, name)

    def method(self, step, *arguments):
        if step == at:
            action()
        return original(self, step, *arguments)

    return mock.patch.object(owner, name, method)


def raise_interrupt():
    raise KeyboardInterrupt


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_that_is_interrupted_and_stopped_early_publishes_the_same(configure, best, tmp_path):
    workdir, config = tmp_path / "run", configure(evaluation__patience=PATIENCE)
    step = best_step(best)
    end = step + PATIENCE * EVERY
    with interrupted(Checkpoints, "save", step, raise_interrupt), pytest.raises(KeyboardInterrupt):
        loop.train(config, workdir)
    with interrupted(Reporter, "step", step + 1, terminate):
        assert loop.train(config, workdir) is None
    # After the last checkpoint: only the output is missing.
    with mock.patch.object(loop, "publish", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        loop.train(config, workdir)
    with mock.patch.object(Reporter, "step") as stepped:
        assert loop.train(config, workdir) == workdir / "model"
    assert not stepped.called
    assert small.files(workdir / "model") == small.files(best / "model")
    assert runs.losses(workdir) == {at: loss for at, loss in runs.losses(best).items() if at <= end}
    assert {int(path.name) for path in (workdir / "checkpoints").iterdir()} == {step, end}


def test_a_damaged_best_checkpoint_is_found(configure, best, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(best, workdir)
    shutil.rmtree(workdir / "model")
    shutil.rmtree(workdir / "checkpoints" / str(best_step(best)) / "state" / "ocdbt.process_0")
    with pytest.raises(
        UserError, match=f"no checkpoint can be read.*{best_step(best)}, the best checkpoint until then"
    ):
        loop.train(configure(evaluation__patience=STEPS), workdir)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"evaluation__data": ""},
            "config.evaluation.keep_best=True: needs held-out text; give config.evaluation.data",
        ),
        ({"evaluation__every": 0}, "config.evaluation.every=0: must be at least 1 with config.evaluation.keep_best"),
        (
            {"evaluation__keep_best": False, "evaluation__patience": 2},
            "config.evaluation.patience=2: needs config.evaluation.keep_best=True",
        ),
    ],
)
def test_keys_that_make_no_sense_are_refused(configure, tmp_path, overrides, message):
    with pytest.raises(ArgumentError) as error:
        loop.train(configure(**overrides), tmp_path / "run")
    assert str(error.value).startswith(message)
    assert not list(tmp_path.iterdir())
