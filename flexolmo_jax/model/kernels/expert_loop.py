"""Experts of a merge on CPUs: expert after expert, each with its rows in blocks, forward and backward.

A row is a token and one of its k experts. Rows are sorted by expert, and a loop takes block after block of an expert's
rows through the whole feed-forward: what lies between its matmuls stays in the cache. Of it, the gate's and up's
products are kept for the backward pass; a policy of rematerialisation has them computed again with the rest. An expert
without rows is never read, and a weight of 0 makes no row.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from flexolmo_jax.model.experts import swiglu
from flexolmo_jax.model.layers import MLP_RESIDUALS

# A block's rows are a multiple of `STEP`. An expert's have the most, `STEPS` times that, while they are full: many rows
# make fast matmuls and few sums of gradients. The last has as few as hold the rest.
STEP, STEPS = 32, 8
EXPERT_OUTPUTS = "expert_outputs"  # name of the output, for rematerialization
LEAVES = ("gate", "up", "down")


@jax.custom_vjp
def looped_experts(x_NxD: jax.Array, experts: dict, weights_NxK: jax.Array, expert_NxK: jax.Array) -> jax.Array:
    """The weighted sum of each token's experts, as `dispatch.sum_experts` has it; a weight of 0 gets no gradient."""
    y_NxD, _ = _compute(x_NxD, experts, weights_NxK, expert_NxK, keep=False)
    return y_NxD


