"""Joining a merged model, and updating an expert of it: the merge from the start, byte for byte."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest

from flexolmo_jax.checkpoint.manifests import MOE
from flexolmo_jax.combine.contribution import Alias
from flexolmo_jax.combine.join import join
from flexolmo_jax.combine.merge import METHODS, merge
from flexolmo_jax.combine.opt_out import AS_IMPORTED, EXACT, opt_out
from tests.extensions.average import AVERAGE
from tests.support import small
from tests.support.small import assert_refused, flexolmo

RNG = np.random.default_rng(0)
NAMES = ["code", "legal", "news"]
STATISTICS = {"code": {"mean": RNG.standard_normal(16)}, "code-v2": {"mean": RNG.standard_normal(16)}}
GATE = MOE + "experts/gate"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """An anchor, three contributions, a second version of one, merges, and the merge of two with a tuned router."""
    home = tmp_path_factory.mktemp("join")
    small.corpus(home / "corpus")
    small.anchor(home / "anchor", statistics={"count": np.array([7])})
    for seed, (folder, name) in enumerate([*zip(NAMES, NAMES, strict=True), ("code-v2", "code")], 1):
        statistics = STATISTICS.get(folder)
        small.contribution(home / folder, home / "anchor", name=name, seed=seed, statistics=statistics)
    for folders in (["code", "news"], NAMES, ["code-v2", "news"], ["legal", "news"]):
        merge(home / "anchor", [home / folder for folder in folders], home / "-".join(["merge", *folders]), top_k=2)
    small.tuned(home / "tuned", home / "merge-code-news", home / "corpus")
    small.tuned(home / "tuned-beyond", home / "merge-code-news", home / "corpus", leaves=[*small.ROUTER, GATE])
    # None of them needs the anchor, or a contribution that was merged before.
    for folder in ("anchor", "code", "news"):
        (home / folder).rename(home / f"away-{folder}")
    return home


@pytest.mark.parametrize("model", ["merge-code-news", "tuned"])
def test_an_owner_joins_as_if_there_from_the_start(home, tmp_path, model):
    join(home / model, [home / "legal"], tmp_path / "out")
    assert small.files(tmp_path / "out") == small.files(home / "merge-code-legal-news")


@pytest.mark.parametrize("model", ["merge-code-news", "tuned"])
def test_a_second_version_replaces_the_first_as_if_there_from_the_start(home, tmp_path, model):
    join(home / model, [home / "code-v2"], tmp_path / "out", replace=["code"])
    assert small.files(tmp_path / "out") == small.files(home / "merge-code-v2-news")


def test_one_joins_while_another_is_updated_in_any_order(home, tmp_path):
    merge(home / "away-anchor", [home / "code-v2", home / "away-news", home / "legal"], tmp_path / "start", top_k=2)
    join(home / "merge-code-news", [home / "legal", home / "code-v2"], tmp_path / "at-once", replace=["code"])
    join(home / "merge-code-v2-news", [home / "legal"], tmp_path / "after")
    for path in ("at-once", "after"):
        assert small.files(tmp_path / path) == small.files(tmp_path / "start")


@pytest.mark.parametrize("keep", [False, True])
def test_joins_after_an_opt_out(home, tmp_path, keep):
    small.tuned(tmp_path / "tuned", home / "merge-code-legal-news", home / "corpus")
    opt_out(tmp_path / "tuned", ["code"], tmp_path / "left", keep_tuned_router=keep)
    join(tmp_path / "left", [home / "code-v2", Alias("law", home / "legal")], tmp_path / "joined")
    assert opt_out(tmp_path / "joined", ["law", "code"], tmp_path / "out")["guarantee"] == EXACT
    (tmp_path / "out" / "certificate.json").unlink()
    assert small.files(tmp_path / "out") == small.files(home / "merge-legal-news")


def test_an_anchor_alone_is_merged(home, tmp_path):
    opt_out(home / "merge-code-news", ["code", "news"], tmp_path / "anchor")
    join(tmp_path / "anchor", [home / "legal"], tmp_path / "out")
    merge(home / "away-anchor", [home / "legal"], tmp_path / "start", top_k=4)
    assert small.files(tmp_path / "out") == small.files(tmp_path / "start")


def test_an_alias_is_updated_by_its_name_in_the_roster(home, tmp_path):
    for folder in ("away-code", "code-v2"):
        merge(home / "away-anchor", [Alias("python", home / folder), home / "legal"], tmp_path / folder, top_k=2)
    join(tmp_path / "away-code", [Alias("python", home / "code-v2")], tmp_path / "out", replace=["python"])
    assert small.files(tmp_path / "out") == small.files(tmp_path / "code-v2")
    join(home / "merge-code-news", [Alias("code-b", home / "code-v2")], tmp_path / "beside")
    inputs = [home / "away-code", Alias("code-b", home / "code-v2"), home / "away-news"]
    merge(home / "away-anchor", inputs, tmp_path / "start", top_k=2)
    assert small.files(tmp_path / "beside") == small.files(tmp_path / "start")


@pytest.mark.parametrize(
    ("before", "dtype"), [(None, None), ("bfloat16", None), ("bfloat16", "bfloat16"), (None, "float16")]
)
def test_leaves_are_cast_as_from_the_start(tmp_path, before, dtype):
    """Owners' dtypes differ from the anchor's, so that every model has casts but that of a float32 owner."""
    small.anchor(tmp_path / "anchor")
    for seed, (name, owned) in enumerate({"a": np.float32, "b": ml_dtypes.bfloat16, "c": np.float16}.items(), 1):
        leaves = {leaf: x.astype(owned) for leaf, x in small.expert_leaves(tmp_path / "anchor", seed).items()}
        small.contribution(tmp_path / name, tmp_path / "anchor", leaves=leaves)
    first = ["a"] if dtype == "float16" else ["a", "b"]
    merge(tmp_path / "anchor", [tmp_path / name for name in first], tmp_path / "model", top_k=2, dtype=before)
    joining = [tmp_path / name for name in "abc" if name not in first]
    join(tmp_path / "model", joining, tmp_path / "out", dtype=dtype)
    merge(tmp_path / "anchor", [tmp_path / n for n in "abc"], tmp_path / "start", top_k=2, dtype=dtype or before)
    assert small.files(tmp_path / "out") == small.files(tmp_path / "start")


def test_what_would_be_rounded_twice_is_refused(home, tmp_path):
    merge(home / "away-anchor", [home / "away-code"], tmp_path / "model", top_k=2, dtype="bfloat16")
    arguments = [f"--model={tmp_path}/model", f"--contribution={home}/legal", f"--out={tmp_path}/out"]
    result = flexolmo("merge", *arguments, "--dtype=float16")
    assert_refused(result, "merge", "--dtype=float16", "was cast to bfloat16 already", "merge the anchor and all")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_another_method_takes_the_experts_of_a_model(home, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "average", AVERAGE)
    join(home / "merge-code-news", [home / "legal"], tmp_path / "out", method="average")
    inputs = [home / "away-code", home / "legal", home / "away-news"]
    merge(home / "away-anchor", inputs, tmp_path / "start", top_k=2, method="average")
    assert small.files(tmp_path / "out") == small.files(tmp_path / "start")
    arguments = [f"--model={tmp_path}/out", f"--contribution={home}/legal", f"--out={tmp_path}/again"]
    assert_refused(flexolmo("merge", *arguments), "merge", "--model=", "'average'", "merge the anchor and all")


def test_who_joined_an_imported_model_leaves_it_as_imported(home, tmp_path):
    shutil.copytree(home / "merge-code-news", tmp_path / "model")
    card = {"imported": {"experts": ["anchor", "code", "news"]}}
    small.reseal(tmp_path / "model" / "model.json", lambda document: document["experts"][0].update(card=card))
    join(tmp_path / "model", [home / "legal"], tmp_path / "joined")
    assert opt_out(tmp_path / "joined", ["legal"], tmp_path / "out")["guarantee"] == AS_IMPORTED
    small.assert_same_leaves(small.read_params(tmp_path / "out"), small.read_params(tmp_path / "model"))
    out, model = (json.loads((tmp_path / path / "model.json").read_text()) for path in ("out", "model"))
    assert out == model


def test_the_command_joins_and_updates(home, tmp_path):
    arguments = [f"--model={home}/tuned", f"--contribution={home}/legal", f"--contribution={home}/code-v2"]
    result = flexolmo("merge", *arguments, "--replace=code", "--top_k=3", f"--out={tmp_path}/out")
    assert (result.status, result.err) == (0, "")
    undone = "the router is the merge's again, its later tuning was undone"
    assert result.out == f"{tmp_path}/out: anchor, code, legal, news\n{undone}\n"
    assert json.loads((tmp_path / "out" / "model.json").read_text())["top_k"] == 3
    assert flexolmo("inspect", tmp_path / "out").status == 0


REFUSED = {
    "on the roster": (["{code}"], ["--contribution={code}", "'code'", "replace=code", "NAME={code}"]),
    "two of one name": (["{legal}", "legal={code}"], ["--contribution=legal={code}", "'legal'", "{legal}"]),
    "not on the roster": (["{code}", "--replace=x"], ["--replace=x", "not on the roster", "code, news"]),
    "the anchor": (["{code}", "--replace=anchor"], ["--replace=anchor", "every model keeps"]),
    "nothing to replace it": (["{legal}", "--replace=code"], ["--replace=code", "no contribution has that name"]),
    "with an anchor": (["{legal}", "--anchor={anchor}"], ["--model=", "goes without --anchor"]),
    "another anchor": (["{other}"], ["--contribution={other}", "another anchor"]),
    "no experts": (["{legal}", "--top_k=0"], ["--top_k=0", "at least 1"]),
    "no contribution": ([], ["--contribution", "none given"]),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_makes_no_roster_is_refused(home, tmp_path, fault):
    arguments, words = REFUSED[fault]
    paths = {"code": home / "code-v2", "legal": home / "legal", "anchor": home / "away-anchor"}
    paths["other"] = tmp_path / "other"
    small.anchor(tmp_path / "anchor", seed=5)
    small.contribution(tmp_path / "other", tmp_path / "anchor", seed=3)
    flags = [argument if argument.startswith("--") else f"--contribution={argument}" for argument in arguments]
    flags = [flag.format(**paths) for flag in flags]
    result = flexolmo("merge", f"--model={home}/merge-code-news", *flags, f"--out={tmp_path}/out")
    assert_refused(result, "merge", *(word.format(**paths) for word in words))
    assert not (tmp_path / "out").exists()


def test_only_a_merged_model_has_experts_to_replace(home, tmp_path):
    arguments = [f"--anchor={home}/away-anchor", f"--contribution={home}/code-v2", f"--out={tmp_path}/out"]
    assert_refused(flexolmo("merge", *arguments, "--replace=code"), "merge", "--replace=code", "--model")
    assert_refused(flexolmo("merge", *arguments[1:]), "merge", "--anchor: not given", "--model")


def test_a_model_with_other_leaves_trained_since_is_refused(home, tmp_path):
    arguments = [f"--contribution={home}/legal", f"--out={tmp_path}/out"]
    result = flexolmo("merge", f"--model={home}/tuned-beyond", *arguments)
    assert_refused(result, "merge", f"--model={home}/tuned-beyond", GATE, "trained since", "merge the anchor and all")


@pytest.mark.parametrize(
    ("model", "chunk", "words"),
    [
        ("merge-code-news", "params/head/c.0.0", ["leaf head", "altered"]),
        ("merge-code-news", "params/blocks.moe.experts.up/c.0.2.0.0", ["experts/up of expert news", "altered"]),
        ("merge-code-news", "statistics/code.mean/c.0", ["leaf code/mean", "altered"]),
        ("tuned", "merged_router/blocks.moe.experts.router.weight/c.0.1.0", ["router/weight of expert code"]),
        ("legal", "params/up/c.0.0.0", ["leaf up", "altered"]),
    ],
)
def test_damage_is_found_on_the_way(home, tmp_path, model, chunk, words):
    shutil.copytree(home / model, tmp_path / "bad")
    file = tmp_path / "bad" / chunk
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)
    paths = {"model": home / "merge-code-news", "contribution": home / "legal"}
    paths["contribution" if model == "legal" else "model"] = tmp_path / "bad"
    result = flexolmo("merge", *(f"--{flag}={path}" for flag, path in paths.items()), f"--out={tmp_path}/out")
    assert_refused(result, "merge", f"{tmp_path}/bad", *words)
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]
