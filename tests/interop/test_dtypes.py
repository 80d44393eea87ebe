"""Dtypes through Hugging Face's form and back: bytes, digests and logits, for each dtype and between them."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest

from flexolmo_jax.checkpoint.model_directory import read_contribution, read_model
from flexolmo_jax.combine.merge import merge
from tests.support import small
from tests.support.small import assert_refused, flexolmo

pytestmark = pytest.mark.usefixtures("no_transformers")

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


def unbiased(leaves):
    return {name: np.zeros_like(x) if name.endswith("router/bias") else x for name, x in leaves.items()}


@pytest.fixture(scope="module", params=DTYPES)
def home(request, tmp_path_factory):
    """An anchor of one dtype, contributions of that and of float32, their merge, and the merge with a tuned router."""
    home = tmp_path_factory.mktemp("dtypes") / request.param
    home.mkdir()
    small.corpus(home / "corpus")
    leaves = unbiased(small.random_leaves(0, dtype=DTYPES[request.param]))
    small.anchor(home / "anchor", leaves=leaves)
    for seed, name in enumerate(["code", "news"], 1):
        trained = unbiased(small.expert_leaves(home / "anchor", seed))
        trained = {leaf: x.astype(np.float32) for leaf, x in trained.items()} if name == "news" else trained
        if name == "news":
            trained["up"] += 1e-6  # not representable in the shorter dtypes
        small.contribution(home / name, home / "anchor", leaves=trained)
    merge(home / "anchor", [home / "code", home / "news"], home / "merged", top_k=3)
    small.tuned(home / "tuned", home / "merged", home / "corpus", leaves=small.ROUTER[:1])
    return home


def run(command, *flags):
    result = flexolmo(command, *flags)
    assert (result.status, result.err) == (0, ""), result
    return result.out


@pytest.mark.parametrize("kind", ["anchor", "merged", "tuned"])
def test_what_goes_out_comes_back(home, tmp_path, kind):
    run("export-hf", f"--model={home}/{kind}", f"--out={tmp_path}/out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == home.name
    printed = run("import-hf", f"--source={tmp_path}/out", f"--out={tmp_path}/back")
    assert "changed" not in printed
    assert small.files(tmp_path / "back") == small.files(home / kind)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_export_in_another_dtype_comes_back_as_the_merge_in_that_dtype(home, tmp_path, dtype):
    run("export-hf", f"--model={home}/merged", f"--out={tmp_path}/out", f"--dtype={dtype}")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    assert "changed" not in run("import-hf", f"--source={tmp_path}/out", f"--out={tmp_path}/back")
    before, after = (read_model(path) for path in (home / "merged", tmp_path / "back"))
    assert after.anchor_digest == before.anchor_digest
    assert [e.digest for e in after.experts] == [e.digest for e in before.experts]
    plain = {path: x.astype(DTYPES[dtype]) for path, x in small.read_params(home / "merged").items()}
    small.assert_same_leaves(small.read_params(tmp_path / "back"), plain)
    assert flexolmo("inspect", tmp_path / "back").status == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tuned_export_in_another_dtype_opts_out_to_the_merge_in_that_dtype(home, tmp_path, dtype):
    run("export-hf", f"--model={home}/tuned", f"--out={tmp_path}/out", f"--dtype={dtype}")
    run("import-hf", f"--source={tmp_path}/out", f"--out={tmp_path}/back")
    run("opt-out", f"--model={tmp_path}/back", "--expert=news", f"--out={tmp_path}/without")
    (tmp_path / "without" / "certificate.json").unlink()
    merge(home / "anchor", [home / "code"], tmp_path / "never", top_k=3, dtype=dtype)
    assert small.files(tmp_path / "without") == small.files(tmp_path / "never")


def test_biases_are_dropped_in_another_dtype(home, tmp_path):
    trained = small.expert_leaves(home / "anchor", 3)
    small.contribution(tmp_path / "math", home / "anchor", leaves=trained)
    merge(home / "anchor", [home / "news", tmp_path / "math"], tmp_path / "biased", top_k=3)
    run("export-hf", f"--model={tmp_path}/biased", f"--out={tmp_path}/out", "--dtype=float16", "--drop_bias")
    run("import-hf", f"--source={tmp_path}/out", f"--out={tmp_path}/back")
    run("opt-out", f"--model={tmp_path}/back", "--expert=news", f"--out={tmp_path}/without")
    (tmp_path / "without" / "certificate.json").unlink()
    merge(home / "anchor", [tmp_path / "math"], tmp_path / "never", top_k=3, dtype="float16")
    assert small.files(tmp_path / "without") == small.files(tmp_path / "never")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pair_of_another_dtype_is_a_contribution(home, tmp_path, dtype):
    """Exported, with the folder of ours, it comes back with its owner's digests; without, it is what it is now."""
    trained = small.read_params(home / "news")
    pair = [f"--contribution={home}/news", f"--anchor={home}/anchor"]
    run("export-hf", *pair, f"--out={tmp_path}/pair", f"--dtype={dtype}")
    imports = [f"--source={tmp_path}/pair", "--as-contribution", f"--anchor={home}/anchor", "--expert=news"]
    run("import-hf", *imports, f"--out={tmp_path}/news")
    original, imported = (read_contribution(path) for path in (home / "news", tmp_path / "news"))
    assert (imported.digest, imported.card) == (original.digest, original.card)
    rounded = {leaf: x.astype(DTYPES[dtype]) for leaf, x in trained.items()}
    small.assert_same_leaves(small.read_params(tmp_path / "news"), rounded)
    assert flexolmo("inspect", tmp_path / "news").status == 0
    if dtype == home.name:  # the merge would round it to that dtype too
        merge(home / "anchor", [home / "code", tmp_path / "news"], tmp_path / "merged", top_k=3)
        assert small.files(tmp_path / "merged") == small.files(home / "merged")
    if dtype == "float32":
        assert small.files(tmp_path / "news") == small.files(home / "news")
    shutil.rmtree(tmp_path / "pair" / "flexolmo")
    run("import-hf", *imports, f"--out={tmp_path}/published")
    small.assert_same_leaves(small.read_params(tmp_path / "published"), rounded)
    merge(home / "anchor", [home / "code", tmp_path / "published"], tmp_path / "with-published", top_k=3)
    found = small.read_params(tmp_path / "with-published")["blocks/moe/experts/up"][:, 2]
    expected = rounded["up"].astype(np.float32).astype(DTYPES[home.name])
    assert found.tobytes() == expected.tobytes()


