"""`flexolmo export-hf`, without torch: what goes out comes back, biases, pairs, and the model card."""

import json
import shutil

import numpy as np
import pytest

import flexolmo_jax
from flexolmo_jax.checkpoint.manifests import MOE
from flexolmo_jax.checkpoint.model_directory import read_contribution, read_model
from flexolmo_jax.combine.merge import merge
from flexolmo_jax.combine.opt_out import AS_IMPORTED
from flexolmo_jax.interop import parity
from tests.support import hf_directories as hf
from tests.support import small
from tests.support.small import assert_refused, flexolmo

pytestmark = pytest.mark.usefixtures("no_transformers")

BIAS = MOE + "anchor/router/bias"


def unbiased(leaves):
    return {name: np.zeros_like(x) if name.endswith("router/bias") else x for name, x in leaves.items()}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """An anchor and contributions without biases, one with, their merges, and a merge that was tuned since."""
    home = tmp_path_factory.mktemp("export")
    small.corpus(home / "corpus")
    anchor = small.anchor(home / "anchor", leaves=unbiased(small.random_leaves(0)))
    for i, name in enumerate(["code", "news"], 1):
        small.contribution(home / name, anchor, leaves=unbiased(small.expert_leaves(anchor, seed=i)))
    small.contribution(home / "math", anchor, seed=3)
    merge(anchor, [home / "code", home / "news"], home / "merged", top_k=4)
    merge(anchor, [home / "code", home / "math"], home / "biased", top_k=2)
    small.tuned(home / "tuned", home / "merged", home / "corpus", leaves=(small.ROUTER[0],))
    return home


def run(command, *flags):
    result = flexolmo(command, *flags)
    assert (result.status, result.err) == (0, ""), result
    return result.out


@pytest.mark.parametrize("kind", ["anchor", "merged", "tuned", "opted out"])
def test_what_goes_out_comes_back(home, tmp_path, kind):
    """Every file of the model directory, its manifest included."""
    model = home / kind
    if kind == "opted out":
        model = tmp_path / "model"
        run("opt-out", f"--model={home}/tuned", "--expert=code", f"--out={model}", "--keep_tuned_router")
    run("export-hf", f"--model={model}", f"--out={tmp_path}/out")
    printed = run("import-hf", f"--source={tmp_path}/out", f"--out={tmp_path}/back")
    assert small.files(tmp_path / "back") == small.files(model)
    assert "changed" not in printed
    assert not list((tmp_path / "out" / "flexolmo").rglob("*.safetensors"))


@pytest.mark.parametrize("change", ["weights", "config", "tokenizer"])
def test_what_was_changed_outside_is_imported_as_it_is_now(home, tmp_path, change):
    run("export-hf", f"--model={home}/merged", f"--out={tmp_path}/out")
    tensors, document = hf.weights(tmp_path / "out"), hf.config(tmp_path / "out")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    if change == "weights":
        hf.save_file(tensors | {name: tensors[name] + 1}, tmp_path / "out" / "model.safetensors")
        message = "up of news"
    elif change == "config":
        (tmp_path / "out" / "config.json").write_text(json.dumps(document | {"num_experts_per_tok": 1}))
        message = "experts per token"
    else:
        (tmp_path / "out" / "tokenizer.json").unlink()
        message = "tokenizer.json"
    printed = run("import-hf", f"--source={tmp_path}/out", f"--out={tmp_path}/back")
    assert f"changed since its export ({message})" in printed
    before, after = (read_model(path) for path in (home / "merged", tmp_path / "back"))
    assert after.roster == before.roster
    assert after.experts[2].card == before.experts[2].card
    assert after.top_k == (1 if change == "config" else 3)
    assert (after.anchor_digest == before.anchor_digest) is True
    assert (after.experts[2].digest == before.experts[2].digest) is (change != "weights")
    assert "imported" in after.experts[0].card
    # What was done outside may have trained the experts together.
    printed = run("opt-out", f"--model={tmp_path}/back", "--expert=code", f"--out={tmp_path}/without")
    assert AS_IMPORTED in printed


def test_a_sidecar_of_another_model_is_refused(home, tmp_path):
    run("export-hf", f"--model={home}/merged", f"--out={tmp_path}/out")
    run("export-hf", f"--model={home}/anchor", f"--out={tmp_path}/other")
    shutil.rmtree(tmp_path / "out" / "flexolmo")
    shutil.copytree(tmp_path / "other" / "flexolmo", tmp_path / "out" / "flexolmo")
    result = flexolmo("import-hf", f"--source={tmp_path}/out", f"--out={tmp_path}/back")
    assert_refused(result, "import-hf", f"{tmp_path}/out/flexolmo", "another model than config.json")
    result = flexolmo("import-hf", f"--source={tmp_path}/other", f"--out={tmp_path}/back", "--router-weights-from=x")
    assert_refused(result, "import-hf", "--router_weights_from", "flexolmo")


