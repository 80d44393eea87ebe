"""Stacked experts: each token is computed by the k experts that were chosen for it, on one device or under a mesh.

Under a mesh, routing depends on the data, so that a partitioner which does not know what sorting tokens by expert means
would gather everything everywhere. Inside `shard_map` each device sorts the tokens it has. Devices exchange:

- Shards of leaves along `expert_embed` (fsdp): gathered when they are used, and again in the backward pass.
- Tokens that are sharded over the mesh axes of the experts, or of their hidden units: gathered over these, so that each
  device computes its experts for all of them; the sums are scattered back. No token is dropped, whatever the routing:
  a token has at most min(k, experts per device) experts on a device, and there is room for all.

With e devices a token goes to the e - 1 others, and as many partial sums come back. Exchanging routed tokens instead
(`jax.lax.ragged_all_to_all`) would send a token k (e - 1) / e times, once for each of its experts. That is less only
if k < e (half, for 4 of 8 experts on 8 devices; the same, for 4 of 8 on 4), in buffers of the same size, since all
tokens may go to one device.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from flexolmo_jax import sharding
from flexolmo_jax.model.architecture import Architecture
from flexolmo_jax.model.experts import EXPERT_KINDS
from flexolmo_jax.model.kernels import grouped_matmul
from flexolmo_jax.model.kernels.expert_loop import looped_experts
from flexolmo_jax.model.layers import MLP_RESIDUALS

# Name of what the backward pass keeps of sorted experts; it recomputes the rest, indices and elementwise operations.
EXPERT_RESIDUALS = "expert_residuals"
KEEP_RESIDUALS = jax.checkpoint_policies.save_only_these_names(EXPERT_RESIDUALS)
FEW_TOKENS = 16
# Cost of a chosen expert, in reads of its leaves: "blocks" copies them, and waiting for the host takes as long;
# "mosaic" leaves small inputs to "blocks".
LEAF_READS = {"loop": 1, "blocks": 5, "mosaic": 5}

Experts = dict[str, jax.Array]
"""{leaf: [experts, in, out]}, without the router's leaves, in the dtype of the computation."""


def choose_dispatch(platform: str) -> str:
    """The fastest dispatch implementation on a platform (`sharding.platform_of`): a key of `DISPATCH`."""
    return "loop" if platform == "cpu" else grouped_matmul.choose(platform)


def dispatch_gains(dispatch: str, num_tokens: int, num_experts: int, top_k: int) -> bool:
    """Whether dispatching computes, or reads, less than all experts for all tokens would."""
    reads = num_tokens * top_k * LEAF_READS.get(dispatch, 0)
    reads_all = num_tokens <= FEW_TOKENS and reads >= 2 * num_experts
    return top_k < num_experts and not reads_all


