"""The mixture of experts: the router, the pair an owner trains, and the choice among the experts of a merge.

Formulas (FlexOlmo, arXiv 2507.07024, section 3; docs/method.md, "Formulas"):
  y = sum over i in TopK(s) of s_i FFN_i(x),  s = softmax(l) over all experts,  l_i = r_i . x - |b_i|.
The paper writes min(b_i, 0) for the bias, whose gradient vanishes for b_i > 0. -|b_i| equals it for every
b_i <= 0 and keeps its gradient on both sides; at exactly 0, where the anchor's bias stays, it has none.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from flexolmo_jax import sharding
from flexolmo_jax.model.architecture import Architecture, Layout
from flexolmo_jax.model.expert_parallel import stacked_experts
from flexolmo_jax.model.experts import KERNEL_AXES
from flexolmo_jax.model.layers import feed_forward, parameter

ROUTER_STDDEV = 0.002
MASKED_LOGIT = -1e30


def route(
    x_BxSxD: jax.Array, row_ExD: jax.Array, bias_E: jax.Array, expert_mask: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Router logits and weights, in float32, on any device: accelerators multiply in fewer bits unless told.

    Args:
      x_BxSxD: the residual stream after attention.
      row_ExD: router rows.
      bias_E: expert biases; their effect is -|b|, never positive.
      expert_mask: bool [E], [B, E] or [B, S, E]; False switches an expert off before the softmax. None: all on.

    Returns:
      (logits_BxSxE before the mask, weights_BxSxE that sum to 1 over the experts that are on, if any is).
    """
    x_BxSxD, row_ExD = x_BxSxD.astype(jnp.float32), row_ExD.astype(jnp.float32)
    logits = jnp.einsum("BSD,ED->BSE", x_BxSxD, row_ExD, precision=jax.lax.Precision.HIGHEST)
    bias_E = bias_E.astype(jnp.float32)
    logits = logits - bias_E * jnp.sign(bias_E)  # |b|, with the gradient of 0 at 0 that jnp.abs has not
    if expert_mask is None:
        return logits, jax.nn.softmax(logits, axis=-1)
    if expert_mask.ndim < 3:
        expert_mask = jnp.atleast_2d(expert_mask)[:, None, :]
    weights = jax.nn.softmax(jnp.where(expert_mask, logits, MASKED_LOGIT), axis=-1)
    return logits, jnp.where(expert_mask, weights, 0)


def separate_experts(x_BxSxD: jax.Array, experts: list[dict], weights_BxSxE: jax.Array) -> jax.Array:
    """The weighted sum of experts that all see every token, without dispatch.

    The weights sum to 1, so the sum is written as the anchor plus weighted differences from it: while
    an expert is still a copy of the anchor, the result is the anchor's, bit for bit.
    """
    # One dimension of tokens: gradients of the kernels contract it, and of two a CPU makes one by a transposed copy.
    x_NxD, weights_NxE = x_BxSxD.reshape(-1, x_BxSxD.shape[-1]), weights_BxSxE.reshape(-1, len(experts))
    anchor, *others = (feed_forward(x_NxD, e["gate"], e["up"], e["down"]) for e in experts)
    y_NxD = anchor
    for i, other in enumerate(others, start=1):
        y_NxD += weights_NxE[:, i, None].astype(x_NxD.dtype) * (other - anchor)
    return y_NxD.reshape(x_BxSxD.shape)


def chosen_weights(weights: jax.Array, top_k: int, normalize: bool) -> tuple[jax.Array, jax.Array]:
    """The top-k of routing weights [..., experts], and their experts: two arrays [..., top_k], likeliest first.

    With `normalize` the weights are divided by their sum (`norm_topk_prob`).
    """
    weights, experts = jax.lax.top_k(weights, top_k)
    if normalize:
        weights /= jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), jnp.finfo(weights.dtype).tiny)
    return weights, experts


class MoE(nn.Module):
    """The feed-forward part of a block, in any layout. The anchor alone is a mixture of one."""

    architecture: Architecture
    layout: Layout
    dtype: jnp.dtype
    rules: sharding.Rules
    dispatch: str = "ragged"

    @nn.compact
    def __call__(
        self, x_BxSxD: jax.Array, expert_mask: jax.Array | None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Returns (y [batch, length, d_model] in `dtype`, what `route` returned)."""
        stacked = self.layout.kind == "stacked"
        stack = (self.layout.num_experts,) if stacked else ()
        sets = [ExpertLeaves(self.architecture, stack, name=name)() for name in self.layout.sets]
        row_ExD, bias_E = (
            sets[0][leaf] if stacked else jnp.stack([s[leaf] for s in sets])
            for leaf in ("router/weight", "router/bias")
        )
        logits_BxSxE, weights_BxSxE = route(x_BxSxD, row_ExD, bias_E, expert_mask)
        kernels = [{leaf: s[leaf].astype(self.dtype) for leaf in ("gate", "up", "down")} for s in sets]
        x_BxSxD = x_BxSxD.astype(self.dtype)
        if stacked:
            chosen = chosen_weights(weights_BxSxE, self.layout.top_k, self.architecture.norm_topk_prob)
            y_BxSxD = stacked_experts(x_BxSxD, kernels[0], *chosen, self.dispatch, self.rules)
        else:
            y_BxSxD = separate_experts(x_BxSxD, kernels, weights_BxSxE)
        return y_BxSxD, (logits_BxSxE, weights_BxSxE)


class ExpertLeaves(nn.Module):
    """Declares the leaves of one expert, or of a stack of them."""

    architecture: Architecture
    stack: tuple[int, ...]

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        """Returns {leaf: array}, each with the stack axis in front when there is one."""
        sizes = {"expert_embed": self.architecture.d_model, "mlp": self.architecture.d_ff}
        stack_axes = ("experts",) * len(self.stack)
        leaves = {
            leaf: parameter(self, leaf, self.stack + tuple(sizes[axis] for axis in axes), stack_axes + axes)
            for leaf, axes in KERNEL_AXES.items()
        }
        return {**leaves, **RouterLeaves(self.architecture, self.stack, name="router")()}


class RouterLeaves(nn.Module):
    """Declares an expert's leaves of the router, or those of a stack of experts."""

    architecture: Architecture
    stack: tuple[int, ...]

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        """Returns {leaf: array}, each with the stack axis in front when there is one."""
        stack_axes = ("experts",) * len(self.stack)
        shape = (*self.stack, self.architecture.d_model)
        init = nn.initializers.truncated_normal(ROUTER_STDDEV)
        return {
            "router/weight": parameter(self, "weight", shape, (*stack_axes, None), init),
            "router/bias": parameter(self, "bias", self.stack, stack_axes, nn.initializers.zeros),
        }
