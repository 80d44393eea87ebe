"""Statistics of owners: a merge carries them as they are, an opt-out drops them, no anchor's digest covers them."""

import json
import shutil

import numpy as np
import pytest

from flexolmo_jax.checkpoint.model_directory import read_contribution, read_model
from flexolmo_jax.checkpoint.params import open_tree, read_block
from flexolmo_jax.combine.contribution import Alias
from flexolmo_jax.combine.merge import merge
from flexolmo_jax.combine.opt_out import opt_out
from flexolmo_jax.interop import parity
from tests.support import small
from tests.support.small import assert_refused, flexolmo

RNG = np.random.default_rng(0)
STATISTICS = {
    "anchor": {"count": np.array([7])},
    "code": {"moment/second": RNG.standard_normal((2, 16, 16)), "mean": RNG.standard_normal(16).astype(np.float32)},
    "legal": {},
    "news": {"mean": RNG.standard_normal(16).astype(np.float32)},
}
NAMES = ["code", "legal", "news"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """An anchor and contributions with statistics and without any, merges of all and of some, and a tuned one."""
    home = tmp_path_factory.mktemp("statistics")
    small.corpus(home / "corpus")
    small.anchor(home / "plain", leaves=unbiased(small.random_leaves(0)))
    small.anchor(home / "anchor", leaves=unbiased(small.random_leaves(0)), statistics=STATISTICS["anchor"])
    for seed, name in enumerate(NAMES, 1):
        leaves = unbiased(small.expert_leaves(home / "anchor", seed))
        small.contribution(home / name, home / "anchor", leaves=leaves, statistics=STATISTICS[name])
    for names in (NAMES, ["legal", "news"]):
        merge(home / "anchor", [home / name for name in names], home / "-".join(["merge", *names]), top_k=2)
    small.tuned(home / "tuned", home / "merge-code-legal-news", home / "corpus", leaves=small.ROUTER[:1])
    return home


def unbiased(leaves):
    return {path: leaf * (not path.endswith("bias")) for path, leaf in leaves.items()}


def stored(directory):
    tree = open_tree(directory / "statistics")
    return {path: read_block(leaf, (slice(None),) * len(leaf.shape), path) for path, leaf in tree.items()}


def expected(*names):
    return {f"{name}/{leaf}": x for name in ("anchor", *names) for leaf, x in STATISTICS[name].items()}


def test_an_anchor_has_the_same_digest_with_statistics_and_without(home):
    assert read_model(home / "anchor").anchor_digest == read_model(home / "plain").anchor_digest
    assert read_model(home / "anchor") != read_model(home / "plain")


def test_a_contribution_names_the_digest_of_each(home):
    assert read_contribution(home / "code").statistics.keys() == STATISTICS["code"].keys()
    assert not (home / "legal" / "statistics").exists()
    small.assert_same_leaves(stored(home / "code"), STATISTICS["code"])


@pytest.mark.parametrize("model", ["merge-code-legal-news", "tuned"])
def test_a_model_keeps_them_as_they_were(home, model):
    small.assert_same_leaves(stored(home / model), expected(*NAMES))
    for expert in read_model(home / model).experts[1:]:
        assert expert.statistics == read_contribution(home / expert.name).statistics


def test_casting_the_weights_does_not_cast_them(home, tmp_path):
    merge(home / "anchor", [home / "code"], tmp_path / "out", top_k=2, dtype="bfloat16")
    small.assert_same_leaves(stored(tmp_path / "out"), expected("code"))


def test_an_alias_names_them_too(home, tmp_path):
    merge(home / "anchor", [Alias("press", home / "news")], tmp_path / "out", top_k=2)
    assert stored(tmp_path / "out").keys() == {"anchor/count", "press/mean"}
    assert flexolmo("inspect", tmp_path / "out").status == 0


@pytest.mark.parametrize("model", ["merge-code-legal-news", "tuned"])
def test_they_leave_with_their_owner(home, tmp_path, model):
    opt_out(home / model, ["code"], tmp_path / "out")
    (tmp_path / "out" / "certificate.json").unlink()
    assert small.files(tmp_path / "out") == small.files(home / "merge-legal-news")
    opt_out(home / model, NAMES, tmp_path / "alone")
    (tmp_path / "alone" / "certificate.json").unlink()
    assert small.files(tmp_path / "alone") == small.files(home / "anchor")


def test_inspect_names_them(home):
    for name in ("code", "merge-code-legal-news"):
        result = flexolmo("inspect", home / name)
        assert (result.status, result.err) == (0, "")
        assert "code: mean, moment/second" in " ".join(result.out.split())
    assert "mean" not in flexolmo("inspect", home / "legal").out


def test_they_survive_a_journey_to_hugging_face(home, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "transformers_installed", lambda: False)
    result = flexolmo("export-hf", f"--model={home}/merge-code-legal-news", f"--out={tmp_path}/hf")
    assert result.status == 0, result
    assert flexolmo("import-hf", f"--source={tmp_path}/hf", f"--out={tmp_path}/back").status == 0
    assert small.files(tmp_path / "back") == small.files(home / "merge-code-legal-news")


def flip(file):
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)


