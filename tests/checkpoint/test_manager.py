"""Checkpoints: what is saved is the state at the save, whole, whatever happens to the state afterwards."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from flexolmo_jax import sharding
from flexolmo_jax.checkpoint.manager import Checkpoints

SIZES = {"data": -1, "fsdp": 1, "expert": 1, "tensor": 1}


@functools.partial(jax.jit, donate_argnums=0)
def change(state):
    """A step that reuses the memory of the state it is given."""
    return jax.tree.map(lambda x: x * 3 + 1, state)


def make_state(devices, size=16):
    """A state spread over devices: a matrix in rows, and a scalar on all."""
    mesh = sharding.make_mesh(SIZES, devices)
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("data",), ()))
    matrix = np.random.default_rng(0).standard_normal((size, size)).astype(np.float32)
    return {"matrix": jax.device_put(matrix, rows), "step": jax.device_put(jnp.int32(7), everywhere)}


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
    state, position = make_state(jax.devices()), {"rows": [[3, 4], {"epoch": 1}], "name": "x"}
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
