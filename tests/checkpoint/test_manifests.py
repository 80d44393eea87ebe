"""Manifests: what is written is read again, and what is damaged or altered is refused."""

import dataclasses
import hashlib
import json

import numpy as np
import pydantic
import pytest

from flexolmo_jax.checkpoint import model_directory
from flexolmo_jax.checkpoint.digests import document_digest
from flexolmo_jax.checkpoint.manifests import (
    ContributionManifest,
    ExpertRecord,
    ModelManifest,
    Tuning,
    write_manifest,
)
from flexolmo_jax.checkpoint.model_directory import read_contribution, read_model, split_experts, stack_experts
from flexolmo_jax.errors import UserError
from tests.support import small

ARCHITECTURE = dataclasses.asdict(small.ARCHITECTURE)
ANCHOR = ExpertRecord(name="anchor", leaves={"gate": "1", "router/weight": "5"}, card={})
NEWS = ContributionManifest(
    name="news",
    anchor_digest="0",
    architecture=ARCHITECTURE,
    card={"license": "none"},
    leaves={"gate": "2", "router/weight": "6"},
    statistics={"mean": "9"},
)
MERGED = ModelManifest(
    architecture=ARCHITECTURE,
    experts=[ANCHOR, ExpertRecord.of(NEWS)],
    shared={"embedding": "3"},
    top_k=2,
    tokenizer_digest="4",
    eos_id=256,
)
TUNED = MERGED.but(
    tuned=MERGED.tuned_in(small.ROUTER, {"tokens": 7}),
    experts=[expert.but(leaves={**expert.leaves, "router/weight": "8"}) for expert in MERGED.experts],
)
KINDS = {
    "model": (TUNED, model_directory.MODEL_FILE, read_model),
    "contribution": (NEWS, model_directory.CONTRIBUTION_FILE, read_contribution),
}
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
        "method": str,
    },
    "contribution": {
        "format": int,
        "name": str,
        "anchor_digest": str,
        "architecture": dict,
        "leaves": dict,
        "statistics": dict,
        "card": dict,
    },
}
OPTIONAL = ("method", "statistics")
WRONG = {  # None for `tuned` is right, and left out
    dict: [3, "junk", []],
    list: [None, 3, "junk", {}],
    int: [None, "junk", [], {}, 2.5, True],
    str: [None, 3, [], {}],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_manifest_is_read_as_it_was_written(tmp_path, kind):
    manifest, file, read = KINDS[kind]
    write_manifest(tmp_path / file, manifest)
    assert read(tmp_path) == manifest
    assert model_directory.kind_of(tmp_path) == kind
    text = (tmp_path / file).read_text()
    write_manifest(tmp_path / file, read(tmp_path))
    assert (tmp_path / file).read_text() == text


@pytest.mark.parametrize("kind", KINDS)
def test_the_digest_is_that_of_canonical_json(tmp_path, kind):
    manifest, file, _ = KINDS[kind]
    write_manifest(tmp_path / file, manifest)
    document = json.loads((tmp_path / file).read_text())
    named = document.pop("digest")
    plain = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    assert named == hashlib.sha256(plain.encode()).hexdigest()


def test_what_an_owner_wrote_besides_is_kept_everywhere(tmp_path):
    """Keys that are not known here are part of the digest, and stand in every model."""
    document = NEWS.document() | {"signature": {"ä": [1, 2.5, None]}}
    document["digest"] = document_digest(document)
    (tmp_path / "contribution.json").write_text(json.dumps(document))
    contribution = read_contribution(tmp_path)
    assert contribution.document() == document
    model = MERGED.but(experts=[ANCHOR, ExpertRecord.of(contribution, "alias")])
    write_manifest(tmp_path / "model.json", model)
    found = read_model(tmp_path).experts[1]
    assert (found.name, found.owner_name, found.digest) == ("alias", "news", document["digest"])
    assert found.contribution == document


def test_the_anchor_digest_is_that_of_the_anchor_alone():
    alone = MERGED.but(experts=MERGED.experts[:1], top_k=1)
    assert alone.anchor_digest == MERGED.anchor_digest


def test_the_anchor_digest_is_that_of_the_router_before_its_tuning():
    assert TUNED.anchor_digest == MERGED.anchor_digest


def test_the_anchor_digest_depends_on_the_shared_leaves_and_on_no_statistics():
    assert MERGED.but(shared={"embedding": "8"}).anchor_digest != MERGED.anchor_digest
    statistics = MERGED.but(experts=[ANCHOR.but(statistics={"mean": "1"}), MERGED.experts[1]])
    assert statistics.anchor_digest == MERGED.anchor_digest


def written(directory, kind, **changes):
    """Writes a manifest with other values and matching digests; None for no value."""
    manifest, file, _ = KINDS[kind]
    write_manifest(directory / file, manifest)
    small.reseal(directory / file, lambda document: document | changes)
    return directory / file


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind in TYPES for key in TYPES[kind]])
def test_a_missing_key_or_a_wrong_type_is_damage_that_names_the_key(tmp_path, kind, key):
    _, file, read = KINDS[kind]
    for value in WRONG[TYPES[kind][key]]:
        written(tmp_path, kind, **{key: value})
        with pytest.raises(UserError, match=rf"{file}: damaged \({key}: ") as caught:
            read(tmp_path)
        assert "\n" not in str(caught.value)
    written(tmp_path, kind)
    small.reseal(tmp_path / file, lambda document: {k: v for k, v in document.items() if k != key})
    if key in OPTIONAL:
        read(tmp_path)
    else:
        field = "router/weight of " if key == "tuned" else f"{key}: "  # trained, and nothing says so
        with pytest.raises(UserError, match=rf"{file}: damaged \({field}"):
            read(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "\N{NULL}", "[" * 100_000, '{"format": 2, "top_k": NaN}'])
