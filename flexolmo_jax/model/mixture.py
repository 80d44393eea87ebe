"""The mixture of experts: the router, the pair an owner trains, and the stacked experts of a merge.

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
from flexolmo_jax.model.layers import parameter

ROW_STDDEV = 0.002
MASKED_LOGIT = -1e30
BLOCK_ROWS = 64
FEW_TOKENS = 16


def route(
    x_BxSxD: jax.Array, row_ExD: jax.Array, bias_E: jax.Array, expert_mask: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Router logits and weights, in float32.

    Args:
      x_BxSxD: the residual stream after attention.
      row_ExD: router rows.
      bias_E: expert biases; their effect is -|b|, never positive.
      expert_mask: bool [E], [B, E] or [B, S, E]; False switches an expert off before the softmax. None: all on.

    Returns:
      (logits_BxSxE before the mask, weights_BxSxE that sum to 1 over the experts that are on, if any is).
    """
    logits = jnp.einsum("BSD,ED->BSE", x_BxSxD.astype(jnp.float32), row_ExD.astype(jnp.float32))
    bias_E = bias_E.astype(jnp.float32)
    logits = logits - bias_E * jnp.sign(bias_E)  # |b|, with the gradient of 0 at 0 that jnp.abs has not
    if expert_mask is None:
        return logits, jax.nn.softmax(logits, axis=-1)
    if expert_mask.ndim < 3:
        expert_mask = jnp.atleast_2d(expert_mask)[:, None, :]
    weights = jax.nn.softmax(jnp.where(expert_mask, logits, MASKED_LOGIT), axis=-1)
    return logits, jnp.where(expert_mask, weights, 0)


def feed_forward(x: jax.Array, gate_DxF: jax.Array, up_DxF: jax.Array, down_FxD: jax.Array) -> jax.Array:
    """SwiGLU: down(silu(gate(x)) * up(x)), over the last dimension of x."""
    return (jax.nn.silu(x @ gate_DxF) * (x @ up_DxF)) @ down_FxD


def separate_experts(x_BxSxD: jax.Array, experts: list[dict], weights_BxSxE: jax.Array) -> jax.Array:
    """The weighted sum of experts that all see every token, without dispatch.

    The weights sum to 1, so the sum is written as the anchor plus weighted differences from it: while
    an expert is still a copy of the anchor, the result is the anchor's, bit for bit.
    """
    anchor, *others = (feed_forward(x_BxSxD, e["gate"], e["up"], e["down"]) for e in experts)
    y_BxSxD = anchor
    for i, other in enumerate(others, start=1):
        y_BxSxD += weights_BxSxE[..., i, None].astype(x_BxSxD.dtype) * (other - anchor)
    return y_BxSxD


def chosen_weights(weights: jax.Array, top_k: int, normalize: bool) -> tuple[jax.Array, jax.Array]:
    """The top-k of routing weights [..., experts], and their experts: two arrays [..., top_k], likeliest first.

    With `normalize` the weights are divided by their sum (`norm_topk_prob`).
    """
    weights, experts = jax.lax.top_k(weights, top_k)
    if normalize:
        weights /= jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), jnp.finfo(weights.dtype).tiny)
    return weights, experts


def stacked_experts(
    x_BxSxD: jax.Array,
    experts: dict,
    weights_BxSxE: jax.Array,
    top_k: int,
    normalize: bool = False,
    dispatch: str = "ragged",
) -> jax.Array:
    """The weighted sum of each token's top-k experts; every token is computed, none is dropped.

    Args:
      x_BxSxD: the input, in the dtype of the computation.
      experts: `gate` and `up` [experts, d_model, d_ff], `down` [experts, d_ff, d_model].
      weights_BxSxE: float32 routing weights.
      top_k: experts per token, at most as many as there are.
      normalize: whether the weights of the top-k are divided by their sum.
      dispatch: a key of `DISPATCH`.
    """
    batch, length, d_model = x_BxSxD.shape
    weights_NxK, expert_NxK = chosen_weights(weights_BxSxE.reshape(batch * length, -1), top_k, normalize)
    reads_all = dispatch == "loop" and batch * length <= FEW_TOKENS and expert_NxK.size >= 2 * weights_BxSxE.shape[-1]
    if top_k == weights_BxSxE.shape[-1] or reads_all:
        dispatch = "all"
    y_NxD = DISPATCH[dispatch](x_BxSxD.reshape(-1, d_model), experts, weights_NxK, expert_NxK)
    return y_NxD.astype(x_BxSxD.dtype).reshape(batch, length, d_model)


def _all_experts(x_NxD: jax.Array, experts: dict, weights_NxK: jax.Array, expert_NxK: jax.Array) -> jax.Array:
    """Every expert sees every token: there is nothing to dispatch.

    The experts are a batch of matmuls, which reads the kernels where they lie.
    """
    num_experts = experts["gate"].shape[0]
    weights_NxE = jnp.sum(weights_NxK[..., None] * jax.nn.one_hot(expert_NxK, num_experts), axis=1)
    x_ExNxD = jnp.broadcast_to(x_NxD, (num_experts, *x_NxD.shape))
    y_ExNxD = feed_forward(x_ExNxD, experts["gate"], experts["up"], experts["down"])
    return jnp.einsum("END,NE->ND", y_ExNxD.astype(jnp.float32), weights_NxE)


