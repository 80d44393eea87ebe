"""Causal self-attention with QK-norm and rotary embedding, over packed documents or with a cache."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from flexolmo_jax import sharding
from flexolmo_jax.model.architecture import Architecture
from flexolmo_jax.model.kernels.causal_attention import attend
from flexolmo_jax.model.layers import RMSNorm
from flexolmo_jax.model.leaves import parameter


class Rotation(NamedTuple):
    """The rotary embedding of some positions, the same in all layers: cosines and sines, float32, of half a head."""

    cos_BxSx1xC: jax.Array
    sin_BxSx1xC: jax.Array

    @classmethod
    def of(cls, positions_BxS: jax.Array, head_dim: int, theta: float) -> "Rotation":
        """Frequency i of the head_dim / 2 is theta ** (-2 i / head_dim)."""
        half = head_dim // 2
        frequency_C = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
        angle_BxSx1xC = (positions_BxS[..., None].astype(jnp.float32) * frequency_C)[:, :, None]
        return cls(jnp.cos(angle_BxSx1xC), jnp.sin(angle_BxSx1xC))

    def turn(self, x_BxSxHxC: jax.Array) -> jax.Array:
        """Rotates the two halves of each head (rotate-half), in float32; an array of x's dtype."""
        a, b = jnp.split(x_BxSxHxC.astype(jnp.float32), 2, axis=-1)
        cos, sin = self
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BxSxHxC.dtype)


class KVCache(NamedTuple):
    """Keys and values of one layer, those of position t in slot t, after norm and rotary embedding.

    Heads stand before positions: a head's slots are then contiguous, which halves the time of a CPU.
    """

    key_BxHxTxC: jax.Array
    value_BxHxTxC: jax.Array

    def write(self, key_BxSxHxC: jax.Array, value_BxSxHxC: jax.Array, positions_BxS: jax.Array) -> "KVCache":
        """The cache with these keys and values in the slots of their positions."""
        rows_Bx1 = jnp.arange(positions_BxS.shape[0])[:, None]
        new = (key_BxSxHxC, value_BxSxHxC)
        return KVCache(*(old.at[rows_Bx1, :, positions_BxS].set(x) for old, x in zip(self, new, strict=True)))

    def attend(self, query_BxSxNxC: jax.Array, positions_BxS: jax.Array) -> jax.Array:
        """What each query gathers from the slots up to its position, an array like the queries."""
        batch, length, _, size = query_BxSxNxC.shape
        query_BxSxHxGxC = query_BxSxNxC.reshape(batch, length, self.key_BxHxTxC.shape[1], -1, size)
        scores = jnp.einsum("BSHGC,BHTC->BHGST", query_BxSxHxGxC, self.key_BxHxTxC, preferred_element_type=jnp.float32)
        visible_BxSxT = jnp.arange(self.key_BxHxTxC.shape[2]) <= positions_BxS[..., None]
        scores = jnp.where(visible_BxSxT[:, None, None], scores * size**-0.5, jnp.finfo(jnp.float32).min)
        weights_BxHxGxSxT = jax.nn.softmax(scores, axis=-1).astype(query_BxSxNxC.dtype)
        return jnp.einsum("BHGST,BHTC->BSHGC", weights_BxHxGxSxT, self.value_BxHxTxC).reshape(query_BxSxNxC.shape)


class Attention(nn.Module):
    """Grouped-query causal attention.

    Without a cache, a token sees what precedes it in its own document (equal segment ids). With one, a row is
    one document: its keys and values go into the slots of their positions, and a token sees every slot up to its own.
    """

    architecture: Architecture
    dtype: jnp.dtype
    rules: sharding.Rules
    kernel: str = "reference"

    @nn.compact
    def __call__(
        self,
        x_BxSxD: jax.Array,
        segment_ids_BxS: jax.Array,
        positions_BxS: jax.Array,
        rotation: Rotation,
        cache: KVCache | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Returns ([batch, length, d_model] in `dtype`, the cache with what was written into it).

        The rotation is that of the positions, which themselves say only where in the cache keys and values go.
        """
        arch = self.architecture
        batch, length, _ = x_BxSxD.shape
        # One dimension for all tokens, and one for all heads: where two are contracted, a CPU makes one by copying.
        x_NxD = x_BxSxD.astype(self.dtype).reshape(-1, arch.d_model)

        def project(name, heads):
            shape = (arch.d_model, heads, arch.head_dim)
            kernel = parameter(self, name, shape, ("embed", "heads", None)).astype(self.dtype)
            y_BxSxHxC = (x_NxD @ kernel.reshape(arch.d_model, -1)).reshape(batch, length, heads, arch.head_dim)
            return sharding.constrain(y_BxSxHxC, ("batch", "length", "heads", None), self.rules)

        query, key = project("query", arch.num_heads), project("key", arch.num_kv_heads)
        value = project("value", arch.num_kv_heads)
        # The norm runs over all heads together, before the split into heads matters.
        query = RMSNorm(arch.norm_eps, ("heads", None), name="query_norm")(query)
        key = RMSNorm(arch.norm_eps, ("heads", None), name="key_norm")(key)
        query, key = rotation.turn(query), rotation.turn(key)

        if cache is None:
            out_BxSxHxC = attend(self.kernel, query, key, value, segment_ids_BxS, self.rules)
        else:
            cache = cache.write(key, value, positions_BxS)
            out_BxSxHxC = cache.attend(query, positions_BxS)
        out_BxSxHxC = sharding.constrain(out_BxSxHxC, ("batch", "length", "heads", None), self.rules)
        shape = (arch.num_heads, arch.head_dim, arch.d_model)
        kernel = parameter(self, "out", shape, ("heads", None, "embed")).astype(self.dtype)
        out_NxD = out_BxSxHxC.reshape(batch * length, -1) @ kernel.reshape(-1, arch.d_model)
        return out_NxD.reshape(batch, length, -1), cache
