"""benchmarks/selection.py and floor.py: policies and measures, against plain versions on a few tokens."""

import functools
import importlib
import itertools
import json
import pathlib
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal

import flexolmo_jax
from flexolmo_jax.evaluation.loss import evaluate
from flexolmo_jax.model.selectors import BUCKETS, DECAY, NgramSelector, advance, new_state
from tests.support import runs, tiny

EXPERTS = 3
KINDS = ("public", "owner", "unowned")
ALL_ON, ONE_OFF = np.array([True, True, True]), np.array([True, False, True])


@pytest.fixture(scope="module")
def folder():
    """The benchmarks, which are in no package, can be imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(pathlib.Path(__file__).parents[1] / "benchmarks")
        yield


@pytest.fixture(scope="module")
def policies(folder):
    return importlib.import_module("selection_policies")


@pytest.fixture
def script(folder, monkeypatch):
    """The script, for short sequences."""
    module = importlib.import_module("selection")
    for name, value in {"LENGTH": 32, "AFTER": 8, "WINDOW": 8, "BATCH": 8, "SPLICES": 2}.items():
        monkeypatch.setattr(module, name, value)
    return module


def random_evidence(sequences=4, length=6, seed=0):
    evidence = np.random.default_rng(seed).normal(size=(sequences, length, EXPERTS))
    evidence[..., 0] = 0
    return evidence


def test_decay_is_what_the_selector_computes(policies):
    rng, selector = np.random.default_rng(0), policies.Ngrams(2)
    statistics = [{"ngram/counts": rng.integers(0, 9, BUCKETS)} for _ in range(EXPERTS)]
    tokens = rng.integers(0, tiny.ARCHITECTURE.vocab_size, (2, 20)).astype(np.int32)
    computed = policies.decay(DECAY)(selector.evidence(statistics, tokens), ALL_ON)
    positions = np.broadcast_to(np.arange(20), tokens.shape)
    state = new_state(selector, tiny.ARCHITECTURE, 2, EXPERTS)
    tables = {name: jnp.asarray(table) for name, table in NgramSelector().tables(statistics).items()}
    expected, _ = advance(selector, tables, state, jnp.asarray(tokens), jnp.asarray(positions))
    np.testing.assert_allclose(computed, expected, atol=1e-4)


@pytest.mark.parametrize("is_on", [ALL_ON, ONE_OFF])
def test_fixed_share_is_the_posterior_over_all_paths_of_experts(policies, is_on):
    evidence, rate, on = random_evidence(length=5), 0.1, np.flatnonzero(is_on)
    computed = policies.fixed_share(rate)(evidence, is_on)
    for sequence, t in itertools.product(range(len(evidence)), range(5)):
        weights = np.zeros(EXPERTS)
        for path in itertools.product(on, repeat=t + 1):
            weight = 1 / len(on)
            for s, expert in enumerate(path):
                if s:
                    weight *= rate / len(on) + (1 - rate) * (expert == path[s - 1])
                weight *= np.exp(evidence[sequence, s, expert])
            weights[path[-1]] += weight
        np.testing.assert_allclose(np.exp(computed[sequence, t]), weights / weights.sum(), atol=1e-12)


def test_a_change_is_where_the_rise_of_another_expert_began(policies):
    evidence = np.zeros((1, 9, EXPERTS))
    evidence[0, :5, 1], evidence[0, :5, 2] = 2, -3
    evidence[0, 5:, 1], evidence[0, 5:, 2] = -1, 1
    totals = policies.change_detection(3)(evidence, ALL_ON)[0]
    # After 5 tokens 1 has 10. Then 2 gains 2 over it with each token, and the anchor 1: at the second, 2 has 4 > 3.
    np.testing.assert_array_equal(totals[4:7], [[0, 10, -15], [0, 9, -14], [2, 0, 4]])
    np.testing.assert_array_equal(totals[5:].argmax(axis=-1), [1, 2, 2, 2])
    without = policies.change_detection(3)(evidence, ONE_OFF)[0]
    assert np.isneginf(without[:, 1]).all()
    np.testing.assert_array_equal(without.argmax(axis=-1), [0, 0, 0, 0, 0, 0, 0, 0, 2])


@pytest.mark.parametrize("covariance", ["pooled", "public", "pair"])
def test_the_discriminant_is_a_ratio_of_normal_densities(policies, covariance, monkeypatch):
    monkeypatch.setattr(policies, "SHRINKAGE", 0)
    rng = np.random.default_rng(0)
    sums = [rng.normal(size=(50, 4)) * [1, 2, 3, 1 + e] + e for e in range(EXPERTS)]
    directions, offsets = policies.discriminant(sums, covariance)
    means, covariances = [s.mean(axis=0) for s in sums], [np.cov(s.T, bias=True) for s in sums]
    for e in range(1, EXPERTS):
        kinds = {
            "pooled": sum(covariances) / 3,
            "public": covariances[0],
            "pair": (covariances[0] + covariances[e]) / 2,
        }
        tokens = rng.normal(size=(policies.WINDOW, 4))
        density, public = (multivariate_normal(means[i], kinds[covariance]) for i in (e, 0))
        expected = density.logpdf(tokens.mean(axis=0)) - public.logpdf(tokens.mean(axis=0))
        assert (tokens @ directions + offsets)[:, e].sum() == pytest.approx(expected)
    assert not directions[:, 0].any()
    assert offsets[0] == 0


def test_an_owner_typical_evidence_leaves_an_n_gram_out_of_its_own_counts(policies):
    public, owner = np.zeros((2, BUCKETS), int)
    public[:3], owner[:2] = [5, 1, 4], [1, 3]
    typical = policies.typical_evidence([{"ngram/counts": public}, {"ngram/counts": owner}])
    total = 0.0
    for bucket in [0, 1, 1, 1]:
        others = owner.copy()
        others[bucket] -= 1
        share = [(c[bucket] + 0.1) / (c.sum() + 0.1 * BUCKETS) for c in (others, public)]
        total += 0.3 * np.log(share[0] / share[1]) / 4
    np.testing.assert_allclose(typical, [0, total])


def test_measures_of_a_policy_that_is_wrong_about_one_owner(script):
    """Corpora: public, owners 1 and 2, one of no owner; each one sequence; then a splice."""
    length, corpora = script.LENGTH, np.arange(5)
    corpora[4] = -1
    evidence = np.zeros((5, length, EXPERTS))
    evidence[..., 1:] = -1
    evidence[1, :, 1] = 1
    evidence[2, : length // 2, 2] = 1  # then the anchor
    evidence[3, :, 2] = 1
    evidence[4, length // 2 + 5 :, 1] = 1  # followed after the fifth token of the second half
    losses = np.ones((5, length, EXPERTS)) * [4.0, 5.0, 6.0]
    losses[1, :, 1], losses[2, :, 2] = 2, 1
    is_token = np.ones((5, length), bool)
    is_token[2, -10:] = False
    texts = script.Texts(np.zeros((5, length)), np.zeros((5, length)), is_token, corpora, np.array([[4, 1]]))
    result = script.measure(lambda e, on: np.where(on, e, -np.inf), evidence, texts, losses, np.zeros(EXPERTS))
    half = length // 2
    second = (1.0 * half + 4.0 * (half - 10)) / (length - 10)
    expected = {
        "own, worst": second - 1,
        "own, mean": (second - 1) / 2,
        "gain, least": (4 - second) / 3,
        "public": 0,
        "unowned, worst": 6 / 4 - 1,
        "others, worst": 0,
        "floor, worst": 0,
        "tokens, half": 6,
        "tokens, 90%": 6,
        "within 64": 1,
    }
    right = np.exp(1) / (np.exp(1) + 1 + np.exp(-1))
    late = half - script.AFTER
    expected["own weight"] = (right * late + np.exp(-1) / (1 + 2 * np.exp(-1)) * (half - 10)) / (late + half - 10)
    assert result == pytest.approx(expected)


@pytest.fixture
def journey(tmp_path_factory):
    return runs.journey(tmp_path_factory.getbasetemp())


def test_the_loss_of_an_expert_alone_is_that_of_a_model_without_the_others(script, journey):
    model = flexolmo_jax.load(journey.merged)
    tokens = np.random.default_rng(0).integers(0, 256, (10, 32)).astype(np.int32)
    targets = np.roll(tokens, -1, axis=1)
    function = functools.partial(script._losses, model.decoder, model.params, np.array([False, True]))
    losses = script.in_batches(function, tokens, targets)
    expected = model.score(tokens, without=["anchor"]).log_likelihood_BxS
    np.testing.assert_allclose(losses[:, :-1], -expected[:, 1:], atol=1e-5)


def test_router_inputs_are_those_of_the_first_block(script, journey):
    """The router's logits are linear in its input, but for the biases."""
    model = flexolmo_jax.load(journey.merged)
    tokens = np.random.default_rng(0).integers(0, 256, (10, 32)).astype(np.int32)
    inputs = script.router_inputs(model, tokens)
    router = {name: model.params[f"blocks_0/moe/experts/router/{name}"] for name in ("weight", "bias")}
    output = model.decoder.apply_flat(model.params, tokens)
    expected = inputs @ np.asarray(router["weight"]).T - np.abs(router["bias"])
    np.testing.assert_allclose(output.router_logits_LxBxSxE[0], expected, atol=1e-5)


