"""Another Hugging Face architecture: its keys and its tensor names are all that has to be declared."""

import json

import numpy as np
import pytest
from pydantic import Field

import flexolmo_jax
from flexolmo_jax.checkpoint.model_directory import kind_of
from flexolmo_jax.combine.merge import merge
from flexolmo_jax.interop import architectures
from flexolmo_jax.interop.architectures import HuggingFaceArchitecture
from flexolmo_jax.interop.config import CausalLMConfig, MixtureConfig, Positive, Size
from flexolmo_jax.interop.tensors import TensorNames
from tests.support import golden, small
from tests.support import hf_directories as hf
from tests.support.small import assert_refused, flexolmo


class ToyConfig(CausalLMConfig):
    """The keys that are named otherwise."""

    num_layers: Size = Field(alias="n_layer")
    d_model: Size = Field(alias="width")
    norm_eps: Positive = Field(alias="epsilon")
    max_length: Size = Field(alias="context")


class ToyMixtureConfig(ToyConfig, MixtureConfig):
    """The same of a mixture."""

    num_experts: Size = Field(alias="n_expert")


SHARED = {
    "embedding": "tokens",
    "final_norm/scale": "norm",
    "head": "head",
    "blocks/attention/query": "block.{layer}.query",
    "blocks/attention/key": "block.{layer}.key",
    "blocks/attention/value": "block.{layer}.value",
    "blocks/attention/out": "block.{layer}.out",
    "blocks/attention/query_norm/scale": "block.{layer}.query_norm",
    "blocks/attention/key_norm/scale": "block.{layer}.key_norm",
    "blocks/attention_norm/scale": "block.{layer}.attention_norm",
    "blocks/moe_norm/scale": "block.{layer}.moe_norm",
}
LEAVES = {"gate": "w1", "up": "w3", "down": "w2", "router/weight": "scores"}
# Experts are stacked in one tensor.
TOYS = (
    HuggingFaceArchitecture(
        "toy", "ToyForCausalLM", ToyConfig, TensorNames(SHARED, "block.{layer}.{leaf}", None, LEAVES), False
    ),
    HuggingFaceArchitecture(
        "toy_moe",
        "ToyMoeForCausalLM",
        ToyMixtureConfig,
        TensorNames(SHARED, "block.{layer}.experts.{leaf}", "block.{layer}.{leaf}", LEAVES),
        False,
    ),
)
# From Hugging Face's names of OLMo-2 to the toy's: written out, so that nothing of the code above is used.
RENAMED = {
    "model.embed_tokens": "tokens", "model.norm": "norm", "lm_head": "head", "model.layers.": "block.",
    "self_attn.q_proj": "query", "self_attn.k_proj": "key", "self_attn.v_proj": "value", "self_attn.o_proj": "out",
    "self_attn.q_norm": "query_norm", "self_attn.k_norm": "key_norm", "post_attention_layernorm": "attention_norm",
    "post_feedforward_layernorm": "moe_norm", "mlp.gate_proj": "w1", "mlp.up_proj": "w3", "mlp.down_proj": "w2",
    ".weight": "",
}  # fmt: skip


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for toy in TOYS:
        monkeypatch.setitem(architectures.ARCHITECTURES, toy.model_type, toy)


@pytest.fixture
def source(tmp_path):
    """The golden dense model as the toy would be saved."""
    tensors = {}
    for name, x in hf.weights(golden.GOLDEN / golden.DENSE).items():
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        tensors[name] = x
    document = {
        "model_type": "toy", "architectures": ["ToyForCausalLM"], "vocab_size": 512, "n_layer": 2, "width": 64,
        "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 96, "epsilon": 1e-6,
        "context": 128, "rope_theta": 500000.0, "eos_token_id": 2,
    }  # fmt: skip
    return hf.write(tmp_path / "source", tensors, document)


def run(command, *flags):
    result = flexolmo(command, *flags)
    assert (result.status, result.err) == (0, ""), result
    return result.out


