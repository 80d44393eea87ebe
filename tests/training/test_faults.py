"""What a run does when a process is lost or stuck, and when a step is bad."""

import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flexolmo_jax import cli
from flexolmo_jax.errors import UserError
from flexolmo_jax.training import loop
from flexolmo_jax.training.metrics import Reporter, TooManySkippedError
from flexolmo_jax.training.optimizer import SPIKE_WINDOW, skipping
from tests.support import processes, runs, small

AT = 5


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return runs.journey(tmp_path_factory.getbasetemp())


def command(arguments, fault):
    """Runs in each process: the command line; at step `AT` something happens to the second process."""
    original = Reporter.step

    def step(self, number, metrics):
        original(self, number, metrics)
        if number == AT and jax.process_index() == 1:
            if fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "stuck":
                time.sleep(600)

    Reporter.step = step
    if fault == "stale" and jax.process_index() == 1:  # a view of the workdir that is late
        loop.latest_whole_step = lambda *_: 1 / 0
        loop.workdirs.finished = lambda *_: 1 / 0
    sys.argv = ["flexolmo", *arguments]
    cli.main()


def two(made, workdir, fault, *flags):
    """[(exit status, output, errors)] of two processes of `flexolmo train`."""
    config = runs.as_flags("anchor", data__train=str(made.public.path), mesh__data=1, mesh__fsdp=2)
    arguments = ["train", *config, *flags, f"--workdir={workdir}"]
    return processes.finish(processes.start(2, 1, __name__, "command", [arguments, fault], made.environment))


@pytest.fixture(scope="module")
def straight(made, tmp_path_factory):
    """The output of two processes to which nothing happens."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    ended = two(made, workdir, "")
    assert [status for status, *_ in ended] == [0, 0], ended
    return small.files(workdir / "model")


def test_when_one_is_killed_the_other_ends_and_a_restart_gives_the_same_bits(made, straight, tmp_path):
    began = time.monotonic()
    (status, _, errors), killed = two(made, tmp_path / "run", "killed")
    assert time.monotonic() - began < 120
    assert killed[0] == -signal.SIGKILL
    assert status in (75, -signal.SIGABRT)  # JAX aborts, where its heartbeat is first
    assert "another process of the run has ended" in errors or "another task died" in errors
    assert [ended[0] for ended in two(made, tmp_path / "run", "stale")] == [0, 0]
    assert small.files(tmp_path / "run" / "model") == straight


def test_when_one_is_stuck_all_end_with_their_stacks(made, tmp_path):
    ended = two(made, tmp_path / "run", "stuck", "--config.faults.step_timeout=8")
    statuses = [status for status, *_ in ended]
    assert 75 in statuses
    assert all(status in (75, -signal.SIGABRT) for status in statuses)
    told = [errors for status, _, errors in ended if "config.faults.step_timeout" in errors]
    assert told
    for errors in told:
        assert f"step {AT}: not done" in errors or f"step {AT + 1}: not done" in errors
        assert "most recent call first" in errors


WATCHED = """
import time
from flexolmo_jax.training.watchdog import Watchdog
with Watchdog(0.2):
    pass
with Watchdog(0):
    time.sleep(0.5)
with Watchdog(1) as watchdog:
    for step in range(1, 4):
        time.sleep(0.5)
        watchdog.beat(step)
    time.sleep(60)
