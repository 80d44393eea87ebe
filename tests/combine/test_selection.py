"""Merges with a selector: what chooses experts is in the manifest, and owners join and leave exactly."""

import itertools
import json

import numpy as np
import pytest

import flexolmo_jax
from flexolmo_jax.checkpoint.manifests import MOE
from flexolmo_jax.checkpoint.model_directory import read_model
from flexolmo_jax.combine.contribution import Alias
from flexolmo_jax.combine.join import join
from flexolmo_jax.combine.merge import merge
from flexolmo_jax.combine.opt_out import EXACT, REMOVED_ONLY, ROUTER_KEPT, ROUTER_RETURNED, opt_out
from flexolmo_jax.errors import UserError
from flexolmo_jax.model.selectors import BUCKETS, LOG_SCALE, SELECTORS
from tests.support import small
from tests.support.small import assert_refused, flexolmo

NAMES = ["code", "legal", "news"]
SELECTIONS = ["ngram", "router+ngram"]
SEEDS = {"anchor": 0, "code": 1, "legal": 2, "news": 3, "code-v2": 4}
TUNED = [LOG_SCALE, *small.ROUTER]
GATE = f"{MOE}experts/gate"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """An anchor and contributions with statistics and without; for each selection merges of some, and tuned ones."""
    home = tmp_path_factory.mktemp("selection")
    small.corpus(home / "corpus")
    small.anchor(home / "plain")
    small.anchor(home / "anchor", statistics=small.ngram_statistics(SEEDS["anchor"]))
    for folder, seed in list(SEEDS.items())[1:]:
        statistics, name = small.ngram_statistics(seed), folder.removesuffix("-v2")
        small.contribution(home / folder, home / "anchor", name=name, seed=seed, statistics=statistics)
    small.contribution(home / "bare", home / "anchor", seed=9)
    for selection in SELECTIONS:
        for folders in (NAMES, ["code", "news"], ["code-v2", "news"], ["news"]):
            out = home / selection / "-".join(folders)
            merge(home / "anchor", [home / folder for folder in folders], out, top_k=2, selection=selection)
        whole = home / selection / "code-legal-news"
        small.tuned(home / selection / "tuned", whole, home / "corpus", leaves=TUNED)
        small.tuned(home / selection / "scaled", whole, home / "corpus", leaves=[LOG_SCALE])
        small.tuned(home / selection / "tuned-news", home / selection / "news", home / "corpus", leaves=TUNED)
    return home


def without_certificate(path):
    return {file: digest for file, digest in small.files(path).items() if file != "certificate.json"}


@pytest.mark.parametrize(
    ("anchor", "asked", "selection", "top_k"),
    [
        ("anchor", None, "ngram", 1),
        ("anchor", "ngram", "ngram", 1),
        ("anchor", "router+ngram", "router+ngram", 4),
        ("anchor", "router", "router", 4),
        ("plain", None, "router", 4),
    ],
)
def test_what_chooses_experts_is_in_the_manifest(home, tmp_path, anchor, asked, selection, top_k):
    merge(home / anchor, [home / name for name in NAMES], tmp_path / "out", selection=asked)
    document = json.loads((tmp_path / "out" / "model.json").read_text())
    assert document.get("selection", "router") == selection
    assert document["top_k"] == top_k
    model = flexolmo_jax.load(tmp_path / "out")
    assert model.decoder.layout.selection == selection
    selector = {path for path in model.params if path.startswith("selector/")}
    assert selector == (set() if selection == "router" else {LOG_SCALE, "selector/log_ratio"})
    stored = small.read_params(tmp_path / "out")
    assert (LOG_SCALE in stored) == (selection != "router")
    assert "selector/log_ratio" not in stored
    assert stored.get(LOG_SCALE, 0) == 0


def test_tables_are_derived_in_the_order_of_the_roster(home):
    model = flexolmo_jax.load(home / "ngram" / "code-legal-news")
    statistics = [small.ngram_statistics(SEEDS[name]) for name in model.roster]
    (expected,) = SELECTORS["ngram"].tables(statistics).values()
    np.testing.assert_array_equal(model.params["selector/log_ratio"], expected)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_any_order_gives_the_same_bytes(home, tmp_path, selection):
    for order in itertools.islice(itertools.permutations(NAMES), 3, 6):
        out = tmp_path / "-".join(order)
        merge(home / "anchor", [home / name for name in order], out, top_k=2, selection=selection)
        assert small.files(out) == small.files(home / selection / "code-legal-news")


