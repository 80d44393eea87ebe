"""Four processes, two and one: the same batches, losses and checkpoints, and a run resumes in another layout."""

import hashlib
import itertools
import json
import pathlib
import shutil
from unittest import mock

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from flexolmo_jax import distributed, sharding
from flexolmo_jax.checkpoint.train_state import Checkpoints
from flexolmo_jax.data.batches.mixture import Mixture
from flexolmo_jax.data.batches.pipeline import ARRAYS, Source, TrainingBatches
from flexolmo_jax.data.corpus import Corpus
from flexolmo_jax.training import loop
from flexolmo_jax.training.inputs import placed_batches
from tests.support import processes, runs

pytestmark = pytest.mark.slow

LAYOUTS = ((1, 4), (2, 2), (4, 1))  # processes, devices of each
STEPS_EACH = 3
MESHES = {"joint": {"fsdp": 2, "expert": 2}, "solo": {"fsdp": 2, "tensor": 2}}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return runs.journey(tmp_path_factory.getbasetemp())


def mixed(paths):
    """Batches of eight packed sequences, mixed of two sources of documents."""
    sources = [Source(path, [Corpus.open(path)]) for path in paths]
    return TrainingBatches(sources, Mixture([(0, [0.6, 0.4])]), 16, 8, seed=5, packing="best_fit")


def digest(batch, index):
    """Of one sequence of a batch."""
    return hashlib.sha256(b"".join(np.asarray(batch[name][index], np.int32).tobytes() for name in ARRAYS)).hexdigest()


def take(paths, position):
    """Runs in each process: takes some batches from the position on, and prints the sequences that its devices have."""
    batches, file = mixed(paths), pathlib.Path(position)
    step = json.loads(file.read_text()) if file.exists() else 0
    make, made = batches.sequences, []
    batches.sequences = lambda numbers: made.append(len(numbers)) or make(numbers)
    mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "expert": 1, "tensor": 1})
    by_sequence = NamedSharding(mesh, PartitionSpec(("data", "fsdp", "expert"), None))
    placed = placed_batches(batches, by_sequence, range(step, step + STEPS_EACH), prefetch=1)
    found = []
    for _ in range(STEPS_EACH):
        shards = {name: array.addressable_shards for name, array in next(placed).items()}
        for place, shard in enumerate(shards["tokens"]):
            local = {name: np.asarray(of_name[place].data) for name, of_name in shards.items()}
            first = shard.index[0].start or 0
            found.append({str(first + at): digest(local, at) for at in range(len(local["tokens"]))})
    distributed.gather("all have read the position", 0)
    if jax.process_index() == 0:
        file.write_text(json.dumps(step + STEPS_EACH))
    # No process reads what another one needs, and each sequence is made once.
    assert made == [8 // jax.process_count()] * STEPS_EACH
    print(json.dumps(found))


def test_every_layout_has_the_same_batches_also_after_a_restart_on_another(made, tmp_path):
    paths, position = [str(made.public.path), str(made.private.path)], str(tmp_path / "position.json")
    batches = map(mixed(paths).batch, itertools.count())
    for count, devices in LAYOUTS:
        printed = processes.run(count, devices, __name__, "take", [paths, position])
        of_processes = [json.loads(output) for output in printed]
        for step in range(STEPS_EACH):
            found = {}
            for of_process in of_processes:
                for of_device in of_process[step * devices : (step + 1) * devices]:
                    assert not found.keys() & of_device.keys()
                    found |= of_device
            batch = next(batches)
            assert found == {str(index): digest(batch, index) for index in range(8)}, (count, devices, step)


def train_all(all_values):
    """Runs in each process."""
    for name, values, workdir in all_values:
        print(loop.train(runs.make_config(name, **values), workdir))


def joint_values(made):
    return {"start_from": str(made.merged), "data__train": f"{made.public.path},{made.private.path}"}


@pytest.fixture(scope="module")
def alone(made):
    """{kind of run: the run} of one process with eight devices."""
    joint = runs.train(runs.make_config("joint", **joint_values(made)), made.root / "joint")
    return {"joint": joint, "solo": made.solo}


@pytest.fixture(scope="module")
def trained(made, alone, tmp_path_factory):
    """{kind of run: workdir} of four processes with a device each."""
    folder = tmp_path_factory.mktemp("layouts")
    values = {"joint": joint_values(made), "solo": made.expert_values}
    all_values = [
        (
            "joint" if name == "joint" else "expert",
            of_run | {"mesh__data": 1, **{f"mesh__{axis}": size for axis, size in MESHES[name].items()}},
            str(folder / name),
        )
        for name, of_run in values.items()
    ]
    printed = processes.run(4, 1, __name__, "train_all", [all_values], environment=made.environment)
    assert len(set(printed)) == 1
    return {name: folder / name for name in values}


@pytest.mark.parametrize("name", MESHES)
def test_four_processes_have_the_losses_of_one(trained, alone, name):
    assert runs.losses(trained[name]) == pytest.approx(runs.losses(alone[name].workdir), abs=1e-5)


@pytest.mark.parametrize("name", MESHES)
def test_what_four_saved_is_restored_on_one_two_and_eight_devices(trained, alone, name):
    make_mesh = sharding.make_mesh
    published = runs.read_params(trained[name] / ("model" if name == "joint" else "contribution"))
    states = []
    for count in (1, 2, 8):
        config = alone[name].config.copy_and_resolve_references()
        config.mesh.data, config.mesh.fsdp = 1, count
        devices = jax.devices()[:count]
        with mock.patch.object(sharding, "make_mesh", lambda sizes, _, devices=devices: make_mesh(sizes, devices)):
            like = loop.read_run(config).program.state
        with Checkpoints(trained[name] / "checkpoints", keep=3) as checkpoints:
            state, _ = checkpoints.restore(runs.STEPS, like)
        assert len(state.step.sharding.device_set) == count
        states.append(jax.device_get(state))
    first, *others = ([leaf.tobytes() for leaf in jax.tree.leaves(state)] for state in states)
    assert all(other == first for other in others)
    if name == "joint":
        for path, leaf in states[0].trainable.items():
            assert leaf.tobytes() == published[path].tobytes(), path


def test_a_run_of_four_resumes_in_one(trained, alone, tmp_path):
    workdir = tmp_path / "joint"
    shutil.copytree(trained["joint"], workdir)
    shutil.rmtree(workdir / "model")
    shutil.rmtree(workdir / "checkpoints" / str(runs.STEPS))
    assert loop.train(alone["joint"].config, workdir) is not None
    assert runs.losses(workdir) == pytest.approx(runs.losses(alone["joint"].workdir), abs=1e-5)