def test_a_manifest_that_is_no_json_object_is_damaged(tmp_path, text):
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(UserError, match=r"model\.json: damaged"):
        read_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"top_k": 0}, "top_k"),
        ({"shared": {"embedding": 3}}, "shared.embedding"),
        ({"architecture": {"d_model": [1]}}, "architecture.d_model"),
        ({"experts": [{"name": "anchor", "leaves": {}}]}, "experts.0.card"),
        ({"experts": ["anchor"]}, "experts.0"),
        ({"tuned": {"leaves": []}}, "tuned.merged_router"),
        ({"tuned": {"leaves": [], "merged_router": {"anchor": {}}}}, "merged_router"),
        ({"tuned": None}, "router/weight of news differs from its owner's manifest"),
        ({"casts": {"head": {"dtypes": ["float32", "float16"], "digest": "0"}}}, "head"),
    ],
    ids=str,
)
def test_nested_records_are_checked_too(tmp_path, change, field):
    written(tmp_path, "model", **change)
    with pytest.raises(UserError, match="damaged") as caught:
        read_model(tmp_path)
    assert field in str(caught.value)


@pytest.mark.parametrize("key", ["card", "statistics", "leaves"])
def test_a_record_agrees_with_its_owners_manifest(tmp_path, key):
    def change(document):
        document["experts"][1][key] = {"gate": "other"}

    write_manifest(tmp_path / "model.json", MERGED)
    small.reseal(tmp_path / "model.json", change)
    with pytest.raises(UserError, match=f"damaged .*{key} of news differ"):
        read_model(tmp_path)


ROSTERS = [["news"], ["news", "anchor"], ["anchor", "anchor"], ["anchor", "news", "news"], ["anchor", "a/b"], []]


@pytest.mark.parametrize("roster", ROSTERS)
def test_a_roster_is_the_anchor_and_distinct_names(tmp_path, roster):
    records = [{"name": name, "leaves": {}, "card": {}} for name in roster]
    written(tmp_path, "model", experts=records, tuned=None)
    with pytest.raises(UserError, match="roster"):
        read_model(tmp_path)


@pytest.mark.parametrize("name", ["anchor", "../up", "a b", "Upper", "", "-x"])
def test_a_contribution_has_a_name_that_an_expert_may_have(tmp_path, name):
    written(tmp_path, "contribution", name=name)
    with pytest.raises(UserError, match=r"contribution\.json.*name.*lower-case"):
        read_contribution(tmp_path)
    with pytest.raises(pydantic.ValidationError):
        ContributionManifest(name=name, anchor_digest="", architecture={}, card={}, leaves={})


def test_a_digest_that_does_not_fit_is_an_alteration(tmp_path):
    for kind, (manifest, file, read) in KINDS.items():
        for key, value in {"card": {"license": "other"}, "name": "olds", "eos_id": 3, "extra": 1}.items():
            write_manifest(tmp_path / file, manifest)
            document = json.loads((tmp_path / file).read_text()) | {key: value}
            (tmp_path / file).write_text(json.dumps(document))
            with pytest.raises(UserError, match=rf"{file}: altered \(its digest is"):
                read(tmp_path)
        (tmp_path / file).unlink()
        assert kind in KINDS


def test_an_owners_manifest_inside_a_model_is_checked_too(tmp_path):
    write_manifest(tmp_path / "model.json", MERGED)
    document = json.loads((tmp_path / "model.json").read_text())
    document["experts"][1]["contribution"]["anchor_digest"] = "1"
    document["digest"] = document_digest(document)
    (tmp_path / "model.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="contribution of news"):
        read_model(tmp_path)


def test_a_tuned_router_keeps_its_casts():
    casts = {"news": {"router/weight": {"dtypes": ["float32", "bfloat16"], "digest": "7"}}}
    tuned = Tuning.model_validate({"leaves": [], "merged_router": TUNED.merged_router, "casts": casts})
    assert TUNED.but(tuned=tuned).stored_router["news"] == {"router/weight": "7"}
    assert TUNED.stored_router["news"] == {"router/weight": "6"}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_taking_a_model_apart_and_putting_it_together_gives_the_same(count):
    roster = ["anchor", "code", "news"][:count]
    name = "anchor" if count == 1 else "experts"
    shape = (2, 4) if count == 1 else (2, count, 4)
    tree = {f"blocks/moe/{name}/up": np.arange(np.prod(shape)).reshape(shape), "head": np.ones((3, 3))}
    shared, experts = split_experts(tree, roster, "the test")
    assert list(experts) == roster
    rebuilt = stack_experts(shared, experts)
    assert rebuilt.keys() == tree.keys()
    slices = rebuilt[f"blocks/moe/{name}/up"]
    whole = (slice(None), slice(None))
    values = slices.read(whole) if count == 1 else np.stack([part.read(whole) for part in slices], axis=1)
    np.testing.assert_array_equal(values, tree[f"blocks/moe/{name}/up"])
    np.testing.assert_array_equal(rebuilt["head"].read(whole), tree["head"])


@pytest.mark.parametrize(("value", "length"), [(256, 256), ("long", 4096), (-3, 4096), (True, 4096), (None, 4096)])
def test_the_context_is_a_sequence_of_the_anchors_training_where_its_card_has_the_length(value, length):
    anchor = ANCHOR.but(card={"sequence_length": value})
    assert MERGED.but(experts=[anchor, MERGED.experts[1]]).context_length == length
    assert MERGED.context_length == 4096