@pytest.mark.parametrize(
    ("anchor", "contribution", "selection", "name"),
    [
        ("anchor", "bare", None, "bare"),
        ("anchor", "bare", "router+ngram", "bare"),
        ("plain", "code", "ngram", "anchor"),
    ],
)
def test_who_has_no_statistics_is_refused(home, tmp_path, anchor, contribution, selection, name):
    arguments = [f"--anchor={home / anchor}", f"--contribution={home / contribution}", f"--out={tmp_path}/out"]
    flags = [f"--selection={selection}"] if selection else []
    result = flexolmo("merge", *arguments, *flags)
    assert_refused(result, "merge", f"{name}: has no statistics", "`flexolmo statistics`", "selection=router")
    assert not list(tmp_path.iterdir())
    assert flexolmo("merge", *arguments, "--selection=router").status == 0


def test_an_unknown_selection_is_refused(home, tmp_path):
    arguments = [f"--anchor={home}/anchor", f"--contribution={home}/code", f"--out={tmp_path}/out"]
    assert_refused(flexolmo("merge", *arguments, "--selection=trigram"), "merge", "--selection=trigram", "router+ngram")


@pytest.mark.parametrize(
    ("change", "card", "words"),
    [
        ({"ngram/counts": np.full(BUCKETS, -1)}, {}, ["negative"]),
        ({"ngram/counts": np.zeros(BUCKETS)}, {}, ["positive sum"]),
        ({"ngram/counts": np.ones(7)}, {}, ["[7]"]),
        ({"ngram/mean": np.ones(7)}, {}, ["ngram/mean"]),
        ({}, {"documents": 6}, ["is 5", "says 6"]),
    ],
    ids=["negative", "zero", "misshapen", "unknown", "other documents"],
)
def test_statistics_that_are_not_valid_are_refused(home, tmp_path, change, card, words):
    statistics = small.ngram_statistics(7) | change
    small.contribution(tmp_path / "bad", home / "anchor", seed=7, statistics=statistics, card=card)
    small.anchor(tmp_path / "anchor", statistics=statistics)
    arguments = [f"--contribution={tmp_path}/bad", f"--out={tmp_path}/out"]
    for flag in (f"--anchor={home}/anchor", f"--model={home}/ngram/news"):
        assert_refused(flexolmo("merge", flag, *arguments), "merge", "the statistics of bad", *words)
    if change:
        with pytest.raises(UserError, match="the statistics of anchor"):
            merge(tmp_path / "anchor", [home / "news"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("selection", "model"),
    [("ngram", "code-legal-news"), ("ngram", "tuned"), ("ngram", "scaled"), ("router+ngram", "tuned")],
)
def test_an_opt_out_equals_the_merge_that_never_had_them(home, tmp_path, selection, model):
    for names, never in ((["legal"], "code-news"), (["legal", "code"], "news"), (NAMES, None)):
        out = tmp_path / "-".join(names)
        certificate = opt_out(home / selection / model, names, out)
        assert certificate["guarantee"] == (EXACT if model == "code-legal-news" else ROUTER_RETURNED)
        assert without_certificate(out) == small.files(home / selection / never if never else home / "anchor")


@pytest.mark.parametrize(("selection", "model"), [("ngram", "scaled"), ("router+ngram", "tuned")])
def test_a_tuned_scale_is_kept_where_asked(home, tmp_path, selection, model):
    source = home / selection / model
    certificate = opt_out(source, ["legal"], tmp_path / "kept", keep_tuned_router=True)
    assert certificate["guarantee"] == ROUTER_KEPT
    assert certificate["trained_together"] == sorted(TUNED if model == "tuned" else [LOG_SCALE])
    kept, tuned = small.read_params(tmp_path / "kept"), small.read_params(source)
    assert kept[LOG_SCALE] == tuned[LOG_SCALE] != 0
    for path in small.ROUTER:
        np.testing.assert_array_equal(kept[path], np.delete(tuned[path], 2, axis=1))
    assert flexolmo_jax.load(tmp_path / "kept").params[LOG_SCALE] == tuned[LOG_SCALE]
    # What is left can still be returned to the merge, alone or with another who joins.
    opt_out(tmp_path / "kept", ["code"], tmp_path / "news")
    assert without_certificate(tmp_path / "news") == small.files(home / selection / "news")
    join(tmp_path / "kept", [home / "legal"], tmp_path / "joined")
    assert small.files(tmp_path / "joined") == small.files(home / selection / "code-legal-news")


@pytest.mark.parametrize("model", ["tuned", "scaled"])
def test_an_anchor_alone_has_no_selector_though_the_router_is_kept(home, tmp_path, model):
    opt_out(home / "ngram" / model, NAMES, tmp_path / "kept", keep_tuned_router=True)
    manifest = read_model(tmp_path / "kept")
    assert (manifest.selection, manifest.top_k) == ("router", 1)
    assert LOG_SCALE not in small.read_params(tmp_path / "kept")
    flexolmo_jax.load(tmp_path / "kept")
    assert flexolmo("inspect", tmp_path / "kept").status == 0
    opt_out(tmp_path / "kept", [], tmp_path / "again")
    assert without_certificate(tmp_path / "again") == small.files(home / "anchor")


def test_what_else_was_tuned_is_named(home, tmp_path):
    model = home / "ngram" / "code-legal-news"
    small.tuned(tmp_path / "beyond", model, home / "corpus", leaves=[LOG_SCALE, GATE])
    certificate = opt_out(tmp_path / "beyond", ["legal"], tmp_path / "out")
    assert (certificate["guarantee"], certificate["trained_together"]) == (REMOVED_ONLY, [GATE])
    assert small.read_params(tmp_path / "out")[LOG_SCALE] == 0


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_model_tuned_twice_keeps_the_merges_router(home, tmp_path, selection):
    source = home / selection / "scaled"
    small.tuned(tmp_path / "again", source, home / "corpus", leaves=small.ROUTER, seed=3)
    assert read_model(tmp_path / "again").tuned.leaves == sorted(TUNED)
    opt_out(tmp_path / "again", ["legal"], tmp_path / "out")
    assert without_certificate(tmp_path / "out") == small.files(home / selection / "code-news")


@pytest.mark.parametrize(("selection", "model"), [("ngram", "tuned-news"), ("router+ngram", "news")])
def test_owners_join_and_update_as_if_there_from_the_start(home, tmp_path, selection, model):
    join(home / selection / model, [home / "legal", home / "code"], tmp_path / "out")
    assert small.files(tmp_path / "out") == small.files(home / selection / "code-legal-news")
    join(home / selection / model, [home / "code"], tmp_path / "two")
    join(tmp_path / "two", [home / "code-v2"], tmp_path / "v2", replace=["code"])
    assert small.files(tmp_path / "v2") == small.files(home / selection / "code-v2-news")


def test_a_model_takes_another_selection_when_an_owner_joins(home, tmp_path):
    for selection, other in itertools.permutations(SELECTIONS):
        out = tmp_path / selection
        join(home / selection / "news", [home / "code", home / "legal"], out, top_k=2, selection=other)
        assert small.files(out) == small.files(home / other / "code-legal-news")
    merge(home / "anchor", [home / "news"], tmp_path / "router", selection="router")
    join(tmp_path / "router", [home / "bare"], tmp_path / "bare")
    assert read_model(tmp_path / "bare").selection == "router"
    join(tmp_path / "router", [home / "code"], tmp_path / "out", selection="ngram")
    merge(home / "anchor", [home / "news", home / "code"], tmp_path / "start")
    assert small.files(tmp_path / "out") == small.files(tmp_path / "start")


def test_an_anchor_that_is_left_merges_by_its_selector_again(home, tmp_path):
    opt_out(home / "ngram" / "tuned-news", ["news"], tmp_path / "anchor")
    join(tmp_path / "anchor", [home / "news"], tmp_path / "out", top_k=2)
    assert small.files(tmp_path / "out") == small.files(home / "ngram" / "news")


def test_an_alias_brings_its_statistics(home, tmp_path):
    merge(home / "anchor", [Alias("python", home / "code"), home / "news"], tmp_path / "out", top_k=2)
    found, expected = (flexolmo_jax.load(path) for path in (tmp_path / "out", home / "ngram" / "code-news"))
    columns = [expected.roster.index({"python": "code"}.get(name, name)) for name in found.roster]
    tables = (np.asarray(model.params["selector/log_ratio"]) for model in (found, expected))
    np.testing.assert_array_equal(next(tables), next(tables)[:, columns])


def test_casting_the_weights_keeps_the_selector(home, tmp_path):
    inputs = [home / name for name in NAMES]
    merge(home / "anchor", inputs, tmp_path / "all", dtype="bfloat16")
    merge(home / "anchor", inputs[::2], tmp_path / "never", dtype="bfloat16")
    assert small.read_params(tmp_path / "all")[LOG_SCALE].dtype == np.float32
    small.tuned(tmp_path / "tuned", tmp_path / "all", home / "corpus", leaves=TUNED)
    for model in ("all", "tuned"):
        opt_out(tmp_path / model, ["legal"], tmp_path / f"{model}-out")
        assert without_certificate(tmp_path / f"{model}-out") == small.files(tmp_path / "never")


def test_damaged_statistics_are_found_when_a_model_is_loaded(home, tmp_path):
    merge(home / "anchor", [home / "news"], tmp_path / "model")
    file = tmp_path / "model" / "statistics" / "news.ngram.counts" / "c.0"
    file.write_bytes(np.full(BUCKETS, -1).tobytes())
    with pytest.raises(UserError, match=r"the statistics of news.*negative.*copy the directory again"):
        flexolmo_jax.load(tmp_path / "model")
    (tmp_path / "model" / "statistics" / "news.ngram.counts").rename(tmp_path / "away")
    with pytest.raises(UserError, match="news/ngram/counts"):
        flexolmo_jax.load(tmp_path / "model")