class _Rows(NamedTuple):
    """The rows sorted by expert, R = N * K of them, those without an expert last.

    Attributes:
      token_R: whose row it is.
      place_NxK: where each token's rows are.
      weight_P: float32, and zeros for the rows that a block may have beyond the last.
      first_E: each expert's first row.
      count_E: its rows.
      sizes: what rows a block may have, the most first; all are multiples of the last.
    """

    token_R: jax.Array
    place_NxK: jax.Array
    weight_P: jax.Array
    first_E: jax.Array
    count_E: jax.Array
    sizes: tuple[int, ...]

    @classmethod
    def sort(cls, weights_NxK: jax.Array, expert_NxK: jax.Array, num_experts: int) -> "_Rows":
        weight_R, (num_tokens, top_k) = weights_NxK.reshape(-1), weights_NxK.shape
        step = min(num_tokens, STEP)
        sizes = tuple(step * steps for steps in range(min(STEPS, -(-num_tokens // step)), 0, -1))
        expert_R = jnp.where(weight_R > 0, expert_NxK.reshape(-1), num_experts)
        order_R = jnp.argsort(expert_R, stable=True)
        count_E = jnp.sum(expert_R[:, None] == jnp.arange(num_experts), axis=0)
        place_NxK = jnp.argsort(order_R).reshape(weights_NxK.shape)
        weight_P = jnp.pad(weight_R[order_R], (0, step))
        return cls(order_R // top_k, place_NxK, weight_P, jnp.cumsum(count_E) - count_E, count_E, sizes)

    def take(self, x_NxD: jax.Array) -> jax.Array:
        """The tokens of the rows, and as many more as weights: a block never begins later than it should."""
        return x_NxD[jnp.pad(self.token_R, (0, self.weight_P.size - self.token_R.size))]

    def add_up(self, y_PxD: jax.Array) -> jax.Array:
        """The sum of each token's rows."""
        return jnp.sum(y_PxD[self.place_NxK], axis=1)

    def loop_over_blocks(self, expert: jax.Array, body, carry):
        """Loops over an expert's blocks: body(first row of the block, its weights [rows, 1], carry) -> carry.

        Rows of the last block that are not the expert's weigh 0. They are the next expert's, which comes later.
        """
        start, end = self.first_E[expert], self.first_E[expert] + self.count_E[expert]
        largest, step = self.sizes[0], self.sizes[-1]
        rounded = -(-self.count_E[expert] // step) * step
        for size in self.sizes:
            blocks = rounded // size if size == largest else (rounded % largest == size).astype(jnp.int32)

            def one(block, carry, size=size, first=start):
                row = first + block * size
                weights_T = jax.lax.dynamic_slice_in_dim(self.weight_P, row, size)
                return body(row, jnp.where(row + jnp.arange(size) < end, weights_T, 0)[:, None], carry)

            carry = jax.lax.fori_loop(0, blocks, one, carry)
            start += blocks * size
        return carry


def _forward(x_NxD, experts, weights_NxK, expert_NxK):
    y_NxD, products = _compute(x_NxD, experts, weights_NxK, expert_NxK, keep=True)
    return y_NxD, (x_NxD, experts, weights_NxK, expert_NxK, *products)


def _compute(x_NxD, experts, weights_NxK, expert_NxK, keep):
    """(the weighted sums, the gate's and up's products of the rows [P, F] if they are to be kept)."""
    num_experts, _, d_ff = experts["gate"].shape
    with jax.named_scope("dispatch"):
        rows = _Rows.sort(weights_NxK, expert_NxK, num_experts)
        x_PxD = rows.take(x_NxD)
        chosen_E = jnp.argsort(rows.count_E == 0, stable=True)  # those with rows come first, in their order

    def add_expert(i, carry):
        gate_DxF, up_DxF, down_FxD = (experts[leaf][chosen_E[i]] for leaf in LEAVES)

        def add_block(start, weights_Tx1, carry):
            x_TxD = jax.lax.dynamic_slice_in_dim(x_PxD, start, weights_Tx1.size)
            gate_TxF, up_TxF = x_TxD @ gate_DxF, x_TxD @ up_DxF
            out_TxD = swiglu(gate_TxF, up_TxF) @ down_FxD
            results = (weights_Tx1 * out_TxD.astype(jnp.float32), gate_TxF, up_TxF)
            return tuple(
                jax.lax.dynamic_update_slice_in_dim(rows_P, result, start, 0)
                for rows_P, result in zip(carry, results[: len(carry)], strict=True)
            )

        return rows.loop_over_blocks(chosen_E[i], add_block, carry)

    with jax.named_scope("experts"):
        products = (jnp.zeros((x_PxD.shape[0], d_ff), x_PxD.dtype),) * 2 * keep
        start = (jnp.zeros(x_PxD.shape, jnp.float32), *products)
        y_PxD, *products = jax.lax.fori_loop(0, jnp.sum(rows.count_E > 0), add_expert, start)
        products = [checkpoint_name(product_PxF, MLP_RESIDUALS) for product_PxF in products]
    with jax.named_scope("combine"):
        return checkpoint_name(rows.add_up(y_PxD), EXPERT_OUTPUTS), products


def _backward(residuals, toward_NxD):
    x_NxD, experts, weights_NxK, expert_NxK, gate_PxF, up_PxF = residuals
    num_experts, dtype = experts["gate"].shape[0], x_NxD.dtype
    with jax.named_scope("dispatch"):
        rows = _Rows.sort(weights_NxK, expert_NxK, num_experts)
        x_PxD, toward_PxD = rows.take(x_NxD), rows.take(toward_NxD.astype(dtype))

    def add_expert(expert, carry):
        d_x_PxD, d_weight_P, *stacks = carry
        gate_DxF, up_DxF, down_FxD = (stack[expert] for stack in stacks)

        def add_block(start, weights_Tx1, gradients):
            d_x_PxD, d_weight_P, *d_kernels = gradients
            x_TxD, toward_TxD, gate_TxF, up_TxF = (
                jax.lax.dynamic_slice_in_dim(rows_P, start, weights_Tx1.size)
                for rows_P in (x_PxD, toward_PxD, gate_PxF, up_PxF)
            )
            hidden_TxF, hidden_vjp = jax.vjp(swiglu, gate_TxF, up_TxF)
            d_out_TxF = toward_TxD @ down_FxD.T  # toward the hidden units, before the row's weight
            d_weight_T = jnp.sum(hidden_TxF.astype(jnp.float32) * d_out_TxF, axis=-1)
            weights_Tx1 = weights_Tx1.astype(dtype)
            d_gate_TxF, d_up_TxF = hidden_vjp(weights_Tx1 * d_out_TxF)
            d_x_TxD = d_gate_TxF @ gate_DxF.T + d_up_TxF @ up_DxF.T
            left = (x_TxD.T, x_TxD.T, (weights_Tx1 * hidden_TxF).T)
            d_kernels = [
                total + jnp.matmul(a, b, preferred_element_type=jnp.float32)
                for total, a, b in zip(d_kernels, left, (d_gate_TxF, d_up_TxF, toward_TxD), strict=True)
            ]
            d_x_PxD = jax.lax.dynamic_update_slice_in_dim(d_x_PxD, d_x_TxD.astype(jnp.float32), start, 0)
            return d_x_PxD, jax.lax.dynamic_update_slice_in_dim(d_weight_P, d_weight_T, start, 0), *d_kernels

        zeros = [jnp.zeros(stack.shape[1:], jnp.float32) for stack in stacks]
        d_x_PxD, d_weight_P, *d_kernels = rows.loop_over_blocks(expert, add_block, (d_x_PxD, d_weight_P, *zeros))
        stacks = (
            jax.lax.dynamic_update_index_in_dim(stack, kernel.astype(stack.dtype), expert, 0)
            for stack, kernel in zip(stacks, d_kernels, strict=True)
        )
        return d_x_PxD, d_weight_P, *stacks

    with jax.named_scope("experts"):
        zeros = (jnp.zeros(x_PxD.shape, jnp.float32), jnp.zeros(rows.weight_P.shape, jnp.float32))
        # An expert's gradients take the places of its kernels: there is no second stack to clear and to keep.
        stacks = (experts[leaf] for leaf in LEAVES)
        d_x_PxD, d_weight_P, *d_stacks = jax.lax.fori_loop(0, num_experts, add_expert, (*zeros, *stacks))
    with jax.named_scope("combine"):
        d_weights_NxK = jnp.where(weights_NxK > 0, d_weight_P[rows.place_NxK], 0)
        d_x_NxD = rows.add_up(jnp.where((rows.weight_P > 0)[:, None], d_x_PxD, 0)).astype(dtype)
    return d_x_NxD, dict(zip(LEAVES, d_stacks, strict=True)), d_weights_NxK, None


looped_experts.defvjp(_forward, _backward)
