"""The router and the ways to sum experts, against plain loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import COMPILE_FAST, assert_trees_close

from flexolmo_jax.model import mixture
from flexolmo_jax.model.mixture import DISPATCH, route, separate_experts, stacked_experts

jit = functools.partial(jax.jit, compiler_options=COMPILE_FAST)
router = jit(route)
summed = jit(stacked_experts, static_argnums=(3, 4, 5))
BATCH, LENGTH, D_MODEL, D_FF, EXPERTS = 2, 7, 8, 12, 4


def random_mixture(seed=0, experts=EXPERTS):
    """(x, experts' kernels, weights), float64."""
    rng = np.random.default_rng(seed)
    kernels = {
        "gate": rng.normal(size=(experts, D_MODEL, D_FF)),
        "up": rng.normal(size=(experts, D_MODEL, D_FF)),
        "down": rng.normal(size=(experts, D_FF, D_MODEL)),
    }
    scores = np.exp(rng.normal(size=(BATCH, LENGTH, experts)))
    return rng.normal(size=(BATCH, LENGTH, D_MODEL)), kernels, scores / scores.sum(-1, keepdims=True)


def to_float32(tree):
    return jax.tree.map(np.float32, tree)


def plain_sum(x, kernels, weights, top_k):
    """The k heaviest experts of every token, one after another."""
    y = np.zeros_like(x)
    for at in np.ndindex(x.shape[:2]):
        for e in np.argsort(-weights[at])[:top_k]:
            gate, up = x[at] @ kernels["gate"][e], x[at] @ kernels["up"][e]
            y[at] += weights[at][e] * (gate / (1 + np.exp(-gate)) * up) @ kernels["down"][e]
    return y


def masked_sum(x, kernels, weights, top_k):
    """Every expert for every token; those that are not among a token's top k weigh nothing."""
    threshold = jax.lax.stop_gradient(jnp.sort(weights, axis=-1)[..., -top_k, None])
    hidden = jax.nn.silu(jnp.einsum("bsd,edf->bsef", x, kernels["gate"])) * jnp.einsum(
        "bsd,edf->bsef", x, kernels["up"]
    )
    return jnp.einsum("bsef,efd,bse->bsd", hidden, kernels["down"], jnp.where(weights >= threshold, weights, 0))


@pytest.mark.parametrize("dispatch", DISPATCH)
@pytest.mark.parametrize("top_k", range(1, EXPERTS + 1))
def test_stacked_experts_sum_as_plain_loops_do(top_k, dispatch):
    x, kernels, weights = random_mixture()
    actual = summed(*to_float32((x, kernels, weights)), top_k, False, dispatch)
    np.testing.assert_allclose(actual, plain_sum(x, kernels, weights, top_k), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dispatch", DISPATCH)
@pytest.mark.parametrize("top_k", range(1, EXPERTS + 1))
def test_normalised_weights_of_the_top_k_sum_to_one(top_k, dispatch):
    x, kernels, weights = random_mixture()
    heaviest = np.sort(weights, axis=-1)[..., -top_k:].sum(-1, keepdims=True)
    actual = summed(*to_float32((x, kernels, weights)), top_k, True, dispatch)
    np.testing.assert_allclose(actual, plain_sum(x, kernels, weights / heaviest, top_k), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 3, 4, 14])
def test_blocks_of_any_size_sum_to_the_same(monkeypatch, rows):
    """Tokens are spread unevenly, so that experts have several blocks, a part of one, or none."""
    monkeypatch.setattr(mixture, "BLOCK_ROWS", rows)
    x, kernels, weights = random_mixture()
    weights[..., 1] = 0
    weights[..., 3] *= 5
    actual = jit(functools.partial(stacked_experts, top_k=2, dispatch="loop"))(*to_float32((x, kernels, weights)))
    np.testing.assert_allclose(actual, plain_sum(x, kernels, weights, 2), rtol=1e-4, atol=1e-4)


def test_tokens_whose_experts_all_weigh_nothing_are_zero():
    x, kernels, weights = random_mixture()
    weights[0] = 0
    for normalize in (False, True):
        assert (summed(*to_float32((x, kernels, weights)), 2, normalize, "loop")[0] == 0).all()


@pytest.mark.parametrize("dispatch", DISPATCH)
@pytest.mark.parametrize("favourite", [0, 2])
def test_no_token_is_dropped_when_all_choose_one_expert(favourite, dispatch):
    x, kernels, weights = random_mixture()
    weights = 0.01 * weights + 0.99 * np.eye(EXPERTS)[favourite]
    actual = summed(*to_float32((x, kernels, weights)), 1, False, dispatch)
    np.testing.assert_allclose(actual, plain_sum(x, kernels, weights, 1), rtol=1e-4, atol=1e-4)
    assert (np.abs(actual).max(axis=-1) > 0).all()


@pytest.mark.parametrize("top_k", [1, 3])
def test_gradients_of_stacked_experts_are_those_of_the_plain_sum(top_k):
    arguments = to_float32(random_mixture())
    toward = np.float32(np.random.default_rng(1).normal(size=(BATCH, LENGTH, D_MODEL)))

    def gradients(experts_sum):
        return jit(jax.grad(lambda a: jnp.sum(experts_sum(*a, top_k) * toward)))(arguments)

    assert_trees_close(gradients(stacked_experts), gradients(masked_sum), 1e-5)


def test_separate_experts_sum_as_plain_loops_do():
    x, kernels, weights = random_mixture(experts=3)
    experts = [{leaf: kernel[e] for leaf, kernel in kernels.items()} for e in range(3)]
    actual = jit(separate_experts)(*to_float32((x, experts, weights)))
    np.testing.assert_allclose(actual, plain_sum(x, kernels, weights, 3), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dispatch", DISPATCH)
def test_bfloat16_experts_are_weighed_in_float32(dispatch):
    x, kernels, weights = random_mixture()
    low = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), (x, kernels))
    actual = summed(*low, np.float32(weights), 2, False, dispatch)
    assert actual.dtype == jnp.bfloat16
    expected = plain_sum(*jax.tree.map(np.float64, low), weights, 2)
    assert np.abs(np.float64(actual) - expected).max() < 0.02 * np.abs(expected).max()