def stacked_experts(
    architecture: Architecture,
    x_BxSxD: jax.Array,
    experts: Experts,
    weights_BxSxK: jax.Array,
    expert_BxSxK: jax.Array,
    dispatch: str,
    rules: sharding.Rules = (),
) -> jax.Array:
    """The weighted sum of each token's k experts, on all devices of the mesh; no token is dropped.

    Args:
      architecture: says which kind of expert it is.
      x_BxSxD: the input, in the dtype of the computation.
      experts: stacked leaves, in the dtype of x.
      weights_BxSxK: float32 weights of each token's experts.
      expert_BxSxK: int32 indices of these experts, all different for a token.
      dispatch: a key of `DISPATCH`. "loop" falls back to "blocks" for kinds of experts without a loop.
      rules: logical axis -> mesh axes. Without them, or without a mesh of several devices, nothing is sharded.

    Returns:
      An array like x. Sums over devices are in the dtype of x.
    """
    kind, (batch, length, _) = EXPERT_KINDS[architecture.expert], x_BxSxD.shape
    if dispatch == "loop" and not kind.has_cpu_loop:
        dispatch = "blocks"
    if not dispatch_gains(dispatch, batch * length, _count(experts), weights_BxSxK.shape[-1]):
        dispatch = "all"
    on_device = functools.partial(_sum_on_device, architecture, dispatch=dispatch)
    mesh = jax.sharding.get_abstract_mesh()
    if not rules or mesh.empty or mesh.size == 1:
        return on_device(x_BxSxD, experts, weights_BxSxK, expert_BxSxK)

    leaves = kind.leaves(architecture)
    specs = {name: sharding.partition_spec(("experts", *leaf.axes), rules) for name, leaf in leaves.items()}
    tokens = sharding.even_spec(x_BxSxD.shape, ("batch", "length", None), rules)
    token_axes = {axis for axes in tokens for axis in sharding.as_tuple(axes)}
    used = {"experts", *(axis for leaf in leaves.values() for axis in leaf.axes)}
    expert_axes, embed_axes, mlp_axes = (
        tuple(axis for axis in sharding.as_tuple(axes) if mesh.shape[axis] > 1 and logical in used)
        for logical, axes in zip(
            ("experts", "expert_embed", "mlp"),
            sharding.partition_spec(("experts", "expert_embed", "mlp"), rules),
            strict=True,
        )
    )
    # A device computes a partial sum over these axes. Tokens that are sharded over some are gathered there.
    partial_axes = (*expert_axes, *mlp_axes)
    on_device = functools.partial(
        on_device,
        expert_axes=expert_axes,
        embed_axes=embed_axes,
        gather_axes=tuple(axis for axis in partial_axes if axis in token_axes),
        sum_axes=tuple(axis for axis in partial_axes if axis not in token_axes),
    )
    if embed_axes:
        # Without this the backward pass would find the gathered leaves of all layers in memory.
        on_device = jax.checkpoint(on_device, policy=KEEP_RESIDUALS)
    # The check of varying axes would need to know over which axes the results of library kernels vary.
    in_specs = (tokens, specs, tokens, tokens)
    sharded = jax.shard_map(on_device, in_specs=in_specs, out_specs=tokens, check_vma=False)
    return sharded(x_BxSxD, experts, weights_BxSxK, expert_BxSxK)


def _sum_on_device(
    architecture: Architecture,
    x_BxSxD: jax.Array,
    experts: Experts,
    weights_BxSxK: jax.Array,
    expert_BxSxK: jax.Array,
    dispatch: str,
    expert_axes: Sequence[str] = (),
    embed_axes: Sequence[str] = (),
    gather_axes: Sequence[str] = (),
    sum_axes: Sequence[str] = (),
) -> jax.Array:
    """One device's share of `stacked_experts`; the axes are those of the mesh.

    Args:
      architecture: as above, like all that follow but the axes.
      x_BxSxD: its tokens.
      experts: its shards of the leaves.
      weights_BxSxK: of its tokens.
      expert_BxSxK: of its tokens.
      dispatch: a key of `DISPATCH`.
      expert_axes: over which the experts are sharded.
      embed_axes: over which the leaves' d_model is sharded.
      gather_axes: over which tokens are gathered, and partial sums scattered.
      sum_axes: over which partial sums are added.
    """
    if embed_axes:
        leaves = EXPERT_KINDS[architecture.expert].leaves(architecture)
        experts = {name: _gather_embed(stack, leaves[name].axes, embed_axes) for name, stack in experts.items()}
    flat = (y.reshape(-1, y.shape[-1]) for y in (x_BxSxD, weights_BxSxK, expert_BxSxK))
    x_NxD, weights_NxK, expert_NxK = (
        jax.lax.all_gather(y, gather_axes, tiled=True) if gather_axes else y for y in flat
    )
    expected_routed = weights_NxK.size // jax.lax.axis_size(expert_axes)
    if expert_axes:
        first = jax.lax.axis_index(expert_axes) * _count(experts)
        weights_NxK, expert_NxK = _local_experts(weights_NxK, expert_NxK, first, _count(experts))
    y_NxD = sum_experts(architecture, x_NxD, experts, weights_NxK, expert_NxK, dispatch, expected_routed)
    y_NxD = y_NxD.astype(x_NxD.dtype)
    y_NxD = jax.lax.psum(y_NxD, sum_axes) if sum_axes else y_NxD
    y_NxD = jax.lax.psum_scatter(y_NxD, gather_axes, tiled=True) if gather_axes else y_NxD
    return y_NxD.reshape(x_BxSxD.shape)


