"""An interrupted run, started again with the same command, ends with the same bits."""

import json
import signal

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from flexolmo_jax.errors import UserError
from flexolmo_jax.training import loop
from tests.support import runs

# What befalls a run of 12 steps with a checkpoint every 3: (event, step, signal, step of a checkpoint that is there).
STRIKES = (
    ("step", 5, signal.SIGKILL, 3),  # between checkpoints
    ("save", 6, signal.SIGKILL, 3),  # while a checkpoint is being written
    ("step", 8, signal.SIGTERM, 6),
    ("save", 9, signal.SIGKILL, 9),  # right after a checkpoint
    ("publish", 12, signal.SIGKILL, 12),  # between the last checkpoint and the product
)
LAST_CHECKPOINTS = (3, None, 8, 9, 12)  # None: that of step 6 is there whole, or not at all


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return runs.journey(tmp_path_factory.getbasetemp())


def command(made, workdir):
    return ["train", *runs.as_flags("expert", **made.expert_values), f"--workdir={workdir}"]


def last_checkpoint(workdir):
    return max((int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()), default=0)


@pytest.fixture(scope="module")
def straight(made, tmp_path_factory):
    """The workdir of a run that nothing interrupts."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    result = runs.run_program(["-m", "flexolmo_jax", *command(made, workdir)], made.environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{workdir}/contribution\n"
    return workdir


@pytest.fixture(scope="module")
def struck(made, tmp_path_factory):
    """The workdir of a run that every one of `STRIKES` befell, and the result of each start."""
    workdir, results = tmp_path_factory.mktemp("struck") / "run", []
    for (event, at, signum, checkpoint), last in zip(STRIKES, LAST_CHECKPOINTS, strict=True):
        program = f"from tests.support import runs; runs.interrupt({event!r}, {at}, {int(signum)}, {checkpoint})"
        results.append(runs.run_program(["-c", program, *command(made, workdir)], made.environment))
        assert not (workdir / "contribution").exists()
        assert last in (None, last_checkpoint(workdir)), results[-1].stderr
    results.append(runs.run_program(["-m", "flexolmo_jax", *command(made, workdir)], made.environment))
    return workdir, results


def test_each_start_ends_as_its_signal_says(struck):
    workdir, results = struck
    killed = -signal.SIGKILL
    assert [result.returncode for result in results] == [killed, killed, 143, killed, killed, 0], results[-1].stderr
    assert results[-1].stdout == f"{workdir}/contribution\n"


def test_sigterm_says_what_to_do(struck):
    workdir, results = struck
    assert results[2].stdout == ""
    assert (
        results[2].stderr.splitlines()[-1].startswith("flexolmo train: stopped by SIGTERM; run the same command again")
    )
    assert str(workdir) in results[2].stderr


def test_the_product_has_the_same_bits(straight, struck):
    expected, found = (runs.read_params(workdir / "contribution") for workdir in (straight, struck[0]))
    assert expected.keys() == found.keys()
    for leaf, array in expected.items():
        np.testing.assert_array_equal(array.view(np.uint32), found[leaf].view(np.uint32), err_msg=leaf)
    manifests = [(workdir / "contribution" / "contribution.json").read_text() for workdir in (straight, struck[0])]
    assert manifests[0] == manifests[1]


def test_the_last_checkpoint_has_the_same_bits_and_data_position(straight, struck):
    folders = [workdir / "checkpoints" / str(runs.STEPS) for workdir in (straight, struck[0])]
    expected, found = (ocp.StandardCheckpointer().restore(folder / "state") for folder in folders)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    positions = [json.loads((folder / "data" / "metadata").read_text()) for folder in folders]
    assert positions[0] == positions[1]


def test_every_step_is_reported_once_with_the_same_loss(straight, struck):
    assert list(runs.losses(straight)) == list(range(1, runs.STEPS + 1))
    rate = "tokens_per_second"
    expected, found = (
        [{name: value for name, value in line.items() if name != rate} for line in runs.read_metrics(workdir)]
        for workdir in (straight, struck[0])
    )
    assert found == expected


def test_nothing_half_written_stays(struck):
    workdir, _ = struck
    assert all(path.name.isdigit() for path in (workdir / "checkpoints").iterdir())
    assert not [path for path in workdir.rglob("*") if "incomplete" in path.name or "tmp" in path.name]


def test_a_finished_run_is_left_alone(made, straight):
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*")}
    config = runs.make_config("expert", **made.expert_values)
    assert loop.train(config, straight) == straight / "contribution"
    assert {path: path.stat().st_mtime_ns for path in straight.rglob("*")} == before


def test_where_it_runs_and_what_it_keeps_may_differ(made, straight):
    values = {"mesh__data": 4, "mesh__fsdp": 2, "checkpoint__every": 7, "checkpoint__keep": 9, "log__every": 5}
    config = runs.make_config("expert", **made.expert_values, **values)
    assert loop.train(config, straight) == straight / "contribution"


def test_a_workdir_of_another_run_is_refused_with_the_keys_that_differ(made, straight):
    config = runs.make_config("expert", **made.expert_values, optimizer__learning_rate=1e-3, seed=1)
    with pytest.raises(UserError, match=r"differs in: optimizer\.learning_rate, seed\)"):
        loop.train(config, straight)
