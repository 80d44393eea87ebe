"""Stacked SwiGLU experts on CPUs: a loop over experts and over blocks of their tokens, forward and backward.

Token-expert assignments are sorted by expert. The loop takes each block of an expert's routed tokens through the whole
feed-forward, so that its intermediate values stay in the cache. The outputs of gate and up are kept for the backward
pass, unless a rematerialization policy recomputes them. An expert without tokens is never read, and an assignment of
weight 0 is not computed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from flexolmo_jax.model.experts import swiglu
from flexolmo_jax.model.kernels.few_tokens import few_assignments, sparse_experts
from flexolmo_jax.model.layers import MLP_RESIDUALS

# The tokens of a block are a multiple of `STEP`. All blocks of an expert but the last have the maximum, `STEPS` times
# that: large blocks make fast matmuls and few sums of gradients. The last is the smallest that holds the rest.
STEP, STEPS = 32, 8
EXPERT_OUTPUTS = "expert_outputs"  # name of the output, for rematerialization
LEAVES = ("gate", "up", "down")


@jax.custom_vjp
def looped_experts(x_NxD: jax.Array, experts: dict, weights_NxK: jax.Array, expert_NxK: jax.Array) -> jax.Array:
    """The weighted sum of each token's experts, as in `dispatch.sum_experts`; a weight of 0 gets no gradient."""
    if few_assignments(x_NxD, expert_NxK):  # without gradients: `_forward` computes what has some
        return sparse_experts(x_NxD, experts, weights_NxK, expert_NxK)
    y_NxD, _ = _compute(x_NxD, experts, weights_NxK, expert_NxK, keep=False)
    return y_NxD


