"""An interrupted run, started again with the same command, ends with the same bits."""

import json
import os
import signal
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from flexolmo_jax.errors import UserError
from flexolmo_jax.training import loop
from flexolmo_jax.training.metrics import Reporter
from tests.support import processes, runs, small

# What befalls a run of 12 steps with a checkpoint every 3, in a process of its own: (event, step, step of a checkpoint
# that is there).
KILLS = (
    ("step", 5, 3),  # between checkpoints
    ("save", 6, 3),  # while a checkpoint is being written
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return runs.journey(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def straight(made):
    """The workdir of a run that nothing interrupts."""
    return made.expert.workdir


def command(made, workdir):
    return ["train", *runs.as_flags("pair", **made.expert_values), f"--workdir={workdir}"]


def last_checkpoint(workdir):
    return max((int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()), default=0)


def flexolmo(made, workdir):
    """Runs the command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(runs.ROOT)
        return small.flexolmo(*command(made, workdir))


@pytest.fixture(scope="module")
def interrupted(made, tmp_path_factory):
    """The workdir of a run that was killed, terminated, and failed before its output; and the result of each start."""
    workdir, results = tmp_path_factory.mktemp("interrupted") / "run", []
    for event, at, checkpoint in KILLS:
        arguments = [event, at, checkpoint, command(made, workdir)]
        started = processes.start(1, jax.device_count(), runs.__name__, "kill", arguments, made.environment)
        results += [small.Result(*ended) for ended in processes.finish(started)]
    # The checkpoint of step 6 is there whole, or not at all.
    assert last_checkpoint(workdir) in (3, 6), results[-1].err

    def terminate_at_step_8(self, step, metrics):
        report(self, step, metrics)
        if step == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    report = Reporter.step
    with mock.patch.object(Reporter, "step", terminate_at_step_8):
        results.append(flexolmo(made, workdir))
    assert last_checkpoint(workdir) == 8
    # Between the last checkpoint and the output.
    with mock.patch.object(loop, "publish", side_effect=KeyboardInterrupt):
        results.append(flexolmo(made, workdir))
    assert last_checkpoint(workdir) == runs.STEPS
    assert not (workdir / "contribution").exists()
    return workdir, [*results, flexolmo(made, workdir)]


def test_each_start_ends_as_its_interruption_says(interrupted):
    workdir, (*killed, terminated, failed, last) = interrupted
    assert [result.status for result in killed] == [-signal.SIGKILL] * len(KILLS), killed[-1].err
    assert [result.status for result in (terminated, failed, last)] == [143, 130, 0], last.err
    assert (terminated.out, last.out) == ("", f"{workdir}/contribution\n")


def test_sigterm_says_what_to_do(interrupted):
    workdir, results = interrupted
    line = results[len(KILLS)].err.splitlines()[-1]
    assert line.startswith("flexolmo train: stopped by SIGTERM; run the same command again")
    assert str(workdir) in line


def test_the_output_has_the_same_bits(straight, interrupted):
    expected, found = (runs.read_params(workdir / "contribution") for workdir in (straight, interrupted[0]))
    assert expected.keys() == found.keys()
    for leaf, array in expected.items():
        np.testing.assert_array_equal(array.view(np.uint32), found[leaf].view(np.uint32), err_msg=leaf)
    manifests = [(workdir / "contribution" / "contribution.json").read_text() for workdir in (straight, interrupted[0])]
    assert manifests[0] == manifests[1]


def test_the_last_checkpoint_has_the_same_bits_and_data_position(straight, interrupted):
    folders = [workdir / "checkpoints" / str(runs.STEPS) for workdir in (straight, interrupted[0])]
    expected, found = (ocp.StandardCheckpointer().restore(folder / "state") for folder in folders)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    positions = [json.loads((folder / "data" / "metadata").read_text()) for folder in folders]
    assert positions[0] == positions[1]


def test_every_step_is_reported_once_with_the_same_loss(straight, interrupted):
    assert list(runs.losses(straight)) == list(range(1, runs.STEPS + 1))
    expected, found = (runs.read_metrics(workdir) for workdir in (straight, interrupted[0]))
    assert found == expected


def test_nothing_half_written_stays(interrupted):
    workdir, _ = interrupted
    assert all(path.name.isdigit() for path in (workdir / "checkpoints").iterdir())
    assert not [path for path in workdir.rglob("*") if "incomplete" in path.name or "tmp" in path.name]


def test_a_finished_run_is_left_alone(made, straight):
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*")}
    config = runs.make_config("pair", **made.expert_values)
    assert loop.train(config, straight) == straight / "contribution"
    assert {path: path.stat().st_mtime_ns for path in straight.rglob("*")} == before


def test_where_it_runs_and_what_it_keeps_may_differ(made, straight):
    values = {"mesh__data": 4, "mesh__fsdp": 2, "checkpoint__every": 7, "checkpoint__keep": 9, "log__every": 5}
    config = runs.make_config("pair", **made.expert_values, **values)
    assert loop.train(config, straight) == straight / "contribution"


def test_a_workdir_of_another_run_is_refused_with_the_keys_that_differ(made, straight):
    config = runs.make_config("pair", **made.expert_values, optimizer__learning_rate=1e-3, seed=1)
    with pytest.raises(UserError, match=r"differs in: optimizer\.learning_rate, seed\)"):
        loop.train(config, straight)
