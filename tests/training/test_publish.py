"""What runs leave behind: an anchor with its sample, a contribution, a model with a tuned router."""

import hashlib
import json

import jax
import numpy as np
import pytest

from flexolmo_jax import sharding
from flexolmo_jax.checkpoint.digests import combined_digest
from flexolmo_jax.checkpoint.model_directory import TOKENIZER_FOLDER, read_contribution, read_model
from flexolmo_jax.checkpoint.params import open_tree
from flexolmo_jax.combine.merge import merge
from flexolmo_jax.data.corpus import Corpus
from flexolmo_jax.data.tokenizer import load_tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.training.inputs import read_inputs
from flexolmo_jax.training.publish import publish
from flexolmo_jax.training.state import initial_leaves, shardings
from tests.support import runs, small

MIXTURE = "blocks/moe/"
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
    found = runs.read_params(made.anchor.product)
    assert as_bits(found) == as_bits(made.anchor.leaves)
    assert {leaf.dtype.name for leaf in found.values()} == {"float32"}


def test_an_anchor_names_its_leaves_by_their_digests(made):
    manifest = read_model(made.anchor.product)
    (expert,) = manifest.experts
    assert expert.name == "anchor"
    assert set(expert.leaves) == set(LEAVES)
    for path, array in runs.read_params(made.anchor.product).items():
        if path.startswith(MIXTURE):
            leaf = path.rsplit("/", 1)[1]
            assert expert.leaves[leaf] == digest(leaf, array)
        else:
            assert manifest.shared[path] == digest(path, array)
    assert len(manifest.shared) + len(LEAVES) == len(made.anchor.leaves)
    assert dict(manifest.architecture) == made.anchor.config.model.to_dict()
    assert (manifest.top_k, manifest.tuned) == (1, None)


def test_an_anchor_brings_its_tokenizer(made):
    tokenizer = load_tokenizer(made.anchor.product / "tokenizer.json")
    manifest = read_model(made.anchor.product)
    assert tokenizer.digest == manifest.tokenizer_digest == made.public.tokenizer_digest


def test_an_anchor_ships_a_sample_of_its_documents_each_once(made):
    sample = Corpus.open(made.anchor.product / "public")
    assert len(sample) == 20
    documents = [bytes(document.astype(np.uint8)) for document in made.public]
    shipped = [bytes(document.astype(np.uint8)) for document in sample]
    assert sorted(shipped, key=documents.index) == shipped
    assert len(set(shipped)) == 20
    assert sample.tokenizer_digest == made.public.tokenizer_digest


def test_the_sample_is_no_larger_than_the_corpus_and_absent_when_not_asked_for(made, tmp_path):
    for count, expected in ((10**6, len(made.public)), (0, None)):
        config = runs.make_config("anchor", data__train=str(made.public.path), publish__public_documents=count)
        product = publish(tmp_path / f"model{count}", config, read_inputs(config), made.anchor.leaves)
        sample = product / "public"
        assert (len(Corpus.open(sample)) if sample.exists() else None) == expected


def test_a_contribution_holds_the_leaves_of_the_expert_and_nothing_else(made):
    found = runs.read_params(made.expert.product)
    expected = {leaf: made.expert.leaves[f"{MIXTURE}expert/{leaf}"] for leaf in LEAVES}
    assert as_bits(found) == as_bits(expected)
    assert {path.name for path in made.expert.product.iterdir()} == {"contribution.json", "params"}


def test_a_contribution_says_what_it_is(made):
    contribution = read_contribution(made.expert.product)
    anchor = read_model(made.anchor.product)
    assert contribution.name == "news"
    assert contribution.anchor_digest == anchor.anchor_digest
    assert contribution.architecture == anchor.architecture
    found = runs.read_params(made.expert.product)
    assert contribution.leaves == {leaf: digest(leaf, array) for leaf, array in found.items()}
    assert contribution.card == {
        "description": "",
        "license": "",
        "documents": len(made.own),
        "tokens": made.own.tokens,
        "sequence_length": 32,
        "trained_tokens": 12 * 8 * 32,
        "public_share": 0.5,
    }


