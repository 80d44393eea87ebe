"""Processes agree, and say so when they cannot."""

import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flexolmo_jax import distributed
from flexolmo_jax.errors import ProcessesError, UserError
from tests.support import processes, runs


def agree():
    """Runs in each of three processes, and prints what came of each agreement."""
    index = distributed.index()
    print(distributed.gather("numbers", [index, "x"]))
    print(distributed.from_primary("choice", lambda: {"process": index}))
    with distributed.primary_alone("alone") as is_this:
        print(is_this, distributed.count())
    for error in (UserError("a bad file"), ValueError("a bug")):
        try:
            with distributed.agreed("reading"):
                if index == 1:
                    raise error
        except (UserError, ProcessesError, ValueError) as raised:
            print(type(raised).__name__, raised)
    try:
        distributed.from_primary("check", lambda: int("one"))
    except (ValueError, ProcessesError) as raised:
        print(type(raised).__name__)
    try:
        distributed.gather("left" if index else "right", 0)
    except ProcessesError as raised:
        print(raised)
    distributed._timeouts = distributed.Timeouts(agreement_timeout=2)
    if index == 1:
        time.sleep(5)
        return
    try:
        distributed.gather("the end", 0)
    except ProcessesError as raised:
        print(raised)


@pytest.fixture(scope="module")
def outputs():
    return [output.splitlines() for output in processes.run(3, 1, __name__, "agree")]


def test_all_hear_what_each_says(outputs):
    assert {lines[0] for lines in outputs} == {"[[0, 'x'], [1, 'x'], [2, 'x']]"}


def test_process_0_decides_for_all(outputs):
    assert {lines[1] for lines in outputs} == {"{'process': 0}"}


def test_alone_a_process_agrees_with_itself(outputs):
    assert [lines[2] for lines in outputs] == ["True 1", "False 1", "False 1"]


def test_an_error_of_one_is_raised_in_all(outputs):
    assert [lines[3] for lines in outputs] == [
        "UserError process 1: a bad file",
        "UserError a bad file",
        "UserError process 1: a bad file",
    ]
    assert [lines[4] for lines in outputs] == [
        "ProcessesError process 1: a bug",
        "ValueError a bug",
        "ProcessesError process 1: a bug",
    ]
    assert [lines[5] for lines in outputs] == ["ValueError", "ProcessesError", "ProcessesError"]


def test_processes_at_different_points_say_so(outputs):
    assert outputs[0][6] == "process 1 is at 'left', process 0 at 'right'; they must agree"
    assert outputs[1][6] == "process 0 is at 'right', process 1 at 'left'; they must agree"


def test_who_does_not_come_in_time_is_named(outputs):
    line = "'the end': not there within 2 seconds: process 1 of 3; see the logs there"
    assert (outputs[0][7:], outputs[1][7:], outputs[2][7:]) == ([line], [], [line])


def test_one_process_agrees_with_itself():
    assert distributed.gather("x", 1) == [1]
    assert distributed.from_primary("x", lambda: "y") == "y"
    with pytest.raises(UserError, match=r"^bad$"), distributed.agreed("x"):
        raise UserError("bad")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("", 2, 0), "coordinator=: give HOST:PORT"),
        (("host", 2, 0), "coordinator=host: give HOST:PORT"),
        (("host:1", None, 0), "num_processes=None: give how many"),
        (("host:1", 0, 0), "num_processes=0: give how many"),
        (("host:1", 2, 2), "process_id=2: give which process this is, from 0 to 1"),
        (("host:1", 2, None), "process_id=None: give which"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, problem):
    with pytest.raises(UserError) as caught:
        distributed.start(*arguments)
    assert str(caught.value).startswith(problem)