def test_without_the_sidecar_names_and_cards_are_gone(home, tmp_path):
    run("export-hf", f"--model={home}/merged", f"--out={tmp_path}/out")
    shutil.rmtree(tmp_path / "out" / "flexolmo")
    run("import-hf", f"--source={tmp_path}/out", f"--out={tmp_path}/back", "--expert_names=code,news")
    before, after = (small.files(path) for path in (home / "merged", tmp_path / "back"))
    assert before.pop("model.json") != after.pop("model.json")
    assert before == after


def test_a_selector_is_refused_or_dropped_and_measured(tmp_path):
    leaves = unbiased(small.random_leaves(0))
    small.anchor(tmp_path / "anchor", leaves=leaves, statistics=small.ngram_statistics(0))
    leaves = unbiased(small.expert_leaves(tmp_path / "anchor", seed=1))
    small.contribution(tmp_path / "news", tmp_path / "anchor", leaves=leaves, statistics=small.ngram_statistics(1))
    merge(tmp_path / "anchor", [tmp_path / "news"], tmp_path / "merged")
    result = flexolmo("export-hf", f"--model={tmp_path}/merged", f"--out={tmp_path}/out")
    assert_refused(result, "export-hf", f"--model={tmp_path}/merged", "selection 'ngram'", "drop_selector")
    printed = run("export-hf", f"--model={tmp_path}/merged", f"--out={tmp_path}/out", "--drop-selector")
    assert "without the selection 'ngram', on random tokens:" in printed
    page = (tmp_path / "out" / "README.md").read_text()
    assert "no place for the selection 'ngram'" in page
    assert "--drop_selector" in page
    run("import-hf", f"--source={tmp_path}/out", f"--out={tmp_path}/back")
    merge(tmp_path / "anchor", [tmp_path / "news"], tmp_path / "by-router", top_k=1, selection="router")
    assert small.files(tmp_path / "back") == small.files(tmp_path / "by-router")


def test_biases_are_refused(home, tmp_path):
    result = flexolmo("export-hf", f"--model={home}/biased", f"--out={tmp_path}/out")
    assert_refused(result, "export-hf", f"--model={home}/biased", "bias of math", "drop_bias")
    assert not list(tmp_path.iterdir())


def test_dropped_biases_are_measured(home, tmp_path):
    printed = run("export-hf", f"--model={home}/biased", f"--out={tmp_path}/out", "--drop-bias")
    run("import-hf", f"--source={tmp_path}/out", f"--out={tmp_path}/back")
    before, after = small.read_params(home / "biased"), small.read_params(tmp_path / "back")
    for path, leaf in before.items():
        np.testing.assert_array_equal(after[path], 0 * leaf if path.endswith("router/bias") else leaf)
    # The digests are those of what went out.
    old, new = (read_model(path).experts for path in (home / "biased", tmp_path / "back"))
    assert [a.leaves == b.leaves for a, b in zip(old, new, strict=True)] == [True, True, False]
    # The merge is not forgotten: opting out gives what it would have been, biases and all.
    run("opt-out", f"--model={tmp_path}/back", "--expert=code", f"--out={tmp_path}/without")
    merge(home / "anchor", [home / "math"], tmp_path / "expected", top_k=2)
    certificate = json.loads((tmp_path / "without" / "certificate.json").read_text())
    assert certificate["guarantee"].startswith("exact")
    (tmp_path / "without" / "certificate.json").unlink()
    assert small.files(tmp_path / "without") == small.files(tmp_path / "expected")
    # The differences are those of the two models.
    tokens = parity.random_tokens(small.ARCHITECTURE.vocab_size)
    models = (flexolmo_jax.load(path) for path in (home / "biased", tmp_path / "back"))
    with_bias, without = (parity.our_logits(model, tokens) for model in models)
    largest = float(np.abs(with_bias - without).max())
    assert largest > 1e-3
    assert f"without the biases of math, on random tokens: max abs difference {largest:.2g}, KL " in printed
    assert "on text: max abs difference" in printed
    page = (tmp_path / "out" / "README.md").read_text()
    assert f"random tokens: max abs difference {largest:.2g}" in page
    assert "--drop_bias" in page