def test_it_comes_in_takes_part_in_a_merge_and_goes_out(source, tmp_path):
    printed = run("import-hf", f"--source={source}", f"--out={tmp_path}/anchor")
    assert "logits were not compared: transformers does not compute this architecture" in printed
    expected = golden.load(golden.DENSE)[3]
    logits = flexolmo_jax.load(tmp_path / "anchor").logits(expected["input_ids"])
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4, rtol=0)

    leaves = small.expert_leaves(tmp_path / "anchor", seed=1)
    small.contribution(
        tmp_path / "news", tmp_path / "anchor", leaves=leaves | {"router/bias": leaves["router/bias"] * 0}
    )
    merge(tmp_path / "anchor", [tmp_path / "news"], tmp_path / "merged", top_k=2)
    without = flexolmo_jax.load(tmp_path / "merged").logits(expected["input_ids"], without=["news"])
    np.testing.assert_allclose(without, expected["logits"], atol=1e-4, rtol=0)

    # As the toy, with and without the folder beside; as the toy's mixture; and as FlexOlmo, which is the default.
    run("export-hf", f"--model={tmp_path}/anchor", f"--out={tmp_path}/dense", "--model_type=toy")
    hf.assert_same_weights(source, tmp_path / "dense")
    written, read = hf.config(tmp_path / "dense"), hf.config(source)
    assert {key: written[key] for key in read} == read
    assert "which transformers does not compute" in (tmp_path / "dense" / "README.md").read_text()
    run("import-hf", f"--source={tmp_path}/dense", f"--out={tmp_path}/anchor-again")
    assert small.files(tmp_path / "anchor-again") == small.files(tmp_path / "anchor")
    for model_type in ("toy_moe", None):
        out = tmp_path / str(model_type)
        flags = [f"--model_type={model_type}"] if model_type else []
        run("export-hf", f"--model={tmp_path}/merged", f"--out={out}", *flags)
        assert hf.config(out)["model_type"] == (model_type or "flex_olmo")
        run("import-hf", f"--source={out}", f"--out={out}-again")
        assert small.files(f"{out}-again") == small.files(tmp_path / "merged")
    stacked = hf.weights(tmp_path / "toy_moe")["block.1.experts.w2"]
    np.testing.assert_array_equal(stacked[1], leaves["down"][1].T)


def test_a_pair_of_it_is_a_contribution(source, tmp_path):
    run("import-hf", f"--source={source}", f"--out={tmp_path}/anchor")
    small.contribution(tmp_path / "news", tmp_path / "anchor")
    pair = [f"--contribution={tmp_path}/news", f"--anchor={tmp_path}/anchor"]
    run("export-hf", *pair, f"--out={tmp_path}/pair", "--model_type=toy_moe")
    flags = ["--as_contribution", f"--anchor={tmp_path}/anchor", "--expert=news"]
    run("import-hf", f"--source={tmp_path}/pair", *flags, f"--out={tmp_path}/again")
    assert small.files(tmp_path / "again") == small.files(tmp_path / "news")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 0}, ["width is 0", "positive integer"]),
        ({"epsilon": None}, ["lacks epsilon"]),
        ({"architectures": ["Toy"]}, ['architectures is ["Toy"]', '["ToyForCausalLM"] (toy)']),
        ({"n_layer": 3}, ["tensor block.2.query is missing"]),
    ],
)
def test_its_own_keys_and_tensors_are_named_in_errors(source, tmp_path, changes, words):
    file = source / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert_refused(flexolmo("import-hf", f"--source={source}", f"--out={tmp_path}/out"), "import-hf", *words)


def test_a_model_that_does_not_fit_is_not_exported(tmp_path):
    small.anchor(tmp_path / "anchor")
    small.contribution(tmp_path / "news", tmp_path / "anchor")
    merge(tmp_path / "anchor", [tmp_path / "news"], tmp_path / "merged", top_k=2)
    for model_type, words in (
        ("toy", ["dense", "2 experts"]),
        ("other", ["unknown", "flex_olmo, flex_olmo_selector, toy"]),
    ):
        flags = [f"--model={tmp_path}/merged", f"--out={tmp_path}/out", f"--model_type={model_type}"]
        assert_refused(flexolmo("export-hf", *flags), "export-hf", f"--model_type={model_type}: ", *words)
    assert kind_of(tmp_path / "out") is None