def _gather_embed(stack: jax.Array, axes: Sequence[str | None], embed_axes: Sequence[str]) -> jax.Array:
    """A stacked leaf [experts, ...] with its axis "expert_embed" whole, if it has one."""
    if "expert_embed" not in axes:
        return stack
    return jax.lax.all_gather(stack, embed_axes, axis=1 + axes.index("expert_embed"), tiled=True)


def _local_experts(
    weights_NxK: jax.Array, expert_NxK: jax.Array, first: jax.Array, num_experts: int
) -> tuple[jax.Array, jax.Array]:
    """Of each token's experts, those of this device: `num_experts` from `first` on, counted from there.

    A token's experts are all different, so that at most min(k, num_experts) of them are. Where there are fewer, the
    expert is `num_experts` and the weight 0.
    """
    is_local_NxK = (expert_NxK >= first) & (expert_NxK < first + num_experts)
    weights_NxK = jnp.where(is_local_NxK, weights_NxK, 0)
    expert_NxK = jnp.where(is_local_NxK, expert_NxK - first, num_experts)
    _, local_NxK = jax.lax.top_k(is_local_NxK.astype(jnp.int32), min(expert_NxK.shape[-1], num_experts))
    return jnp.take_along_axis(weights_NxK, local_NxK, axis=-1), jnp.take_along_axis(expert_NxK, local_NxK, axis=-1)


def sum_experts(
    architecture: Architecture,
    x_NxD: jax.Array,
    experts: Experts,
    weights_NxK: jax.Array,
    expert_NxK: jax.Array,
    dispatch: str,
    expected_routed: int,
) -> jax.Array:
    """The weighted sum of each token's k experts on one device; every token is computed, none is dropped.

    Args:
      architecture: says which kind of expert it is.
      x_NxD: the input, in the dtype of the computation.
      experts: stacked leaves, in the dtype of x.
      weights_NxK: float32 weights of each token's experts.
      expert_NxK: int32 indices of these experts, all different for a token. Where the index is the number of experts,
        the token has fewer than k, and the weight must be 0.
      dispatch: a key of `DISPATCH`.
      expected_routed: how many of the N * K token-expert assignments have an expert, if all experts are chosen equally
        often. It changes no result.

    Returns:
      float32 [N, D].
    """
    return DISPATCH[dispatch](x_NxD, experts, weights_NxK, expert_NxK, architecture, expected_routed)


def _all_experts(
    x_NxD: jax.Array,
    experts: Experts,
    weights_NxK: jax.Array,
    expert_NxK: jax.Array,
    architecture: Architecture,
    _: int,
) -> jax.Array:
    """All experts compute all tokens, in batched matmuls, which read the leaves where they lie."""
    num_experts = _count(experts)
    weights_NxE = jnp.sum(weights_NxK[..., None] * jax.nn.one_hot(expert_NxK, num_experts), axis=1)
    x_ExNxD = jnp.broadcast_to(x_NxD, (num_experts, *x_NxD.shape))
    y_ExNxD = apply_expert(architecture, experts, x_ExNxD)
    return jnp.einsum("END,NE->ND", y_ExNxD.astype(jnp.float32), weights_NxE)