def test_an_anchor_keeps_its_bias_beside(home, tmp_path):
    """Alone it is weighed against no one, so that its router weights and bias change nothing, and none is refused."""
    small.anchor(tmp_path / "anchor", seed=7)
    run("export-hf", f"--model={tmp_path}/anchor", f"--out={tmp_path}/out")
    run("import-hf", f"--source={tmp_path}/out", f"--out={tmp_path}/back")
    assert small.files(tmp_path / "back") == small.files(tmp_path / "anchor")


def test_the_public_sample_is_what_biases_are_measured_on(home, tmp_path):
    shutil.copytree(home / "biased", tmp_path / "model")
    small.corpus(tmp_path / "model" / "public")
    printed = run("export-hf", f"--model={tmp_path}/model", f"--out={tmp_path}/out", "--drop_bias")
    assert "on its public sample: max abs difference" in printed
    assert not (tmp_path / "out" / "public").exists()


@pytest.fixture
def published(home, tmp_path):
    """The anchor as a run of training publishes it, with a sample of public data."""
    shutil.copytree(home / "anchor", tmp_path / "anchor")
    small.corpus(tmp_path / "anchor" / "public")
    return tmp_path / "anchor"


def test_the_public_sample_goes_along(published, tmp_path):
    run("export-hf", f"--model={published}", f"--out={tmp_path}/out")
    run("import-hf", f"--source={tmp_path}/out", f"--out={tmp_path}/back")
    assert "public/corpus.json" in small.files(published)
    assert small.files(tmp_path / "back") == small.files(published)
    tokens = tmp_path / "out/flexolmo/public/tokens-00000.npy"
    data = tokens.read_bytes()
    tokens.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    result = flexolmo("import-hf", f"--source={tmp_path}/out", f"--out={tmp_path}/again")
    assert_refused(result, "import-hf", str(tokens), "differs from the digest")
    assert not (tmp_path / "again").exists()


def test_a_pair_goes_out_as_its_merge_would(home, published, tmp_path):
    merge(home / "anchor", [home / "news"], tmp_path / "pair", top_k=2)
    run("export-hf", f"--model={tmp_path}/pair", f"--out={tmp_path}/expected")
    run("export-hf", f"--contribution={home}/news", f"--anchor={published}", f"--out={tmp_path}/out")
    assert small.files(tmp_path / "out") == small.files(tmp_path / "expected")
    assert hf.config(tmp_path / "out")["num_experts_per_tok"] == 2


def test_a_pair_comes_back_as_the_contribution_it_was(home, tmp_path):
    run("export-hf", f"--contribution={home}/news", f"--anchor={home}/anchor", f"--out={tmp_path}/out")
    flags = [f"--source={tmp_path}/out", "--as-contribution", f"--anchor={home}/anchor", "--expert=news"]
    printed = run("import-hf", *flags, f"--out={tmp_path}/news")
    assert printed.startswith(f"{tmp_path}/news: news\n")
    assert small.files(tmp_path / "news") == small.files(home / "news")
    # A pair of other writers has no sidecar: the weights are the same, the card is another.
    shutil.rmtree(tmp_path / "out" / "flexolmo")
    run("import-hf", *flags, f"--out={tmp_path}/published")
    expected, found = (read_contribution(path) for path in (home / "news", tmp_path / "published"))
    assert found.leaves == expected.leaves
    assert found.card["imported"]["from"] == "out"
    merge(home / "anchor", [tmp_path / "published"], tmp_path / "merged", top_k=2)


@pytest.mark.parametrize("sidecar", [True, False])
def test_a_pair_of_an_anchor_with_another_bias_is_no_contribution(home, tmp_path, sidecar):
    """The bias is in no tensor."""
    leaves = small.read_params(home / "anchor")
    biased = small.anchor(tmp_path / "biased", leaves=leaves | {BIAS: leaves[BIAS] + 1})
    run("export-hf", f"--contribution={home}/news", f"--anchor={home}/anchor", f"--out={tmp_path}/out")
    if not sidecar:
        shutil.rmtree(tmp_path / "out" / "flexolmo")
    flags = [f"--source={tmp_path}/out", "--as_contribution", f"--anchor={biased}", "--expert=news"]
    result = flexolmo("import-hf", *flags, f"--out={tmp_path}/news")
    assert_refused(result, "import-hf", f"--anchor={biased}", "router/bias", "trained on")
    assert not (tmp_path / "news").exists()


