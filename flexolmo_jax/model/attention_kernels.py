"""Ways to compute causal attention within packed documents. All agree; which one is fast depends on the device.

Each takes queries [batch, length, heads, head size], keys and values [batch, length, kv heads, head size], segment
ids [batch, length] and the sharding rules, and returns an array like the queries. A token sees those before it, and
itself, that have its segment id.
"""

from flexolmo_jax.model.attention_accelerators import cudnn, masked, splash
from flexolmo_jax.model.attention_blockwise import blockwise

KERNELS = {
    "reference": lambda query, key, value, segment_ids, rules: masked(query, key, value, segment_ids),
    "blockwise": lambda query, key, value, segment_ids, rules: blockwise(query, key, value, segment_ids),
    "cudnn": cudnn,
    "splash": splash,
}


def choose(platform: str) -> str:
    """The kernel for the devices of a platform ("cpu", "gpu" or "tpu")."""
    return {"cpu": "blockwise", "gpu": "cudnn", "tpu": "splash"}.get(platform, "reference")