def collect():
    """Runs in each process: prints the collectives whose results are not those of numpy, on whole numbers."""
    devices, count = np.array(jax.devices()), jax.device_count()
    numbers = np.random.default_rng(0).integers(-1000, 1000, (count, 2 * count, 3)).astype(np.float32)
    shifted = [(i, (i + 1) % count) for i in range(count)]
    blocks = numbers.reshape(count, count, 2, 3)
    expected = {
        "psum": (lambda x: jax.lax.psum(x, "x"), np.broadcast_to(numbers.sum(0), numbers.shape)),
        "psum_scatter": (
            lambda x: jax.lax.psum_scatter(x, "x", scatter_dimension=1, tiled=True),
            blocks.sum(0),
        ),
        "all_gather": (
            lambda x: jax.lax.all_gather(x, "x", axis=1, tiled=True),
            np.broadcast_to(numbers.reshape(-1, 3), (count, 2 * count * count, 3)),
        ),
        "all_to_all": (
            lambda x: jax.lax.all_to_all(x, "x", split_axis=1, concat_axis=1, tiled=True),
            blocks.swapaxes(0, 1).reshape(numbers.shape),
        ),
        "ppermute": (lambda x: jax.lax.ppermute(x, "x", shifted), np.roll(numbers, 1, axis=0)),
    }
    # Processes one after another, and in turns.
    for order in (np.arange(count), np.arange(count).reshape(2, -1).T.ravel()):
        mesh = Mesh(devices[order], ("x",))
        over = NamedSharding(mesh, PartitionSpec("x"))
        placed = jax.make_array_from_callback(numbers.shape, over, numbers.__getitem__)
        for name, (collective, wanted) in expected.items():
            mapped = jax.shard_map(collective, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x"))
            for shard in jax.jit(mapped)(placed).addressable_shards:
                if not np.array_equal(shard.data, wanted[shard.index]):
                    print(name, [*order])
    print("done")


@pytest.mark.slow
def test_collectives_between_processes_are_right():
    assert processes.run(2, 2, __name__, "collect") == ["done", "done"]


def compile_slowly():
    """Runs in each process: one takes longer to compile than the heartbeat's timeout, then all add up."""
    if distributed.index() == 1:
        time.sleep(25)  # JAX gives up a process after 10 seconds without a heartbeat
    distributed.gather("compiled", 0)
    mesh = Mesh(jax.devices(), ("x",))
    ones = jax.make_array_from_callback(
        (2,), NamedSharding(mesh, PartitionSpec("x")), np.ones(2, np.float32).__getitem__
    )
    print(float(jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))(ones)))


@pytest.mark.slow
def test_a_compilation_may_take_longer_than_the_heartbeat():
    assert processes.run(2, 1, __name__, "compile_slowly") == ["2.0", "2.0"]


def flexolmo_train(*flags, environment=None):
    """The end of `flexolmo train` in a process that finds no other."""
    return subprocess.run(
        [sys.executable, "-m", "flexolmo_jax", "train", "--config=configs/anchor.py:tiny", "--workdir=w", *flags],
        cwd=runs.ROOT,
        env={**os.environ, "PYTHONPATH": runs.PYTHONPATH, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_without_a_scheduler_the_command_says_what_to_give():
    ended = flexolmo_train("--distributed")
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("flexolmo train: --coordinator=: no scheduler that JAX knows")
    assert line.endswith("give HOST:PORT, num_processes and process_id")


def test_a_coordinator_that_is_not_there_ends_the_command():
    flags = [f"--coordinator={processes.free_address()}", "--num_processes=2", "--process_id=1"]
    ended = flexolmo_train(*flags, "--config.distributed.start_timeout=3")
    assert ended.returncode == 75
    assert "not all processes have started within 3 seconds" in ended.stderr.splitlines()[-1]


def report_environment():
    """Runs in each process: prints what is left of a former slice's environment."""
    print(sorted(name for name in os.environ if name.startswith("MEGASCALE_")))


def test_the_environment_of_a_former_slice_does_not_count():
    environment = {"MEGASCALE_COORDINATOR_ADDRESS": "gone:8080", "MEGASCALE_NUM_SLICES": "4"}
    assert processes.run(2, 1, __name__, "report_environment", environment=environment) == ["[]", "[]"]
