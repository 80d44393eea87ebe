"""The training loop, on a small journey that every test here shares: anchor, expert, merge, tuned router."""

import json
import math
import os
import re
import shutil
import signal
import struct
import threading
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tensorboardX.proto.event_pb2 import Event

import flexolmo_jax
from flexolmo_jax.data.batches.pipeline import EvaluationBatches
from flexolmo_jax.errors import UserError
from flexolmo_jax.evaluation.loss import evaluate
from flexolmo_jax.training import loop
from flexolmo_jax.training import workdir as workdirs
from flexolmo_jax.training.clock import time_spent
from flexolmo_jax.training.metrics import Reporter
from flexolmo_jax.training.state import EXPERT, start_leaf
from tests.support import runs

GOLDEN_LOSSES = {1: 5.758563, 4: 5.505365, 8: 5.021784, 12: 4.84711}
TOKENS = runs.TINY["data.batch_size"] * runs.TINY["data.sequence_length"]
PEAK = 3e-3  # of the anchor


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return runs.journey(tmp_path_factory.getbasetemp())


def losses_on_one_device(config, workdir, last):
    """Trains on the first device until after step `last`; returns {step: line of metrics.jsonl}."""

    def step_and_stop(self, step, metrics):
        take(self, step, metrics)
        if step == last:
            os.kill(os.getpid(), signal.SIGTERM)

    take = Reporter.step
    with runs.one_device(), mock.patch.object(Reporter, "step", step_and_stop):
        loop.train(config, workdir)
    return {line["step"]: line for line in runs.read_metrics(workdir) if "loss" in line}


def test_golden_losses(made):
    found = runs.losses(made.anchor.workdir)
    found = {step: round(found[step], 6) for step in GOLDEN_LOSSES}
    assert found == pytest.approx(GOLDEN_LOSSES, rel=1e-3), (
        f"the numbers of training have changed. If that is intended, set GOLDEN_LOSSES = {found} in {__file__} and say "
        "in the commit why; if not, find the change in model, data order, initialisation, objective or optimizer."
    )


def test_the_loss_falls(made):
    found = runs.losses(made.anchor.workdir)
    assert found[12] < found[1] - 0.3


def test_every_step_is_reported_with_its_tokens_and_learning_rate(made):
    lines = [line for line in runs.read_metrics(made.anchor.workdir) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, runs.STEPS + 1))
    assert {line["tokens"] for line in lines} == {TOKENS}
    warmup, end = 2, 0.1
    for line in lines:
        done = line["step"] - 1
        fall = 0.5 * (1 + math.cos(math.pi * (done - warmup) / (runs.STEPS - warmup)))
        expected = PEAK * (done / warmup if done < warmup else end + (1 - end) * fall)
        assert line["learning_rate"] == pytest.approx(expected, rel=1e-5)


def test_a_wsd_run_stays_at_the_peak_and_then_falls_in_a_line(made):
    rates = [line["learning_rate"] for line in runs.read_metrics(made.router.workdir)]
    peak, fall = 2e-3, (1 - 0.1) / 6
    expected = [0, peak / 2, *[peak] * 4, *(peak * (1 - fall * step) for step in range(6))]
    assert rates == pytest.approx(expected, rel=1e-5)


def test_evaluation_is_due_every_so_many_steps_and_at_the_end(made):
    due = [line["step"] for line in runs.read_metrics(made.anchor.workdir) if "loss" not in line]
    assert due == [8, 12]


def test_evaluation_while_training_is_that_of_the_published_model(made):
    model = flexolmo_jax.load(made.anchor.output)
    corpora = {"held_out": made.held_out, "corpora/own": made.private}
    expected = evaluate(model, corpora, length=32, batch_size=8)
    line = runs.read_metrics(made.anchor.workdir)[-1]
    assert line == {"step": 12, **{f"evaluation/{label}": line[f"evaluation/{label}"] for label in corpora}}
    for label, loss in expected.items():
        assert line[f"evaluation/{label}"] == pytest.approx(loss.nats / loss.tokens, rel=1e-5)