def test_a_pair_that_went_by_way_of_a_wider_dtype_is_its_owners_again(home, tmp_path):
    anchor = f"--anchor={home}/anchor"
    run("export-hf", f"--contribution={home}/code", anchor, f"--out={tmp_path}/pair", "--dtype=float32")
    imports = [f"--source={tmp_path}/pair", "--as-contribution", anchor, "--expert=code"]
    run("import-hf", *imports, f"--out={tmp_path}/code")
    merge(home / "anchor", [tmp_path / "code", home / "news"], tmp_path / "by-way", top_k=3)
    assert small.files(tmp_path / "by-way") == small.files(home / "merged")


def test_a_pair_of_another_dtype_and_another_anchor_is_no_contribution(home, tmp_path):
    leaves = unbiased(small.random_leaves(0, dtype=DTYPES[home.name]))
    leaves["embedding"][3, 4] += 1
    small.anchor(tmp_path / "other", leaves=leaves)
    pair = [f"--contribution={home}/news", f"--anchor={home}/anchor"]
    run("export-hf", *pair, f"--out={tmp_path}/pair", "--dtype=float32")
    shutil.rmtree(tmp_path / "pair" / "flexolmo")
    flags = [f"--source={tmp_path}/pair", "--as-contribution", f"--anchor={tmp_path}/other", "--expert=news"]
    result = flexolmo("import-hf", *flags, f"--out={tmp_path}/news")
    assert_refused(result, "import-hf", "model.embed_tokens.weight is not the anchor's")


