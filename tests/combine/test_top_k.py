"""A copy of a model with another top_k: all else is the same, byte for byte, and stays so when an owner leaves."""

import json
import shutil

import pytest

from flexolmo_jax.checkpoint.model_directory import read_model
from flexolmo_jax.combine.merge import merge
from flexolmo_jax.combine.opt_out import opt_out
from flexolmo_jax.combine.top_k import copy_with_top_k
from flexolmo_jax.errors import ArgumentError, UserError
from tests.support import small

NAMES = ["code", "legal", "news"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """An anchor, three contributions with statistics, and merges of them with top_k 2 and others."""
    home = tmp_path_factory.mktemp("top_k")
    counts = {"tokens": small.random_leaves(7)["final_norm/scale"]}
    small.corpus(home / "corpus")
    small.anchor(home / "anchor", statistics=counts)
    for seed, name in enumerate(NAMES, 1):
        small.contribution(home / name, home / "anchor", seed=seed, statistics=counts)
    for names, top_k in ((NAMES, 1), (NAMES, 2), (NAMES, 4), (["code", "news"], 4), (["code", "news"], 1)):
        merge(home / "anchor", [home / name for name in names], home / f"{len(names)}-top-{top_k}", top_k)
    return home


@pytest.mark.parametrize("top_k", [1, 4])
def test_a_copy_is_the_merge_with_that_top_k(home, tmp_path, top_k):
    made = copy_with_top_k(home / "3-top-2", top_k, tmp_path / "copy")
    assert small.files(tmp_path / "copy") == small.files(home / f"3-top-{top_k}")
    assert made == read_model(tmp_path / "copy")


@pytest.mark.parametrize("top_k", [1, 4])
def test_opting_out_of_a_copy_equals_the_merge_without_that_expert(home, tmp_path, top_k):
    copy_with_top_k(home / "3-top-2", top_k, tmp_path / "copy")
    opt_out(tmp_path / "copy", ["legal"], tmp_path / "out")
    found = small.files(tmp_path / "out")
    del found["certificate.json"]
    assert found == small.files(home / f"2-top-{top_k}")


def test_all_that_a_model_may_hold_is_copied(home, tmp_path):
    """A tuned router, the merged one beside it, a certificate, a public sample and settings of a tokenizer."""
    small.tuned(tmp_path / "tuned", home / "3-top-2", home / "corpus")
    opt_out(tmp_path / "tuned", ["legal"], tmp_path / "model", keep_tuned_router=True)
    small.corpus(tmp_path / "model" / "public")
    (tmp_path / "model" / "hugging_face").mkdir()
    (tmp_path / "model" / "hugging_face" / "tokenizer_config.json").write_text("{}")
    copy_with_top_k(tmp_path / "model", 1, tmp_path / "copy")
    before, after = small.files(tmp_path / "model"), small.files(tmp_path / "copy")
    assert {path.split("/")[0] for path in before} == {
        *("model.json", "params", "statistics", "merged_router", "tokenizer.json", "hugging_face", "public"),
        "certificate.json",
    }
    assert before.keys() == after.keys()
    assert [path for path in before if before[path] != after[path]] == ["model.json"]
    old, new = (json.loads((tmp_path / name / "model.json").read_text()) for name in ("model", "copy"))
    assert [key for key in old if old[key] != new[key]] == ["top_k", "digest"]
    assert (old["top_k"], new["top_k"], list(old)) == (2, 1, list(new))


@pytest.mark.parametrize("folder", ["params", "statistics", "merged_router"])
def test_a_damaged_leaf_is_refused(home, tmp_path, folder):
    small.tuned(tmp_path / "model", home / "3-top-2", home / "corpus")
    chunk = sorted((tmp_path / "model" / folder).rglob("c.*"))[0]
    data = bytearray(chunk.read_bytes())
    data[0] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(UserError, match="altered"):
        copy_with_top_k(tmp_path / "model", 1, tmp_path / "copy")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_bad_arguments_are_refused(home, tmp_path):
    for top_k in (0, 5):
        with pytest.raises(ArgumentError, match=f"top_k={top_k}: must be from 1 to 4"):
            copy_with_top_k(home / "3-top-2", top_k, tmp_path / "copy")
    with pytest.raises(UserError, match=r"anchor: has one expert, .*; give a merged model"):
        copy_with_top_k(home / "anchor", 1, tmp_path / "copy")
    with pytest.raises(UserError, match="copy: exists already"):
        copy_with_top_k(home / "3-top-2", 1, shutil.copytree(home / "3-top-1", tmp_path / "copy"))
    (tmp_path / "copy" / "foreign").write_text("")
    with pytest.raises(UserError, match="copy: holds foreign, which is no part of it"):
        copy_with_top_k(tmp_path / "copy", 2, tmp_path / "out")
    assert small.files(tmp_path / "copy").keys() - {"foreign"} == small.files(home / "3-top-1").keys()
    assert not (tmp_path / "out").exists()
