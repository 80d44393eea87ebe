"""Ways to compute causal attention within packed documents. All agree; which one is fast depends on the device.

Each takes queries [batch, length, heads, head size], keys and values [batch, length, kv heads, head size] and segment
ids [batch, length], and returns an array like the queries. A token sees those before it, and itself, that have its
segment id.
"""

import jax

from flexolmo_jax import sharding
from flexolmo_jax.model.kernels.accelerator_attention import cudnn, masked, splash
from flexolmo_jax.model.kernels.blockwise_attention import blockwise

KERNELS = {"reference": masked, "blockwise": blockwise, "cudnn": cudnn, "splash": splash}


def choose(platform: str) -> str:
    """The kernel for the devices of a platform (`sharding.platform_of`)."""
    return {"cpu": "blockwise", "gpu": "cudnn", "hopper": "cudnn", "tpu": "splash"}.get(platform, "reference")


def attend(
    kernel: str,
    query_BxSxNxC: jax.Array,
    key_BxSxHxC: jax.Array,
    value_BxSxHxC: jax.Array,
    segment_ids_BxS: jax.Array,
    rules: sharding.Rules,
) -> jax.Array:
    """Attention by a key of `KERNELS`: each device has its rows and its heads.

    To the partitioner a kernel is opaque, and a loop over rows would have them all on each device. Without a mesh or
    rules, there is nothing to divide.
    """
    inputs = (query_BxSxNxC, key_BxSxHxC, value_BxSxHxC, segment_ids_BxS)
    if not rules or jax.sharding.get_abstract_mesh().empty:
        return KERNELS[kernel](*inputs)
    # Heads of keys and of queries are divided alike, so that those that belong together lie together.
    heads = sharding.even_spec(key_BxSxHxC.shape, ("batch", None, "heads", None), rules)
    rows = jax.sharding.PartitionSpec(heads[0], None)
    # Kernels of libraries do not say over which axes their results vary, which the check would want to know.
    sharded = jax.shard_map(KERNELS[kernel], in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
    return sharded(*inputs)
