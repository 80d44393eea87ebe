"""Checkpoints: what is saved is the state at the save, whole, whatever happens to the state afterwards."""

import contextlib
import functools
import json
import os
import re
import shutil
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from flexolmo_jax import distributed, sharding
from flexolmo_jax.checkpoint import train_state
from flexolmo_jax.checkpoint.train_state import Best, Checkpoints, latest_whole_step
from flexolmo_jax.errors import ProcessesError, UserError

SIZES = {"data": -1, "fsdp": 1, "expert": 1, "tensor": 1}


@functools.partial(jax.jit, donate_argnums=0)
def change(state):
    """A step that reuses the memory of the state it is given."""
    return jax.tree.map(lambda x: x * 3 + 1, state)


def make_state(devices, size=16):
    """A state spread over devices: a matrix, sharded along its first axis, and a scalar on all."""
    mesh = sharding.make_mesh(SIZES, devices)
    sharded, everywhere = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("data",), ()))
    matrix = np.random.default_rng(0).standard_normal((size, size)).astype(np.float32)
    return {"matrix": jax.device_put(matrix, sharded), "step": jax.device_put(jnp.int32(7), everywhere)}


@pytest.mark.parametrize("count", [1, 8])
def test_steps_that_donate_the_state_do_not_reach_a_save_under_way(tmp_path, count):
    first = make_state(jax.devices()[:count], size=1024)
    state = change(first)
    assert first["matrix"].is_deleted(), "the test is about donated memory"
    expected = jax.tree.map(np.array, state)
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        checkpoints.save(1, state, {})
        for _ in range(6):
            state = change(state)
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        restored, _ = checkpoints.restore(1, state)
    jax.tree.map(np.testing.assert_array_equal, restored, expected)


def test_a_checkpoint_is_restored_onto_other_devices(tmp_path):
    state, position = make_state(jax.devices()), {"parents": [[3, 4], {"epoch": 1}], "name": "x"}
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        assert checkpoints.latest_step() is None
        checkpoints.save(5, state, position)
    like = make_state(jax.devices()[:2])
    like = jax.tree.map(jnp.zeros_like, like)
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        assert checkpoints.latest_step() == 5
        restored, found = checkpoints.restore(5, like)
    assert found == position
    assert json.loads(json.dumps(found)) == found
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, like)


def test_the_latest_checkpoints_are_kept_and_a_saved_step_is_not_saved_again(tmp_path):
    state = make_state(jax.devices()[:1])
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        for step in (1, 2, 5, 5):
            checkpoints.save(step, {**state, "step": jnp.int32(step)}, {"at": step})
        checkpoints.save(5, change(make_state(jax.devices()[:1])), {"at": -1})
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "5"]
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        restored, position = checkpoints.restore(5, state)
    assert position == {"at": 5}
    np.testing.assert_array_equal(restored["matrix"], state["matrix"])


def test_what_an_interrupted_save_left_is_no_checkpoint_and_is_removed(tmp_path):
    folder = tmp_path / "checkpoints"
    with Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save(1, make_state(jax.devices()[:1]), {})
    half = folder / "2.orbax-checkpoint-tmp"
    (half / "state.orbax-checkpoint-tmp").mkdir(parents=True)
    with Checkpoints(folder, keep=2) as checkpoints:
        assert checkpoints.latest_step() == 1
        checkpoints.save(2, make_state(jax.devices()[:1]), {})
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


POSITION = {"parents": [{"next_index": 3, "slices": [1, 2]}], "stop": False}


def saved(folder, steps=(5, 10)):
    """Checkpoints of these steps, each of another state; returns {step: state}."""
    states = {step: {**make_state(jax.devices()[:2], size=96), "step": jnp.int32(step)} for step in steps}
    with Checkpoints(folder, keep=5) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state, POSITION)
    return states


