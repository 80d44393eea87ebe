"""The mixture of experts of a block: routing, the pair that an owner trains, and the top k experts of a merged model.

Formula (FlexOlmo, arXiv 2507.07024, section 3; docs/method.md, "Formulas"):
  y = sum over i in TopK(s) of s_i FFN_i(x),  s = softmax(l) over all experts;
`routers` computes the logits l, `experts` the networks FFN_i.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from flexolmo_jax import sharding
from flexolmo_jax.checkpoint.manifests import ROUTER
from flexolmo_jax.model.architecture import Architecture, Layout
from flexolmo_jax.model.dispatch import apply_expert, stacked_experts
from flexolmo_jax.model.experts import EXPERT_KINDS
from flexolmo_jax.model.leaves import Leaf, parameters
from flexolmo_jax.model.routers import ROUTERS
from flexolmo_jax.model.selectors import uses_router

MASKED_LOGIT = -1e30


def expert_leaves(architecture: Architecture) -> dict[str, Leaf]:
    """All leaves of one expert: the feed-forward's by name, the router's under `router/`."""
    router = ROUTERS[architecture.router].leaves(architecture)
    experts = EXPERT_KINDS[architecture.expert].leaves(architecture)
    return experts | {ROUTER + name: leaf for name, leaf in router.items()}


def routing_weights(logits_BxSxE: jax.Array, expert_mask: jax.Array | None) -> jax.Array:
    """Softmax of router logits over the experts that are switched on.

    Args:
      logits_BxSxE: float32.
      expert_mask: bool [E], [B, E] or [B, S, E]; False switches an expert off. None: all on.

    Returns:
      float32 [batch, length, experts], summing to 1 over the experts that are on, if any is.
    """
    if expert_mask is None:
        return jax.nn.softmax(logits_BxSxE, axis=-1)
    if expert_mask.ndim < 3:
        expert_mask = jnp.atleast_2d(expert_mask)[:, None, :]
    weights = jax.nn.softmax(jnp.where(expert_mask, logits_BxSxE, MASKED_LOGIT), axis=-1)
    return jnp.where(expert_mask, weights, 0)


def top_k_weights(weights: jax.Array, top_k: int, normalize: bool) -> tuple[jax.Array, jax.Array]:
    """The top k of routing weights [..., experts], and their experts: two arrays [..., top_k] in descending order.

    With `normalize` the weights are divided by their sum (`norm_topk_prob`).
    """
    weights, experts = jax.lax.top_k(weights, top_k)
    if normalize:
        weights /= jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), jnp.finfo(weights.dtype).tiny)
    return weights, experts


def separate_experts(
    architecture: Architecture, x_BxSxD: jax.Array, experts: list[dict[str, jax.Array]], weights_BxSxE: jax.Array
) -> jax.Array:
    """The weighted sum of experts that all see every token, without dispatch.

    The weights sum to 1, so the sum is written as the anchor plus weighted differences from it: while
    an expert is still a copy of the anchor, the result is the anchor's, bit for bit.
    """
    # One axis of tokens: gradients of the leaves contract it, and a CPU would merge two axes by a transposed copy.
    x_NxD, weights_NxE = x_BxSxD.reshape(-1, x_BxSxD.shape[-1]), weights_BxSxE.reshape(-1, len(experts))
    anchor, *others = (apply_expert(architecture, leaves, x_NxD) for leaves in experts)
    y_NxD = anchor
    for i, other in enumerate(others, start=1):
        y_NxD += weights_NxE[:, i, None].astype(x_NxD.dtype) * (other - anchor)
    return y_NxD.reshape(x_BxSxD.shape)


class MoE(nn.Module):
    """The feed-forward part of a block, in any layout. The anchor alone is a mixture of one."""

    architecture: Architecture
    layout: Layout
    dtype: jnp.dtype
    rules: sharding.Rules
    dispatch: str = "ragged"

    @nn.compact
    def __call__(
        self, x_BxSxD: jax.Array, expert_mask: jax.Array | None, evidence_BxSxE: jax.Array | None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Returns (y [batch, length, d_model] in `dtype`, (router logits, router weights))."""
        arch, is_stacked = self.architecture, self.layout.kind == "stacked"
        stack = (self.layout.num_experts,) if is_stacked else ()
        sets = [ExpertParameters(arch, stack, name=name)() for name in self.layout.sets]
        router = {
            name: (sets[0][1][name] if is_stacked else jnp.stack([leaves[name] for _, leaves in sets])).astype(
                jnp.float32
            )
            for name in sets[0][1]
        }
        kind = ROUTERS[arch.router]
        if uses_router(self.layout.selection):
            logits_BxSxE = kind.logits(x_BxSxD.astype(jnp.float32), router)
        else:
            logits_BxSxE = kind.bias(router)
        if evidence_BxSxE is not None:
            logits_BxSxE += evidence_BxSxE
        weights_BxSxE = routing_weights(logits_BxSxE, expert_mask)
        experts = [{name: leaf.astype(self.dtype) for name, leaf in leaves.items()} for leaves, _ in sets]
        x_BxSxD = x_BxSxD.astype(self.dtype)
        if is_stacked:
            chosen = top_k_weights(weights_BxSxE, self.layout.top_k, arch.norm_topk_prob)
            y_BxSxD = stacked_experts(arch, x_BxSxD, experts[0], *chosen, self.dispatch, self.rules)
        else:
            y_BxSxD = separate_experts(arch, x_BxSxD, experts, weights_BxSxE)
        return y_BxSxD, (logits_BxSxE, weights_BxSxE)


class ExpertParameters(nn.Module):
    """The parameters of one expert, or of a stack of them."""

    architecture: Architecture
    stack: tuple[int, ...]

    @nn.compact
    def __call__(self) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Returns (leaves of the feed-forward, leaves of the router), {name: array}, stacked over experts if any."""
        experts = parameters(self, EXPERT_KINDS[self.architecture.expert].leaves(self.architecture), self.stack)
        return experts, RouterParameters(self.architecture, self.stack, name=ROUTER.rstrip("/"))()


class RouterParameters(nn.Module):
    """The router's parameters of one expert, or of a stack of them."""

    architecture: Architecture
    stack: tuple[int, ...]

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        """Returns {name: array}, stacked over experts if any."""
        return parameters(self, ROUTERS[self.architecture.router].leaves(self.architecture), self.stack)
