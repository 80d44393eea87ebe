"""Opting out: the model that never had the expert, byte for byte, and a certificate that says so."""

import json
import shutil

import numpy as np
import pytest

import flexolmo_jax
from flexolmo_jax.checkpoint.manifests import MOE
from flexolmo_jax.checkpoint.model_directory import read_contribution, read_model
from flexolmo_jax.combine.merge import merge
from flexolmo_jax.combine.opt_out import (
    AS_IMPORTED,
    EXACT,
    REMOVED_ONLY,
    ROUTER_KEPT,
    ROUTER_RETURNED,
    UNKNOWN,
    opt_out,
)
from flexolmo_jax.errors import UserError
from tests.support import small
from tests.support.small import flexolmo

CERTIFICATE_FILE = "certificate.json"
NAMES = ["code", "legal", "news"]
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 12))
GATE = MOE + "experts/gate"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """An anchor, three contributions, merges of all and of some, and the merge of all with a tuned router."""
    home = tmp_path_factory.mktemp("opt_out")
    small.corpus(home / "corpus")
    small.anchor(home / "anchor")
    for seed, name in enumerate(NAMES, 1):
        small.contribution(home / name, home / "anchor", seed=seed)
    for names in (NAMES, ["code", "news"], ["news"]):
        merge(home / "anchor", [home / name for name in names], home / "-".join(["merge", *names]), top_k=2)
    small.tuned(home / "tuned", home / "merge-code-legal-news", home / "corpus")
    small.tuned(home / "tuned-beyond", home / "merge-code-legal-news", home / "corpus", leaves=[*small.ROUTER, GATE])
    return home


def without_certificate(path):
    return {file: digest for file, digest in small.files(path).items() if file != CERTIFICATE_FILE}


def certificate_of(path):
    return json.loads((path / CERTIFICATE_FILE).read_text())


@pytest.mark.parametrize(
    ("names", "never_merged"),
    [(["legal"], "merge-code-news"), (["legal", "code"], "merge-news"), (NAMES, "anchor"), (NAMES[::-1], "anchor")],
)
def test_equals_the_merge_that_never_had_them(home, tmp_path, names, never_merged):
    certificate = opt_out(home / "merge-code-legal-news", names, tmp_path / "out")
    assert without_certificate(tmp_path / "out") == small.files(home / never_merged)
    assert certificate == certificate_of(tmp_path / "out")
    assert certificate["guarantee"] == EXACT
    assert certificate["trained_together"] == []
    roster = ["anchor", *(name for name in NAMES if name not in names)]
    assert [expert["name"] for expert in certificate["remaining"]] == roster
    removed = {name: read_contribution(home / name).digest for name in names}
    assert {expert["name"]: expert["digest"] for expert in certificate["removed"]} == removed
    assert certificate["anchor_digest"] == read_model(home / "anchor").anchor_digest


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("model", ["merge-code-legal-news", "tuned", "tuned-beyond"])
def test_several_at_once_equal_one_after_another(home, tmp_path, model, keep):
    opt_out(home / model, ["code", "news"], tmp_path / "at-once", keep)
    opt_out(home / model, ["news"], tmp_path / "first", keep)
    opt_out(tmp_path / "first", ["code"], tmp_path / "second", keep)
    assert without_certificate(tmp_path / "second") == without_certificate(tmp_path / "at-once")


def test_leaving_out_of_a_request_gives_the_same_logits(home, tmp_path):
    opt_out(home / "merge-code-legal-news", ["legal"], tmp_path / "out")
    whole = flexolmo_jax.load(home / "merge-code-legal-news")
    removed = np.asarray(flexolmo_jax.load(tmp_path / "out").logits(TOKENS))
    np.testing.assert_allclose(np.asarray(whole.logits(TOKENS, without=["legal"])), removed, atol=1e-5)
    assert np.abs(np.asarray(whole.logits(TOKENS)) - removed).max() > 0.1


def test_a_tuned_router_is_returned_to_the_merge(home, tmp_path):
    whole, tuned = (small.read_params(home / name) for name in ("merge-code-legal-news", "tuned"))
    changed = {path for path in whole if not np.array_equal(whole[path], tuned[path])}
    assert changed == set(small.ROUTER)
    certificate = opt_out(home / "tuned", ["legal"], tmp_path / "out")
    assert without_certificate(tmp_path / "out") == small.files(home / "merge-code-news")
    assert certificate["guarantee"] == ROUTER_RETURNED


def test_a_router_tuned_twice_is_returned_to_the_merge(home, tmp_path):
    small.tuned(tmp_path / "again", home / "tuned", home / "corpus", seed=10)
    opt_out(tmp_path / "again", ["legal"], tmp_path / "out")
    assert without_certificate(tmp_path / "out") == small.files(home / "merge-code-news")