def files(folder, name="*"):
    found = [path for path in folder.rglob(name) if path.is_file()]
    assert found, "there is nothing to damage"
    return found


def largest(folder):
    return max(files(folder / "state"), key=lambda file: file.stat().st_size)


def overwrite(file, start, data):
    with file.open("r+b") as stream:
        stream.seek(start)
        stream.write(data)


def each(folder, name, change):
    for file in files(folder, name):
        change(file)


def altered_value(folder):
    """Saves another value, whole but for its checksum."""
    data = json.loads((folder / "data" / "metadata").read_text())
    data["checksums"]["matrix"] ^= 1
    (folder / "data" / "metadata").write_text(json.dumps(data))


def emptied(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def becomes_a_file(folder):
    shutil.rmtree(folder)
    folder.write_text("")


def becomes_a_directory(file):
    file.unlink()
    file.mkdir()


DAMAGE = {
    "a file cut off": lambda folder: os.truncate(largest(folder), 100),
    "a file emptied": lambda folder: os.truncate(largest(folder), 0),
    "a file missing": lambda folder: largest(folder).unlink(),
    "a file overwritten": lambda folder: overwrite(largest(folder), 500, bytes(range(256)) * 8),
    "all files of data emptied": lambda folder: [os.truncate(f, 0) for f in files(folder) if f.parent.name == "d"],
    "a value altered": altered_value,
    "manifests emptied": lambda folder: each(folder, "manifest.ocdbt", lambda file: file.write_bytes(b"")),
    "manifests missing": lambda folder: each(folder, "manifest.ocdbt", os.unlink),
    "manifests overwritten": lambda folder: each(folder, "manifest.ocdbt", lambda file: file.write_bytes(b"x" * 99)),
    "parts missing": lambda folder: shutil.rmtree(folder / "state" / "ocdbt.process_0"),
    "no state": lambda folder: shutil.rmtree(folder / "state"),
    "no index": lambda folder: (folder / "state" / "_METADATA").unlink(),
    "an empty index": lambda folder: (folder / "state" / "_METADATA").write_text(""),
    "an index of something else": lambda folder: (folder / "state" / "_METADATA").write_text("[1]"),
    "metadata of arrays overwritten": lambda folder: each(folder, "process_0", lambda file: file.write_bytes(b"x")),
    "no data position": lambda folder: shutil.rmtree(folder / "data"),
    "an empty data position": lambda folder: (folder / "data" / "metadata").write_text(""),
    "a data position cut off": lambda folder: os.truncate(folder / "data" / "metadata", 20),
    "a data position of zeros": lambda folder: (folder / "data" / "metadata").write_bytes(bytes(30)),
    "a data position not in UTF-8": lambda folder: (folder / "data" / "metadata").write_bytes(b"\xff\xfe"),
    "a data position of another kind": lambda folder: (folder / "data" / "metadata").write_text('{"a": 1}'),
    "a data position that is a list": lambda folder: (folder / "data" / "metadata").write_text("[]"),
    "a data position that is a directory": lambda folder: becomes_a_directory(folder / "data" / "metadata"),
    "a data position altered": lambda folder: (folder / "data" / "metadata").write_text(
        (folder / "data" / "metadata").read_text().replace('"next_index": 3', '"next_index": 4')
    ),
    "an empty directory": emptied,
    "a file in its place": becomes_a_file,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_renamed_and_the_one_before_it_is_read(tmp_path, capfd, kind):
    states = saved(tmp_path)
    DAMAGE[kind](tmp_path / "10")
    assert latest_whole_step(tmp_path, POSITION) == 5
    with Checkpoints(tmp_path, keep=5) as checkpoints:
        assert checkpoints.latest_step() == 5
        restored, position = checkpoints.restore(5, states[5])
        assert sorted(path.name for path in tmp_path.iterdir()) == ["10.damaged", "5"]
        # The step is free again.
        checkpoints.save(10, states[10], POSITION)
    jax.tree.map(np.testing.assert_array_equal, (restored, position), (states[5], POSITION))
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path}/10: damaged (")
    assert line.endswith("renamed to 10.damaged, resuming from step 5")
    assert latest_whole_step(tmp_path, POSITION) == 10


def test_a_checkpoint_that_is_not_finite_is_damaged(tmp_path):
    """As an earlier version might have kept it; here, what looks at it before it is saved is kept from it."""
    states = saved(tmp_path, (5,))
    states[5]["matrix"] = states[5]["matrix"].at[3, 4].set(np.inf)
    sums = {"matrix": 0, "step": 10, "data position": 0}
    with (
        mock.patch.object(train_state, "_checksums", return_value=sums),
        Checkpoints(tmp_path, keep=5) as checkpoints,
    ):
        checkpoints.save(10, states[5], POSITION)
    (tmp_path / "10" / "data" / "metadata").write_text(json.dumps(POSITION))
    assert latest_whole_step(tmp_path, POSITION) == 5


def test_of_several_damaged_checkpoints_each_gets_a_name_of_its_own(tmp_path, capsys):
    saved(tmp_path, (1, 2, 3))
    emptied(tmp_path / "2")
    shutil.copytree(tmp_path / "3", tmp_path / "3.damaged")
    DAMAGE["no state"](tmp_path / "3")
    assert latest_whole_step(tmp_path, POSITION) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2.damaged", "3.damaged", "3.damaged-2"]
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_folder_that_is_empty_or_not_there_holds_none(tmp_path):
    assert latest_whole_step(tmp_path, POSITION) is None
    assert latest_whole_step(tmp_path / "nosuch", POSITION) is None


def test_where_none_can_be_read_nothing_is_renamed(tmp_path):
    saved(tmp_path)
    emptied(tmp_path / "5")
    DAMAGE["manifests emptied"](tmp_path / "10")
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            latest_whole_step(tmp_path, POSITION)
        assert str(caught.value).startswith(f"{tmp_path}: no checkpoint can be read (step 10: ")
        assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "5"]


@pytest.mark.parametrize("change", ["shape", "leaf"])
def test_a_checkpoint_of_another_structure_is_refused_and_is_not_damaged(tmp_path, change):
    (state,) = saved(tmp_path, (5,)).values()
    like = {**state, "matrix": jnp.zeros((3, 4))} if change == "shape" else {**state, "more": jnp.zeros(3)}
    assert latest_whole_step(tmp_path, POSITION) == 5
    with Checkpoints(tmp_path, keep=5) as checkpoints, pytest.raises(UserError, match="of another program's run"):
        checkpoints.restore(5, like)
    assert [path.name for path in tmp_path.iterdir()] == ["5"]


@pytest.mark.parametrize("error", [MemoryError("no memory"), RuntimeError("a fault"), PermissionError(13, "denied")])
def test_what_is_no_damage_is_not_taken_for_it(tmp_path, error):
    saved(tmp_path)
    with (
        mock.patch.object(train_state, "_chunk_sum", side_effect=error),
        pytest.raises(type(error)),
    ):
        latest_whole_step(tmp_path, POSITION)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "5"]


