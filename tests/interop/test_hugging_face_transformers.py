"""transformers -> here -> transformers: logits, gradients of the router and greedy tokens of random models."""

import contextlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexolmo_jax
from flexolmo_jax.checkpoint.model_directory import read_model
from flexolmo_jax.data.tokenization.tokenizer import byte_tokenizer
from flexolmo_jax.errors import UserError
from flexolmo_jax.interop import parity
from flexolmo_jax.model.architecture import Architecture, Layout
from flexolmo_jax.model.decoder import Decoder
from tests.support import golden, small
from tests.support import hf_directories as hf
from tests.support.small import assert_refused, flexolmo
from tests.support.tiny import COMPILE_FAST

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 96, "eos_token_id": 256, "pad_token_id": None,
}  # fmt: skip
# name: (experts, of which compute a token, key/value heads, norm_topk_prob, tied embeddings)
CASES = {
    "dense, tied": (0, 0, 2, False, True),
    "one expert": (1, 1, 4, False, False),
    "top-1 of 3, normalised, tied": (3, 1, 1, True, True),
    "top-3 of 8, normalised": (8, 3, 2, True, False),
    "top-5 of 7": (7, 5, 4, False, False),
}
GENERATED = "top-5 of 7"  # the case in which text is written here too
NEW = 32