def test_a_tuned_router_is_kept_where_asked(home, tmp_path):
    certificate = opt_out(home / "tuned", ["legal"], tmp_path / "kept", keep_tuned_router=True)
    assert certificate["guarantee"] == ROUTER_KEPT
    assert certificate["trained_together"] == sorted(small.ROUTER)
    never, tuned, kept = (
        small.read_params(path) for path in (home / "merge-code-news", home / "tuned", tmp_path / "kept")
    )
    for path, leaf in kept.items():
        expected = np.delete(tuned[path], 2, axis=1) if path in small.ROUTER else never[path]
        np.testing.assert_array_equal(leaf, expected)
    # What is left can still be returned to the merge, and be tuned again.
    small.tuned(tmp_path / "again", tmp_path / "kept", home / "corpus", seed=10)
    for model in ("kept", "again"):
        opt_out(tmp_path / model, ["code"], tmp_path / f"{model}-news")
        assert without_certificate(tmp_path / f"{model}-news") == small.files(home / "merge-news")


@pytest.mark.parametrize("keep", [False, True])
def test_what_else_was_tuned_is_named(home, tmp_path, keep):
    certificate = opt_out(home / "tuned-beyond", ["legal"], tmp_path / "out", keep)
    assert certificate["guarantee"] == REMOVED_ONLY
    assert certificate["trained_together"] == sorted([*small.ROUTER, GATE] if keep else [GATE])
    tuned, never, out = (
        small.read_params(path) for path in (home / "tuned-beyond", home / "merge-code-news", tmp_path / "out")
    )
    for path in (GATE, *small.ROUTER):
        source = np.delete(tuned[path], 2, axis=1) if keep or path == GATE else never[path]
        np.testing.assert_array_equal(out[path], source)
    assert read_model(tmp_path / "out").tuned.leaves == certificate["trained_together"]


def with_card(path, source, card):
    """A copy of a model whose anchor has that data card."""
    shutil.copytree(source, path)
    small.reseal(path / "model.json", lambda document: document["experts"][0].update(card=card))
    return path


@pytest.mark.parametrize(
    ("model", "keep", "guarantee"),
    [
        ("merge-code-legal-news", False, AS_IMPORTED),
        ("tuned", False, AS_IMPORTED),
        ("tuned", True, REMOVED_ONLY + UNKNOWN),
        ("tuned-beyond", False, REMOVED_ONLY + UNKNOWN),
    ],
)
def test_of_an_imported_model_no_more_is_said_than_is_known(home, tmp_path, model, keep, guarantee):
    card = {"imported": {"experts": ["anchor", *NAMES]}}
    certificate = opt_out(with_card(tmp_path / "model", home / model, card), ["legal"], tmp_path / "out", keep)
    assert certificate["guarantee"] == guarantee
    # What is left came from the import, too.
    assert opt_out(tmp_path / "out", ["news"], tmp_path / "second", keep)["guarantee"] == guarantee


@pytest.mark.parametrize("note", ["elsewhere", {"experts": ["anchor"]}, {"experts": 4}, {"experts": ["anchor", "x"]}])
def test_a_merge_on_an_imported_anchor_is_a_merge(home, tmp_path, note):
    model = with_card(tmp_path / "model", home / "merge-code-legal-news", {"imported": note})
    assert opt_out(model, ["legal"], tmp_path / "out")["guarantee"] == EXACT


def test_settings_of_the_tokenizer_come_along(home, tmp_path):
    shutil.copytree(home / "anchor", tmp_path / "anchor")
    (tmp_path / "anchor" / "hugging_face").mkdir()
    (tmp_path / "anchor" / "hugging_face" / "generation_config.json").write_text('{"temperature": 0.6}')
    merge(tmp_path / "anchor", [home / "code", home / "news"], tmp_path / "merged", top_k=2)
    opt_out(tmp_path / "merged", ["code"], tmp_path / "out")
    for path in ("merged", "out"):
        kept = tmp_path / path / "hugging_face" / "generation_config.json"
        assert kept.read_text() == '{"temperature": 0.6}'


@pytest.mark.parametrize("kept", ["merged_router", "params"])
def test_a_damaged_tuned_model_is_refused(home, tmp_path, kept):
    shutil.copytree(home / "tuned", tmp_path / "bad")
    leaf = "router/weight" if kept == "merged_router" else "up"
    chunk = min((tmp_path / "bad" / kept / f"blocks.moe.experts.{leaf.replace('/', '.')}").glob("c.*"))
    data = bytearray(chunk.read_bytes())
    data[0] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(UserError, match=f"{leaf}.*altered"):
        opt_out(tmp_path / "bad", ["legal"], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_the_command_prints_the_roster_and_the_guarantee(home, tmp_path):
    arguments = [f"--model={home}/tuned", "--expert=legal", "--expert=news"]
    result = flexolmo("opt-out", *arguments, f"--out={tmp_path}/out")
    assert (result.status, result.err) == (0, "")
    assert result.out == f"{tmp_path}/out: anchor, code\n{ROUTER_RETURNED}\n"
    result = flexolmo("opt-out", *arguments, f"--out={tmp_path}/kept", "--keep_tuned_router")
    assert result.out == f"{tmp_path}/kept: anchor, code\n{ROUTER_KEPT}\n"
