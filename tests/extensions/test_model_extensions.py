"""A router and a kind of expert that the package does not know go through train, merge, opt-out, evaluate, generate."""

import dataclasses
import math

import jax
import numpy as np
import pytest

import flexolmo_jax
from configs.base import SHARDING_RULES
from flexolmo_jax import sharding
from flexolmo_jax.combine.merge import merge
from flexolmo_jax.combine.opt_out import opt_out
from flexolmo_jax.evaluation.loss import evaluate
from flexolmo_jax.model.architecture import ANCHOR, PAIR
from flexolmo_jax.model.dispatch import stacked_experts
from flexolmo_jax.model.experts import EXPERT_KINDS
from flexolmo_jax.model.flops import train_step_flops
from flexolmo_jax.model.moe import top_k_weights
from flexolmo_jax.model.routers import ROUTERS
from tests.extensions.cosine_router import CosineRouter
from tests.extensions.low_rank import RANK, LowRank
from tests.support import small, tiny
from tests.support.runs import make_config, one_device, train, write_words

EXPERTS, D_MODEL, D_FF = 4, tiny.ARCHITECTURE.d_model, tiny.ARCHITECTURE.d_ff
LOW_RANK = {
    "gate_in": (D_MODEL, RANK),
    "gate_out": (RANK, D_FF),
    "up_in": (D_MODEL, RANK),
    "up_out": (RANK, D_FF),
    "down_in": (D_FF, RANK),
    "down_out": (RANK, D_MODEL),
}


@pytest.fixture(autouse=True)
def architectures(monkeypatch):
    """{name: architecture} with the extensions, which are registered."""
    monkeypatch.setitem(EXPERT_KINDS, "low_rank", LowRank())
    monkeypatch.setitem(ROUTERS, "cosine", CosineRouter())
    return {
        "low_rank": dataclasses.replace(tiny.ARCHITECTURE, expert="low_rank"),
        "cosine": dataclasses.replace(tiny.ARCHITECTURE, router="cosine"),
    }


@pytest.mark.parametrize(
    ("field", "name", "leaves"),
    [
        ("expert", "low_rank", {*LOW_RANK, "router/weight", "router/bias"}),
        ("router", "cosine", {"gate", "up", "down", "router/center", "router/offset", "router/log_scale"}),
    ],
    ids=["low_rank", "cosine"],
)
@pytest.mark.slow
def test_an_extension_trains_merges_opts_out_evaluates_and_generates(tmp_path, field, name, leaves):
    corpus = write_words(tmp_path / "corpus", seed=0)
    options = {"data__train": str(corpus.path), "steps": 2, "checkpoint__every": 2, "data__sequence_length": 16}

    def run(kind, directory, **values):
        with one_device():
            return train(make_config(kind, **options, **values), tmp_path / directory).output

    anchor = run("anchor", "anchor", model__num_layers=1, **{f"model__{field}": name})
    news = run("pair", "news", start_from=str(anchor), expert="news")
    law = small.contribution(tmp_path / "law", anchor, seed=1)
    trained = small.read_params(news)
    assert trained.keys() == leaves
    for leaf, initial in small.expert_leaves(anchor).items():
        assert not np.array_equal(trained[leaf], initial), leaf

    merge(anchor, [news, law], tmp_path / "merged", top_k=2, selection="router")
    tuned = run("router", "tuned", start_from=str(tmp_path / "merged")) if field == "router" else tmp_path / "merged"
    opt_out(tuned, ["law"], tmp_path / "without")
    merge(anchor, [news], tmp_path / "expected", top_k=2, selection="router")
    small.assert_same_leaves(small.read_params(tmp_path / "without"), small.read_params(tmp_path / "expected"))

    merged, without = (flexolmo_jax.load(tmp_path / directory) for directory in ("merged", "without"))
    losses = {
        "merged": evaluate(merged, {"": corpus}, length=32)[""].nats,
        "masked": evaluate(merged, {"": corpus}, without=["law"], length=32)[""].nats,
        "without": evaluate(without, {"": corpus}, length=32)[""].nats,
    }
    assert losses["masked"] == pytest.approx(losses["without"], rel=1e-5)
    assert math.isfinite(losses["merged"])
    assert losses["merged"] != pytest.approx(losses["without"], rel=1e-3)
    (text,) = merged.generate([[1, 2, 3]], max_new_tokens=4, without=["law"], ignore_eos=True)
    logits_SxV = np.asarray(without.logits([[1, 2, 3, *text.token_ids]]))[0]
    assert text.token_ids == logits_SxV[2:-1].argmax(-1).tolist()


@pytest.mark.parametrize("dispatch", ["loop", "ragged"])
def test_a_kind_without_a_cpu_loop_is_computed_by_any_dispatch_and_on_any_mesh(architectures, dispatch):
    """Against every expert for every token."""
    arch, rng = architectures["low_rank"], np.random.default_rng(0)
    experts = {name: np.float32(rng.normal(size=(EXPERTS, *shape))) for name, shape in LOW_RANK.items()}
    x = np.float32(rng.normal(size=(2, 16, D_MODEL)))
    weights = jax.nn.softmax(np.float32(rng.normal(size=(2, 16, EXPERTS))), axis=-1)

    def gradients(dispatch, rules=()):
        def loss(x, experts):
            y = stacked_experts(arch, x, experts, *top_k_weights(weights, 2, False), dispatch, rules)
            return (y**2).sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1)), compiler_options=tiny.COMPILE_FAST)(x, experts)

    expected = jax.device_get(gradients("all"))
    tiny.assert_trees_close(gradients(dispatch), expected, 1e-5)
    sizes = {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2}
    with jax.set_mesh(sharding.make_mesh(sizes)):
        tiny.assert_trees_close(gradients(dispatch, SHARDING_RULES), expected, 1e-5)


def test_flops_follow_from_the_declared_leaves(architectures):
    def forward(name, layout=ANCHOR):
        return train_step_flops(architectures.get(name, tiny.ARCHITECTURE), layout, (), batch=1, length=1)

    narrow, full = sum(math.prod(shape) for shape in LOW_RANK.values()), 3 * D_MODEL * D_FF
    assert forward("") - forward("low_rank") == 2 * tiny.ARCHITECTURE.num_layers * (full - narrow)
    # Two experts, each with two vectors of d_model instead of one.
    assert forward("cosine", PAIR) - forward("", PAIR) == 2 * tiny.ARCHITECTURE.num_layers * 2 * D_MODEL


def test_a_gradient_through_low_rank_leaves_is_counted_once(architectures):
    """Training `down_in` alone: its own gradient, and that of its output, through `down_out`."""
    arch = architectures["low_rank"]
    path = "blocks/moe/anchor/down_in"
    extra = train_step_flops(arch, ANCHOR, {path}, 1, 1) - train_step_flops(arch, ANCHOR, (), 1, 1)
    head = D_MODEL * arch.vocab_size
    first = math.prod(LOW_RANK["down_in"]) + math.prod(LOW_RANK["down_out"])
    narrow = sum(math.prod(shape) for shape in LOW_RANK.values())
    kv_size = arch.num_kv_heads * arch.head_dim
    # In the layer above, everything carries a gradient, and both operands of attention's two matmuls do.
    attention = 2 * D_MODEL * (D_MODEL + kv_size) + 2 * 2 * D_MODEL * 1
    second = attention + narrow + math.prod(LOW_RANK["down_in"])
    assert arch.num_layers == 2
    assert extra == 2 * (first + second + head)
