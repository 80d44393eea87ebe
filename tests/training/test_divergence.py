"""A run whose metrics are not finite stops at that step, and keeps the checkpoints before it."""

import json
import shutil
from unittest import mock

import jax
import numpy as np
import pytest

from flexolmo_jax.checkpoint.train_state import Checkpoints
from flexolmo_jax.errors import UserError
from flexolmo_jax.training import loop
from tests.support import runs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return runs.journey(tmp_path_factory.getbasetemp())


@pytest.fixture
def config(made):
    return runs.make_config("pair", **made.expert_values)


@pytest.fixture
def begun(made, tmp_path):
    """A run that was interrupted after its checkpoint of step 9, with metrics of all 12."""
    shutil.copytree(made.expert.workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "contribution")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "12")
    return tmp_path / "run"


class Poison:
    """Makes values of one step NaN or infinite: metrics, or leaves of the state."""

    def __init__(self, at, *names, value=np.nan):
        """Counts the steps that are taken."""
        self.at, self.names, self.value, self.taken = at, names, value, []

    def __call__(self, step, *arguments):
        """In the place of `compile_step`."""
        compiled = self.compile(step, *arguments)

        def poisoned(state, frozen, batch):
            step = int(jax.device_get(state.step)) + 1
            self.taken.append(step)
            state, metrics = compiled(state, frozen, batch)
            if step == self.at:
                metrics = self._broken(metrics)
                state = state._replace(trainable=self._broken(state.trainable))
            return state, metrics

        return poisoned

    def _broken(self, leaves):
        return {name: self._with_value(leaf) if name in self.names else leaf for name, leaf in leaves.items()}

    def _with_value(self, leaf):
        values = np.array(jax.device_get(leaf))
        values.flat[0] = self.value
        return jax.device_put(values, leaf.sharding)

    compile = staticmethod(loop.compile_step)


def strict_metrics(workdir):
    """The lines of metrics.jsonl, as a reader of JSON alone has them."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def fails(config, workdir, poison):
    """The line in which the run ends."""
    with mock.patch.object(loop, "compile_step", poison), pytest.raises(UserError) as caught:
        loop.train(config, workdir)
    assert "\n" not in str(caught.value)
    assert not (workdir / "contribution").exists()
    return str(caught.value)


def checkpoints(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("name", "value"), [("loss", np.nan), ("gradient_norm", np.inf), ("z_loss", -np.inf), ("routing_LxE", np.nan)]
)
def test_it_stops_at_the_step_and_so_does_the_same_command_again(config, begun, capsys, name, value):
    for _ in range(2):
        poison = Poison(11, name, value=value)
        line = fails(config, begun, poison)
        assert line.startswith(f"step 11: {name} is not finite (")
        assert poison.taken in ([10, 11], [10, 11, 12]), "step 12 may be under way when the metrics of 11 are there"
        assert checkpoints(begun) == [6, 9] or checkpoints(begun) == [9]
        steps = [line["step"] for line in strict_metrics(begun) if "loss" in line]
        assert steps == list(range(1, 11))
    assert "NaN or Inf" not in capsys.readouterr().err
    # The last good checkpoint is resumable: without the fault the run ends as ever.
    assert loop.train(config, begun) == begun / "contribution"


def test_metrics_of_a_step_are_checked_before_its_checkpoint_is_saved(config, begun):
    assert fails(config, begun, Poison(12, "loss")).startswith("step 12: loss is not finite (nan)")
    assert 12 not in checkpoints(begun)


def test_the_loss_is_named_before_what_follows_from_it(config, begun):
    names = ("cross_entropy", "gradient_norm", "loss", "z_loss")
    assert fails(config, begun, Poison(10, *names)).startswith("step 10: loss is not finite (nan)")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_state_that_is_not_finite_reaches_no_checkpoint_and_no_output(config, begun, value):
    """The update of the last step overflows: its metrics, of the weights before it, are finite."""
    leaf = "blocks/moe/expert/gate"
    config.evaluation.data, config.evaluation.every = "", 0
    (begun / "config.json").unlink()
    assert fails(config, begun, Poison(12, leaf, value=value)).startswith(f"step 12: trainable.{leaf} is not finite")
    assert 12 not in checkpoints(begun)
    with Checkpoints(begun / "checkpoints", 2) as kept:
        assert kept.latest_step() == 9


def test_a_held_out_loss_that_is_not_finite_stops_the_run(config, begun):
    with (
        mock.patch.object(loop, "_evaluate", return_value={"held_out": float("nan")}),
        pytest.raises(UserError, match="step 12: the held-out loss of held_out is not finite"),
    ):
        loop.train(config, begun)
    assert 12 not in checkpoints(begun)
    assert all("evaluation/held_out" not in line or line["step"] < 12 for line in strict_metrics(begun))


def test_a_learning_rate_that_overflows_stops_the_run(made, tmp_path):
    config = runs.make_config("pair", **made.expert_values, optimizer__learning_rate=1e38)
    with pytest.raises(UserError, match=r"^step [23]: "):
        loop.train(config, tmp_path / "run")
    assert checkpoints(tmp_path / "run") == []
    strict_metrics(tmp_path / "run")