"""


def test_the_watchdog_ends_a_process_that_does_not_beat():
    ended = subprocess.run([sys.executable, "-c", WATCHED], cwd=runs.ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 75
    assert "step 3: not done within 1 seconds" in ended.stderr.splitlines()[-1]
    assert 'File "<string>", line 12' in ended.stderr


def take(optimizer, gradients, losses):
    """The leaf after steps with these gradients, and the last state."""
    leaf = jnp.ones(2)
    state, update = optimizer.init(leaf), jax.jit(optimizer.update)
    for gradient, loss in zip(gradients, losses, strict=True):
        updates, state = update(jnp.full(2, gradient), state, leaf, value=jnp.float32(loss))
        leaf = optax.apply_updates(leaf, updates)
    return np.asarray(leaf), state


@pytest.mark.parametrize(("gradient", "loss"), [(np.nan, 1.0), (np.inf, 1.0), (0.5, np.nan)])
def test_a_step_that_is_not_finite_changes_nothing(gradient, loss):
    optimizer = skipping(optax.adamw(0.1, weight_decay=0.5), 0.0)
    expected, _ = take(optimizer, [1.0, 2.0], [1.0, 1.0])
    found, state = take(optimizer, [1.0, gradient, gradient, 2.0], [1.0, loss, loss, 1.0])
    np.testing.assert_array_equal(found, expected)
    assert (int(state.taken), int(state.consecutive), int(state.skipped)) == (2, 0, 2)
    assert int(take(optimizer, [1.0, gradient, gradient], [1.0, loss, loss])[1].consecutive) == 2


@pytest.mark.parametrize(("name", "spiked"), [("gradient", (3.0, 1.0)), ("loss", (1.0, 3.0))])
def test_a_spike_is_far_above_the_last_steps(name, spiked):
    rng = np.random.default_rng(0)
    gradients, losses = 1 + 0.1 * rng.standard_normal((2, SPIKE_WINDOW + 8))
    optimizer = skipping(optax.sgd(0.01), 6.0)
    assert int(take(optimizer, gradients, losses)[1].skipped) == 0
    _, state = take(optimizer, [*gradients, spiked[0]], [*losses, spiked[1]])
    assert (int(state.skipped), int(state.consecutive)) == (1, 1)
    # Not before there are enough to compare with.
    assert int(take(optimizer, [*gradients[:100], spiked[0]], [*losses[:100], spiked[1]])[1].skipped) == 0
    assert int(take(skipping(optax.sgd(0.01), 0.0), [*gradients, spiked[0]], [*losses, spiked[1]])[1].skipped) == 0


class Poison:
    """Computes some steps with a frozen leaf that is not finite."""

    def __init__(self, *at):
        """Steps, from 1."""
        self.at, self.compile = at, loop.compile_step

    def __call__(self, step, *arguments):
        """In the place of `compile_step`."""
        compiled = self.compile(step, *arguments)

        def poisoned(state, frozen, batch):
            with jax.transfer_guard("allow"):
                number = int(jax.device_get(state.step)) + 1
                if number in self.at:
                    frozen = {**frozen, "final_norm/scale": frozen["final_norm/scale"] * jnp.nan}
            return compiled(state, frozen, batch)

        return poisoned


def test_bad_steps_are_skipped_and_counted_and_too_many_stop_the_run(made, tmp_path, monkeypatch):
    values = made.expert_values | {"faults__skip_steps": 1, "evaluation__data": "", "evaluation__every": 0}
    config = runs.make_config("pair", **values)
    monkeypatch.setattr(loop, "compile_step", Poison(4, 7, 8))
    with pytest.raises(TooManySkippedError, match=r"^step 8: 2 consecutive steps .* \(loss nan, norm nan\)"):
        loop.train(config, tmp_path / "run")
    lines = {line["step"]: line for line in runs.read_metrics(tmp_path / "run")}
    assert lines[4] == {"step": 4, "skipped": 1, "consecutive_skipped": 1}
    assert lines[7] == {"step": 7, "skipped": 2, "consecutive_skipped": 1}
    assert lines[6]["skipped"] == 1
    assert 8 not in lines
    saved = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved[-1] in (8, 9)
    monkeypatch.undo()
    output = loop.train(config, tmp_path / "run")
    assert all(np.isfinite(leaf).all() for leaf in runs.read_params(output).values())


def test_weights_and_biases_must_be_there(made, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = runs.make_config("pair", **made.expert_values, log__wandb="owners")
    with pytest.raises(UserError, match=r"config.log.wandb=owners: needs the package wandb"):
        loop.train(config, tmp_path / "run")


def test_a_spike_needs_steps_that_may_be_skipped(made, tmp_path):
    config = runs.make_config("pair", **made.expert_values, faults__spike=6.0)
    with pytest.raises(UserError, match=r"config.faults.spike=6.0: needs config.faults.skip_steps"):
        loop.train(config, tmp_path / "run")