def test_evaluation_of_an_expert_in_training_is_that_of_its_merge_with_the_anchor(made):
    expected = evaluate(flexolmo_jax.load(made.merged), {"": made.held_out}, length=32, batch_size=8)[""]
    line = runs.read_metrics(made.expert.workdir)[-1]
    assert line["evaluation/held_out"] == pytest.approx(expected.nats / expected.tokens, rel=1e-5)


def test_evaluation_can_stop_after_some_batches(made):
    config = runs.make_config("anchor", **made.anchor_values, evaluation__batches=2)
    run = loop.read_run(config)
    loss_step = jax.jit(lambda params, batch: {"tokens": jnp.float32(4), "cross_entropy": 1.0 * batch["tokens"].sum()})
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found = loop._evaluate(run, loss_step, device, {})
    first_two = [
        batch["tokens"].sum() for _, batch in zip(range(2), EvaluationBatches(made.private, 32, 8), strict=False)
    ]
    assert found["corpora/own"] == sum(first_two) / 8


@pytest.mark.parametrize("name", ["expert", "solo", "router"])
def test_frozen_leaves_have_the_same_bits_after_a_run_with_weight_decay(made, name):
    run = getattr(made, name)
    assert run.config.optimizer.weight_decay > 0
    before, trained = runs.read_params(run.config.start_from), loop.read_run(run.config).program.trainable
    assert before.keys() - trained, "nothing is frozen"
    for path in run.leaves.keys() - trained - {f"{EXPERT}router/bias"}:
        expected = before[start_leaf(path)].astype(jnp.dtype(run.config.compute.frozen_dtype))
        assert run.leaves[path].tobytes() == expected.tobytes(), path
        assert run.leaves[path].dtype == expected.dtype


def test_an_expert_alone_ships_the_routers_leaves_of_the_anchor_and_the_bias_it_began_with(made):
    found, anchor = runs.read_params(made.solo.output), runs.read_params(made.anchor.output)
    assert found["router/weight"].tobytes() == anchor["blocks/moe/anchor/router/weight"].tobytes()
    assert np.all(found["router/bias"] == np.float32(made.solo.config.init.router_bias))


@pytest.mark.parametrize("name", ["expert", "solo", "router"])
def test_every_trainable_leaf_moves(made, name):
    run = getattr(made, name)
    before, trained = runs.read_params(run.config.start_from), loop.read_run(run.config).program.trainable
    for path in trained:
        start = before[path.replace("/expert/", "/anchor/")]
        assert np.abs(run.leaves[path] - start).max() > 1e-5, path


@pytest.mark.parametrize("name", ["expert", "solo", "router"])
def test_checkpoints_hold_no_frozen_leaf(made, name):
    run = getattr(made, name)
    trained = loop.read_run(run.config).program.trainable
    tree = ocp.StandardCheckpointer().metadata(run.workdir / "checkpoints" / "12" / "state").item_metadata.tree
    leaves = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]}
    named = {leaf for leaf in leaves if "/" in leaf}
    assert all(any(f"'{path}'" in leaf for path in trained) for leaf in named), named
    # A leaf, and its two moments.
    assert len(named) == 3 * len(trained)
    assert len(leaves - named) <= 3, "step counters only"


