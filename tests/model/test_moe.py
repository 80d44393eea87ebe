"""The router and the pair, against plain loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax.model.moe import routing_weights, separate_experts
from flexolmo_jax.model.routers import ROUTERS
from tests.support.mixtures import BATCH, D_MODEL, EXPERTS, LENGTH, plain_sum, random_mixture, to_float32
from tests.support.tiny import ARCHITECTURE, COMPILE_FAST

jit = functools.partial(jax.jit, compiler_options=COMPILE_FAST)


def route(x, weight, bias, mask):
    """(logits, weights) of the linear router, as the mixture computes them."""
    leaves = {"weight": weight.astype(jnp.float32), "bias": bias.astype(jnp.float32)}
    logits = ROUTERS["linear"].logits(x.astype(jnp.float32), leaves)
    return logits, routing_weights(logits, mask)


router = jit(route)


def test_separate_experts_sum_as_plain_loops_do():
    x, kernels, weights = random_mixture(experts=3)
    experts = [{leaf: kernel[e] for leaf, kernel in kernels.items()} for e in range(3)]
    actual = jit(functools.partial(separate_experts, ARCHITECTURE))(*to_float32((x, experts, weights)))
    np.testing.assert_allclose(actual, plain_sum(x, kernels, weights, 3), rtol=1e-4, atol=1e-4)


def random_router(seed=0):
    rng = np.random.default_rng(seed)
    x, weight = rng.normal(size=(BATCH, LENGTH, D_MODEL)), rng.normal(size=(EXPERTS, D_MODEL))
    return x, weight, np.array([0.0, -1.5, 0.75, -0.2])


def test_router_weights_are_the_softmax_of_logits_with_never_positive_biases():
    x, weight, bias = random_router()
    expected = np.einsum("bsd,ed->bse", x, weight) - np.array([0.0, 1.5, 0.75, 0.2])
    logits, weights = router(*to_float32((x, weight, bias)), None)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(weights, np.exp(expected) / np.exp(expected).sum(-1, keepdims=True), rtol=1e-5)


def test_router_computes_in_float32_whatever_the_dtype_of_its_input():
    x, weight, bias = random_router()
    x = jnp.asarray(x, jnp.bfloat16)
    logits, weights = router(x, *to_float32((weight, bias)), None)
    expected = np.einsum("bsd,ed->bse", np.float64(x), weight) - np.abs(bias)
    assert logits.dtype == weights.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_an_accelerator_is_asked_for_all_bits_of_the_router():
    """It would take TF32 or bfloat16 for float32; of the gradient's matmuls too."""

    def total(x, weights):
        return jnp.sum(route(x, weights, jnp.zeros(3), None)[0])

    x, weights = jnp.ones((1, 4, 8), jnp.bfloat16), jnp.ones((3, 8))
    jaxpr = str(jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(x, weights))
    assert jaxpr.count("dot_general[") == jaxpr.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == 3


def test_biases_of_both_signs_learn_and_a_bias_of_zero_stays():
    x, weight, bias = to_float32(random_router())
    slope = jax.grad(lambda bias: jnp.sum(route(x, weight, bias, None)[0]))(bias)
    np.testing.assert_array_equal(slope, BATCH * LENGTH * np.array([0, 1, -1, 1]))


MASK_BxE = np.array([[True, True, False, True], [False, True, False, False]])
MASK_BxSxE = MASK_BxE[:, None] ^ (np.arange(LENGTH) % 2 > 0)[:, None]


@pytest.mark.parametrize("mask", [MASK_BxE[0], MASK_BxE, MASK_BxSxE], ids=["one", "sequences", "tokens"])
def test_masked_experts_weigh_nothing_and_the_others_sum_to_one(mask):
    """One mask for all sequences, one for each, or one for each token."""
    x, weight, bias = random_router()
    logits, weights = router(*to_float32((x, weight, bias)), mask)
    on = np.broadcast_to(mask if mask.ndim == 3 else np.atleast_2d(mask)[:, None], weights.shape)
    exact = np.einsum("bsd,ed->bse", x, weight) - np.abs(bias)
    scores = np.where(on, np.exp(exact), 0)
    np.testing.assert_allclose(logits, exact, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(weights, scores / scores.sum(-1, keepdims=True), rtol=1e-5)
    assert (np.asarray(weights)[~on] == 0).all()