class _Routing(NamedTuple):
    """The R = N * K token-expert assignments sorted by expert; those without an expert come last.

    Attributes:
      token_R: the token of each assignment.
      place_NxK: the positions of each token's assignments.
      weight_P: float32 weights, and zeros for the padding that the last block may need.
      first_E: the first assignment of each expert.
      count_E: its number of assignments.
      sizes: possible numbers of tokens in a block, in descending order; all are multiples of the last.
    """

    token_R: jax.Array
    place_NxK: jax.Array
    weight_P: jax.Array
    first_E: jax.Array
    count_E: jax.Array
    sizes: tuple[int, ...]

    @classmethod
    def sort(cls, weights_NxK: jax.Array, expert_NxK: jax.Array, num_experts: int) -> "_Routing":
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
        """The routed tokens [P, D], padded so that `dynamic_slice` never shifts a block."""
        return x_NxD[jnp.pad(self.token_R, (0, self.weight_P.size - self.token_R.size))]

    def sum_by_token(self, y_PxD: jax.Array) -> jax.Array:
        """The sum of each token's assignments."""
        return jnp.sum(y_PxD[self.place_NxK], axis=1)

    def loop_over_blocks(self, expert: jax.Array, body, carry):
        """Loops over an expert's blocks: body(first assignment of the block, its weights [M, 1], carry) -> carry.

        Assignments of the last block that belong to the next expert, which comes later, have weight 0.
        """
        start, end = self.first_E[expert], self.first_E[expert] + self.count_E[expert]
        largest, step = self.sizes[0], self.sizes[-1]
        rounded = -(-self.count_E[expert] // step) * step
        for size in self.sizes:
            blocks = rounded // size if size == largest else (rounded % largest == size).astype(jnp.int32)

            def apply_body(block, carry, size=size, first=start):
                at = first + block * size
                weights_M = jax.lax.dynamic_slice_in_dim(self.weight_P, at, size)
                return body(at, jnp.where(at + jnp.arange(size) < end, weights_M, 0)[:, None], carry)

            carry = jax.lax.fori_loop(0, blocks, apply_body, carry)
            start += blocks * size
        return carry


def _forward(x_NxD, experts, weights_NxK, expert_NxK):
    y_NxD, residuals = _compute(x_NxD, experts, weights_NxK, expert_NxK, keep=True)
    return y_NxD, (x_NxD, experts, weights_NxK, expert_NxK, *residuals)


def _compute(x_NxD, experts, weights_NxK, expert_NxK, keep):
    """(The weighted sums, [outputs of gate and of up, [P, F]] if `keep`)."""
    num_experts, _, d_ff = experts["gate"].shape
    with jax.named_scope("dispatch"):
        routing = _Routing.sort(weights_NxK, expert_NxK, num_experts)
        x_PxD = routing.take(x_NxD)
        used_E = jnp.argsort(routing.count_E == 0, stable=True)  # experts with tokens first, in their order

    def add_expert(i, carry):
        gate_DxF, up_DxF, down_FxD = (experts[leaf][used_E[i]] for leaf in LEAVES)

        def add_block(start, weights_Mx1, carry):
            x_MxD = jax.lax.dynamic_slice_in_dim(x_PxD, start, weights_Mx1.size)
            gate_MxF, up_MxF = x_MxD @ gate_DxF, x_MxD @ up_DxF
            out_MxD = swiglu(gate_MxF, up_MxF) @ down_FxD
            outputs = (weights_Mx1 * out_MxD.astype(jnp.float32), gate_MxF, up_MxF)
            return tuple(
                jax.lax.dynamic_update_slice_in_dim(buffer_P, output, start, 0)
                for buffer_P, output in zip(carry, outputs[: len(carry)], strict=True)
            )

        return routing.loop_over_blocks(used_E[i], add_block, carry)

    with jax.named_scope("experts"):
        residuals = (jnp.zeros((x_PxD.shape[0], d_ff), x_PxD.dtype),) * 2 * keep
        start = (jnp.zeros(x_PxD.shape, jnp.float32), *residuals)
        y_PxD, *residuals = jax.lax.fori_loop(0, jnp.sum(routing.count_E > 0), add_expert, start)
        residuals = [checkpoint_name(residual_PxF, MLP_RESIDUALS) for residual_PxF in residuals]
    with jax.named_scope("combine"):
        return checkpoint_name(routing.sum_by_token(y_PxD), EXPERT_OUTPUTS), residuals


def _backward(residuals, d_out_NxD):
    x_NxD, experts, weights_NxK, expert_NxK, gate_PxF, up_PxF = residuals
    num_experts, dtype = experts["gate"].shape[0], x_NxD.dtype
    with jax.named_scope("dispatch"):
        routing = _Routing.sort(weights_NxK, expert_NxK, num_experts)
        x_PxD, d_out_PxD = routing.take(x_NxD), routing.take(d_out_NxD.astype(dtype))

    def add_expert(expert, carry):
        d_x_PxD, d_weight_P, *stacks = carry
        gate_DxF, up_DxF, down_FxD = (stack[expert] for stack in stacks)

        def add_block(start, weights_Mx1, gradients):
            d_x_PxD, d_weight_P, *d_kernels = gradients
            x_MxD, d_out_MxD, gate_MxF, up_MxF = (
                jax.lax.dynamic_slice_in_dim(array_P, start, weights_Mx1.size)
                for array_P in (x_PxD, d_out_PxD, gate_PxF, up_PxF)
            )
            hidden_MxF, hidden_vjp = jax.vjp(swiglu, gate_MxF, up_MxF)
            d_hidden_MxF = d_out_MxD @ down_FxD.T  # before the weight of the assignment
            d_weight_M = jnp.sum(hidden_MxF.astype(jnp.float32) * d_hidden_MxF, axis=-1)
            weights_Mx1 = weights_Mx1.astype(dtype)
            d_gate_MxF, d_up_MxF = hidden_vjp(weights_Mx1 * d_hidden_MxF)
            d_x_MxD = d_gate_MxF @ gate_DxF.T + d_up_MxF @ up_DxF.T
            left = (x_MxD.T, x_MxD.T, (weights_Mx1 * hidden_MxF).T)
            d_kernels = [
                total + jnp.matmul(a, b, preferred_element_type=jnp.float32)
                for total, a, b in zip(d_kernels, left, (d_gate_MxF, d_up_MxF, d_out_MxD), strict=True)
            ]
            d_x_PxD = jax.lax.dynamic_update_slice_in_dim(d_x_PxD, d_x_MxD.astype(jnp.float32), start, 0)
            return d_x_PxD, jax.lax.dynamic_update_slice_in_dim(d_weight_P, d_weight_M, start, 0), *d_kernels

        zeros = [jnp.zeros(stack.shape[1:], jnp.float32) for stack in stacks]
        d_x_PxD, d_weight_P, *d_kernels = routing.loop_over_blocks(expert, add_block, (d_x_PxD, d_weight_P, *zeros))
        stacks = (
            jax.lax.dynamic_update_index_in_dim(stack, kernel.astype(stack.dtype), expert, 0)
            for stack, kernel in zip(stacks, d_kernels, strict=True)
        )
        return d_x_PxD, d_weight_P, *stacks

    with jax.named_scope("experts"):
        zeros = (jnp.zeros(x_PxD.shape, jnp.float32), jnp.zeros(routing.weight_P.shape, jnp.float32))
        # An expert's gradients overwrite its matrices, so that no second stack is cleared and held.
        stacks = (experts[leaf] for leaf in LEAVES)
        d_x_PxD, d_weight_P, *d_stacks = jax.lax.fori_loop(0, num_experts, add_expert, (*zeros, *stacks))
    with jax.named_scope("combine"):
        d_weights_NxK = jnp.where(weights_NxK > 0, d_weight_P[routing.place_NxK], 0)
        d_x_NxD = routing.sum_by_token(jnp.where((routing.weight_P > 0)[:, None], d_x_PxD, 0)).astype(dtype)
    return d_x_NxD, dict(zip(LEAVES, d_stacks, strict=True)), d_weights_NxK, None


looped_experts.defvjp(_forward, _backward)
