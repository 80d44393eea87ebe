"""Causal self-attention with QK-norm and rotary embedding, over packed documents."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from flexolmo_jax import sharding
from flexolmo_jax.model.architecture import Architecture
from flexolmo_jax.model.layers import RMSNorm, parameter


def rotary(x_BxSxHxC: jax.Array, positions_BxS: jax.Array, theta: float) -> jax.Array:
    """Rotates the two halves of each head (rotate-half), cos and sin in float32."""
    half = x_BxSxHxC.shape[-1] // 2
    frequency_C = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BxSx1xC = (positions_BxS[..., None].astype(jnp.float32) * frequency_C)[:, :, None]
    cos, sin = jnp.cos(angle_BxSx1xC), jnp.sin(angle_BxSx1xC)
    a, b = jnp.split(x_BxSxHxC.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BxSxHxC.dtype)


class Attention(nn.Module):
    """Grouped-query causal attention; a token sees only its own document (equal segment ids)."""

    architecture: Architecture
    dtype: jnp.dtype
    rules: sharding.Rules

    @nn.compact
    def __call__(self, x_BxSxD: jax.Array, segment_ids_BxS: jax.Array, positions_BxS: jax.Array) -> jax.Array:
        """Returns [batch, length, d_model] in `dtype`."""
        arch = self.architecture
        x_BxSxD = x_BxSxD.astype(self.dtype)

        def project(name, heads):
            shape = (arch.d_model, heads, arch.head_dim)
            kernel = parameter(self, name, shape, ("embed", "heads", None)).astype(self.dtype)
            y_BxSxHxC = jnp.einsum("BSD,DHC->BSHC", x_BxSxD, kernel)
            return sharding.constrain(y_BxSxHxC, ("batch", "length", "heads", None), self.rules)

        query, key = project("query", arch.num_heads), project("key", arch.num_kv_heads)
        value = project("value", arch.num_kv_heads)
        # The norm runs over all heads together, before the split into heads matters.
        query = RMSNorm(arch.norm_eps, ("heads", None), name="query_norm")(query)
        key = RMSNorm(arch.norm_eps, ("heads", None), name="key_norm")(key)
        query, key = (rotary(y, positions_BxS, arch.rope_theta) for y in (query, key))

        same_document = segment_ids_BxS[:, None, :, None] == segment_ids_BxS[:, None, None, :]
        out_BxSxHxC = jax.nn.dot_product_attention(query, key, value, mask=same_document, is_causal=True)
        out_BxSxHxC = sharding.constrain(out_BxSxHxC, ("batch", "length", "heads", None), self.rules)
        shape = (arch.num_heads, arch.head_dim, arch.d_model)
        kernel = parameter(self, "out", shape, ("heads", None, "embed")).astype(self.dtype)
        return jnp.einsum("BSHC,HCD->BSD", out_BxSxHxC, kernel)