def rename(file):
    """Has the index and the folder of a leaf name another one."""
    index = file.parents[1] / "_METADATA"
    index.write_text(index.read_text().replace('"mean"', '"median"').replace("'mean'", "'median'"))
    file.parent.rename(file.parent.with_name(file.parent.name.replace("mean", "median")))


@pytest.mark.parametrize("command", ["merge", "inspect"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip, ["leaf mean", "altered"]),
        (lambda file: shutil.rmtree(file.parents[1]), ["statistics", "mean", "missing"]),
        (rename, ["statistics", "mean"]),
    ],
    ids=["altered", "missing", "renamed"],
)
def test_damage_is_found(home, tmp_path, damage, words, command):
    shutil.copytree(home / "news", tmp_path / "news")
    damage(tmp_path / "news" / "statistics" / "mean" / "c.0")
    arguments = {
        "merge": [f"--anchor={home}/anchor", f"--contribution={tmp_path}/news", f"--out={tmp_path}/out"],
        "inspect": [tmp_path / "news"],
    }
    assert_refused(flexolmo(command, *arguments[command]), command, tmp_path / "news", *words)
    assert [path.name for path in tmp_path.iterdir()] == ["news"]


def test_statistics_that_no_manifest_names_are_refused(home, tmp_path):
    shutil.copytree(home / "legal", tmp_path / "legal")
    shutil.copytree(home / "news" / "statistics", tmp_path / "legal" / "statistics")
    assert_refused(flexolmo("inspect", tmp_path / "legal"), "inspect", "statistics", "not in its manifest")


@pytest.mark.parametrize("values", [np.ones(3, np.uint8), np.ones(3, np.int16)], ids=["uint8", "int16"])
def test_numbers_of_other_kinds_are_refused(home, tmp_path, values):
    small.contribution(tmp_path / "bad", home / "anchor", seed=1, statistics={"mean": values})
    arguments = [f"--anchor={home}/anchor", f"--contribution={tmp_path}/bad", f"--out={tmp_path}/out"]
    assert_refused(flexolmo("merge", *arguments), "merge", "--contribution=", "mean", values.dtype.name, "float64")


def test_values_that_are_not_finite_are_refused(home, tmp_path):
    small.contribution(tmp_path / "bad", home / "anchor", seed=1, statistics={"mean": np.ones(3)})
    file = tmp_path / "bad" / "statistics" / "mean" / "c.0"
    file.write_bytes(np.full(3, np.nan).tobytes())
    arguments = [f"--anchor={home}/anchor", f"--contribution={tmp_path}/bad", f"--out={tmp_path}/out"]
    assert_refused(flexolmo("merge", *arguments), "merge", "leaf mean", "not finite")


def test_the_manifest_is_the_owners_word_for_word(home):
    record = json.loads((home / "tuned" / "model.json").read_text())["experts"][1]
    assert record["contribution"] == json.loads((home / "code" / "contribution.json").read_text())
