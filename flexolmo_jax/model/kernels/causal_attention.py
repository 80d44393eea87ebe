"""Implementations of causal attention within packed documents. All agree; which one is fast depends on the device.

Each takes queries [batch, length, query heads, head size], keys and values [batch, length, key-value heads, head size]
and segment ids [batch, length], and returns an array like the queries. A token attends to itself and to earlier tokens
with its segment id.
"""

import jax

from flexolmo_jax import sharding
from flexolmo_jax.model.kernels.accelerator_attention import cudnn, masked, splash
from flexolmo_jax.model.kernels.blockwise_attention import blockwise

KERNELS = {"reference": masked, "blockwise": blockwise, "cudnn": cudnn, "splash": splash}
# Of the kernels that do not compile everywhere: the platforms that they compile for (`sharding.platform_of`).
PLATFORMS = {"cudnn": ("gpu", "hopper"), "splash": ("tpu",)}


def choose(platform: str) -> str:
    """The fastest kernel on a platform (`sharding.platform_of`): a key of `KERNELS`."""
    return {"cpu": "blockwise", "gpu": "cudnn", "hopper": "cudnn", "tpu": "splash"}.get(platform, "reference")


def attend(
    kernel: str,
    query_BxSxQxC: jax.Array,
    key_BxSxHxC: jax.Array,
    value_BxSxHxC: jax.Array,
    segment_ids_BxS: jax.Array,
    rules: sharding.Rules,
) -> jax.Array:
    """Attention by a key of `KERNELS`; under a mesh each device computes its sequences and heads.

    A kernel is opaque to the partitioner, and a loop over sequences would gather them all on each device.
    """
    inputs = (query_BxSxQxC, key_BxSxHxC, value_BxSxHxC, segment_ids_BxS)
    if not rules or jax.sharding.get_abstract_mesh().empty:
        return KERNELS[kernel](*inputs)
    # Heads of keys and of queries are sharded alike, so that each query head is with its key-value head.
    heads = sharding.even_spec(key_BxSxHxC.shape, ("batch", None, "heads", None), rules)
    ids = jax.sharding.PartitionSpec(heads[0], None)
    # The check of varying axes would need to know over which axes the results of library kernels vary.
    sharded = jax.shard_map(KERNELS[kernel], in_specs=(heads, heads, heads, ids), out_specs=heads, check_vma=False)
    return sharded(*inputs)
