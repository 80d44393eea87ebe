"""What runs leave behind: an anchor with its sample, a contribution, a model with a tuned router."""

import hashlib
import json

import jax
import numpy as np
import pytest

from flexolmo_jax.checkpoint.model_directory import TOKENIZER_FOLDER, read_contribution, read_model
from flexolmo_jax.checkpoint.params import open_tree
from flexolmo_jax.checkpoint.statistics import open_statistics, read_statistics
from flexolmo_jax.combine.merge import merge
from flexolmo_jax.data.corpus import Corpus
from flexolmo_jax.data.tokenization.tokenizer import load_tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.model import privacy
from flexolmo_jax.training.publish import publish
from flexolmo_jax.training.run import read_run
from flexolmo_jax.training.state import initial_leaves
from tests.support import runs, small

MOE = "blocks/moe/"
LEAVES = ("router/bias", "down", "gate", "router/weight", "up")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return runs.journey(tmp_path_factory.getbasetemp())


def digest(name, array):
    """Digest of a leaf of one chunk, written out: of name, dtype, shape, shape of the chunk, digest of its bytes."""
    header = json.dumps([name, array.dtype.name, list(array.shape), list(array.shape)]) + "\n"
    chunk = hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest()
    return hashlib.sha256(header.encode() + chunk).hexdigest()


def as_bits(leaves):
    return {path: (leaf.dtype.name, leaf.shape, leaf.tobytes()) for path, leaf in leaves.items()}


def test_an_anchor_holds_every_leaf_the_run_ended_with(made):
    found = runs.read_params(made.anchor.output)
    assert as_bits(found) == as_bits(made.anchor.leaves)
    assert {leaf.dtype.name for leaf in found.values()} == {"float32"}


def test_an_anchor_names_its_leaves_by_their_digests(made):
    manifest = read_model(made.anchor.output)
    (expert,) = manifest.experts
    assert expert.name == "anchor"
    assert set(expert.leaves) == set(LEAVES)
    for path, array in runs.read_params(made.anchor.output).items():
        if path.startswith(MOE):
            leaf = path.removeprefix(f"{MOE}anchor/")
            assert expert.leaves[leaf] == digest(leaf, array)
        else:
            assert manifest.shared[path] == digest(path, array)
    assert len(manifest.shared) + len(LEAVES) == len(made.anchor.leaves)
    assert dict(manifest.architecture) == made.anchor.config.model.to_dict()
    assert (manifest.top_k, manifest.tuned) == (1, None)


def test_an_anchor_brings_its_tokenizer(made):
    tokenizer = load_tokenizer(made.anchor.output / "tokenizer.json")
    manifest = read_model(made.anchor.output)
    assert tokenizer.digest == manifest.tokenizer_digest == made.public.tokenizer_digest


def test_an_anchor_ships_a_sample_of_its_documents_each_once(made):
    sample = Corpus.open(made.anchor.output / "public")
    assert len(sample) == 20
    documents = [bytes(document.astype(np.uint8)) for document in made.public]
    shipped = [bytes(document.astype(np.uint8)) for document in sample]
    assert sorted(shipped, key=documents.index) == shipped
    assert len(set(shipped)) == 20
    assert sample.tokenizer_digest == made.public.tokenizer_digest


def test_the_sample_is_no_larger_than_the_corpus_and_absent_when_not_asked_for(made, tmp_path):
    for count, expected in ((10**6, len(made.public)), (0, None)):
        config = runs.make_config("anchor", data__train=str(made.public.path), publish__public_documents=count)
        output = publish(tmp_path / f"model{count}", made.anchor.leaves, read_run(config).publication)
        sample = output / "public"
        assert (len(Corpus.open(sample)) if sample.exists() else None) == expected


def test_a_contribution_holds_the_leaves_of_the_expert_and_nothing_else(made):
    found = runs.read_params(made.expert.output)
    expected = {leaf: made.expert.leaves[f"{MOE}expert/{leaf}"] for leaf in LEAVES}
    assert as_bits(found) == as_bits(expected)
    assert {path.name for path in made.expert.output.iterdir()} == {"contribution.json", "params", "statistics"}


