"""A model with a selector: what its weights are, and that masks, packing and scale act as they should."""

import functools

import jax
import numpy as np
import pytest

from flexolmo_jax.model.architecture import Layout
from flexolmo_jax.model.decoder import Compute, Decoder
from flexolmo_jax.model.selectors import LOG_SCALE, SELECTORS, derived_leaves
from tests.support import small
from tests.support.tiny import (
    ARCHITECTURE,
    COMPILE_FAST,
    expert_leaves,
    random_batch,
    random_leaves,
    stack,
    with_experts,
)

EXPERTS, LENGTH = 4, 16
STATISTICS = [small.ngram_statistics(seed) for seed in range(EXPERTS)]
ROUTER = ("blocks/moe/experts/router/weight", "blocks/moe/experts/router/bias")
BATCH = random_batch([[LENGTH], [LENGTH]], LENGTH)
EVERYONE = np.ones((2, EXPERTS), bool)


@functools.cache
def forward(selection, experts=EXPERTS, top_k=2):
    """The compiled forward pass of a tiny model."""
    model = Decoder(ARCHITECTURE, Layout("stacked", experts, top_k, selection), Compute())
    return jax.jit(model.apply_flat, compiler_options=COMPILE_FAST)


def run(leaves, selection, batch=BATCH, mask=EVERYONE, **layout):
    return forward(selection, **layout)(leaves, batch["tokens"], batch["segment_ids"], batch["positions"], mask)


@pytest.fixture(scope="module")
def plain():
    """The leaves of a model whose router chooses; a selector's come beside them."""
    return random_leaves(Decoder(ARCHITECTURE, Layout("stacked", EXPERTS, 2)))


@pytest.fixture(scope="module")
def leaves(plain):
    return plain | derived_leaves("ngram", STATISTICS) | {LOG_SCALE: np.float32(np.log(2))}


def evidence(batch):
    """float64 [batch, length, experts], of sequences of one document each, before its scale."""
    table = SELECTORS["ngram"].tables(STATISTICS)["log_ratio"].astype(np.float64)
    selector, tokens = SELECTORS["ngram"], batch["tokens"]
    context = selector.context(ARCHITECTURE)
    result, sums = [], np.zeros((len(tokens), EXPERTS))
    for end in range(tokens.shape[1]):
        sums = sums * (1 - 1 / 32)
        for i in range(len(tokens)):
            if end >= context:
                sums[i] += table[bucket(tokens[i, end - context : end + 1])]
        result.append(sums.copy())
    return np.stack(result, axis=1)


def bucket(tokens):
    value = 0
    for token in reversed(tokens.tolist()):
        value = (value * 0x9E3779B1 + token + 1) % 2**32
    return value * 0x85EBCA6B % 2**32 >> 16


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def test_weights_are_the_posterior_of_the_scaled_evidence(leaves):
    """In every layer; less the size of each expert's bias."""
    without_bias = leaves | {ROUTER[1]: np.zeros_like(leaves[ROUTER[1]])}
    out = run(without_bias, "ngram")
    expected = softmax(2 * evidence(BATCH))
    assert np.ptp(expected, axis=-1).max() > 0.5
    for weights in out.router_weights_LxBxSxE:
        np.testing.assert_allclose(weights, expected, atol=1e-5)
    biased = run(leaves, "ngram")
    for weights, bias in zip(biased.router_weights_LxBxSxE, leaves[ROUTER[1]], strict=True):
        np.testing.assert_allclose(weights, softmax(2 * evidence(BATCH) - np.abs(bias)), atol=1e-5)


def test_router_weights_play_no_part_beside_a_selector_alone(leaves):
    other = leaves | {ROUTER[0]: -3 * leaves[ROUTER[0]]}
    np.testing.assert_array_equal(run(leaves, "ngram").logits_BxSxV, run(other, "ngram").logits_BxSxV)
    both = [np.asarray(run(values, "router+ngram").logits_BxSxV) for values in (leaves, other)]
    assert np.abs(both[0] - both[1]).max() > 0.1