def test_on_another_number_of_devices_a_run_resumes_with_the_same_batches(made, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(made.anchor.workdir, workdir)
    shutil.rmtree(workdir / "model")
    shutil.rmtree(workdir / "checkpoints" / "12")
    assert jax.device_count() == 8
    lines = losses_on_one_device(made.anchor.config, workdir, last=runs.STEPS)
    assert sorted(lines) == list(range(1, runs.STEPS + 1))
    expected = runs.losses(made.anchor.workdir)
    for step in range(10, runs.STEPS + 1):
        assert lines[step]["loss"] != 0
        assert lines[step]["loss"] == pytest.approx(expected[step], rel=1e-5)
    output, same = (runs.read_params(path / "model") for path in (workdir, made.anchor.workdir))
    for path, leaf in output.items():
        np.testing.assert_allclose(leaf, same[path], atol=1e-4, err_msg=path)


def test_micro_batches_make_the_same_step_and_sigterm_stops_after_the_step_under_way(made, tmp_path):
    config = runs.make_config("anchor", **made.anchor_values, data__grad_accum_steps=2)
    handler = signal.getsignal(signal.SIGTERM)
    lines = losses_on_one_device(config, tmp_path / "run", last=4)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert sorted(lines) == [1, 2, 3, 4]
    assert (tmp_path / "run" / "checkpoints" / "4").exists()
    expected = {line["step"]: line for line in runs.read_metrics(made.anchor.workdir) if "loss" in line}
    for step, line in lines.items():
        for name in ("loss", "cross_entropy", "gradient_norm", "tokens"):
            assert line[name] == pytest.approx(expected[step][name], rel=1e-4), (step, name)


def test_an_implicit_transfer_in_the_loop_is_an_error(made, tmp_path):
    config = runs.make_config("anchor", **made.anchor_values)

    def sums(batches, sharding, numbers, prefetch):
        return (jax.jit(jnp.sum)(batches.batch(number)["tokens"]) for number in numbers)

    with (
        mock.patch.object(loop, "placed_batches", sums),
        pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"),
    ):
        loop.train(config, tmp_path / "run")


def test_an_error_in_the_loop_ends_the_progress_bar_and_leaves_no_output(made, tmp_path):
    config = runs.make_config("anchor", **made.anchor_values)
    with (
        mock.patch.object(loop, "placed_batches", lambda *_: (1 / 0 for _ in range(1))),
        pytest.raises(ZeroDivisionError),
    ):
        loop.train(config, tmp_path / "run")
    assert "_RefreshThread" not in [type(thread).__name__ for thread in threading.enumerate()]
    assert not (tmp_path / "run" / "model").exists()


def test_a_batch_that_does_not_divide_over_the_devices_is_refused(made, tmp_path):
    config = runs.make_config("anchor", **made.anchor_values, data__grad_accum_steps=2)
    with pytest.raises(UserError, match=r"config.data.batch_size=8: its micro-batches of 4 sequences .* 8 devices"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_altered_anchor_is_refused_and_the_workdir_stays_free(made, tmp_path):
    shutil.copytree(made.anchor.output, tmp_path / "anchor")
    block = next((tmp_path / "anchor" / "params" / "head").glob("c.*"))
    data = block.read_bytes()
    block.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    values = {**made.expert_values, "start_from": str(tmp_path / "anchor")}
    with pytest.raises(UserError, match="leaf head: altered"):
        loop.train(runs.make_config("pair", **values), tmp_path / "run")
    assert not (tmp_path / "run" / workdirs.CONFIG_FILE).exists()


def read_events(workdir):
    """{(tag, step): value} of TensorBoard's files: records of length, checksum, protobuf, checksum."""
    scalars = {}
    for file in sorted((workdir / "tensorboard").iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            scalars |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            at += 16 + length
    return scalars


def test_tensorboard_gets_what_metrics_jsonl_gets(made):
    expected = {}
    for line in runs.read_metrics(made.router.workdir, of_machine=True):
        for name, value in line.items():
            for layer, number in enumerate(value if isinstance(value, list) else []):
                expected[f"{name}/{layer:03}", line["step"]] = number
            if name not in ("step", "time") and not isinstance(value, list):
                expected[name, line["step"]] = value
    assert len(expected) > 200
    assert read_events(made.router.workdir) == pytest.approx(expected, rel=1e-6)


def test_metrics_say_where_the_time_went(made):
    lines = runs.read_metrics(made.anchor.workdir, of_machine=True)
    spent = time_spent(lines)
    assert min(spent["steps"], spent["start"], spent["evaluation"], spent["checkpoint"]) > 0
    assert spent["lost"] == 0
    assert spent["away"] < 0.2 * sum(spent.values())
    (last,) = [line for line in lines if line["step"] == runs.STEPS and "loss" in line]
    assert last["goodput"] == pytest.approx(spent["steps"] / (sum(spent.values()) - spent["away"]), rel=0.2)
    assert all(0 <= line["seconds/data"] <= line["seconds/steps"] for line in lines if "loss" in line)


def test_some_steps_can_be_traced(made, tmp_path):
    config = runs.make_config("anchor", **made.anchor_values, profile__first=2, profile__steps=1)
    losses_on_one_device(config, tmp_path / "run", last=3)
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def alter(corpus, folder, token=3):
    """A copy of a corpus with one token changed, to another of the vocabulary."""
    shutil.copytree(corpus.path, folder)
    tokens = np.memmap(folder / "tokens-00000.npy", "<u2", "r+")
    tokens[token] ^= 1
    tokens.flush()


def test_damaged_data_gives_no_output_even_once_it_is_repaired(made, tmp_path):
    alter(made.private, tmp_path / "own")
    config = runs.make_config("pair", **made.expert_values | {"data__train": f"{tmp_path}/own", "steps": 3})
    with pytest.raises(UserError, match=r"tokens-00000\.npy: differs from the digest .* gives no output") as caught:
        loop.train(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "own")
    shutil.copytree(made.private.path, tmp_path / "own")
    with pytest.raises(UserError, match=re.escape(str(caught.value))):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "contribution").exists()
    assert loop.train(config, tmp_path / "new", verify=True) == tmp_path / "new" / "contribution"


@pytest.mark.parametrize(("corpus", "key"), [("private", "data__train"), ("held_out", "evaluation__data")])
def test_verify_finds_damage_before_anything_else(made, tmp_path, corpus, key):
    alter(getattr(made, corpus), tmp_path / corpus)
    config = runs.make_config("pair", **made.expert_values | {key: f"{tmp_path}/{corpus}"})
    with pytest.raises(UserError, match=r"tokens-00000\.npy: differs from the digest"):
        loop.train(config, tmp_path / "run", verify=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [workdirs.LOCK_FILE]


def test_an_id_outside_the_vocabulary_never_reaches_a_step(made, tmp_path):
    shutil.copytree(made.private.path, tmp_path / "own")
    tokens = np.memmap(tmp_path / "own" / "tokens-00000.npy", "<u2", "r+")
    tokens[::2][tokens[::2] != 256] = 300  # the model has 320 ids, the tokenizer 257
    tokens.flush()
    config = runs.make_config("pair", **made.expert_values | {"data__train": f"{tmp_path}/own"})
    with (
        mock.patch.object(Reporter, "step", side_effect=AssertionError("a step was taken")),
        pytest.raises(UserError, match=r"own/tokens-00000\.npy: damaged: the id 300 at offset 0"),
    ):
        loop.train(config, tmp_path / "run")


def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(made, tmp_path, capfd):
    shutil.copytree(made.expert.workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "contribution")
    (tmp_path / "run" / "checkpoints" / "12" / "data" / "metadata").write_text("{}")
    assert loop.train(made.expert.config, tmp_path / "run") == tmp_path / "run" / "contribution"
    assert capfd.readouterr().err.count("12: damaged (data position: not one); renamed to 12.damaged") == 1
    expected, found = (
        runs.read_params(workdir / "contribution") for workdir in (made.expert.workdir, tmp_path / "run")
    )
    for leaf, array in expected.items():
        np.testing.assert_array_equal(array, found[leaf])
    assert runs.losses(tmp_path / "run") == runs.losses(made.expert.workdir)


def test_a_short_trial_needs_no_flag_but_steps(made, tmp_path, capfd):
    """Of a warm-up of 20, as configs/expert.py has it, and of one that just fits."""
    values = made.expert_values | {"steps": 5, "optimizer__warmup_steps": 20}
    loop.train(runs.make_config("pair", **values), tmp_path / "run")
    assert "config.optimizer.warmup_steps=20: no shorter than the run; the learning rate rises for 2 of 5" in (
        capfd.readouterr().err
    )
    rates = [line["learning_rate"] for line in runs.read_metrics(tmp_path / "run") if "loss" in line]
    peak = made.expert.config.optimizer.learning_rate
    assert rates[:3] == pytest.approx([0, peak / 2, peak], rel=1e-5)
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["optimizer"]["warmup_steps"] == 2
    # Who writes the same warm-up out has the same run.
    same = loop.train(runs.make_config("pair", **values | {"optimizer__warmup_steps": 2}), tmp_path / "run")
    assert same == tmp_path / "run" / "contribution"