def test_a_tuned_router_is_recorded_and_the_one_of_the_merge_kept(made):
    merged = read_model(made.merged)
    manifest = read_model(made.router.product)
    assert manifest.tuned.leaves == sorted(small.ROUTER)
    assert manifest.tuned.card["tokens"] == made.public.tokens
    kept = open_tree(made.router.product / "merged_router")
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
    assert {made.router.leaves[path].dtype.name for path in ("embedding", f"{MIXTURE}experts/up")} == {"bfloat16"}
    before, after = runs.read_params(made.merged), runs.read_params(made.router.product)
    tuned = set(small.ROUTER)
    assert before.keys() == after.keys()
    changed = {path for path in before if before[path].tobytes() != after[path].tobytes()}
    assert changed == tuned
    assert as_bits({path: after[path] for path in tuned}) == as_bits({path: made.router.leaves[path] for path in tuned})
    merged, manifest = (read_model(path) for path in (made.merged, made.router.product))
    assert manifest.shared == merged.shared
    assert (manifest.roster, manifest.top_k) == (merged.roster, merged.top_k)
    assert [expert.card for expert in manifest.experts] == [expert.card for expert in merged.experts]
    assert manifest.anchor_digest == merged.anchor_digest


def begin(config):
    """The leaves a run begins with, {path: array}."""
    inputs = read_inputs(config)
    where = shardings(inputs, sharding.make_mesh(config.mesh), config.sharding_rules)
    trainable, frozen = initial_leaves(config, inputs, where)
    return inputs, jax.device_get({**trainable, **frozen})


def test_fresh_weights_are_published_whole_though_frozen_ones_may_be_held_in_bfloat16(made, tmp_path):
    values = {"data__train": str(made.public.path), "compute__frozen_dtype": "bfloat16"}
    config = runs.make_config("anchor", **values)
    inputs, leaves = begin(config)
    published = runs.read_params(publish(tmp_path / "model", config, inputs, leaves))
    assert {leaf.dtype.name for leaf in published.values()} == {"float32"}
    before = made.anchor.leaves
    for leaf in ("router/weight", "router/bias"):
        path = f"{MIXTURE}anchor/{leaf}"
        np.testing.assert_array_equal(published[path], before[path])


def test_an_expert_ships_the_leaves_of_its_own_that_it_did_not_train(made, tmp_path):
    values = {**made.expert_values, "compute__frozen_dtype": "bfloat16"}
    config = runs.make_config("expert", **values)
    config.partition = ((f"{MIXTURE}expert/(row|up)", "trainable"), (".*", "frozen"))
    inputs, leaves = begin(config)
    published = runs.read_params(publish(tmp_path / "contribution", config, inputs, leaves))
    assert set(published) == set(LEAVES)
    assert {leaf.dtype.name for leaf in published.values()} == {"float32"}
    np.testing.assert_array_equal(published["gate"], made.anchor.leaves[f"{MIXTURE}anchor/gate"])


def test_what_is_not_finite_is_not_published(made, tmp_path):
    name = f"{MIXTURE}expert/down"
    broken = made.expert.leaves[name].copy()
    broken[1, 2, 3] = np.nan
    inputs = read_inputs(made.expert.config)
    with pytest.raises(UserError, match=f"the trained leaf {name}: holds values that are not finite"):
        publish(tmp_path / "contribution", made.expert.config, inputs, {**made.expert.leaves, name: broken})
    assert not list(tmp_path.iterdir())


def test_the_manifest_of_a_contribution_does_not_depend_on_the_order_of_leaves(made, tmp_path):
    inputs = read_inputs(made.expert.config)
    backwards = dict(reversed(made.expert.leaves.items()))
    published = publish(tmp_path / "contribution", made.expert.config, inputs, backwards)
    file = "contribution.json"
    assert (published / file).read_text() == (made.expert.product / file).read_text()
    leaves = json.loads((published / file).read_text())["leaves"]
    assert combined_digest(leaves) == json.loads((published / file).read_text())["digest"]


def test_settings_kept_from_an_import_come_along(tmp_path):
    anchor, corpus = small.anchor(tmp_path / "anchor"), small.corpus(tmp_path / "corpus")
    pair = [small.contribution(tmp_path / name, anchor, seed=seed) for seed, name in enumerate(["code", "news"])]
    (anchor / TOKENIZER_FOLDER).mkdir()
    (anchor / TOKENIZER_FOLDER / "generation_config.json").write_text("{}")
    merge(anchor, pair, tmp_path / "merged", top_k=2)
    tuned = small.tuned(tmp_path / "tuned", tmp_path / "merged", corpus)
    assert (tuned / TOKENIZER_FOLDER / "generation_config.json").read_text() == "{}"
