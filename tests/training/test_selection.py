"""Runs and selectors: statistics that runs ship, and tuning what chooses experts."""

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models

import flexolmo_jax
from flexolmo_jax.checkpoint.model_directory import read_contribution, read_model
from flexolmo_jax.checkpoint.statistics import open_statistics, read_statistics
from flexolmo_jax.combine.merge import merge
from flexolmo_jax.combine.opt_out import opt_out
from flexolmo_jax.data.tokenization.tokenizer import Tokenizer
from flexolmo_jax.evaluation.loss import evaluate
from flexolmo_jax.model.selectors import BUCKETS, LOG_SCALE, SELECTORS
from tests.support import runs, small
from tests.support.small import assert_refused, flexolmo


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return runs.journey(tmp_path_factory.getbasetemp())


def test_runs_ship_the_statistics_of_their_text(made):
    architecture = flexolmo_jax.load(made.anchor.output).decoder.architecture
    for run, corpus, read in ((made.solo, made.private, read_contribution), (made.anchor, made.public, read_model)):
        (statistics,) = open_statistics(run.output, read(run.output)).values()
        found = read_statistics(statistics, "ngram")
        expected = SELECTORS["ngram"].statistics(list(corpus), architecture, corpus.eos_id)
        assert found.keys() == expected.keys()
        for leaf, values in expected.items():
            np.testing.assert_array_equal(found[leaf], values)
        assert found["ngram/counts"].shape == (BUCKETS,)
        assert found["ngram/documents"] == len(corpus)


def test_the_command_adds_what_runs_ship(made, tmp_path):
    for run, corpus in ((made.solo, made.private), (made.anchor, made.public)):
        out = tmp_path / run.workdir.name
        result = flexolmo("statistics", f"--source={run.output}", f"--data={corpus.path}", f"--out={out}")
        assert (result.status, result.err) == (0, "")
        assert result.out == f"{out}: statistics for the selector ngram\n"
        assert small.files(out) == small.files(run.output)


def test_the_command_refuses_other_text(made, tmp_path):
    def refuse(source, data, *words):
        arguments = [f"--source={source}", *(f"--data={path}" for path in data), f"--out={tmp_path}/out"]
        assert_refused(flexolmo("statistics", *arguments), "statistics", *words)
        assert not (tmp_path / "out").exists()

    private, public = made.private.path, made.public.path
    count = len(made.private)
    refuse(made.solo.output, [], "--data")
    refuse(made.solo.output, [made.held_out.path], f"trained on {count} documents", "have 11", "give all")
    refuse(made.solo.output, [private, public], f"trained on {count} documents", f"have {2 * count}")
    refuse(made.merged, [public], "a merged model", "anchor")
    backend = Backend(models.WordLevel({"a": 0}, unk_token="a"))
    backend.add_special_tokens(["<|endoftext|>"])
    small.corpus(tmp_path / "foreign", ["a"] * len(made.public), Tokenizer(backend, eos_id=1))
    refuse(made.anchor.output, [tmp_path / "foreign"], f"{tmp_path}/foreign", "tokenizer is not that of")
    result = flexolmo("statistics", f"--source={made.solo.output}", f"--data={private}", "--out=x", "--selector=mean")
    assert_refused(result, "statistics", "--selector=mean", "ngram")


@pytest.mark.parametrize("selection", ["ngram", "router+ngram"])
def test_tuning_trains_the_scale_and_publishes_no_table(made, tmp_path, selection):
    merged = tmp_path / "merged"
    merge(made.anchor.output, [made.solo.output], merged, top_k=2, selection=selection)
    values = {
        "start_from": str(merged),
        "data__train": str(made.public.path),
        "evaluation__data": str(made.held_out.path),
        "evaluation__every": runs.STEPS,
        "optimizer__learning_rate": 0.05,
    }
    with runs.one_device():
        run = runs.train(runs.make_config("router", **values), tmp_path / "router")
    before, after = small.read_params(merged), small.read_params(run.output)
    assert before.keys() == after.keys()
    assert "selector/log_ratio" not in after
    changed = {path for path in before if before[path].tobytes() != after[path].tobytes()}
    assert {LOG_SCALE, small.ROUTER[1]} <= changed <= {LOG_SCALE, *small.ROUTER}
    assert (small.ROUTER[0] in changed) or selection == "ngram"
    assert after[LOG_SCALE] == run.leaves[LOG_SCALE] != 0
    manifest = read_model(run.output)
    assert manifest.selection == selection
    assert manifest.tuned.leaves == sorted([LOG_SCALE, *small.ROUTER])

    model = flexolmo_jax.load(run.output)
    np.testing.assert_array_equal(model.params["selector/log_ratio"], run.leaves["selector/log_ratio"])
    (line,) = [line for line in runs.read_metrics(run.workdir) if "evaluation/held_out" in line]
    expected = evaluate(model, {"": made.held_out}, length=32, batch_size=8)[""]
    assert line["evaluation/held_out"] == pytest.approx(expected.nats_per_token, rel=1e-4)
    opt_out(run.output, ["news"], tmp_path / "out")
    (tmp_path / "out" / "certificate.json").unlink()
    anchor = small.files(made.anchor.output)
    assert small.files(tmp_path / "out") == {file: anchor[file] for file in anchor if not file.startswith("public")}