def test_a_contribution_says_what_it_is(made):
    contribution = read_contribution(made.expert.output)
    anchor = read_model(made.anchor.output)
    assert contribution.name == "news"
    assert contribution.anchor_digest == anchor.anchor_digest
    assert contribution.architecture == anchor.architecture
    found = runs.read_params(made.expert.output)
    assert contribution.leaves == {leaf: digest(leaf, array) for leaf, array in found.items()}
    assert contribution.card == {
        "description": "",
        "license": "",
        "expert_layout": "pair",
        "documents": len(made.private),
        "tokens": made.private.tokens,
        "sequence_length": 32,
        "trained_tokens": 12 * 8 * 32,
        "public_share": 0.5,
    }


def test_statistics_are_noised_if_asked_for_and_the_card_says_so(made, tmp_path, monkeypatch):
    monkeypatch.setattr(privacy, "noise_multiplier", lambda epsilon, delta: epsilon / 2)
    options = {"publish__epsilon": 3.0, "publish__delta": 1e-5, "publish__clip": 4.0}
    publication = read_run(runs.make_config("pair", **made.expert_values, **options)).publication
    output = publish(tmp_path / "contribution", made.expert.leaves, publication)
    before, after = read_contribution(made.expert.output), read_contribution(output)
    guarantee = {"epsilon": 3.0, "delta": 1e-5, "clip": 4.0, "noise_multiplier": 1.5}
    expected = {"statistics_privacy": {"mechanism": "gaussian", "unit": "document", **guarantee}}
    assert after.card == before.card | expected
    assert after.leaves == before.leaves
    assert after.statistics.keys() == before.statistics.keys() | {"ngram/noise"}
    assert read_statistics(open_statistics(output, after)["news"], "ngram")["ngram/noise"] == 6.0


def test_a_tuned_router_is_recorded_and_the_one_of_the_merge_kept(made):
    merged = read_model(made.merged)
    manifest = read_model(made.router.output)
    assert manifest.tuned.leaves == sorted(small.ROUTER)
    assert manifest.tuned.card["tokens"] == made.public.tokens
    kept = open_tree(made.router.output / "merged_router")
    before = runs.read_params(made.merged)
    assert kept.keys() == set(small.ROUTER)
    for path, leaf in kept.items():
        assert leaf.read().result().tobytes() == before[path].tobytes()
    for expert in merged.experts:
        assert manifest.tuned.merged_router[expert.name] == {
            leaf: expert.leaves[leaf] for leaf in ("router/bias", "router/weight")
        }


def test_router_tuning_publishes_every_other_leaf_as_the_merge_has_it_though_held_in_bfloat16(made):
    assert made.router.config.compute.frozen_dtype == "bfloat16"
    assert {made.router.leaves[path].dtype.name for path in ("embedding", f"{MOE}experts/up")} == {"bfloat16"}
    before, after = runs.read_params(made.merged), runs.read_params(made.router.output)
    tuned = set(small.ROUTER)
    assert before.keys() == after.keys()
    changed = {path for path in before if before[path].tobytes() != after[path].tobytes()}
    assert changed == tuned
    assert as_bits({path: after[path] for path in tuned}) == as_bits({path: made.router.leaves[path] for path in tuned})
    merged, manifest = (read_model(path) for path in (made.merged, made.router.output))
    assert manifest.shared == merged.shared
    assert (manifest.roster, manifest.top_k) == (merged.roster, merged.top_k)
    assert [expert.card for expert in manifest.experts] == [expert.card for expert in merged.experts]
    assert manifest.anchor_digest == merged.anchor_digest


def begin(config):
    """(the run, {path: array} of the leaves that it begins with)."""
    run = read_run(config)
    program = run.program
    leaves = initial_leaves(program.model, program.state.trainable, program.frozen, run.start, run.initialization)
    return run, jax.device_get(leaves[0] | leaves[1])