def test_a_checkpoint_of_another_order_of_the_data_is_refused_and_is_not_damaged(tmp_path):
    saved(tmp_path)
    with pytest.raises(UserError) as caught:
        latest_whole_step(tmp_path, {"step": 0})
    assert re.fullmatch(
        f"{tmp_path}/10: its data position is of another version.*or name a new workdir", str(caught.value)
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "5"]


def test_a_checkpoint_without_checksums_is_read(tmp_path):
    """As the first version wrote it: the data position stands alone."""
    (state,) = saved(tmp_path, (5,)).values()
    (tmp_path / "5" / "data" / "metadata").write_text(json.dumps(POSITION))
    assert latest_whole_step(tmp_path, POSITION) == 5
    with Checkpoints(tmp_path, keep=5) as checkpoints:
        restored, position = checkpoints.restore(5, state)
    jax.tree.map(np.testing.assert_array_equal, (restored, position), (state, POSITION))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, value, dtype):
    state = make_state(jax.devices()[:2])
    state["matrix"] = state["matrix"].astype(dtype)
    with Checkpoints(tmp_path, keep=5) as checkpoints:
        checkpoints.save(1, state, POSITION)
        broken = {**state, "matrix": state["matrix"].at[3, 4].set(value)}
        with pytest.raises(UserError, match=r"^step 2: matrix is not finite"):
            checkpoints.save(2, broken, POSITION)
        assert checkpoints.latest_step() == 1
    assert latest_whole_step(tmp_path, POSITION) == 1