def _ragged_experts(x_NxD: jax.Array, experts: dict, weights_NxK: jax.Array, expert_NxK: jax.Array) -> jax.Array:
    """Each expert sees the tokens that chose it, in one grouped matmul: for training, and for accelerators.

    Rows (a token and one of its experts) are sorted by expert, so that each expert's rows are contiguous
    for the grouped matmul, and summed back to their tokens in float32.
    """
    num_experts, top_k = experts["gate"].shape[0], weights_NxK.shape[-1]
    with jax.named_scope("dispatch"):
        expert_R = expert_NxK.reshape(-1)  # R = N * K rows, a token's K rows adjacent
        order_R = jnp.argsort(expert_R, stable=True)
        group_sizes_E = jnp.bincount(expert_R, length=num_experts).astype(jnp.int32)
        x_RxD = x_NxD[order_R // top_k]
    with jax.named_scope("experts"):
        gate_RxF = jax.lax.ragged_dot(x_RxD, experts["gate"], group_sizes_E)
        up_RxF = jax.lax.ragged_dot(x_RxD, experts["up"], group_sizes_E)
        y_RxD = jax.lax.ragged_dot(jax.nn.silu(gate_RxF) * up_RxF, experts["down"], group_sizes_E)
    with jax.named_scope("combine"):
        y_NxKxD = y_RxD[jnp.argsort(order_R)].reshape(*weights_NxK.shape, -1)
        return jnp.einsum("NKD,NK->ND", y_NxKxD.astype(jnp.float32), weights_NxK)


def _looped_experts(x_NxD: jax.Array, experts: dict, weights_NxK: jax.Array, expert_NxK: jax.Array) -> jax.Array:
    """Each expert sees the tokens that chose it, expert after expert in blocks of `BLOCK_ROWS`: for CPUs.

    An expert that no token chose is never read; a weight of zero chooses nothing. There is no gradient
    through loops whose lengths follow the routing.
    """
    (num_tokens, top_k), num_experts = weights_NxK.shape, experts["gate"].shape[0]
    size = min(num_tokens, BLOCK_ROWS)
    with jax.named_scope("dispatch"):
        weights_R = weights_NxK.reshape(-1)
        expert_R = jnp.where(weights_R > 0, expert_NxK.reshape(-1), num_experts)
        order_R = jnp.argsort(expert_R, stable=True)
        rows_E = jnp.sum(expert_R[:, None] == jnp.arange(num_experts), axis=0)
        first_row_E = jnp.cumsum(rows_E) - rows_E
        chosen_E = jnp.argsort(rows_E == 0, stable=True)  # those with rows come first

    def add_expert(i, y_NxD):
        expert = chosen_E[i]
        kernels = [experts[leaf][expert] for leaf in ("gate", "up", "down")]

        def add_block(block, y_NxD):
            # The last block is filled up with rows of the next expert, which count for nothing.
            in_expert = block * size + jnp.arange(size)
            row = order_R.at[first_row_E[expert] + in_expert].get(mode="clip")
            weights = jnp.where(in_expert < rows_E[expert], weights_R[row], 0)
            out = feed_forward(x_NxD[row // top_k], *kernels).astype(jnp.float32)
            return y_NxD.at[row // top_k].add(weights[:, None] * out)

        return jax.lax.fori_loop(0, -(-rows_E[expert] // size), add_block, y_NxD)

    with jax.named_scope("experts"):
        return jax.lax.fori_loop(0, jnp.sum(rows_E > 0), add_expert, jnp.zeros(x_NxD.shape, jnp.float32))


DISPATCH = {"all": _all_experts, "ragged": _ragged_experts, "loop": _looped_experts}


class Mixture(nn.Module):
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
        row_ExD, bias_E = (sets[0][leaf] if stacked else jnp.stack([s[leaf] for s in sets]) for leaf in ("row", "bias"))
        logits_BxSxE, weights_BxSxE = route(x_BxSxD, row_ExD, bias_E, expert_mask)
        kernels = [{leaf: s[leaf].astype(self.dtype) for leaf in ("gate", "up", "down")} for s in sets]
        x_BxSxD = x_BxSxD.astype(self.dtype)
        if stacked:
            how = (self.layout.top_k, self.architecture.norm_topk_prob, self.dispatch)
            y_BxSxD = stacked_experts(x_BxSxD, kernels[0], weights_BxSxE, *how)
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
        d_model, d_ff = self.architecture.d_model, self.architecture.d_ff
        row_init = nn.initializers.truncated_normal(ROW_STDDEV)
        declared = {
            "gate": ((d_model, d_ff), ("embed", "mlp"), None),
            "up": ((d_model, d_ff), ("embed", "mlp"), None),
            "down": ((d_ff, d_model), ("mlp", "embed"), None),
            "row": ((d_model,), (None,), row_init),
            "bias": ((), (), nn.initializers.zeros),
        }
        stack_axes = ("experts",) * len(self.stack)
        return {
            leaf: parameter(self, leaf, self.stack + shape, stack_axes + axes, init)
            for leaf, (shape, axes, init) in declared.items()
        }