def test_fresh_weights_are_published_whole_though_frozen_ones_may_be_held_in_bfloat16(made, tmp_path):
    values = {"data__train": str(made.public.path), "compute__frozen_dtype": "bfloat16"}
    config = runs.make_config("anchor", **values)
    run, leaves = begin(config)
    published = runs.read_params(publish(tmp_path / "model", leaves, run.publication))
    assert {leaf.dtype.name for leaf in published.values()} == {"float32"}
    before = made.anchor.leaves
    for leaf in ("router/weight", "router/bias"):
        path = f"{MOE}anchor/{leaf}"
        np.testing.assert_array_equal(published[path], before[path])


def test_a_published_expert_lies_between_the_anchor_and_what_was_trained(made):
    weight = made.solo.config.publish.interpolation
    assert 0 < weight < 1
    anchor, found = runs.read_params(made.anchor.output), runs.read_params(made.solo.output)
    for leaf in ("up", "gate", "down"):
        start = anchor[f"{MOE}anchor/{leaf}"].astype(np.float64)
        trained = made.solo.leaves[f"{MOE}expert/{leaf}"].astype(np.float64)
        np.testing.assert_allclose(found[leaf], (1 - weight) * start + weight * trained, rtol=0, atol=1e-7)
        assert np.abs(found[leaf] - trained).max() > 1e-4
    for leaf in ("router/weight", "router/bias"):  # these do not begin as the anchor's
        assert found[leaf].tobytes() == made.solo.leaves[f"{MOE}expert/{leaf}"].tobytes()


def test_an_expert_ships_the_leaves_of_its_own_that_it_did_not_train(made, tmp_path):
    values = {**made.expert_values, "compute__frozen_dtype": "bfloat16"}
    config = runs.make_config("pair", **values)
    config.partition = ((f"{MOE}expert/(router/weight|up)", "trainable"), (".*", "frozen"))
    run, leaves = begin(config)
    published = runs.read_params(publish(tmp_path / "contribution", leaves, run.publication))
    assert set(published) == set(LEAVES)
    assert {leaf.dtype.name for leaf in published.values()} == {"float32"}
    np.testing.assert_array_equal(published["gate"], made.anchor.leaves[f"{MOE}anchor/gate"])


def test_what_is_not_finite_is_not_published(made, tmp_path):
    name = f"{MOE}expert/down"
    broken = made.expert.leaves[name].copy()
    broken[1, 2, 3] = np.nan
    publication = read_run(made.expert.config).publication
    with pytest.raises(UserError, match=f"the trained leaf {name}: holds values that are not finite"):
        publish(tmp_path / "contribution", {**made.expert.leaves, name: broken}, publication)
    assert not list(tmp_path.iterdir())


def test_the_manifest_of_a_contribution_does_not_depend_on_the_order_of_leaves(made, tmp_path):
    backwards = dict(reversed(made.expert.leaves.items()))
    published = publish(tmp_path / "contribution", backwards, read_run(made.expert.config).publication)
    file = "contribution.json"
    assert (published / file).read_text() == (made.expert.output / file).read_text()
    manifest = json.loads((published / file).read_text())
    digest = manifest.pop("digest")
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(canonical.encode()).hexdigest() == digest


def test_settings_kept_from_an_import_come_along(tmp_path):
    anchor, corpus = small.anchor(tmp_path / "anchor"), small.corpus(tmp_path / "corpus")
    pair = [small.contribution(tmp_path / name, anchor, seed=seed) for seed, name in enumerate(["code", "news"])]
    (anchor / TOKENIZER_FOLDER).mkdir()
    (anchor / TOKENIZER_FOLDER / "generation_config.json").write_text("{}")
    merge(anchor, pair, tmp_path / "merged", top_k=2)
    tuned = small.tuned(tmp_path / "tuned", tmp_path / "merged", corpus)
    assert (tuned / TOKENIZER_FOLDER / "generation_config.json").read_text() == "{}"
