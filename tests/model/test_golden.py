"""The decoder against transformers: outputs, losses and gradients of two tiny random models."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax.model.decoder import Compute, Decoder
from flexolmo_jax.model.loss import head_loss, load_balancing
from tests.support import golden
from tests.support.tiny import COMPILE_FAST

WIDTH = 33  # tokens in a sequence of `input_ids`; everything is padded to it, for one compilation


@pytest.fixture(scope="module", params=[golden.DENSE, golden.MIXTURE])
def case(request):
    """A golden model with what transformers computed, and our outputs, loss and gradient on the same sequences."""
    architecture, layout, params, expected = golden.load(request.param)
    model = Decoder(architecture, layout)
    targets = expected["labels"][:, 1:]  # a label is the token at its own position, -100 where none is asked for
    mask = (targets >= 0).astype(np.float32)

    def loss(params, tokens, segment_ids):
        out = model.apply_flat(params, tokens, segment_ids)
        hidden, head = out.hidden_BxSxD[:, :-1], model.head(params)
        nats = head_loss(hidden, head, jnp.maximum(targets, 0), mask, z_weight=0.0, chunk=WIDTH).loss
        return nats / mask.sum(), out

    compute = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=COMPILE_FAST)
    tokens = expected["input_ids"]
    (loss, out), gradient = compute(params, tokens, np.ones_like(tokens))

    def forward(tokens, segment_ids):
        return compute(params, tokens, segment_ids)[0][1]

    return types.SimpleNamespace(
        model=model, params=params, expected=expected, out=out, loss=loss, gradient=gradient, forward=forward
    )


def hugging_face_names(gradient, arch):
    """Our gradient under Hugging Face's names, as [out, in] matrices: layer 0 and what lies outside the layers."""
    block = {path.removeprefix("blocks/"): leaf[0] for path, leaf in gradient.items() if path.startswith("blocks/")}
    attention = {
        f"self_attn.{projection}_proj": block[f"attention/{leaf}"].reshape(arch.d_model, -1).T
        for projection, leaf in (("q", "query"), ("k", "key"), ("v", "value"))
    }
    attention["self_attn.o_proj"] = block["attention/out"].reshape(-1, arch.d_model).T
    attention["self_attn.q_norm"] = block["attention/query_norm/scale"].reshape(-1)
    attention["self_attn.k_norm"] = block["attention/key_norm/scale"].reshape(-1)
    norms = {
        "post_attention_layernorm": block["attention_norm/scale"],
        "post_feedforward_layernorm": block["moe_norm/scale"],
    }
    layer = {f"{name}.weight": leaf for name, leaf in (attention | norms).items()}
    if "moe/anchor/gate" in block:
        layer |= {f"mlp.{leaf}_proj.weight": block[f"moe/anchor/{leaf}"].T for leaf in ("gate", "up", "down")}
    else:
        gate, up, down = (block[f"moe/experts/{leaf}"].swapaxes(1, 2) for leaf in ("gate", "up", "down"))
        layer["mlp.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        layer["mlp.experts.down_proj"] = down
        layer["mlp.gate.weight"] = block["moe/experts/router/weight"]
    return {f"model.layers.0.{name}": leaf for name, leaf in layer.items()} | {
        "model.embed_tokens.weight": gradient["embedding"],
        "model.norm.weight": gradient["final_norm/scale"],
        "lm_head.weight": gradient["head"].T,
    }


def test_logits_are_those_of_transformers(case):
    np.testing.assert_allclose(case.out.logits_BxSxV, case.expected["logits"], atol=1e-4, rtol=0)


def test_padding_changes_no_logit_of_a_text(case):
    attended = case.expected["attention_mask_padded"]
    assert 0 < attended.sum() < attended.size
    out = case.forward(case.expected["input_ids"], attended)
    difference = np.abs(out.logits_BxSxV - case.expected["logits_padded"])
    assert difference[attended == 1].max() < 1e-4
    if case.model.layout.kind == "stacked":
        balance = load_balancing(out.router_weights_LxBxSxE, attended.astype(np.float32), case.model.layout.top_k)
        assert float(balance) == pytest.approx(float(case.expected["aux_loss_padded"]), rel=1e-5)


def test_greedy_tokens_are_those_of_transformers(case):
    """Each generated token is the top one after the prompt and the tokens before it."""
    prompt, generated = case.expected["prompt"], case.expected["generated"]
    end = prompt.shape[1] + generated.shape[1]
    tokens = np.zeros((len(prompt), WIDTH), prompt.dtype)
    tokens[:, :end] = np.concatenate([prompt, generated], axis=1)
    logits = case.forward(tokens, np.ones_like(tokens)).logits_BxSxV
    np.testing.assert_array_equal(logits[:, prompt.shape[1] - 1 : end - 1].argmax(axis=-1), generated)


def test_losses_are_those_of_transformers(case):
    assert float(case.loss) == pytest.approx(float(case.expected["loss"]), rel=1e-5)
    if case.model.layout.kind == "stacked":
        weights = case.out.router_weights_LxBxSxE
        balance = load_balancing(weights, jnp.ones(weights.shape[1:3]), case.model.layout.top_k)
        assert float(balance) == pytest.approx(float(case.expected["aux_loss"]), rel=1e-5)
        assert float(case.loss + 0.01 * balance) == pytest.approx(float(case.expected["loss_with_aux"]), rel=1e-5)


def test_router_logits_are_those_of_transformers(case):
    if case.model.layout.kind == "stacked":
        logits = case.out.router_logits_LxBxSxE
        expected = case.expected["router_logits"].reshape(logits.shape)
        np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


def test_gradients_are_those_of_transformers(case):
    expected = {name.removeprefix("grad:"): x for name, x in case.expected.items() if name.startswith("grad:")}
    actual = hugging_face_names(case.gradient, case.model.architecture)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        # Of the biggest leaves only the norm is kept.
        found = actual[name] if gradient.ndim else np.linalg.norm(actual[name])
        assert np.linalg.norm(found - gradient) < 1e-4 * np.linalg.norm(gradient), name


def test_bfloat16_logits_are_those_of_transformers_within_rounding(case):
    model = Decoder(case.model.architecture, case.model.layout, Compute("bfloat16"))
    logits = jax.jit(model.apply_flat, compiler_options=COMPILE_FAST)(
        case.params, case.expected["input_ids"]
    ).logits_BxSxV
    assert logits.dtype == jnp.float32
    reference, exact = case.expected["logits_bf16"], case.expected["logits"]
    rounding = np.abs(reference - exact)
    assert np.abs(logits - reference).mean() < 1.5 * rounding.mean()
    assert np.abs(logits - reference).max() < 2 * rounding.max()
    assert np.abs(logits - exact).mean() > 0.5 * rounding.mean()