def test_what_was_changed_outside_keeps_what_is_known_of_the_rest(home, tmp_path):
    run("export-hf", f"--model={home}/merged", f"--out={tmp_path}/out", "--dtype=float16")
    weights = tmp_path / "out" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    at = 8 + length + header["model.layers.1.mlp.experts.2.up_proj.weight"]["data_offsets"][0]
    data[at] ^= 1
    weights.write_bytes(data)
    assert "changed since its export (up of news)" in run(
        "import-hf", f"--source={tmp_path}/out", f"--out={tmp_path}/back"
    )
    before, after = (read_model(path) for path in (home / "merged", tmp_path / "back"))
    assert after.anchor_digest == before.anchor_digest
    assert [a.digest == b.digest for a, b in zip(after.experts, before.experts, strict=True)] == [True, True, False]
    assert [bool(e.contribution) for e in after.experts] == [False, True, False]
    assert flexolmo("inspect", tmp_path / "back").status == 0


def test_too_large_a_value_is_refused_by_name(tmp_path):
    leaves = unbiased(small.random_leaves(0))
    leaves["head"][1, 2] = 1e6
    small.anchor(tmp_path / "anchor", leaves=leaves)
    result = flexolmo("export-hf", f"--model={tmp_path}/anchor", f"--out={tmp_path}/out", "--dtype=float16")
    assert_refused(result, "export-hf", f"--model={tmp_path}/anchor: leaf head", "65504", "float16")
    assert [path.name for path in tmp_path.iterdir()] == ["anchor"]


def test_a_damaged_source_is_refused_though_it_is_cast(home, tmp_path):
    shutil.copytree(home / "merged", tmp_path / "bad")
    chunk = tmp_path / "bad/params/blocks.moe.experts.gate/c.0.1.0.0"
    data = bytearray(chunk.read_bytes())
    data[0] ^= 1
    chunk.write_bytes(data)
    dtype = "bfloat16" if home.name != "bfloat16" else "float32"
    result = flexolmo("export-hf", f"--model={tmp_path}/bad", f"--out={tmp_path}/out", f"--dtype={dtype}")
    assert_refused(result, "export-hf", "gate", "altered")


def test_an_alias_and_a_cast_are_on_the_card(home, tmp_path):
    result = flexolmo(
        "merge",
        f"--anchor={home}/anchor",
        f"--contribution=press={home}/news",
        f"--out={tmp_path}/model",
        "--dtype=float16",
    )
    assert result.status == 0
    run("export-hf", f"--model={tmp_path}/model", f"--out={tmp_path}/out")
    page = (tmp_path / "out" / "README.md").read_text()
    assert "| press (its owner's news) |" in page
    assert "Weights were cast from " in page
    assert "float32 to float16" in page
    run("import-hf", f"--source={tmp_path}/out", f"--out={tmp_path}/back")
    assert small.files(tmp_path / "back") == small.files(tmp_path / "model")


def test_transformers_computes_the_same_logits(home, tmp_path, monkeypatch):
    """Of the rounded weights; the gate is the program's trained."""
    pytest.importorskip("transformers")
    monkeypatch.undo()
    flags = ["--dtype=bfloat16"] if home.name == "float32" else []
    for source in ([f"--model={home}/merged"], [f"--contribution={home}/news", f"--anchor={home}/anchor"]):
        out = tmp_path / str(len(source))
        assert "logits, float32, against transformers: max abs" in run("export-hf", *source, f"--out={out}", *flags)
    # Back as a contribution to the anchor of its trained dtype: what it shares with the pair, in the pair's.
    shutil.rmtree(out / "flexolmo")
    flags = [f"--source={out}", "--as-contribution", f"--anchor={home}/anchor", "--expert=news"]
    assert "against transformers: max abs" in run("import-hf", *flags, f"--out={tmp_path}/news")
