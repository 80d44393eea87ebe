"""`flexolmo import-hf`, without torch: golden models and their logits, there and back."""

import json

import ml_dtypes
import numpy as np
import pytest

import flexolmo_jax
from flexolmo_jax.checkpoint.model_directory import check_model, open_model, read_model
from flexolmo_jax.combine.opt_out import AS_IMPORTED
from flexolmo_jax.interop import parity
from flexolmo_jax.interop.hf_directory import open_directory
from tests.support import golden, small
from tests.support import hf_directories as hf
from tests.support.small import assert_refused, flexolmo

pytestmark = pytest.mark.usefixtures("no_transformers")


def imported(source, out, *flags):
    result = flexolmo("import-hf", f"--source={source}", f"--out={out}", *flags)
    assert (result.status, result.err) == (0, ""), result
    return result.out


def exported(model, out, *flags):
    result = flexolmo("export-hf", f"--model={model}", f"--out={out}", *flags)
    assert (result.status, result.err) == (0, ""), result
    return result.out


def check(directory):
    """Every leaf has the digest that the manifest names; returns the manifest."""
    manifest = read_model(directory)
    check_model(manifest, *open_model(directory, manifest))
    return manifest


@pytest.fixture(scope="module", params=[golden.DENSE, golden.MIXTURE])
def case(request, tmp_path_factory):
    """A golden model, imported, and what the import printed."""
    out = tmp_path_factory.mktemp("import") / request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "transformers_installed", lambda: False)
        return request.param, out, imported(golden.GOLDEN / request.param, out)


def test_leaves_are_those_of_an_independent_map(case):
    name, out, _ = case
    _, _, expected, _ = golden.load(name)
    found = small.read_params(out)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


def test_the_manifest_says_what_came(case):
    name, out, printed = case
    manifest = check(out)
    mixture = name == golden.MIXTURE
    assert manifest.roster == ["anchor", *(["expert1", "expert2", "expert3"] if mixture else [])]
    assert (manifest.top_k, manifest.eos_id, manifest.tokenizer_digest) == (2 if mixture else 1, 2, "")
    assert manifest.architecture["norm_eps"] == 1e-6
    card = manifest.experts[0].card
    assert card["sequence_length"] == 128
    assert card["imported"]["from"] == name
    assert card["imported"]["tensors_with_identical_bytes"] == len(hf.weights(golden.GOLDEN / name))
    assert card["imported"]["logits"] == "not compared"
    assert "no tokenizer.json" in printed
    assert "identical bytes in all" in printed
    assert "logits were not compared" in printed
    assert "flexolmo-jax[interop]" in printed


def test_logits_and_greedy_tokens_are_those_of_transformers(case):
    name, out, _ = case
    expected = golden.load(name)[3]
    model = flexolmo_jax.load(out)
    np.testing.assert_allclose(model.logits(expected["input_ids"]), expected["logits"], atol=1e-4, rtol=0)
    # Each generated token is the most likely after those before it.
    written = np.concatenate([expected["prompt"], expected["generated"]], axis=1)
    start, end = expected["prompt"].shape[1], written.shape[1]
    padded = np.pad(written, ((0, 0), (0, expected["input_ids"].shape[1] - end)))  # one shape, one compilation
    greedy = np.asarray(model.logits(padded)).argmax(axis=-1)[:, start - 1 : end - 1]
    np.testing.assert_array_equal(greedy, expected["generated"])


def test_what_was_before_the_import_is_not_vouched_for(case, tmp_path):
    name, out, _ = case
    exported(out, tmp_path / "out")
    page = (tmp_path / "out" / "README.md").read_text()
    assert "It has no tokenizer" in page
    assert "tokenizer(" not in page
    if name == golden.DENSE:
        assert "not known" not in page
        return
    assert "experts anchor, expert1, expert2, expert3" in page
    assert "what was trained together before that is not known" in page
    assert "byte for byte, the imported model without that expert" in page
    assert "were stacked" not in page
    result = flexolmo("opt-out", f"--model={out}", "--expert=expert2", f"--out={tmp_path}/without")
    assert result.out.splitlines()[1] == AS_IMPORTED


def test_export_gives_back_every_byte(case, tmp_path):
    name, out, _ = case
    printed = exported(out, tmp_path / "out")
    hf.assert_same_weights(golden.GOLDEN / name, tmp_path / "out")
    before, after = hf.config(golden.GOLDEN / name), hf.config(tmp_path / "out")
    rewritten = {"bos_token_id", "pad_token_id", "transformers_version", "router_aux_loss_coef"}
    assert {key: after[key] for key in before.keys() - rewritten} == {
        key: before[key] for key in before.keys() - rewritten
    }
    assert "identical bytes in all" in printed


