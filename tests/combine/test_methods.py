"""Another method of combining is one function that is registered; every command then knows it."""

import json

import numpy as np
import pytest

import flexolmo_jax
from flexolmo_jax.checkpoint.model_directory import read_model
from flexolmo_jax.combine.merge import METHODS
from tests.extensions.average import AVERAGE
from tests.support import small
from tests.support.small import assert_refused, flexolmo

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 12))
NAMES = ["code", "news"]


@pytest.fixture(scope="module", autouse=True)
def registered():
    METHODS["average"] = AVERAGE
    yield
    del METHODS["average"]


@pytest.fixture(scope="module")
def home(tmp_path_factory, registered):
    """An anchor, two contributions, and their average."""
    home = tmp_path_factory.mktemp("methods")
    small.anchor(home / "anchor")
    for seed, name in enumerate(NAMES, 1):
        small.contribution(home / name, home / "anchor", seed=seed)
    result = merged(home, home / "average")
    assert (result.status, result.out) == (0, f"{home}/average: anchor\n")
    return home


def merged(home, out, *arguments, names=NAMES):
    inputs = [f"--contribution={home}/{name}" for name in names]
    return flexolmo("merge", f"--anchor={home}/anchor", *inputs, f"--out={out}", "--method=average", *arguments)


def test_the_average_computes_what_an_anchor_of_averaged_leaves_computes(home, tmp_path):
    leaves = small.read_params(home / "anchor")
    experts = [small.expert_leaves(home / "anchor"), *(small.read_params(home / name) for name in NAMES)]
    means = {f"blocks/moe/anchor/{leaf}": np.mean([e[leaf] for e in experts], axis=0) for leaf in experts[0]}
    small.anchor(tmp_path / "plain", leaves=leaves | means)
    found, expected = (flexolmo_jax.load(path).logits(TOKENS) for path in (home / "average", tmp_path / "plain"))
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=1e-5)
    anchor = np.asarray(flexolmo_jax.load(home / "anchor").logits(TOKENS))
    assert np.abs(anchor - np.asarray(found)).max() > 0.1


def test_its_manifest_names_the_method_and_keeps_what_the_owners_wrote(home):
    manifest = read_model(home / "average")
    assert (manifest.method, manifest.roster) == ("average", ["anchor"])
    assert [expert.name for expert in manifest.combined] == ["anchor", *NAMES]
    for expert, name in zip(manifest.combined[1:], NAMES, strict=True):
        assert expert.contribution == json.loads((home / name / "contribution.json").read_text())


def test_the_order_of_contributions_does_not_matter(home, tmp_path):
    merged(home, tmp_path / "again", names=NAMES[::-1])
    assert small.files(tmp_path / "again") == small.files(home / "average")


def test_inspect_shows_it_and_generate_runs_it(home):
    shown = flexolmo("inspect", home / "average")
    assert (shown.status, shown.err) == (0, "")
    for word in ("average", "digests", "hold", *NAMES):
        assert word in shown.out
    result = flexolmo("generate", f"--model={home}/average", "--prompt=a", "--max_new_tokens=2")
    assert result.status == 0, result


def test_no_expert_leaves_a_method_that_does_not_keep_them(home, tmp_path):
    result = flexolmo("opt-out", f"--model={home}/average", "--expert=news", f"--out={tmp_path}/out")
    assert_refused(result, "opt-out", f"--model={home}/average", "'average'", "merge the anchor and the other")
    assert not list(tmp_path.iterdir())


def test_its_result_is_no_anchor(home, tmp_path):
    arguments = [f"--anchor={home}/average", f"--contribution={home}/news", f"--out={tmp_path}/out"]
    assert_refused(flexolmo("merge", *arguments), "merge", f"--anchor={home}/average", "a merged model", *NAMES)


def test_an_altered_leaf_is_found_although_only_a_mean_of_it_is_written(home, tmp_path):
    small.contribution(tmp_path / "news", home / "anchor", seed=2)
    chunk = tmp_path / "news" / "params" / "gate" / "c.0.0.0"
    data = bytearray(chunk.read_bytes())
    data[0] ^= 1
    chunk.write_bytes(data)
    inputs = [f"--contribution={home}/code", f"--contribution={tmp_path}/news"]
    result = flexolmo("merge", f"--anchor={home}/anchor", *inputs, f"--out={tmp_path}/out", "--method=average")
    assert_refused(result, "merge", f"--contribution={tmp_path}/news", "leaf gate", "altered")


def test_an_unknown_method_is_refused(home, tmp_path):
    arguments = [f"--anchor={home}/anchor", f"--contribution={home}/news", f"--out={tmp_path}/out"]
    assert_refused(flexolmo("merge", *arguments, "--method=vote"), "merge", "--method=vote", "stack, average")
