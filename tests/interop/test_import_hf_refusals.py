"""What `flexolmo import-hf` may be handed: each fault is named in one line, and nothing is written."""

import json
import shutil

import numpy as np
import pytest

from flexolmo_jax.data.tokenization.tokenizer import byte_tokenizer
from tests.support import golden, small
from tests.support import hf_directories as hf
from tests.support.small import assert_refused, flexolmo

pytestmark = pytest.mark.usefixtures("no_transformers")

NORM = "model.layers.1.post_attention_layernorm.weight"
UP = "model.layers.0.mlp.experts.1.up_proj.weight"
SHARD = "model-00002-of-00003.safetensors"


def tensors_with(shards=1, **changes):
    """Makes directories in which tensors are changed: {name: new value of the old one, or None for none}."""

    def make(path):
        tensors = hf.weights(golden.GOLDEN / golden.MIXTURE)
        for name, change in changes.items():
            tensors[name] = change(tensors.get(name))
        hf.golden_with(path, tensors={name: x for name, x in tensors.items() if x is not None}, shards=shards)

    return make


def config_with(name=golden.MIXTURE, **changes):
    return lambda path: hf.golden_with(path, name, **changes)


def config_without(key):
    def make(path):
        hf.golden_with(path)
        document = hf.config(path)
        del document[key]
        (path / "config.json").write_text(json.dumps(document))

    return make


def file_with(name, change, shards=3):
    """Makes directories of which one file has other bytes; None for none."""

    def make(path):
        hf.golden_with(path, shards=shards)
        data = change((path / name).read_bytes() if (path / name).exists() else b"")
        if data is None:
            (path / name).unlink()
        else:
            (path / name).write_bytes(data)

    return make


def index_with(change):
    def changed(data):
        document = json.loads(data)
        change(document["weight_map"])
        return json.dumps(document).encode()

    return file_with(hf.INDEX, changed)


def shard_elsewhere(name):
    """Makes directories whose index names a shard by that path, where it lies."""

    def make(path):
        hf.golden_with(path, shards=3)
        there = path / name.format(home=path.parent)
        there.parent.mkdir(exist_ok=True)
        shutil.move(path / SHARD, there)
        index = path / hf.INDEX
        index.write_text(index.read_text().replace(SHARD, name.format(home=path.parent)))

    return make


def header_with(**changes):
    """Changes the JSON header of a file, and its length."""

    def changed(data):
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header[NORM] |= changes
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    return file_with("model.safetensors", changed, shards=1)


def nan(x):
    x = x.copy()
    x.reshape(-1)[3] = np.nan
    return x


def only_config(path):
    path.mkdir()
    shutil.copy(golden.GOLDEN / golden.MIXTURE / "config.json", path)


def pickled(path):
    only_config(path)
    (path / "pytorch_model.bin").write_bytes(b"pickle")


def tokenizer_of(text):
    def make(path):
        hf.golden_with(path)
        (path / "tokenizer.json").write_text(text)

    return make


def wide_tokenizer(path):
    tensors = hf.weights(golden.GOLDEN / golden.MIXTURE)
    tensors |= {name: tensors[name][:200].copy() for name in ("model.embed_tokens.weight", "lm_head.weight")}
    hf.golden_with(path, tensors=tensors, vocab_size=200, eos_token_id=10)
    byte_tokenizer().save(path / "tokenizer.json")