@pytest.mark.parametrize("layout", ["sharded", "fused", "fused and sharded", "old keys of rope"])
def test_other_layouts_give_the_same_model(case, layout, tmp_path):
    name, out, _ = case
    tensors, document = hf.weights(golden.GOLDEN / name), hf.config(golden.GOLDEN / name)
    if layout.startswith("fused"):
        tensors = hf.fused(tensors, document.get("num_experts", 0)) if name == golden.MIXTURE else tensors
    if layout == "old keys of rope":
        document |= {"rope_theta": document.pop("rope_parameters")["rope_theta"], "rope_scaling": None}
    hf.write(tmp_path / name, tensors, document, shards=3 if "sharded" in layout else 1)
    imported(tmp_path / name, tmp_path / "out")
    params = {file: digest for file, digest in small.files(out).items() if file.startswith("params/")}
    assert params == {file: digest for file, digest in small.files(tmp_path / "out").items() if "params/" in file}
    assert read_model(tmp_path / "out").shared == read_model(out).shared


def test_export_in_shards(case, tmp_path):
    name, out, _ = case
    exported(out, tmp_path / "out", "--shard-size=0.0001")
    hf.assert_same_weights(golden.GOLDEN / name, tmp_path / "out")
    index = json.loads((tmp_path / "out" / hf.INDEX).read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert [file.name for file in files] == sorted(set(index["weight_map"].values()))
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    total = 0
    for file in files:
        held = hf.safe_open(file, "np")
        sizes = [held.get_tensor(key).nbytes for key in held.keys()]  # noqa: SIM118
        assert sum(sizes) <= 100_000 or len(sizes) == 1
        assert all(index["weight_map"][key] == file.name for key in held.keys())  # noqa: SIM118
        total += sum(sizes)
    assert index["metadata"]["total_size"] == total


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_short_dtypes_are_kept(tmp_path, dtype):
    tensors = {name: x.astype(dtype) for name, x in hf.weights(golden.GOLDEN / golden.MIXTURE).items()}
    source = hf.golden_with(tmp_path / "source", tensors=tensors)
    imported(source, tmp_path / "model")
    assert {leaf.dtype for leaf in small.read_params(tmp_path / "model").values()} == {np.dtype(dtype)}
    exported(tmp_path / "model", tmp_path / "out")
    hf.assert_same_weights(source, tmp_path / "out")
    assert hf.config(tmp_path / "out")["dtype"] == np.dtype(dtype).name


def test_mixed_dtypes_are_kept(tmp_path):
    """A router in float32 among bfloat16: both stay, and every tensor is aligned to its items."""
    tensors = {
        name: x if "mlp.gate." in name else x.astype(ml_dtypes.bfloat16)
        for name, x in hf.weights(golden.GOLDEN / golden.MIXTURE).items()
    }
    source = hf.golden_with(tmp_path / "source", tensors=tensors)
    imported(source, tmp_path / "model")
    exported(tmp_path / "model", tmp_path / "out")
    hf.assert_same_weights(source, tmp_path / "out")


def test_experts_are_kept_sorted_by_the_names_they_are_given(tmp_path):
    printed = imported(golden.GOLDEN / golden.MIXTURE, tmp_path / "model", "--expert-names=news,code,math")
    assert printed.startswith(f"{tmp_path}/model: anchor, code, math, news\n")
    manifest = check(tmp_path / "model")
    assert manifest.roster == ["anchor", "code", "math", "news"]
    _, _, expected, outputs = golden.load(golden.MIXTURE)
    found = small.read_params(tmp_path / "model")
    for leaf in ("gate", "up", "down", "router/weight"):
        path = f"blocks/moe/experts/{leaf}"
        np.testing.assert_array_equal(found[path], expected[path][:, [0, 2, 3, 1]])
    logits = flexolmo_jax.load(tmp_path / "model").logits(outputs["input_ids"])
    np.testing.assert_allclose(logits, outputs["logits"], atol=1e-4, rtol=0)


def test_default_names_sort_as_the_experts_do(tmp_path):
    tensors = hf.first_experts(hf.weights(golden.GOLDEN / golden.MIXTURE), 4)
    for name in [name for name in tensors if ".experts.3." in name]:
        for expert in range(4, 11):
            tensors[name.replace(".experts.3.", f".experts.{expert}.")] = tensors[name] + expert
    for name in [name for name in tensors if name.endswith("mlp.gate.weight")]:
        tensors[name] = np.resize(tensors[name], (11, 64))
    imported(hf.golden_with(tmp_path / "source", tensors=tensors, num_experts=11), tmp_path / "model")
    roster = check(tmp_path / "model").roster
    assert roster == ["anchor", *(f"expert{i:02d}" for i in range(1, 11))]
    exported(tmp_path / "model", tmp_path / "out")
    hf.assert_same_weights(tmp_path / "source", tmp_path / "out")


def test_one_expert_is_an_anchor_with_router_weights(tmp_path):
    tensors = hf.first_experts(hf.weights(golden.GOLDEN / golden.MIXTURE), 1)
    source = hf.golden_with(tmp_path / "source", tensors=tensors, num_experts=1, num_experts_per_tok=1)
    imported(source, tmp_path / "model")
    params = small.read_params(tmp_path / "model")
    np.testing.assert_array_equal(
        params["blocks/moe/anchor/router/weight"],
        np.concatenate([tensors[f"model.layers.{layer}.mlp.gate.weight"] for layer in range(2)]),
    )
    exported(tmp_path / "model", tmp_path / "out")
    assert hf.config(tmp_path / "out")["model_type"] == "olmo2"
    imported(tmp_path / "out", tmp_path / "again")
    assert small.files(tmp_path / "again") == small.files(tmp_path / "model")


def test_tied_embeddings_have_one_leaf(tmp_path):
    tensors = hf.weights(golden.GOLDEN / golden.DENSE)
    head = tensors.pop("lm_head.weight")
    source = hf.golden_with(tmp_path / "source", golden.DENSE, tensors, tie_word_embeddings=True)
    imported(source, tmp_path / "model")
    assert "head" not in small.read_params(tmp_path / "model")
    assert read_model(tmp_path / "model").architecture["tied_embeddings"] is True
    exported(tmp_path / "model", tmp_path / "out")
    hf.assert_same_weights(source, tmp_path / "out")
    assert hf.config(tmp_path / "out")["tie_word_embeddings"] is True
    # Some writers keep the head although it is tied.
    twice = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    imported(hf.golden_with(tmp_path / "twice", golden.DENSE, twice, tie_word_embeddings=True), tmp_path / "second")
    assert check(tmp_path / "second").shared == check(tmp_path / "model").shared
    other = hf.golden_with(
        tmp_path / "other", golden.DENSE, tensors | {"lm_head.weight": head}, tie_word_embeddings=True
    )
    result = flexolmo("import-hf", f"--source={other}", f"--out={tmp_path}/third")
    assert_refused(result, "import-hf", "lm_head.weight", "tie")


def test_a_tokenizer_comes_along(tmp_path):
    small.anchor(tmp_path / "ours")
    tokenizer = (tmp_path / "ours" / "tokenizer.json").read_bytes()
    source = hf.golden_with(tmp_path / "source", golden.DENSE, eos_token_id=[256, 3])
    (source / "tokenizer.json").write_bytes(tokenizer)
    (source / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>", "chat_template": "x"}')
    printed = imported(source, tmp_path / "model")
    assert "no tokenizer.json" not in printed
    manifest = check(tmp_path / "model")
    assert manifest.eos_id == 256
    assert manifest.tokenizer_digest == read_model(tmp_path / "ours").tokenizer_digest
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == tokenizer
    assert flexolmo_jax.load(tmp_path / "model").encode("a") == [256, *b"a"]
    exported(tmp_path / "model", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == tokenizer
    assert (tmp_path / "out" / "tokenizer_config.json").read_text().endswith('"chat_template": "x"}')


def test_a_failing_round_trip_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "check_bytes", lambda *_: ["model.norm.weight"])
    result = flexolmo("import-hf", f"--source={golden.GOLDEN / golden.DENSE}", f"--out={tmp_path}/out")
    assert_refused(result, "import-hf", "model.norm.weight", "do not come back")
    assert not list(tmp_path.iterdir())


def test_the_round_trip_sees_a_single_bit(case):
    name, out, _ = case
    opened = open_directory(golden.GOLDEN / name)
    manifest = read_model(out)
    shared, experts = open_model(out, manifest)
    members = [dict(leaves) for leaves in experts.values()]
    assert parity.check_bytes(opened.table, opened.stored, shared, members) == []
    leaf = members[0]["up"]
    values = leaf.read((slice(None),) * 3).copy()
    values.view(np.uint32)[1, 2, 3] ^= 1
    members[0]["up"] = leaf._replace(source=values, expert=None)
    stem = "mlp.experts.0.up_proj" if name == golden.MIXTURE else "mlp.up_proj"
    expected = [f"model.layers.1.{stem}.weight"]
    assert parity.check_bytes(opened.table, opened.stored, shared, members) == expected
