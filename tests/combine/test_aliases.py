"""Owners who chose one name: the coordinator gives one of their experts another, and what the owner wrote stays."""

import json

import pytest

from flexolmo_jax.combine.contribution import Alias
from flexolmo_jax.combine.merge import merge
from tests.support import small
from tests.support.small import assert_refused, flexolmo


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """An anchor, two contributions called code, and one called news."""
    home = tmp_path_factory.mktemp("aliases")
    small.anchor(home / "anchor")
    for seed, (folder, name) in enumerate([("a", "code"), ("b", "code"), ("news", "news")], 1):
        small.contribution(home / folder, home / "anchor", name=name, seed=seed)
    return home


def merged(home, out, *contributions):
    flags = [f"--contribution={contribution}" for contribution in contributions]
    return flexolmo("merge", f"--anchor={home}/anchor", *flags, f"--out={out}", "--top_k=2")


def roster(model):
    return [expert["name"] for expert in json.loads((model / "model.json").read_text())["experts"]]


def test_two_owners_of_one_name_in_any_order(home, tmp_path):
    contributions = [f"{home}/a", f"zeta={home}/b", f"{home}/news"]
    for out, ordered in (("one", contributions), ("two", contributions[::-1])):
        result = merged(home, tmp_path / out, *ordered)
        assert (result.status, result.err) == (0, "")
        assert result.out.endswith("anchor, code, news, zeta\n")
    assert small.files(tmp_path / "one") == small.files(tmp_path / "two")
    # The weights are those of a merge of owners who chose these names.
    small.contribution(tmp_path / "c", home / "anchor", name="zeta", leaves=small.read_params(home / "b"))
    merge(home / "anchor", [home / "a", home / "news", tmp_path / "c"], tmp_path / "plain", top_k=2)
    small.assert_same_leaves(small.read_params(tmp_path / "one"), small.read_params(tmp_path / "plain"))


def test_the_owners_manifest_stands_beside_the_alias(home, tmp_path):
    merged(home, tmp_path / "model", f"{home}/a", f"code-b={home}/b")
    _, a, b = json.loads((tmp_path / "model" / "model.json").read_text())["experts"]
    for record, folder, name in ((a, "a", "code"), (b, "b", "code-b")):
        manifest = json.loads((home / folder / "contribution.json").read_text())
        assert record["contribution"] == manifest
        assert (record["name"], manifest["name"], record["digest"]) == (name, "code", manifest["digest"])
    shown = " ".join(flexolmo("inspect", tmp_path / "model").out.split())
    assert "code-b" in shown
    assert "owner's" in shown


def test_an_alias_opts_out_exactly_and_is_named_in_the_certificate(home, tmp_path):
    merged(home, tmp_path / "model", f"{home}/a", f"code-b={home}/b", f"n2={home}/news")
    merged(home, tmp_path / "never", f"{home}/a", f"n2={home}/news")
    result = flexolmo("opt-out", f"--model={tmp_path}/model", "--expert=code-b", f"--out={tmp_path}/out")
    assert result.status == 0
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text())
    digest = json.loads((home / "b" / "contribution.json").read_text())["digest"]
    assert certificate["removed"] == [{"name": "code-b", "digest": digest, "owner_name": "code"}]
    assert [line.get("owner_name") for line in certificate["remaining"]] == [None, None, "news"]
    (tmp_path / "out" / "certificate.json").unlink()
    assert small.files(tmp_path / "out") == small.files(tmp_path / "never")


def test_the_owners_own_name_is_no_alias(home, tmp_path):
    merged(home, tmp_path / "alias", f"code={home}/a")
    merged(home, tmp_path / "plain", home / "a")
    assert small.files(tmp_path / "alias") == small.files(tmp_path / "plain")
    merge(home / "anchor", [Alias("code", home / "a")], tmp_path / "python", top_k=2)
    assert small.files(tmp_path / "python") == small.files(tmp_path / "plain")


def test_a_directory_that_exists_is_that_directory(home, tmp_path):
    small.contribution(tmp_path / "a=b", home / "anchor", name="news", seed=1)
    assert merged(home, tmp_path / "one", tmp_path / "a=b").status == 0
    assert roster(tmp_path / "one") == ["anchor", "news"]
    assert merged(home, tmp_path / "two", f"x={tmp_path}/a=b").status == 0
    assert roster(tmp_path / "two") == ["anchor", "x"]


def test_a_relative_directory_that_exists_is_that_directory(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small.contribution(tmp_path / "x=y", home / "anchor", name="news", seed=1)
    (tmp_path / "y").mkdir()
    assert merged(home, tmp_path / "one", "x=y").status == 0


@pytest.mark.parametrize(
    ("contributions", "words"),
    [
        (["{home}/a", "{home}/b"], ["{home}/b", "'code'", "{home}/a", "NAME={home}/b"]),
        (["x={home}/a", "x={home}/b"], ["{home}/b", "'x'", "{home}/a", "NAME="]),
        (["news={home}/a", "{home}/news"], ["{home}/news", "'news'"]),
        (["News={home}/a"], ["'News' is no name", "lower-case"]),
        (["anchor={home}/a"], ["'anchor' is no name", "not 'anchor'"]),
        (["={home}/a"], ["'' is no name"]),
        (["a b={home}/a"], ["'a b' is no name"]),
        (["x="], ["names no directory", "NAME=DIR"]),
        (["x={home}/nosuch"], ["{home}/nosuch", "no such directory"]),
        (["{home}/no=such"], ["{home}/no=such", "no such directory"]),
        (["x={home}/anchor"], ["{home}/anchor", "is a model directory"]),
    ],
)
def test_what_makes_no_roster_is_refused(home, tmp_path, contributions, words):
    result = merged(home, tmp_path / "out", *(contribution.format(home=home) for contribution in contributions))
    assert_refused(result, "merge", "--contribution=", *(word.format(home=home) for word in words))
    assert not list(tmp_path.iterdir())