def test_a_contribution_gets_its_bias_back(home, tmp_path, monkeypatch):
    run("export-hf", f"--contribution={home}/math", f"--anchor={home}/anchor", f"--out={tmp_path}/out", "--drop_bias")
    flags = [f"--source={tmp_path}/out", "--as_contribution", f"--anchor={home}/anchor", "--expert=math"]
    compared = []
    monkeypatch.setattr(
        parity, "compare_logits", lambda *arguments: compared.extend(arguments[3].values()) or "not here"
    )
    printed = run("import-hf", *flags, f"--out={tmp_path}/math")
    assert small.files(tmp_path / "math") == small.files(home / "math")
    assert "changed" not in printed
    # What transformers computes has none.
    assert [leaves["router/bias"].read((slice(None),)).any() for leaves in compared] == [False, False]


def test_a_contribution_that_was_changed_outside_has_another_card(home, tmp_path):
    run("export-hf", f"--contribution={home}/news", f"--anchor={home}/anchor", f"--out={tmp_path}/out")
    tensors, name = hf.weights(tmp_path / "out"), "model.layers.1.mlp.experts.1.up_proj.weight"
    hf.save_file(tensors | {name: tensors[name] + 1}, tmp_path / "out" / "model.safetensors")
    flags = [f"--source={tmp_path}/out", "--as_contribution", f"--anchor={home}/anchor", "--expert=news"]
    assert "changed since its export" in run("import-hf", *flags, f"--out={tmp_path}/news")
    assert list(read_contribution(tmp_path / "news").card) == ["imported"]


def test_an_anchor_takes_the_router_weights_of_published_pairs(home, tmp_path):
    """A dense anchor has no router weights; pairs that were trained against some hold them."""
    run("export-hf", f"--model={home}/anchor", f"--out={tmp_path}/dense")
    run("export-hf", f"--contribution={home}/news", f"--anchor={home}/anchor", f"--out={tmp_path}/pair")
    shutil.rmtree(tmp_path / "dense" / "flexolmo")
    shutil.rmtree(tmp_path / "pair" / "flexolmo")
    run("import-hf", f"--source={tmp_path}/dense", f"--out={tmp_path}/zeros")
    assert not small.read_params(tmp_path / "zeros")["blocks/moe/anchor/router/weight"].any()
    flags = [f"--source={tmp_path}/pair", "--as_contribution", "--expert=news", f"--out={tmp_path}/news"]
    result = flexolmo("import-hf", *flags, f"--anchor={tmp_path}/zeros")
    assert_refused(result, "import-hf", "router weights", "zeros", f"router_weights_from={tmp_path}/pair")
    run("import-hf", f"--source={tmp_path}/dense", f"--out={tmp_path}/anchor", f"--router-weights-from={tmp_path}/pair")
    anchor = read_model(tmp_path / "anchor")
    assert anchor.anchor_digest == read_model(home / "anchor").anchor_digest
    assert anchor.experts[0].card["imported"]["router_weights_from"] == "pair"
    run("import-hf", *flags, f"--anchor={tmp_path}/anchor")
    merge(tmp_path / "anchor", [tmp_path / "news"], tmp_path / "merged", top_k=2)


def changed(directory, name):
    """The same directory with another value in one tensor, and without its sidecar."""
    shutil.rmtree(directory / "flexolmo")
    tensors = hf.weights(directory)
    values = tensors[name].copy()
    values.reshape(-1)[0] += 1
    hf.save_file(tensors | {name: values}, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (
            "model.layers.1.self_attn.k_norm.weight",
            ["model.layers.1.self_attn.k_norm.weight", "1 of", "shared tensors"],
        ),
        (
            "model.layers.0.mlp.experts.0.down_proj.weight",
            ["model.layers.0.mlp.experts.0.down_proj.weight", "give the anchor"],
        ),
        ("model.embed_tokens.weight", ["model.embed_tokens.weight is not the anchor's"]),
        ("model.layers.1.mlp.gate.weight", ["router weights", "not those of"]),
    ],
)
def test_a_pair_of_another_anchor_is_no_contribution(home, tmp_path, tensor, words):
    run("export-hf", f"--contribution={home}/news", f"--anchor={home}/anchor", f"--out={tmp_path}/pair")
    changed(tmp_path / "pair", tensor)
    before = small.files(tmp_path)
    flags = [f"--source={tmp_path}/pair", "--as_contribution", f"--anchor={home}/anchor", "--expert=news"]
    assert_refused(flexolmo("import-hf", *flags, f"--out={tmp_path}/out"), "import-hf", f"{tmp_path}/pair", *words)
    assert small.files(tmp_path) == before


