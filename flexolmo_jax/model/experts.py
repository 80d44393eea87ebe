"""The ways to compute stacked experts: a token is seen by the k experts that were chosen for it."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from flexolmo_jax.model import grouped_matmul
from flexolmo_jax.model.experts_cpu import looped_experts
from flexolmo_jax.model.layers import feed_forward, swiglu

# Logical axes of the kernels of one expert.
KERNEL_AXES = {"gate": ("expert_embed", "mlp"), "up": ("expert_embed", "mlp"), "down": ("mlp", "expert_embed")}
# The name of what is worth its memory in the backward pass; the rest is indices, and elementwise.
KEPT = "experts"
KEEP = jax.checkpoint_policies.save_only_these_names(KEPT)
FEW_TOKENS = 16
# What a chosen expert costs, in readings of its kernels: blocks copy them, and waiting for the host takes as long;
# `mosaic` leaves few rows to blocks.
READINGS = {"loop": 1, "blocks": 5, "mosaic": 5}


def sum_experts(
    x_NxD: jax.Array,
    experts: dict,
    weights_NxK: jax.Array,
    expert_NxK: jax.Array,
    dispatch: str,
    expected_rows: int,
) -> jax.Array:
    """The weighted sum of each token's k experts; every token is computed, none is dropped.

    Args:
      x_NxD: the input, in the dtype of the computation.
      experts: `gate` and `up` [experts, d_model, d_ff], `down` [experts, d_ff, d_model], in the dtype of x.
      weights_NxK: float32 weights of each token's experts.
      expert_NxK: int32, which experts these are; a token's are all different. Where it is the number of experts,
        the token has fewer than k, and the weight must be 0.
      dispatch: a key of `DISPATCH`.
      expected_rows: how many of the N * K rows, a token and one of its experts, have an expert, if all are chosen
        equally often. It changes no result.

    Returns:
      float32 [N, D].
    """
    return DISPATCH[dispatch](x_NxD, experts, weights_NxK, expert_NxK, expected_rows)


def choose_dispatch(platform: str) -> str:
    """The way that suits the devices of a platform (`sharding.platform_of`): a key of `DISPATCH`."""
    return "loop" if platform == "cpu" else grouped_matmul.choose(platform)


def dispatch_gains(dispatch: str, num_tokens: int, num_experts: int, top_k: int) -> bool:
    """Whether less is computed, or read, than if every expert saw every token."""
    readings = num_tokens * top_k * READINGS.get(dispatch, 0)
    reads_all = num_tokens <= FEW_TOKENS and readings >= 2 * num_experts
    return top_k < num_experts and not reads_all


def _all_experts(x_NxD: jax.Array, experts: dict, weights_NxK: jax.Array, expert_NxK: jax.Array, _: int) -> jax.Array:
    """Every expert sees every token: there is nothing to dispatch.

    The experts are a batch of matmuls, which reads the kernels where they lie.
    """
    num_experts = experts["gate"].shape[0]
    weights_NxE = jnp.sum(weights_NxK[..., None] * jax.nn.one_hot(expert_NxK, num_experts), axis=1)
    x_ExNxD = jnp.broadcast_to(x_NxD, (num_experts, *x_NxD.shape))
    y_ExNxD = feed_forward(x_ExNxD, experts["gate"], experts["up"], experts["down"])
    return jnp.einsum("END,NE->ND", y_ExNxD.astype(jnp.float32), weights_NxE)


def _looped_experts(
    x_NxD: jax.Array, experts: dict, weights_NxK: jax.Array, expert_NxK: jax.Array, _: int
) -> jax.Array:
    """One expert after the other, for CPUs."""
    return looped_experts(x_NxD, experts, weights_NxK, expert_NxK)


def _sorted_experts(
    implementation: str,
    x_NxD: jax.Array,
    experts: dict,
    weights_NxK: jax.Array,
    expert_NxK: jax.Array,
    expected_rows: int,
) -> jax.Array:
    """Each expert sees the tokens that chose it, in one grouped matmul: for accelerators.

    Rows (a token and one of its experts) are sorted by expert, so that each expert's rows are contiguous
    for the grouped matmul, and summed back to their tokens in float32.
    """
    num_experts, top_k = experts["gate"].shape[0], weights_NxK.shape[-1]
    with jax.named_scope("dispatch"):
        expert_R = expert_NxK.reshape(-1)  # R = N * K rows, a token's K rows adjacent
        order_R = jnp.argsort(expert_R, stable=True)
        place_NxK = jnp.argsort(order_R).reshape(weights_NxK.shape)  # where each row went
        order_R, place_NxK = checkpoint_name(order_R, KEPT), checkpoint_name(place_NxK, KEPT)
        group_sizes_E = jnp.sum(expert_R[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
        # Rows of no expert come last, and grouped matmuls leave anything there, in results and in gradients.
        is_grouped_Rx1 = (jnp.arange(expert_R.size) < jnp.sum(group_sizes_E))[:, None]
        x_RxD = jnp.where(is_grouped_Rx1, _take_rows(x_NxD, order_R // top_k, place_NxK), 0)
        x_RxD = checkpoint_name(x_RxD, KEPT)

    def matmul(x, leaf):
        y = grouped_matmul.grouped_matmul(x, experts[leaf], group_sizes_E, implementation, expected_rows)
        return checkpoint_name(y, KEPT)

    with jax.named_scope("experts"):
        gate_RxF, up_RxF = (jnp.where(is_grouped_Rx1, matmul(x_RxD, leaf), 0) for leaf in ("gate", "up"))
        y_RxD = matmul(jnp.where(is_grouped_Rx1, swiglu(gate_RxF, up_RxF), 0), "down")
    with jax.named_scope("combine"):
        y_NxKxD = _take_rows(y_RxD, place_NxK.reshape(-1), order_R[:, None]).reshape(*weights_NxK.shape, -1)
        y_NxKxD = jnp.where(expert_NxK[..., None] < num_experts, y_NxKxD, 0)
        return jnp.sum(y_NxKxD.astype(jnp.float32) * weights_NxK[..., None], axis=1)


@jax.custom_vjp
def _take_rows(x: jax.Array, rows: jax.Array, taken: jax.Array) -> jax.Array:
    """x[rows]. `taken`, [rows of x, times each is taken], says where each row of x went.

    With it the gradient is gathered too; without, it would be scattered, which accelerators do slowly.
    """
    return x[rows]


def _take_rows_forward(x, rows, taken):
    return x[rows], taken


def _take_rows_backward(taken, toward):
    return jnp.sum(toward[taken], axis=1, dtype=jnp.float32).astype(toward.dtype), None, None


_take_rows.defvjp(_take_rows_forward, _take_rows_backward)

DISPATCH: dict[str, Callable[[jax.Array, dict, jax.Array, jax.Array, int], jax.Array]] = {
    "all": _all_experts,
    "loop": _looped_experts,
    **{
        name: jax.checkpoint(functools.partial(_sorted_experts, name), policy=KEEP, static_argnums=4)
        for name in grouped_matmul.IMPLEMENTATIONS
    },
}