def random_router(seed=0):
    rng = np.random.default_rng(seed)
    x, row = rng.normal(size=(BATCH, LENGTH, D_MODEL)), rng.normal(size=(EXPERTS, D_MODEL))
    return x, row, np.array([0.0, -1.5, 0.75, -0.2])


def test_router_weights_are_the_softmax_of_rows_and_never_positive_biases():
    x, row, bias = random_router()
    expected = np.einsum("bsd,ed->bse", x, row) - np.array([0.0, 1.5, 0.75, 0.2])
    logits, weights = router(*to_float32((x, row, bias)), None)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(weights, np.exp(expected) / np.exp(expected).sum(-1, keepdims=True), rtol=1e-5)


def test_router_computes_in_float32_whatever_the_dtype_of_its_input():
    x, row, bias = random_router()
    x = jnp.asarray(x, jnp.bfloat16)
    logits, weights = router(x, *to_float32((row, bias)), None)
    expected = np.einsum("bsd,ed->bse", np.float64(x), row) - np.abs(bias)
    assert logits.dtype == weights.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_biases_of_both_signs_learn_and_a_bias_of_zero_stays():
    x, row, bias = to_float32(random_router())
    slope = jax.grad(lambda bias: jnp.sum(route(x, row, bias, None)[0]))(bias)
    np.testing.assert_array_equal(slope, BATCH * LENGTH * np.array([0, 1, -1, 1]))


MASK_BxE = np.array([[True, True, False, True], [False, True, False, False]])
MASK_BxSxE = MASK_BxE[:, None] ^ (np.arange(LENGTH) % 2 > 0)[:, None]


@pytest.mark.parametrize("mask", [MASK_BxE[0], MASK_BxE, MASK_BxSxE], ids=["one", "rows", "tokens"])
def test_masked_experts_weigh_nothing_and_the_others_sum_to_one(mask):
    """One mask for all rows, one for each, or one for each token."""
    x, row, bias = random_router()
    logits, weights = router(*to_float32((x, row, bias)), mask)
    on = np.broadcast_to(mask if mask.ndim == 3 else np.atleast_2d(mask)[:, None], weights.shape)
    exact = np.einsum("bsd,ed->bse", x, row) - np.abs(bias)
    scores = np.where(on, np.exp(exact), 0)
    np.testing.assert_allclose(logits, exact, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(weights, scores / scores.sum(-1, keepdims=True), rtol=1e-5)
    assert (np.asarray(weights)[~on] == 0).all()