def nameless_eos(path):
    hf.golden_with(path, eos_token_id=None)
    backend = byte_tokenizer().backend.to_str().replace("<|endoftext|>", "<stop>")
    (path / "tokenizer.json").write_text(backend)


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 500000.0}
REFUSED = {
    "nothing": (lambda path: None, ["--source=", "no such directory"]),
    "a file": (lambda path: path.write_text(""), ["--source=", "no such directory"]),
    "an empty directory": (lambda path: path.mkdir(), ["config.json", "no such file"]),
    "no weights": (only_config, ["bad", "neither model.safetensors nor model.safetensors.index.json"]),
    "pickled weights": (pickled, ["the only weights read here", "save the model again"]),
    "damaged config": (file_with("config.json", lambda data: data[:-9]), ["config.json", "damaged"]),
    "config is a list": (file_with("config.json", lambda data: b"[]"), ["config.json", "damaged"]),
    "other architecture": (
        config_with(model_type="llama", architectures=["LlamaForCausalLM"]),
        ["config.json", 'architectures is ["LlamaForCausalLM"]', '"llama"', '["FlexOlmoForCausalLM"] (flex_olmo)'],
    ),
    "other head": (config_with(architectures=["FlexOlmoModel"]), ["config.json", "FlexOlmoModel"]),
    "architecture of a dense model": (config_with(architectures=["Olmo2ForCausalLM"]), ["flex_olmo", "only"]),
    "architecture is a text": (
        config_with(architectures="FlexOlmoForCausalLM"),
        ['architectures is "FlexOlmoForCausalLM", model_type "flex_olmo"', '["FlexOlmoForCausalLM"] (flex_olmo)'],
    ),
    "architecture is a number": (config_with(architectures=3), ["architectures is 3"]),
    "model type is a list": (config_with(model_type=["flex_olmo"]), ['model_type ["flex_olmo"]']),
    "yarn": (config_with(rope_parameters=YARN), ["config.json", "rope_parameters", "yarn", "default rope"]),
    "old rope scaling": (config_with(rope_scaling={"type": "linear", "factor": 2}), ["rope_scaling", "linear"]),
    "partial rope": (
        config_with(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        ["rope_parameters", "partial_rotary_factor"],
    ),
    "no rope": (config_without("rope_parameters"), ["config.json", "lacks rope_theta"]),
    "attention bias": (config_with(attention_bias=True), ["attention_bias is true", "only false"]),
    "other activation": (config_with(hidden_act="gelu"), ['hidden_act is "gelu"', 'only "silu"']),
    "quantized": (config_with(quantization_config={"bits": 4}), ["quantization_config"]),
    "no size": (config_without("hidden_size"), ["config.json", "lacks hidden_size"]),
    "size is a text": (config_with(hidden_size="64"), ['hidden_size is "64"', "positive integer"]),
    "size is zero": (config_with(num_hidden_layers=0), ["num_hidden_layers is 0"]),
    "size is true": (config_with(num_hidden_layers=True), ["num_hidden_layers is true"]),
    "heads that do not divide": (config_with(num_attention_heads=5), ["config.json", "num_heads 5 must divide"]),
    "other head size": (config_with(head_dim=8), ["head_dim is 8"]),
    "no epsilon": (config_with(rms_norm_eps=0), ["rms_norm_eps is 0"]),
    "flag is a text": (config_with(tie_word_embeddings="no"), ['tie_word_embeddings is "no"', "true or false"]),
    "top-k above the experts": (config_with(num_experts_per_tok=5), ["num_experts_per_tok is 5", "4 experts"]),
    "EOS outside": (config_with(eos_token_id=512), ["eos_token_id is 512", "below 512"]),
    "no EOS": (config_with(eos_token_id=None), ["config.json", "lacks eos_token_id"]),
    "EOS of no known name": (
        nameless_eos,
        ["tokenizer.json: has no EOS token of a known name", "with eos_token_id in", "config.json"],
    ),
    "one EOS of several outside": (config_with(eos_token_id=[2, 512]), ["eos_token_id is [2, 512]", "below 512"]),
    # Of any number, the first that is missing ends the search.
    "layers without end": (config_with(num_hidden_layers=10**5), ["model.layers.2.self_attn.q_proj", "missing"]),
    "experts without end": (config_with(num_experts=10**5), ["model.layers.0.mlp.experts.4.gate_proj", "missing"]),
    "fewer experts than named": (config_with(num_experts=5), ["mlp.experts.4.", "missing"]),
    "more experts than named": (config_with(num_experts=3), ["tensor model.layers.0.mlp.experts.3.", "is not one of"]),
    "other vocabulary": (config_with(vocab_size=500), ["model.embed_tokens.weight", "[512, 64]", "[500, 64]"]),
    "missing tensor": (tensors_with(**{NORM: lambda _: None}), [f"tensor {NORM} is missing"]),
    "unknown tensor": (
        tensors_with(**{"model.layers.0.mlp.expert_bias": lambda _: np.ones(4, np.float32)}),
        ["tensor model.layers.0.mlp.expert_bias is not one of the model"],
    ),
    "misshapen tensor": (tensors_with(**{UP: lambda x: x[:-1].copy()}), [UP, "[95, 64]", "[96, 64]"]),
    "transposed tensor": (tensors_with(**{UP: lambda x: x.T.copy()}), [UP, "[64, 96]", "[96, 64]"]),
    "one tensor short": (tensors_with(**{UP: lambda x: x.astype(np.float16)}), [UP, "float16", "float32"]),
    "double precision": (tensors_with(**{UP: lambda x: x.astype(np.float64)}), [UP, "F64", "F32, BF16, F16"]),
    "not finite": (tensors_with(**{UP: nan}), ["model.layers.*.mlp.experts.1.up_proj.weight", "not finite"]),
    "truncated file": (file_with("model.safetensors", lambda d: d[:-1], shards=1), ["model.safetensors", "truncated"]),
    "no safetensors file": (file_with("model.safetensors", lambda d: b"hello world", shards=1), ["truncated, or no"]),
    "empty file": (file_with("model.safetensors", lambda d: b"", shards=1), ["model.safetensors", "truncated"]),
    "header of another size": (header_with(shape=[63]), ["model.safetensors", "truncated, or no"]),
    "header of another place": (header_with(data_offsets=[0, 256]), ["model.safetensors", "truncated, or no"]),
    "truncated shard": (file_with(SHARD, lambda data: data[:-1]), [SHARD, "truncated"]),
    "missing shard": (file_with(SHARD, lambda data: None), [hf.INDEX, SHARD, "missing"]),
    "damaged index": (file_with(hf.INDEX, lambda data: data[:-9]), [hf.INDEX, "damaged"]),
    "empty index": (file_with(hf.INDEX, lambda data: b'{"weight_map": {}}'), [hf.INDEX, "damaged"]),
    "index of numbers": (file_with(hf.INDEX, lambda data: b'{"weight_map": {"a": 1}}'), [hf.INDEX, "damaged"]),
    "tensor not in the index": (index_with(lambda names: names.pop(NORM)), [f"holds {NORM}", hf.INDEX]),
    "tensor in another shard": (index_with(lambda names: names.update({NORM: SHARD})), [NORM, hf.INDEX]),
    "tensor in no shard": (index_with(lambda names: names.update({"x": SHARD})), [SHARD, "lacks x"]),
    "index names the directory": (index_with(lambda names: names.update({NORM: "."})), [hf.INDEX, "'.'", "beside it"]),
    "index names the parent": (index_with(lambda names: names.update({NORM: ".."})), [hf.INDEX, "'..'", "beside it"]),
    "index names a folder": (index_with(lambda names: names.update({NORM: "x/"})), [hf.INDEX, "'x/'", "beside it"]),
    "index leads outside": (shard_elsewhere("../x.safetensors"), [hf.INDEX, "'../x.safetensors'", "no file beside it"]),
    "index leads away": (shard_elsewhere("{home}/x.safetensors"), [hf.INDEX, "/x.safetensors'", "no file beside it"]),
    "index leads inside": (shard_elsewhere("a/x.safetensors"), [hf.INDEX, "'a/x.safetensors'", "no file beside it"]),
    "damaged tokenizer": (tokenizer_of("{}"), ["tokenizer.json", "is not a tokenizer.json"]),
    "tokenizer is too large": (wide_tokenizer, ["tokenizer.json", "256", "vocab_size of 200"]),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_bad_directory_is_refused(tmp_path, fault):
    make, words = REFUSED[fault]
    make(tmp_path / "bad")
    before = sorted(tmp_path.rglob("*"))
    result = flexolmo("import-hf", f"--source={tmp_path}/bad", f"--out={tmp_path}/out")
    assert_refused(result, "import-hf", *words)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """An anchor of another size, a dense source, and a contribution."""
    home = tmp_path_factory.mktemp("refusals")
    small.anchor(home / "anchor")
    small.contribution(home / "news", home / "anchor", seed=1)
    flexolmo("merge", f"--anchor={home}/anchor", f"--contribution={home}/news", f"--out={home}/merged")
    pair = hf.first_experts(hf.weights(golden.GOLDEN / golden.MIXTURE), 2)
    hf.golden_with(home / "pair", tensors=pair, num_experts=2)
    return home


MIXTURE, DENSE = f"--source={golden.GOLDEN / golden.MIXTURE}", f"--source={golden.GOLDEN / golden.DENSE}"
PAIR = "--source={home}/pair"
CONTRIBUTION = ["--as-contribution", "--anchor={home}/anchor", "--expert=news"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["--source"]),
        ([MIXTURE, "--expert-names=code,news"], ["--expert_names=code,news", "2 names for the 3 experts"]),
        ([MIXTURE, "--expert-names=code,news,News"], ["--expert_names", "'News' is no name", "lower-case"]),
        ([MIXTURE, "--expert-names=code,news,anchor"], ["--expert_names", "'anchor'"]),
        ([MIXTURE, "--expert-names=code,news,code"], ["--expert_names", "code came twice"]),
        ([DENSE, "--expert-names=code"], ["--expert_names=code", "1 names for the 0 experts"]),
        (
            [MIXTURE, PAIR.replace("source", "router-weights-from")],
            ["--router_weights_from", "router weights of its own"],
        ),
        (
            [DENSE, DENSE.replace("source", "router-weights-from")],
            ["--router_weights_from", "a dense model has no router weights"],
        ),
        ([DENSE, "--router-weights-from={home}/none"], ["--router_weights_from={home}/none", "no such directory"]),
        ([MIXTURE, "--anchor={home}/anchor"], ["--anchor", "only with --as_contribution"]),
        ([PAIR, *CONTRIBUTION, "--expert-names=a"], ["--expert_names", "only without --as_contribution"]),
        ([PAIR, *CONTRIBUTION[:2]], ["--expert", "not given"]),
        ([PAIR, CONTRIBUTION[0], CONTRIBUTION[2]], ["--anchor", "not given"]),
        ([PAIR, *CONTRIBUTION[:2], "--expert=News"], ["--expert=News", "no name"]),
        ([PAIR, *CONTRIBUTION], ["another architecture", "vocab_size", "d_model"]),
        ([MIXTURE, *CONTRIBUTION], ["has 4 experts", "of two"]),
        ([DENSE, *CONTRIBUTION], ["has 1 experts", "of two"]),
        ([PAIR, CONTRIBUTION[0], CONTRIBUTION[2], "--anchor={home}/merged"], ["--anchor=", "a merged model"]),
        ([PAIR, CONTRIBUTION[0], CONTRIBUTION[2], "--anchor={home}/news"], ["--anchor=", "contribution directory"]),
        ([MIXTURE, "--no-such-flag=1"], ["no_such_flag"]),
    ],
)
def test_flags_that_do_not_fit_are_refused(home, tmp_path, flags, words):
    flags, words = ([text.format(home=home) for text in texts] for texts in (flags, words))
    assert_refused(flexolmo("import-hf", *flags, f"--out={tmp_path}/out"), "import-hf", *words)
    assert not list(tmp_path.iterdir())


