"""The whole model: layouts against one another, packing, implementations, and the published sizes."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import anchor
from flexolmo_jax.model.architecture import ANCHOR, PAIR, Architecture, Layout
from flexolmo_jax.model.decoder import Compute, Decoder
from tests.support.tiny import (
    ARCHITECTURE,
    COMPILE_FAST,
    LAYOUTS,
    STACKED,
    assert_trees_close,
    expert_leaves,
    random_batch,
    random_leaves,
    stack,
    with_experts,
)

TOKENS = random_batch([[9], [9]], 9)["tokens"]
ROUTER = ("router/weight", "router/bias")
EVERYONE = (None, None, np.ones((2, 4), bool))  # segments, positions and a mask of experts, for `logits`


@functools.cache
def forward(layout, dtype="float32", fast=True):
    """The compiled forward pass of a tiny model."""
    model = Decoder(ARCHITECTURE, layout, Compute(dtype))
    return jax.jit(model.apply_flat, compiler_options=COMPILE_FAST if fast else None)


def logits(layout, leaves, *args):
    """Logits of a tiny model for TOKENS."""
    return np.asarray(forward(layout)(leaves, TOKENS, *args).logits_BxSxV)


@pytest.fixture(scope="module")
def anchor_leaves():
    return random_leaves(Decoder(ARCHITECTURE, ANCHOR))


@pytest.fixture(scope="module")
def stacked_leaves():
    return random_leaves(Decoder(ARCHITECTURE, STACKED))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pair_of_copies_is_the_anchor_bit_for_bit(anchor_leaves, dtype):
    """Whatever the router's logits, since the expert's router weight differs from the anchor's."""
    anchor = expert_leaves(anchor_leaves, "anchor")
    routed = {leaf: np.float32(3) * anchor[leaf] - np.float32(1) for leaf in ROUTER}
    copies = with_experts(anchor_leaves, anchor=anchor, expert=anchor | routed)
    trained = with_experts(
        anchor_leaves, anchor=anchor, expert=anchor | routed | {"down": np.float32(1.01) * anchor["down"]}
    )
    expected = forward(ANCHOR, dtype, fast=False)(anchor_leaves, TOKENS).logits_BxSxV
    pair = forward(PAIR, dtype, fast=False)
    np.testing.assert_array_equal(pair(copies, TOKENS).logits_BxSxV, expected)
    assert (pair(trained, TOKENS).logits_BxSxV != expected).any()


@pytest.mark.parametrize(("top_k", "tolerance"), [(4, 1e-5), (2, 1e-4), (1, 1e-4)])
def test_a_merge_of_copies_is_the_anchor(anchor_leaves, top_k, tolerance):
    """Up to the epsilon of the norm that removes the weights' sum, where top_k leaves experts out."""
    anchor = expert_leaves(anchor_leaves, "anchor")
    rng = np.random.default_rng(0)
    copies = [anchor] + [anchor | {leaf: rng.normal(size=anchor[leaf].shape) for leaf in ROUTER} for _ in range(3)]
    merged = with_experts(anchor_leaves, experts=stack(*copies))
    expected = logits(ANCHOR, anchor_leaves)
    error = np.abs(logits(Layout("stacked", 4, top_k), merged, *EVERYONE) - expected).max()
    assert error < tolerance * np.abs(expected).max()