@pytest.mark.parametrize(
    ("processes", "error", "waits"),
    [(2, None, True), (2, UserError, True), (2, ProcessesError, False), (2, ValueError, False), (1, ValueError, True)],
)
def test_a_save_is_not_waited_for_where_other_processes_may_be_lost(tmp_path, monkeypatch, processes, error, waits):
    checkpoints = Checkpoints(tmp_path, keep=1)
    manager = mock.Mock()
    monkeypatch.setattr(checkpoints, "_manager", manager)
    monkeypatch.setattr(distributed, "count", lambda: processes)
    with contextlib.suppress(error or ()), checkpoints:
        if error:
            raise error
    assert manager.wait_until_finished.called == waits


def saved_with_best(folder, bests, keep=1):
    """Checkpoints of the steps {step: step of the best evaluation until then}."""
    states = {step: {**make_state(jax.devices()[:2], size=96), "step": jnp.int32(step)} for step in bests}
    with Checkpoints(folder, keep) as checkpoints:
        for step, best in bests.items():
            checkpoints.save(step, states[step], POSITION, Best(best, 2.5 - best / 100))
    return states


def steps_of(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_best_checkpoint_stays_beside_the_latest(tmp_path):
    states = saved_with_best(tmp_path, {1: 1, 2: 2, 3: 2, 4: 2})
    assert steps_of(tmp_path) == ["2", "4"]
    assert latest_whole_step(tmp_path, POSITION) == 4
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.restore(4, states[4])
        assert checkpoints.best == Best(2, 2.5 - 2 / 100)
        checkpoints.save(5, states[4], POSITION, checkpoints.best)
    assert steps_of(tmp_path) == ["2", "5"]
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert int(checkpoints.restore_checked(2, states[2], POSITION)["step"]) == 2
        checkpoints.save(6, states[4], POSITION, Best(6, 2.0))
    assert steps_of(tmp_path) == ["6"]


def test_a_checkpoint_whose_best_is_damaged_counts_as_damaged(tmp_path, capsys):
    states = saved_with_best(tmp_path, {1: 1, 2: 2, 3: 2}, keep=3)
    DAMAGE["a file missing"](tmp_path / "2")
    with Checkpoints(tmp_path, keep=3) as checkpoints, pytest.raises(UserError, match=r"2: damaged .*run the same"):
        checkpoints.restore_checked(2, states[2], POSITION)
    assert latest_whole_step(tmp_path, POSITION) == 1
    assert steps_of(tmp_path) == ["1", "2.damaged", "3.damaged"]
    assert "3: damaged (2, the best checkpoint until then: " in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"step": 1, "loss": 0.5}, None])
def test_an_altered_best_evaluation_is_damage(tmp_path, change):
    saved_with_best(tmp_path, {1: 1, 2: 2}, keep=2)
    file = tmp_path / "2" / "data" / "metadata"
    data = json.loads(file.read_text())
    data["best"] = change
    file.write_text(json.dumps({name: value for name, value in data.items() if value is not None}))
    assert latest_whole_step(tmp_path, POSITION) == 1