def test_an_existing_out_is_kept(tmp_path):
    assert_refused(
        flexolmo("import-hf", MIXTURE, f"--out={tmp_path}"), "import-hf", f"--out={tmp_path}", "exists already"
    )


def test_a_directory_of_links_is_read(tmp_path):
    """As the cache of Hugging Face keeps a model: every file is a link into a folder of blobs."""
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "blobs").mkdir()
    source = hf.golden_with(tmp_path / "snapshots" / "main", shards=3)
    for number, file in enumerate(sorted(source.iterdir())):
        shutil.move(file, tmp_path / "blobs" / str(number))
        file.symlink_to(f"../../blobs/{number}")
    result = flexolmo("import-hf", f"--source={source}", f"--out={tmp_path}/out")
    assert (result.status, result.err) == (0, "")
    assert "identical bytes in all" in result.out


def test_all_but_the_first_of_several_eos_are_named_as_unused(tmp_path):
    printed = {}
    for name, ids in (("one", [7]), ("several", [7, 3, 5])):
        source = hf.golden_with(tmp_path / name, eos_token_id=ids)
        printed[name] = flexolmo("import-hf", f"--source={source}", f"--out={tmp_path}/out_{name}").out
        assert json.loads((tmp_path / f"out_{name}" / "model.json").read_text())["eos_id"] == 7
    assert "config.json: names 3 tokens as EOS; the first, 7, is used here\n" in printed["several"]
    assert "EOS" not in printed["one"]