def test_a_damaged_model_is_not_exported(home, tmp_path):
    shutil.copytree(home / "merged", tmp_path / "bad")
    chunk = tmp_path / "bad/params/blocks.moe.experts.gate/c.0.1.0.0"
    data = chunk.read_bytes()
    chunk.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    result = flexolmo("export-hf", f"--model={tmp_path}/bad", f"--out={tmp_path}/out")
    assert_refused(result, "export-hf", f"--model={tmp_path}/bad", "experts.1.gate_proj", "altered")
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_the_model_card(home, tmp_path):
    run("export-hf", f"--model={home}/tuned", f"--out={tmp_path}/out")
    manifest = read_model(home / "tuned")
    page = (tmp_path / "out" / "README.md").read_text()
    front, page = page.removeprefix("---\n").split("\n---\n", 1)
    assert front.splitlines()[:3] == ['license: "none"', "library_name: transformers", "pipeline_tag: text-generation"]
    news = manifest.experts[2]
    per_expert = sum(np.prod(shape) for path, shape in small.shapes().items() if "/moe/" in path)
    shared = sum(np.prod(shape) for path, shape in small.shapes().items() if "/moe/" not in path)
    assert f"| news | `{news.digest[:12]}` | {per_expert:,} | 10 | 20 | none | data of news |" in page
    assert f"{shared + 3 * per_expert:,} parameters" in page
    assert f"- anchor: `{manifest.anchor_digest}`" in page
    assert f"- news: `{news.digest}`" in page
    assert "3 of 3 compute each token" in page
    assert "Changed since: `blocks/moe/experts/router/weight`" in page
    assert "flexolmo opt-out --model=model --expert=code" in page
    assert 'AutoTokenizer.from_pretrained("DIRECTORY")' in page
    assert "[tokenizer.eos_token_id] + tokenizer(text, add_special_tokens=False).input_ids" in page
    assert "were not compared with those of transformers" in page


def test_a_text_begins_as_the_card_says(home, tmp_path):
    transformers = pytest.importorskip("transformers")
    run("export-hf", f"--model={home}/anchor", f"--out={tmp_path}/out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("naïve", " two  words\n"):
        ids = [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]
        assert ids == flexolmo_jax.load(home / "anchor").encode(text)


def test_the_card_of_what_an_owner_wrote_stays_a_table(home, tmp_path):
    contribution = small.contribution(tmp_path / "odd", home / "anchor")
    file = contribution / "contribution.json"
    document = json.loads(file.read_text())
    document["card"] = {"description": "a | b\nc", "license": "x: y"}
    file.write_text(json.dumps(document))
    small.reseal(file)
    merge(home / "anchor", [contribution], tmp_path / "merged", top_k=2)
    run("export-hf", f"--model={tmp_path}/merged", f"--out={tmp_path}/out", "--drop_bias")
    page = (tmp_path / "out" / "README.md").read_text()
    assert "| x: y | a \\| b c |" in page
    assert page.startswith('---\nlicense: "x: y"\n')


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["--model", "both --contribution and --anchor"]),
        (["--contribution={home}/news"], ["both --contribution and --anchor"]),
        (["--model={home}/merged", "--anchor={home}/anchor"], ["--model", "either"]),
        (["--model={home}/news"], ["is a contribution directory"]),
        (["--contribution={home}/news", "--anchor={home}/merged"], ["--anchor=", "a merged model"]),
        (["--contribution={home}/anchor", "--anchor={home}/anchor"], ["is a model directory"]),
        (["--model={home}/merged", "--shard-size=0"], ["--shard_size=0"]),
        (["--model={home}/merged", "--shard_size=much"], ["--shard_size=much"]),
    ],
)
def test_flags_that_do_not_fit_are_refused(home, tmp_path, flags, words):
    flags = [flag.format(home=home) for flag in flags]
    assert_refused(flexolmo("export-hf", *flags, f"--out={tmp_path}/out"), "export-hf", *words)
    assert not list(tmp_path.iterdir())


def test_only_a_new_local_directory_is_made(home, tmp_path):
    result = flexolmo("export-hf", f"--model={home}/merged", f"--out={tmp_path}")
    assert_refused(result, "export-hf", f"--out={tmp_path}", "exists already")
    result = flexolmo("export-hf", f"--model={home}/merged", "--out=gs://bucket/out")
    assert_refused(result, "export-hf", "--out=gs://bucket/out", "local directory")