def test_the_script_compares_all_policies(script, journey, tmp_path, monkeypatch, capsys):
    for name, corpus in {"public": journey.public, "news": journey.private, "other": journey.held_out}.items():
        (tmp_path / name).mkdir()
        for split in ("train", "validation"):
            (tmp_path / name / split).symlink_to(corpus.path)
    corpora = [f"--{kind}={tmp_path / name}" for kind, name in zip(KINDS, ("public", "news", "other"), strict=True)]
    arguments = ["selection.py", f"--model={journey.merged}", *corpora, f"--json={tmp_path}/results.json"]
    monkeypatch.setattr(sys, "argv", arguments)
    script.main()
    results = json.loads((tmp_path / "results.json").read_text())
    assert results[0]["selection"] == "3-gram, decay 1 - 1/32: the selector"
    assert results[0]["own weight"] > 0.9  # other words than in public text
    assert all(np.isfinite(list(result.values())[1:]).all() for result in results)
    assert capsys.readouterr().out.count("discriminant") == 9


def test_the_floor_is_that_of_an_evaluation_and_resampling_one_document_changes_nothing(folder, tmp_path_factory):
    floor, made = importlib.import_module("floor"), runs.journey(tmp_path_factory.getbasetemp())
    model = flexolmo_jax.load(made.merged)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(floor, "LENGTH", 32)
        patch.setattr(floor, "BATCH", 8)
        tokens = floor.read_tokens(model, made.held_out, "anchor")
    shares, added = floor.by_expert(tokens, len(model.roster))
    sizes = {"length": 32, "batch_size": 8}
    left = evaluate(model, {"": made.held_out}, without=["anchor"], **sizes)[""].nats
    alone = evaluate(model, {"": made.held_out}, without=model.roster[1:], **sizes)[""].nats
    assert added.sum() == pytest.approx(left / alone - 1, abs=1e-6)
    assert shares.tolist() == [0, 1]
    assert len(np.unique(tokens.document)) == len(made.held_out)
    drawn = floor.resampled(tokens, samples=500)
    assert drawn.min() < left / alone - 1 < drawn.max()
    one_document = tokens._replace(document=np.zeros_like(tokens.document))
    np.testing.assert_allclose(floor.resampled(one_document, samples=3), left / alone - 1, rtol=1e-4)