def test_logits_of_router_and_selector_add_up(plain, leaves):
    """In the first layer, whose input is the same whatever is chosen."""
    router, both = run(plain, "router"), run(leaves, "router+ngram")
    expected = router.router_logits_LxBxSxE[0] + 2 * evidence(BATCH)
    np.testing.assert_allclose(both.router_logits_LxBxSxE[0], expected, atol=1e-4)


@pytest.mark.parametrize(("selection", "top_k"), [("ngram", 1), ("router+ngram", 2)])
def test_masking_an_expert_is_never_having_merged_it(leaves, selection, top_k):
    """For one sequence of the batch; the other keeps all experts, and no bit of it changes."""
    experts = {leaf: np.delete(x, 2, axis=1) for leaf, x in expert_leaves(leaves, "experts").items()}
    fewer = with_experts(leaves, experts=experts) | derived_leaves(selection, [*STATISTICS[:2], STATISTICS[3]])
    removed = run(fewer, selection, mask=np.ones((2, EXPERTS - 1), bool), experts=EXPERTS - 1, top_k=top_k)
    one_out = np.array([[True, True, False, True], [True] * 4])
    whole, masked = (run(leaves, selection, mask=mask, top_k=top_k) for mask in (EVERYONE, one_out))
    np.testing.assert_allclose(masked.logits_BxSxV[0], removed.logits_BxSxV[0], atol=1e-4)
    np.testing.assert_array_equal(masked.logits_BxSxV[1], whole.logits_BxSxV[1])
    found = np.delete(masked.router_weights_LxBxSxE[:, 0], 2, axis=-1)
    np.testing.assert_allclose(found, removed.router_weights_LxBxSxE[:, 0], atol=1e-5)
    assert np.abs(np.asarray(removed.logits_BxSxV - whole.logits_BxSxV)).max() > 0.1


def test_a_merge_of_copies_is_what_each_copy_computes(leaves):
    """At top-1, whatever the posterior, up to the epsilon of the norm that removes its weight."""
    expert = {leaf: x[:, 0] for leaf, x in expert_leaves(leaves, "experts").items()}
    copies = with_experts(leaves, experts=stack(*[expert] * EXPERTS))
    found = np.asarray(run(copies, "ngram", top_k=1).logits_BxSxV)
    other = run(copies | {LOG_SCALE: np.float32(-2)}, "ngram", top_k=1).logits_BxSxV
    np.testing.assert_allclose(found, other, atol=1e-3 * np.abs(found).max())


@pytest.mark.parametrize("selection", ["ngram", "router+ngram"])
def test_packed_documents_do_not_know_one_another(leaves, selection):
    """Each has the logits and the weights that it has alone, and none depends on padding."""
    documents = [[5, 3, 8], [4, 9]]
    batch = random_batch(documents, LENGTH, seed=3)
    packed = run(leaves, selection, batch)
    for i, lengths in enumerate(documents):
        start = 0
        for length in lengths:
            inside, alone = slice(start, start + length), random_batch([[length], [length]], LENGTH, seed=4)
            alone["tokens"][0, :length] = batch["tokens"][i, inside]
            expected = run(leaves, selection, alone)
            np.testing.assert_allclose(packed.logits_BxSxV[i, inside], expected.logits_BxSxV[0, :length], atol=1e-4)
            weights = packed.router_weights_LxBxSxE[:, i, inside]
            np.testing.assert_allclose(weights, expected.router_weights_LxBxSxE[:, 0, :length], atol=1e-5)
            start += length


def test_a_model_with_a_selector_declares_its_leaves(leaves):
    model = Decoder(ARCHITECTURE, Layout("stacked", EXPERTS, 2, "ngram"), Compute())
    abstract = model.abstract()
    assert {path: leaf.shape for path, leaf in abstract.items()} == {path: x.shape for path, x in leaves.items()}
    assert not any(path.startswith("selector/") for path in Decoder(ARCHITECTURE, Layout("stacked", 4, 2)).abstract())
