"""Stacked SwiGLU experts for a few tokens on CPUs, as in decoding: bound by reading the chosen experts' matrices once.

A slice of a stack is a copy for XLA, which takes longer than the matmul that reads it. So the inputs of token-expert
assignments are the entries of a sparse matrix, each input in the columns of its expert, which multiplies the whole
stack: only the rows of the stack that meet an entry are read, where they lie. Such a matmul runs on one core, so each
is a sum of several.
"""

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax.model.experts import swiglu

MOST = 16  # assignments; more share experts, and matmuls pay
SUMS = 16  # into which a matmul is split; XLA divides so many among cores, but not a few
DTYPES = (jnp.float32,)  # of JAX's sparse matmul for CPUs


def few_assignments(x_NxD: jax.Array, expert_NxK: jax.Array) -> bool:
    """Whether `sparse_experts` is the fastest for these tokens and their experts."""
    return expert_NxK.size <= MOST and x_NxD.dtype in DTYPES


def sparse_experts(x_NxD: jax.Array, experts: dict, weights_NxK: jax.Array, expert_NxK: jax.Array) -> jax.Array:
    """The weighted sum of each token's experts, as in `dispatch.sum_experts`; weights of 0 cost nothing."""
    top_k = weights_NxK.shape[1]
    weight_R, expert_R = weights_NxK.reshape(-1), expert_NxK.reshape(-1)
    order_R = jnp.argsort(weight_R <= 0, stable=True)  # those of weight 0 come last
    used, expert_R = jnp.sum(weight_R > 0), expert_R[order_R]

    def matmul(x_RxI, leaf):
        return _sparse_matmul(x_RxI, experts[leaf], expert_R, used)

    x_RxD = x_NxD[order_R // top_k]
    y_RxD = matmul(swiglu(matmul(x_RxD, "gate"), matmul(x_RxD, "up")), "down")
    place_NxK = jnp.argsort(order_R).reshape(weights_NxK.shape)
    return jnp.sum(y_RxD[place_NxK] * weights_NxK[..., None], axis=1)


def _sparse_matmul(x_RxI: jax.Array, stack_ExIxO: jax.Array, expert_R: jax.Array, used: jax.Array) -> jax.Array:
    """x_r @ stack[expert_r] for the first `used` r, and 0 for the others."""
    from jax.experimental import sparse  # takes a while, and few programs need it

    (count, size), experts = x_RxI.shape, stack_ExIxO.shape[0]
    stack_ExIxO = stack_ExIxO.reshape(-1, stack_ExIxO.shape[-1])
    products = []
    for index in np.array_split(np.arange(size), min(SUMS, size)):
        column_RxI = expert_R[:, None] * size + index
        start = jnp.minimum(jnp.arange(count + 1), used) * len(index)  # of each x_r among the entries
        entries = x_RxI[:, index[0] : index[-1] + 1].reshape(-1), column_RxI.reshape(-1), start.astype(column_RxI.dtype)
        products.append(sparse.BCSR(entries, shape=(count, experts * size)) @ stack_ExIxO)
    return sum(products[1:], products[0])
