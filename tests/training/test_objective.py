"""The loss against plain numpy, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax.model.decoder import Decoder
from flexolmo_jax.model.loss import load_balancing
from flexolmo_jax.training.step import LossWeights, objective
from tests.support.tiny import ARCHITECTURE, COMPILE_FAST, STACKED, random_batch, random_leaves

WEIGHTS = LossWeights(z_loss=0.3, router_z_loss=0.2, load_balancing=0.7)


@pytest.fixture(scope="module")
def computed():
    """(batch, loss, sums, output) of a random stacked model."""
    model = Decoder(ARCHITECTURE, STACKED)
    leaves, batch = random_leaves(model), random_batch([[5, 4], [7]], 12)

    def both(leaves, batch):
        return objective(model, leaves, batch, WEIGHTS), model.apply_flat(
            leaves, batch["tokens"], batch["segment_ids"], batch["positions"]
        )

    compute = jax.jit(both, compiler_options=COMPILE_FAST)
    (loss, sums), out = compute(leaves, batch)
    return batch, loss, sums, jax.tree.map(np.float64, out), lambda batch: compute(leaves, batch)[0]


def log_sum_exp(x):
    return np.log(np.exp(x).sum(axis=-1))


def plain_sums(batch, out):
    """Token by token; padding counts nowhere."""
    sums = {"tokens": 0, "cross_entropy": 0.0, "z_loss": 0.0, "router_z_loss": 0.0}
    layers, routed = ARCHITECTURE.num_layers, np.zeros(4)
    routing_LxE, entropy_L = np.zeros((layers, 4)), np.zeros(layers)
    for b, s in zip(*np.nonzero(batch["segment_ids"]), strict=True):
        logits = out.logits_BxSxV[b, s]
        sums["tokens"] += 1
        sums["cross_entropy"] += log_sum_exp(logits) - logits[batch["targets"][b, s]]
        sums["z_loss"] += log_sum_exp(logits) ** 2
        for layer in range(ARCHITECTURE.num_layers):
            weights = out.router_weights_LxBxSxE[layer, b, s]
            sums["router_z_loss"] += log_sum_exp(out.router_logits_LxBxSxE[layer, b, s]) ** 2 / ARCHITECTURE.num_layers
            routing_LxE[layer] += weights
            entropy_L[layer] -= np.sum(weights * np.log(weights))
            routed[np.argsort(-weights)[: STACKED.top_k]] += 1 / ARCHITECTURE.num_layers
    tokens = sums["tokens"]
    of_routing = {"routing_LxE": routing_LxE, "router_entropy_L": entropy_L}
    routing = routing_LxE.mean(axis=0)
    return sums | of_routing | {"load_balancing": 4 * np.sum(routed / tokens * routing / tokens) * tokens}


def test_terms_are_sums_over_tokens_that_are_not_padding(computed):
    batch, _, sums, out, _ = computed
    expected = plain_sums(batch, out)
    assert sums.keys() == expected.keys()
    assert expected["tokens"] == 16
    for name, value in expected.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-5, err_msg=name)


def test_the_loss_weighs_its_terms(computed):
    batch, loss, _, out, _ = computed
    terms = plain_sums(batch, out)
    expected = terms["cross_entropy"] + sum(getattr(WEIGHTS, name) * terms[name] for name in WEIGHTS._fields)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_what_padding_holds_changes_nothing(computed):
    batch, loss, sums, _, compute = computed
    padding = batch["segment_ids"] == 0
    other = {
        **batch,
        "tokens": np.where(padding, 1, batch["tokens"]),
        "targets": np.where(padding, 2, batch["targets"]),
    }
    jax.tree.map(np.testing.assert_array_equal, compute(other), (loss, sums))


def test_a_batch_of_padding_weighs_nothing(computed):
    batch, *_, compute = computed
    empty = {name: np.zeros_like(array) for name, array in batch.items()}
    for value in jax.tree.leaves(compute(empty)):
        assert not np.asarray(value).any()


def test_load_balancing_is_top_k_for_even_routing_and_all_experts_for_one():
    mask = jnp.ones((2, 3))
    even = jnp.full((2, 2, 3, 4), 0.25)
    assert float(load_balancing(even, mask, 2)) == pytest.approx(2)
    assert float(load_balancing(jax.nn.one_hot(jnp.ones((2, 2, 3), int), 4), mask, 1)) == pytest.approx(4)