def test_a_pair_is_the_stack_of_its_two_experts():
    leaves = random_leaves(Decoder(ARCHITECTURE, PAIR))
    stacked = with_experts(leaves, experts=stack(expert_leaves(leaves, "anchor"), expert_leaves(leaves, "expert")))
    expected = logits(PAIR, leaves)
    np.testing.assert_allclose(logits(Layout("stacked", 2, 2), stacked), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("top_k", [2, 4])
def test_masking_an_expert_is_removing_it(stacked_leaves, top_k):
    """For one sequence of the batch; the other keeps all experts, and its logits do not change."""
    experts = expert_leaves(stacked_leaves, "experts")
    without = {leaf: np.delete(x, 2, axis=1) for leaf, x in experts.items()}
    layout, fewer = Layout("stacked", 4, top_k), Layout.of_roster(3, top_k)
    removed = logits(fewer, with_experts(stacked_leaves, experts=without))
    one_out = np.array([[True, True, False, True], [True, True, True, True]])
    whole = logits(layout, stacked_leaves, *EVERYONE)
    masked = logits(layout, stacked_leaves, None, None, one_out)
    np.testing.assert_allclose(masked[0], removed[0], atol=1e-4)
    np.testing.assert_array_equal(masked[1], whole[1])
    assert np.abs(removed - whole).max() > 0.1


def test_packed_documents_do_not_see_one_another(stacked_leaves):
    """Each has the logits it has alone, and none depends on what follows or on padding."""
    documents = [[5, 3, 6], [4, 9]]
    batch = random_batch(documents, 16)
    compute = forward(STACKED)
    packed = compute(stacked_leaves, batch["tokens"], batch["segment_ids"], batch["positions"]).logits_BxSxV
    sequences, expected = [], []
    for i, lengths in enumerate(documents):
        ends = np.cumsum(lengths)
        for start, end in zip(ends - lengths, ends, strict=True):
            sequences.append(np.pad(batch["tokens"][i, start:end], (0, 16 - (end - start))))
            expected.append(np.asarray(packed[i, start:end]))
    alone = compute(stacked_leaves, np.stack(sequences)).logits_BxSxV
    for i, document in enumerate(expected):
        np.testing.assert_allclose(alone[i, : len(document)], document, atol=1e-4)


def test_what_is_recomputed_or_unrolled_changes_neither_loss_nor_gradient(stacked_leaves):
    batch = random_batch([[9, 4], [16]], 16)

    def loss_and_gradient(**compute):
        model = Decoder(ARCHITECTURE, STACKED, Compute(**compute))

        def loss(leaves):
            out = model.apply_flat(leaves, batch["tokens"], batch["segment_ids"], batch["positions"])
            return jnp.mean(jax.nn.log_softmax(out.logits_BxSxV)[..., 0]) + jnp.mean(out.router_logits_LxBxSxE**2)

        traced = jax.jit(jax.value_and_grad(loss)).trace(stacked_leaves)
        assert ("remat" in str(traced.jaxpr)) == (compute.get("remat", "none") != "none")
        return traced.lower().compile(COMPILE_FAST)(stacked_leaves)

    expected = loss_and_gradient()
    for compute in ({"remat": "feed_forward"}, {"remat": "kernels"}, {"remat": "full", "unroll": 2}):
        assert_trees_close(loss_and_gradient(**compute), expected, 1e-5)
    loss, gradient = loss_and_gradient(remat="dots", input_gradient=False)
    assert not gradient["embedding"].any()
    assert_trees_close((loss, {**gradient, "embedding": expected[1]["embedding"]}), expected, 1e-5)


def test_logits_are_float32_in_bfloat16_too(stacked_leaves):
    model = Decoder(ARCHITECTURE, STACKED, Compute("bfloat16"))
    out = jax.eval_shape(model.apply_flat, stacked_leaves, TOKENS)
    assert out.hidden_BxSxD.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(out[1:])} == {jnp.dtype("float32")}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_dimension_of_every_leaf_has_a_logical_axis(layout):
    model = Decoder(ARCHITECTURE, layout)
    axes = model.logical_axes()
    assert {path: len(names) for path, names in axes.items()} == {p: x.ndim for p, x in model.abstract().items()}
    in_blocks = [path for path in axes if path.startswith("blocks/")]
    assert all(axes[path][0] == "layers" for path in in_blocks)
    stacked = [path for path in axes if "moe/experts/" in path]
    assert all(axes[path][1] == "experts" for path in stacked)
    assert len(stacked) == 5 * (layout.kind == "stacked")


@pytest.mark.parametrize(
    ("layout", "billions"),
    [(ANCHOR, 7.3), (PAIR, 11.6), (Layout("stacked", 7, 5), 33.3), (Layout("stacked", 8, 4), 37.6)],
    ids=["anchor", "pair", "7 experts", "8 experts"],
)
def test_the_published_size_has_the_published_parameters(layout, billions):
    arch = Architecture.from_dict(anchor.get_config("7b").model.to_dict(), "7b")
    width, vocabulary = arch.d_model, arch.vocab_size
    expert = 3 * width * arch.d_ff + width + 1
    layer = 4 * width**2 + 4 * width + layout.num_experts * expert
    leaves = Decoder(arch, layout).abstract()
    count = sum(math.prod(leaf.shape) for leaf in leaves.values())
    assert count == 2 * vocabulary * width + width + arch.num_layers * layer
    assert count / 1e9 == pytest.approx(billions, abs=0.05)
    assert {leaf.dtype for leaf in leaves.values()} == {jnp.dtype("float32")}


def test_the_published_size_computes_what_its_shapes_say():
    arch = Architecture.from_dict(anchor.get_config("7b").model.to_dict(), "7b")
    model = Decoder(arch, Layout("stacked", 8, 4), Compute("bfloat16", "dots"))
    tokens = jax.ShapeDtypeStruct((2, 4096), jnp.int32)
    out = jax.eval_shape(model.apply_flat, model.abstract(), tokens)
    assert out.logits_BxSxV.shape == (2, 4096, arch.vocab_size)
    assert out.router_logits_LxBxSxE.shape == out.router_weights_LxBxSxE.shape == (32, 2, 4096, 8)


def test_grouped_heads_have_fewer_keys_and_values():
    leaves = Decoder(dataclasses.replace(ARCHITECTURE, num_kv_heads=1), ANCHOR).abstract()
    shapes = {name: leaves[f"blocks/attention/{name}"].shape for name in ("query", "key", "value")}
    assert shapes == {"query": (2, 32, 4, 8), "key": (2, 32, 1, 8), "value": (2, 32, 1, 8)}
