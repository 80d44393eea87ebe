"""Stacked experts under a mesh: each device computes its experts, and its share of their hidden units.

Routing depends on the data, so a partitioner that does not know what sorting tokens by expert means would gather
everything everywhere. Inside `shard_map` each device sorts what it has. Between devices go:

- Kernels that are split over `expert_embed` (fsdp): gathered when they are used, and again in the backward pass.
- Tokens that lie apart on the axes over which the experts, or their hidden units, are split: gathered over these, so
  that each device computes its experts for all of them; the sums are scattered back. Nothing is dropped, whatever
  the routing: a token has at most min(k, experts per device) rows on a device, and there is room for all.

Over e devices a token goes to the e - 1 others, and as many parts of its sum come back. An exchange of rows
(`jax.lax.ragged_all_to_all`) would send it k (e - 1) / e times, once for each expert: less only if k < e (half, for
4 of 8 experts on 8 devices; the same, for 4 of 8 on 4), in buffers of the same size, as all rows may go to one device.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from flexolmo_jax import sharding
from flexolmo_jax.model.experts import KEEP, KERNEL_AXES, dispatch_gains, sum_experts


def stacked_experts(
    x_BxSxD: jax.Array,
    experts: dict[str, jax.Array],
    weights_BxSxK: jax.Array,
    expert_BxSxK: jax.Array,
    dispatch: str,
    rules: sharding.Rules = (),
) -> jax.Array:
    """The weighted sum of each token's k experts, on all devices of the mesh; no token is dropped.

    Without rules, or with a mesh of one device or none, there is nothing to divide.

    Args:
      x_BxSxD: the input, in the dtype of the computation.
      experts: `gate` and `up` [experts, d_model, d_ff], `down` [experts, d_ff, d_model], in the dtype of x.
      weights_BxSxK: float32 weights of each token's experts.
      expert_BxSxK: int32, which experts these are; a token's are all different.
      dispatch: a key of `experts.DISPATCH`.
      rules: logical axis -> mesh axes.

    Returns:
      An array like x. Sums over devices are made in the dtype of x.
    """
    batch, length, _ = x_BxSxD.shape
    if not dispatch_gains(dispatch, batch * length, experts["gate"].shape[0], weights_BxSxK.shape[-1]):
        dispatch = "all"
    mesh = jax.sharding.get_abstract_mesh()
    if not rules or mesh.empty or mesh.size == 1:
        return _sum_on_device(x_BxSxD, experts, weights_BxSxK, expert_BxSxK, dispatch=dispatch)

    specs = {leaf: sharding.partition_spec(("experts", *axes), rules) for leaf, axes in KERNEL_AXES.items()}
    tokens = sharding.even_spec(x_BxSxD.shape, ("batch", "length", None), rules)
    token_axes = {axis for axes in tokens for axis in sharding.as_tuple(axes)}
    expert_axes, embed_axes, mlp_axes = (
        tuple(axis for axis in sharding.as_tuple(axes) if mesh.shape[axis] > 1) for axes in specs["gate"]
    )
    # What a device computes is a part of a sum over these. Tokens that lie apart on some are brought together there.
    parts = (*expert_axes, *mlp_axes)
    on_device = functools.partial(
        _sum_on_device,
        dispatch=dispatch,
        expert_axes=expert_axes,
        embed_axes=embed_axes,
        apart=tuple(axis for axis in parts if axis in token_axes),
        together=tuple(axis for axis in parts if axis not in token_axes),
    )
    if embed_axes:
        # Else the backward pass would find the gathered kernels of all layers in memory.
        on_device = jax.checkpoint(on_device, policy=KEEP)
    # Kernels of libraries do not say over which axes their results vary, which the check would want to know.
    in_specs = (tokens, specs, tokens, tokens)
    sharded = jax.shard_map(on_device, in_specs=in_specs, out_specs=tokens, check_vma=False)
    return sharded(x_BxSxD, experts, weights_BxSxK, expert_BxSxK)


def _sum_on_device(
    x_BxSxD: jax.Array,
    experts: dict[str, jax.Array],
    weights_BxSxK: jax.Array,
    expert_BxSxK: jax.Array,
    dispatch: str,
    expert_axes: Sequence[str] = (),
    embed_axes: Sequence[str] = (),
    apart: Sequence[str] = (),
    together: Sequence[str] = (),
) -> jax.Array:
    """One device's part of `stacked_experts`; the axes are those of the mesh it takes part in."""
    if embed_axes:
        experts = {
            leaf: jax.lax.all_gather(kernel, embed_axes, axis=1 + KERNEL_AXES[leaf].index("expert_embed"), tiled=True)
            for leaf, kernel in experts.items()
        }
    flat = (y.reshape(-1, y.shape[-1]) for y in (x_BxSxD, weights_BxSxK, expert_BxSxK))
    x_NxD, weights_NxK, expert_NxK = (jax.lax.all_gather(y, apart, tiled=True) if apart else y for y in flat)
    expected_rows = weights_NxK.size // jax.lax.axis_size(expert_axes)
    if expert_axes:
        first = jax.lax.axis_index(expert_axes) * experts["gate"].shape[0]
        weights_NxK, expert_NxK = _own_experts(weights_NxK, expert_NxK, first, experts["gate"].shape[0])
    y_NxD = sum_experts(x_NxD, experts, weights_NxK, expert_NxK, dispatch, expected_rows).astype(x_NxD.dtype)
    y_NxD = jax.lax.psum(y_NxD, together) if together else y_NxD
    y_NxD = jax.lax.psum_scatter(y_NxD, apart, tiled=True) if apart else y_NxD
    return y_NxD.reshape(x_BxSxD.shape)


def _own_experts(
    weights_NxK: jax.Array, expert_NxK: jax.Array, first: jax.Array, num_experts: int
) -> tuple[jax.Array, jax.Array]:
    """Of each token's experts those that this device has, `num_experts` from `first` on, counted from there.

    A token's experts are all different, so there are at most min(k, num_experts) of them. Where there are fewer, the
    expert is `num_experts` and the weight 0.
    """
    mine_NxK = (expert_NxK >= first) & (expert_NxK < first + num_experts)
    weights_NxK = jnp.where(mine_NxK, weights_NxK, 0)
    expert_NxK = jnp.where(mine_NxK, expert_NxK - first, num_experts)
    _, kept_NxK = jax.lax.top_k(mine_NxK.astype(jnp.int32), min(expert_NxK.shape[-1], num_experts))
    return tuple(jnp.take_along_axis(y, kept_NxK, axis=-1) for y in (weights_NxK, expert_NxK))
