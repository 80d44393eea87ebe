"""A run over two processes computes what a run of one process does, and leaves the same behind."""

import json
import os
import signal
from unittest import mock

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import flexolmo_jax
from flexolmo_jax import sharding
from flexolmo_jax.checkpoint.model_directory import check_model, open_model, read_model
from flexolmo_jax.combine.merge import merge
from flexolmo_jax.evaluation.loss import evaluate
from flexolmo_jax.interop.export_hf import export, open_source
from flexolmo_jax.interop.import_hf import import_model
from flexolmo_jax.training import loop
from flexolmo_jax.training.inputs import placed_batches
from flexolmo_jax.training.metrics import Reporter
from tests.support import processes, runs, small

STOPPED = 7


def train_all(all_values):
    """Runs in each process: trains one after the other, then the first again, until a signal to the second process."""
    for name, values, workdir in all_values:
        print(loop.train(runs.make_config(name, **values), workdir))
    (name, values, workdir), *_ = all_values
    original = Reporter.step

    def signalled(self, step, metrics):
        original(self, step, metrics)
        if step == STOPPED and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    Reporter.step = signalled
    print(loop.train(runs.make_config(name, **values), f"{workdir}-stopped"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return runs.journey(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def alone(made):
    """{kind of run: workdir} of one process with eight devices."""
    return {"anchor": made.anchor.workdir, "pair": made.expert.workdir, "router": made.router.workdir}


@pytest.fixture(scope="module")
def trained(made, alone, tmp_path_factory):
    """{kind of run: workdir} of two processes with a device each."""
    folder = tmp_path_factory.mktemp("processes")
    values = {"anchor": made.anchor_values, "pair": made.expert_values, "router": made.router_values}
    axes = {"anchor": "fsdp", "pair": "tensor", "router": "expert"}
    all_values = [
        (name, of_run | {"mesh__data": 1, f"mesh__{axes[name]}": 2}, str(folder / name))
        for name, of_run in values.items()
    ]
    first, second = processes.run(2, 1, __name__, "train_all", [all_values], environment=made.environment)
    assert first == second
    assert first.splitlines()[-1] == "None"
    return {name: folder / name for name in values} | {"stopped": folder / "anchor-stopped"}


@pytest.mark.parametrize("name", ["anchor", "pair", "router"])
def test_metrics_are_those_of_one_process(trained, alone, name):
    expected_lines, lines = (runs.read_metrics(workdirs[name]) for workdirs in (alone, trained))
    assert [line.keys() for line in lines] == [line.keys() for line in expected_lines]
    for expected, found in zip(expected_lines, lines, strict=True):
        for metric, value in expected.items():
            assert found[metric] == pytest.approx(value, rel=1e-4, abs=1e-5), metric
        assert found.get("loss", 0) == pytest.approx(expected.get("loss", 0), abs=1e-5)


@pytest.mark.parametrize("name", ["anchor", "pair", "router"])
def test_what_they_publish_is_whole_and_close_to_that_of_one_process(trained, alone, name):
    output = "contribution" if name == "pair" else "model"
    same, leaves = (runs.read_params(workdirs[name] / output) for workdirs in (alone, trained))
    assert leaves.keys() == same.keys()
    for path, expected in same.items():
        np.testing.assert_allclose(leaves[path], expected, atol=2e-4, err_msg=path)
    if output == "model":
        manifest = read_model(trained[name] / output, strict=True)
        check_model(manifest, *open_model(trained[name] / output, manifest))
    expected, found = (small.files(workdirs[name] / output).keys() for workdirs in (alone, trained))
    assert found == expected


def test_frozen_leaves_and_statistics_are_copied_byte_for_byte(made, trained, alone):
    start, tuned = (small.files(path) for path in (made.merged, trained["router"] / "model"))
    same = [path for path in start if "router" not in str(path) and not str(path).endswith(".json")]
    assert len(same) > 15
    assert all(tuned[path] == start[path] for path in same)
    expected, found = (small.files(workdirs["pair"] / "contribution" / "statistics") for workdirs in (alone, trained))
    assert found
    assert found == expected


def test_what_they_publish_is_merged_evaluated_and_exported(made, trained, alone, tmp_path):
    losses = []
    for name, workdirs in (("one", alone), ("two", trained)):
        out = tmp_path / name
        merge(made.anchor.output, [workdirs["pair"] / "contribution"], out, top_k=2, selection="router")
        found = evaluate(flexolmo_jax.load(out), {"held out": made.held_out}, length=32, batch_size=8)
        losses.append(found["held out"].nats / found["held out"].tokens)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    export(open_source(tmp_path / "two"), str(tmp_path / "exported"), drop_bias=True)
    import_model(str(tmp_path / "exported"), str(tmp_path / "imported"))
    expected, found = (runs.read_params(tmp_path / name) for name in ("two", "imported"))
    assert found.keys() == expected.keys()
    for path in expected:
        if not path.endswith("router/bias"):  # for which that form has no place
            np.testing.assert_array_equal(found[path], expected[path], err_msg=path)


def test_a_signal_to_one_stops_all_after_the_same_step_and_another_layout_goes_on(made, trained, alone):
    stopped = trained["stopped"]
    steps = sorted(int(path.name) for path in (stopped / "checkpoints").iterdir() if path.name.isdigit())
    assert STOPPED <= steps[-1] < runs.STEPS
    assert loop.train(made.anchor.config, stopped) is not None
    assert runs.losses(stopped) == pytest.approx(runs.losses(alone["anchor"]), abs=1e-5)


def test_a_record_names_no_processes(trained, alone):
    expected, found = (json.loads((workdirs["anchor"] / "config.json").read_text()) for workdirs in (alone, trained))
    assert {key for key in expected if expected[key] != found[key]} == {"mesh"}


def place():
    """Runs in each process: prints which sequences of a batch its devices have."""
    mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "expert": 1, "tensor": 1})
    sequences = NamedSharding(mesh, PartitionSpec(("data", "fsdp", "expert"), None))
    batches = mock.Mock(batch_size=8, length=3, sequences=lambda numbers: {"tokens": np.array([numbers] * 3).T})
    placed = next(placed_batches(batches, sequences, [0]))["tokens"]
    print(*[int(sequence[0]) for shard in placed.addressable_shards for sequence in np.asarray(shard.data)])


def test_every_sequence_goes_to_one_process():
    sequences = [np.array(output.split(), int) for output in processes.run(2, 2, __name__, "place")]
    assert [len(indices) for indices in sequences] == [4, 4]
    assert sorted(np.concatenate(sequences)) == list(range(8))
