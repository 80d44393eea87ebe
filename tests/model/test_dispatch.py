"""Implementations of stacked experts against plain loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexolmo_jax.model import dispatch as dispatch_module
from flexolmo_jax.model.decoder import REMAT_POLICIES
from flexolmo_jax.model.dispatch import stacked_experts
from flexolmo_jax.model.kernels import expert_loop, few_tokens
from flexolmo_jax.model.moe import top_k_weights
from tests.support.mixtures import BATCH, D_MODEL, EXPERTS, LENGTH, masked_sum, plain_sum, random_mixture, to_float32
from tests.support.tiny import ARCHITECTURE, COMPILE_FAST, assert_trees_close

HERE = ("all", "loop", "ragged", "blocks")  # those that run without an accelerator
jit = functools.partial(jax.jit, compiler_options=COMPILE_FAST)


@pytest.fixture(autouse=True)
def few_tokens_are_dispatched_too(monkeypatch):
    monkeypatch.setattr(dispatch_module, "FEW_TOKENS", 0)
    monkeypatch.setattr(few_tokens, "MOST", 0)


def sum_of_chosen(x, kernels, weights, top_k, normalize=False, dispatch="ragged"):
    return stacked_experts(ARCHITECTURE, x, kernels, *top_k_weights(weights, top_k, normalize), dispatch)


summed = jit(sum_of_chosen, static_argnums=(3, 4, 5))


@pytest.mark.parametrize("dispatch", HERE)
@pytest.mark.parametrize("top_k", range(1, EXPERTS + 1))
def test_stacked_experts_sum_as_plain_loops_do(top_k, dispatch):
    x, kernels, weights = random_mixture()
    actual = summed(*to_float32((x, kernels, weights)), top_k, False, dispatch)
    np.testing.assert_allclose(actual, plain_sum(x, kernels, weights, top_k), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("top_k", range(1, EXPERTS + 1))
def test_normalised_weights_of_the_top_k_sum_to_one(top_k):
    x, kernels, weights = random_mixture()
    heaviest = np.sort(weights, axis=-1)[..., -top_k:].sum(-1, keepdims=True)
    actual = summed(*to_float32((x, kernels, weights)), top_k, True, "all")
    np.testing.assert_allclose(actual, plain_sum(x, kernels, weights / heaviest, top_k), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("step", "steps"), [(1, 1), (1, 4), (3, 3), (14, 1)])
def test_blocks_of_any_size_sum_to_the_same(monkeypatch, step, steps):
    """Tokens are spread unevenly, so that experts have several blocks, a part of one, or none."""
    monkeypatch.setattr(expert_loop, "STEP", step)
    monkeypatch.setattr(expert_loop, "STEPS", steps)
    x, kernels, weights = random_mixture()
    weights[..., 1] = 0
    weights[..., 3] *= 5
    actual = jit(functools.partial(sum_of_chosen, top_k=2, dispatch="loop"))(*to_float32((x, kernels, weights)))
    np.testing.assert_allclose(actual, plain_sum(x, kernels, weights, 2), rtol=1e-4, atol=1e-4)


def test_tokens_whose_experts_all_weigh_nothing_are_zero():
    x, kernels, weights = random_mixture()
    weights[0] = 0
    for normalize in (False, True):
        assert (summed(*to_float32((x, kernels, weights)), 2, normalize, "loop")[0] == 0).all()


@pytest.mark.parametrize("dispatch", HERE)
@pytest.mark.parametrize("favourite", [0, 2])
def test_no_token_is_dropped_when_all_choose_one_expert(favourite, dispatch):
    x, kernels, weights = random_mixture()
    weights = 0.01 * weights + 0.99 * np.eye(EXPERTS)[favourite]
    actual = summed(*to_float32((x, kernels, weights)), 1, False, dispatch)
    np.testing.assert_allclose(actual, plain_sum(x, kernels, weights, 1), rtol=1e-4, atol=1e-4)
    assert (np.abs(actual).max(axis=-1) > 0).all()


@pytest.fixture
def sparse_for_all(monkeypatch):
    monkeypatch.setattr(few_tokens, "MOST", BATCH * LENGTH * EXPERTS)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize("top_k", [1, 3])
def test_the_sparse_matmul_of_a_few_tokens_sums_as_plain_loops_do(sparse_for_all, top_k):
    """A token has experts that weigh nothing; one has none but these, and is zero."""
    x, kernels, weights = random_mixture()
    weights[0, 0, 1:] = 0
    weights[1, 1] = 0
    loop = jit(functools.partial(sum_of_chosen, top_k=top_k, dispatch="loop"))
    actual = loop(*to_float32((x, kernels, weights)))
    np.testing.assert_allclose(actual, plain_sum(x, kernels, weights, top_k), rtol=1e-4, atol=1e-4)
    assert (actual[1, 1] == 0).all()
    compiled = str(loop.lower(*to_float32((x, kernels, weights))).compile().as_text())
    assert "cpu_csr_sparse_dense" in compiled
    assert "dynamic-slice" not in compiled  # of the stacks, which would be a copy


def test_experts_that_weigh_nothing_are_not_read(sparse_for_all):
    x, kernels, weights = to_float32(random_mixture())
    weights[..., 2] = 0
    kernels = {name: kernel.copy() for name, kernel in kernels.items()}
    for kernel in kernels.values():
        kernel[2] = np.nan
    weights_NxK, expert_NxK = top_k_weights(weights.reshape(-1, EXPERTS), EXPERTS, False)
    actual = few_tokens.sparse_experts(x.reshape(-1, D_MODEL), kernels, weights_NxK, expert_NxK)
    assert np.isfinite(actual).all()


def test_a_few_tokens_get_the_gradients_of_many(sparse_for_all):
    actual = uneven_gradient(functools.partial(sum_of_chosen, dispatch="loop"), 3)
    assert_trees_close(actual, expected_gradient(3), 1e-5)


def uneven_gradient(experts_sum, top_k):
    """The gradient of tokens that are spread unevenly, by x, kernels and weights."""
    x, kernels, weights = random_mixture()
    weights[..., 1] *= 1e-6
    weights[..., 3] *= 5
    cotangent = np.float32(np.random.default_rng(1).normal(size=(BATCH, LENGTH, D_MODEL)))
    gradient = jit(jax.grad(lambda arguments: jnp.sum(experts_sum(*arguments, top_k) * cotangent)))
    return gradient(to_float32((x, kernels, weights)))


@functools.cache
def expected_gradient(top_k):
    return uneven_gradient(masked_sum, top_k)


@pytest.mark.parametrize("dispatch", HERE)
@pytest.mark.parametrize("top_k", [1, 3])
def test_gradients_of_stacked_experts_are_those_of_the_plain_sum(monkeypatch, top_k, dispatch):
    """Experts have several blocks, or a part of one; one has no tokens, and a gradient of 0."""
    monkeypatch.setattr(expert_loop, "STEP", 1)
    monkeypatch.setattr(expert_loop, "STEPS", 3)
    actual = uneven_gradient(functools.partial(sum_of_chosen, dispatch=dispatch), top_k)
    assert_trees_close(actual, expected_gradient(top_k), 1e-5)
    assert not np.asarray(actual[1]["gate"][1]).any()
    assert np.asarray(actual[1]["gate"][3]).any()


def test_an_assignment_of_weight_zero_is_not_computed_and_gets_no_gradient():
    x, kernels, weights = random_mixture()
    weights[0, :3] = 0
    gradients = jit(jax.grad(lambda a: jnp.sum(sum_of_chosen(*a, top_k=3, dispatch="loop") ** 2)))
    d_x, _, d_weights = gradients(to_float32((x, kernels, weights)))
    assert not np.asarray(d_x[0, :3]).any()
    assert not np.asarray(d_weights[0, :3]).any()
    assert np.abs(d_x[0, 3:]).max(axis=-1).all()


@pytest.mark.parametrize(("remat", "matmuls"), [("none", 9), ("dots", 9), ("feed_forward", 9), ("kernels", 12)])
def test_the_loop_recomputes_its_matmuls_as_the_policy_says(monkeypatch, remat, matmuls):
    """A block has three in the forward pass, and for each two in the backward pass: of its input and of its matrix."""
    monkeypatch.setattr(expert_loop, "STEPS", 1)
    loop, policy = functools.partial(sum_of_chosen, top_k=2, dispatch="loop"), REMAT_POLICIES[remat]
    remembering = jax.checkpoint(loop, policy=policy) if policy else loop
    jaxpr = jax.make_jaxpr(jax.grad(lambda arguments: jnp.sum(remembering(*arguments))))(to_float32(random_mixture()))
    assert str(jaxpr).count("dot_general[") == matmuls


@pytest.mark.parametrize("dispatch", HERE)
def test_bfloat16_experts_are_weighed_in_float32(dispatch):
    x, kernels, weights = random_mixture()
    low = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), (x, kernels))
    actual = summed(*low, np.float32(weights), 2, False, dispatch)
    assert actual.dtype == jnp.bfloat16
    expected = plain_sum(*jax.tree.map(np.float64, low), weights, 2)
    assert np.abs(np.float64(actual) - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("dispatch", "num_tokens", "num_experts", "top_k", "gains"),
    [
        ("loop", 1, 4, 2, True),  # reads two experts of four
        ("loop", 8, 4, 2, False),  # most likely all
        ("loop", 17, 4, 2, True),  # what is computed counts
        ("blocks", 1, 4, 2, False),  # two of four, with copies
        ("blocks", 1, 64, 2, True),
        ("megablox", 8, 4, 2, True),
        ("megablox", 8, 4, 4, False),  # each token has all
    ],
)
def test_a_few_tokens_see_all_experts_where_choosing_would_read_more(
    monkeypatch, dispatch, num_tokens, num_experts, top_k, gains
):
    monkeypatch.setattr(dispatch_module, "FEW_TOKENS", 16)
    assert dispatch_module.dispatch_gains(dispatch, num_tokens, num_experts, top_k) == gains