def apply_expert(architecture: Architecture, leaves: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """The output of an expert, or of a stack of them, for x [..., tokens, d_model], by plain matmuls."""
    return EXPERT_KINDS[architecture.expert].apply(lambda x, leaf: checkpoint_name(x @ leaves[leaf], MLP_RESIDUALS), x)


def _looped_experts(
    x_NxD: jax.Array,
    experts: Experts,
    weights_NxK: jax.Array,
    expert_NxK: jax.Array,
    architecture: Architecture,
    _: int,
) -> jax.Array:
    """One expert after the other, for CPUs."""
    return looped_experts(x_NxD, experts, weights_NxK, expert_NxK)


def _sorted_experts(
    implementation: str,
    x_NxD: jax.Array,
    experts: Experts,
    weights_NxK: jax.Array,
    expert_NxK: jax.Array,
    architecture: Architecture,
    expected_routed: int,
) -> jax.Array:
    """Each expert computes the tokens that chose it, in grouped matmuls: for accelerators.

    Token-expert assignments are sorted by expert, so that each expert's routed tokens are contiguous for the grouped
    matmul, and summed back to their tokens in float32.
    """
    kind, num_experts, top_k = EXPERT_KINDS[architecture.expert], _count(experts), weights_NxK.shape[-1]
    with jax.named_scope("dispatch"):
        expert_R = expert_NxK.reshape(-1)  # R = N * K assignments, the K of a token adjacent
        order_R = jnp.argsort(expert_R, stable=True)
        place_NxK = jnp.argsort(order_R).reshape(weights_NxK.shape)  # where each assignment went
        order_R = checkpoint_name(order_R, EXPERT_RESIDUALS)
        place_NxK = checkpoint_name(place_NxK, EXPERT_RESIDUALS)
        group_sizes_E = jnp.sum(expert_R[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
        # Assignments without an expert come last. Grouped matmuls leave anything there, in outputs and in gradients.
        is_routed_Rx1 = (jnp.arange(expert_R.size) < jnp.sum(group_sizes_E))[:, None]
        x_RxD = jnp.where(is_routed_Rx1, _gather_routed(x_NxD, order_R // top_k, place_NxK), 0)
        x_RxD = checkpoint_name(x_RxD, EXPERT_RESIDUALS)
    is_input = {name for leaf in kind.leaves(architecture).values() for name in leaf.inputs}

    def matmul(x, leaf):
        y = grouped_matmul.grouped_matmul(x, experts[leaf], group_sizes_E, implementation, expected_routed)
        y = checkpoint_name(y, EXPERT_RESIDUALS)
        return jnp.where(is_routed_Rx1, y, 0) if leaf in is_input else y

    with jax.named_scope("experts"):
        y_RxD = kind.apply(matmul, x_RxD)
    with jax.named_scope("combine"):
        y_NxKxD = _gather_routed(y_RxD, place_NxK.reshape(-1), order_R[:, None]).reshape(*weights_NxK.shape, -1)
        y_NxKxD = jnp.where(expert_NxK[..., None] < num_experts, y_NxKxD, 0)
        return jnp.sum(y_NxKxD.astype(jnp.float32) * weights_NxK[..., None], axis=1)


@jax.custom_vjp
def _gather_routed(x: jax.Array, indices: jax.Array, destinations: jax.Array) -> jax.Array:
    """x[indices]; `destinations`, [len(x), times each is taken], says where each x[i] goes.

    With it the gradient is a gather too; without, it would be a scatter, which is slow on accelerators.
    """
    return x[indices]


def _gather_routed_forward(x, indices, destinations):
    return x[indices], destinations


def _gather_routed_backward(destinations, cotangent):
    return jnp.sum(cotangent[destinations], axis=1, dtype=jnp.float32).astype(cotangent.dtype), None, None


_gather_routed.defvjp(_gather_routed_forward, _gather_routed_backward)


def _count(experts: Experts) -> int:
    """The number of stacked experts on this device."""
    return next(iter(experts.values())).shape[0]


DISPATCH: dict[str, Callable[[jax.Array, Experts, jax.Array, jax.Array, Architecture, int], jax.Array]] = {
    "all": _all_experts,
    "loop": _looped_experts,
    **{
        name: jax.checkpoint(functools.partial(_sorted_experts, name), policy=KEEP_RESIDUALS, static_argnums=(4, 5))
        for name in grouped_matmul.IMPLEMENTATIONS
    },
}