def random_model(experts, top_k, kv_heads, norm_topk_prob, tied):
    """A model of transformers whose parameters are spread widely enough that routing is uneven."""
    common = SIZES | {"num_key_value_heads": kv_heads, "tie_word_embeddings": tied}
    if experts:
        config = transformers.FlexOlmoConfig(
            **common, num_experts=experts, num_experts_per_tok=top_k, norm_topk_prob=norm_topk_prob
        )
        model = transformers.FlexOlmoForCausalLM(config)
    else:
        model = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**common))
    generator = torch.Generator().manual_seed(experts)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(("norm" in name) + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A random model as transformers saves it, imported, exported, and loaded by transformers again."""
    home = tmp_path_factory.mktemp("transformers")
    experts, top_k, _, norm_topk_prob, _ = CASES[request.param]
    original = random_model(*CASES[request.param])
    original.save_pretrained(home / "original")
    byte_tokenizer().save(home / "original" / "tokenizer.json")
    results = [flexolmo("import-hf", f"--source={home}/original", f"--out={home}/imported")]
    results.append(flexolmo("export-hf", f"--model={home}/imported", f"--out={home}/back"))
    assert [(result.status, result.err) for result in results] == [(0, "")] * 2
    with quiet():
        back = transformers.AutoModelForCausalLM.from_pretrained(home / "back", dtype="auto").eval()
    tokens = np.random.default_rng(1).integers(0, 256, (2, 17))
    return types.SimpleNamespace(
        name=request.param,
        experts=experts,
        top_k=top_k,
        norm_topk_prob=norm_topk_prob,
        home=home,
        original=original,
        back=back,
        imported=flexolmo_jax.load(home / "imported"),
        tokens=tokens,
        printed=[result.out for result in results],
    )


@contextlib.contextmanager
def quiet():
    with parity._quiet():
        yield


def logits(model, tokens):
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


def our_logits(model, tokens):
    """In the shape of the gate, for which everything is compiled already."""
    padded = np.zeros((parity.BATCH, parity.LENGTH), int)
    padded[:, : tokens.shape[1]] = tokens
    return parity.our_logits(model, padded)[:, : tokens.shape[1]]


def greedy(model, prompts):
    """The prompts and the most likely NEW tokens after them, by transformers."""
    settings = transformers.GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    with quiet():
        return model.generate(torch.from_numpy(prompts), generation_config=settings).numpy()


def test_the_gate_compared_logits(case):
    for printed in case.printed:
        assert "logits, float32, against transformers: max abs difference" in printed
    page = (case.home / "back" / "README.md").read_text()
    assert "over 128 tokens (allowed: 0.0001 and 1e-06)" in page
    manifest = read_model(case.home / "imported")
    found = manifest.experts[0].card["imported"]["logits"]
    assert 0 < found["max_abs"] < 1e-4
    assert found["kl"] < 1e-6


def test_logits_are_equal(case):
    original = logits(case.original, case.tokens)
    assert np.abs(original).max() > 1
    np.testing.assert_allclose(our_logits(case.imported, case.tokens), original, atol=1e-4, rtol=0)
    np.testing.assert_allclose(logits(case.back, case.tokens), original, atol=1e-5, rtol=0)


def test_weights_are_equal_to_the_bit(case):
    if case.experts != 1:  # one expert goes out as the dense model it is
        hf.assert_same_weights(case.home / "original", case.home / "back")
    assert type(case.back).__name__ == ("FlexOlmoForCausalLM" if case.experts > 1 else "Olmo2ForCausalLM")


def test_router_gradients_are_equal(case):
    if not case.experts:
        pytest.skip("a dense model has no router")
    case.original.zero_grad()
    tokens = torch.from_numpy(case.tokens)
    case.original(tokens, labels=tokens).loss.backward()
    expected = np.stack([layer.mlp.gate.weight.grad.numpy() for layer in case.original.model.layers])
    manifest = read_model(case.home / "imported")
    layout = Layout.of_roster(case.experts, manifest.top_k)
    decoder = Decoder(Architecture.from_dict(manifest.architecture, ""), layout)
    params = small.read_params(case.home / "imported")
    (path,) = (path for path in params if path.endswith("/router/weight"))

    @jax.jit
    def gradient(weights):
        def loss(weights):
            out = decoder.apply_flat(params | {path: weights}, case.tokens).logits_BxSxV[:, :-1]
            return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(out), case.tokens[:, 1:, None], axis=-1))

        return jax.grad(loss)(weights)

    found = np.asarray(gradient.lower(params[path]).compile(COMPILE_FAST)(params[path])).reshape(expected.shape)
    if case.experts > 1 and not (case.norm_topk_prob and case.top_k == 1):  # where the only weight is 1
        assert np.linalg.norm(expected) > 1e-3
    assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected) + 1e-7


def test_greedy_tokens_are_equal(case):
    """Each of their tokens is the most likely here after those before it."""
    start = 9
    written = greedy(case.back, case.tokens[:, :start])
    found = our_logits(case.imported, written).argmax(axis=-1)
    np.testing.assert_array_equal(found[:, start - 1 : -1], written[:, start:])
    if case.name == GENERATED:
        continuations = case.imported.generate(case.tokens[:, :start].tolist(), max_new_tokens=NEW)
        for continuation, expected in zip(continuations, written[:, start:].tolist(), strict=True):
            end = expected.index(256) if 256 in expected else NEW
            assert continuation.token_ids == expected[:end]


def test_the_fused_layout_of_memory_is_read(case, tmp_path, no_transformers):
    tensors = {name: x.contiguous().numpy() for name, x in case.original.state_dict().items()}
    assert any("gate_up_proj" in name for name in tensors) == bool(case.experts)
    source = hf.write(tmp_path / "fused", tensors, hf.config(case.home / "original"))
    byte_tokenizer().save(source / "tokenizer.json")
    assert flexolmo("import-hf", f"--source={source}", f"--out={tmp_path}/imported").status == 0
    found, expected = (read_model(path) for path in (tmp_path / "imported", case.home / "imported"))
    assert found.shared == expected.shared
    assert [expert.digest for expert in found.experts] == [expert.digest for expert in expected.experts]


def test_tokenizer_and_generation_config_load(case):
    with quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(case.home / "back")
        settings = transformers.GenerationConfig.from_pretrained(case.home / "back")
    text = "naïve: two words"
    assert tokenizer(text)["input_ids"] == byte_tokenizer().encode(text).tolist()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (256, 256, 256)
    assert tokenizer.model_max_length == 96
    assert settings.eos_token_id == 256
    assert case.back.config.max_position_embeddings == 96


def test_logits_too_far_apart_leave_nothing(tmp_path, monkeypatch):
    source = golden.GOLDEN / golden.DENSE
    assert flexolmo("import-hf", f"--source={source}", f"--out={tmp_path}/imported").status == 0
    monkeypatch.setattr(parity, "MAX_KL", -1.0)
    for command, flag in (("import-hf", f"--source={source}"), ("export-hf", f"--model={tmp_path}/imported")):
        result = flexolmo(command, flag, f"--out={tmp_path}/out")
        assert_refused(result, command, "its logits here and in transformers differ", "nothing was written")
    assert [path.name for path in tmp_path.iterdir()] == ["imported"]


def test_what_transformers_does_not_load_fails_the_gate(tmp_path):
    tensors = hf.weights(golden.GOLDEN / golden.DENSE)
    source = hf.golden_with(tmp_path / "source", golden.DENSE, tensors | {"lm_head.bias": np.zeros(512, np.float32)})
    with pytest.raises(UserError, match=r"does not find its weights as they are \(lm_head.bias\)"):
        parity._transformers_logits(source, np.zeros((1, 2), int))
    (source / "config.json").write_text("{}")
    with pytest.raises(UserError, match="transformers cannot load it"):
        parity._transformers_logits(source, np.zeros((1, 2), int))
