"""Manifests: what is written is read again, and what is damaged is refused."""

import dataclasses
import json

import numpy as np
import pytest

from flexolmo_jax.checkpoint import directories
from flexolmo_jax.checkpoint.directories import Contribution, Expert, Model
from flexolmo_jax.errors import UserError
from tests.support import small

MODEL = Model(
    architecture=dataclasses.asdict(small.ARCHITECTURE),
    experts=(Expert("anchor", {"gate": "1"}, {}), Expert("news", {"gate": "2"}, {"license": "none"})),
    shared={"embedding": "3"},
    top_k=2,
    tokenizer_digest="4",
    eos_id=256,
    tuned={
        "leaves": list(small.ROUTER),
        "merged_router": {"anchor": {"router/weight": "5"}, "news": {"router/weight": "6"}},
        "card": {"tokens": 7},
    },
)
CONTRIBUTION = Contribution(MODEL.experts[1], MODEL.anchor_digest, MODEL.architecture)
KINDS = {"model": (MODEL, directories.MODEL_FILE), "contribution": (CONTRIBUTION, directories.CONTRIBUTION_FILE)}
TYPES = {
    "model": {
        "format": int,
        "architecture": dict,
        "experts": list,
        "shared": dict,
        "top_k": int,
        "tokenizer_digest": str,
        "eos_id": int,
        "tuned": dict,
    },
    "contribution": {
        "format": int,
        "expert": str,
        "anchor_digest": str,
        "architecture": dict,
        "leaves": dict,
        "card": dict,
    },
}
WRONG = {  # None for `tuned` is right, and left out
    dict: [3, "junk", []],
    list: [None, 3, "junk", {}],
    int: [None, "junk", [], {}],
    str: [None, 3, [], {}],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_manifest_is_read_as_it_was_written(tmp_path, kind):
    manifest, _ = KINDS[kind]
    manifest.write(tmp_path)
    assert type(manifest).read(tmp_path, flag="--x") == manifest
    assert directories.kind_of(tmp_path) == kind


def test_the_anchor_digest_is_that_of_the_anchor_alone():
    merged = dataclasses.replace(MODEL, tuned=None)
    alone = dataclasses.replace(merged, experts=merged.experts[:1], top_k=1)
    assert alone.anchor_digest == merged.anchor_digest


def test_the_anchor_digest_is_that_of_the_router_before_its_tuning():
    merged = Expert("anchor", {"gate": "1", "router/weight": "5"}, {})
    untuned = dataclasses.replace(MODEL, experts=(merged, MODEL.experts[1]), tuned=None)
    assert MODEL.anchor_digest == untuned.anchor_digest


def test_the_anchor_digest_depends_on_the_shared_leaves():
    other = dataclasses.replace(MODEL, shared={"embedding": "8"})
    assert other.anchor_digest != MODEL.anchor_digest


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind in TYPES for key in TYPES[kind]])
def test_a_manifest_with_a_missing_key_or_a_wrong_type_is_damaged(tmp_path, kind, key):
    manifest, file = KINDS[kind]
    manifest.write(tmp_path)
    document = json.loads((tmp_path / file).read_text())
    without = {k: v for k, v in document.items() if k != key}
    for broken in [without, *({**document, key: value} for value in WRONG[TYPES[kind][key]])]:
        (tmp_path / file).write_text(json.dumps(broken))
        with pytest.raises(UserError, match=rf"{file}: (damaged|format)"):
            type(manifest).read(tmp_path, flag="--x")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "\N{NULL}"])
def test_a_manifest_that_is_no_json_object_is_damaged(tmp_path, text):
    (tmp_path / directories.MODEL_FILE).write_text(text)
    with pytest.raises(UserError, match=r"model\.json: damaged"):
        Model.read(tmp_path, flag="--x")


def test_nested_records_are_checked_too(tmp_path):
    MODEL.write(tmp_path)
    document = json.loads((tmp_path / directories.MODEL_FILE).read_text())
    for change in (
        {"top_k": 0},
        {"shared": {"embedding": 3}},
        {"architecture": {"d_model": "wide"}},
        {"experts": [{"name": "anchor", "leaves": {}}]},
        {"experts": ["anchor"]},
        {"tuned": {"leaves": []}},
        {"tuned": {"leaves": [], "merged_router": {"anchor": {}}}},
    ):
        (tmp_path / directories.MODEL_FILE).write_text(json.dumps(document | change))
        with pytest.raises(UserError, match="damaged"):
            Model.read(tmp_path, flag="--x")


ROSTERS = [["news"], ["news", "anchor"], ["anchor", "anchor"], ["anchor", "news", "news"], ["anchor", "a/b"], []]


@pytest.mark.parametrize("roster", ROSTERS)
def test_a_roster_is_the_anchor_and_distinct_names(tmp_path, roster):
    experts = tuple(Expert(name, {}, {}) for name in roster)
    MODEL.write(tmp_path)
    document = json.loads((tmp_path / directories.MODEL_FILE).read_text())
    document |= {"experts": [dataclasses.asdict(expert) for expert in experts], "tuned": None}
    (tmp_path / directories.MODEL_FILE).write_text(json.dumps(document))
    with pytest.raises(UserError, match="roster"):
        Model.read(tmp_path, flag="--x")


@pytest.mark.parametrize("name", ["anchor", "../up", "a b", "Upper", "", "-x"])
def test_a_contribution_has_a_name_that_an_expert_may_have(tmp_path, name):
    expert = dataclasses.replace(CONTRIBUTION.expert, name=name)
    dataclasses.replace(CONTRIBUTION, expert=expert).write(tmp_path)
    with pytest.raises(UserError, match=r"contribution\.json.*lower-case"):
        Contribution.read(tmp_path, flag="--x")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_taking_a_model_apart_and_putting_it_together_gives_the_same(count):
    roster = ["anchor", "code", "news"][:count]
    name = "anchor" if count == 1 else "experts"
    shape = (2, 4) if count == 1 else (2, count, 4)
    tree = {f"blocks/moe/{name}/up": np.arange(np.prod(shape)).reshape(shape), "head": np.ones((3, 3))}
    shared, experts = directories.model_slices(tree, roster, "the test")
    assert list(experts) == roster
    rebuilt = directories.model_leaves(shared, experts)
    assert rebuilt.keys() == tree.keys()
    parts = rebuilt[f"blocks/moe/{name}/up"]
    whole = (slice(None), slice(None))
    values = parts.read(whole) if count == 1 else np.stack([part.read(whole) for part in parts], axis=1)
    np.testing.assert_array_equal(values, tree[f"blocks/moe/{name}/up"])
    np.testing.assert_array_equal(rebuilt["head"].read(whole), tree["head"])


@pytest.mark.parametrize(("said", "length"), [(256, 256), ("long", None), (-3, None), (True, None), (None, None)])
def test_the_length_of_a_row_is_what_the_anchors_card_says(said, length):
    anchor = dataclasses.replace(MODEL.experts[0], card={"sequence_length": said})
    assert dataclasses.replace(MODEL, experts=(anchor, MODEL.experts[1])).sequence_length == length
    assert MODEL.sequence_length is None
