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


class RotaryEmbedding(NamedTuple):
    """Cosines and sines, float32, of the angles of some positions; the same in all layers."""

    cos_BxSx1xI: jax.Array
    sin_BxSx1xI: jax.Array

    @classmethod
    def of(cls, positions_BxS: jax.Array, head_dim: int, theta: float) -> "RotaryEmbedding":
        """Frequency i of the head_dim / 2 is theta ** (-2 i / head_dim)."""
        half = head_dim // 2
        frequency_I = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
        angle_BxSx1xI = (positions_BxS[..., None].astype(jnp.float32) * frequency_I)[:, :, None]
        return cls(jnp.cos(angle_BxSx1xI), jnp.sin(angle_BxSx1xI))

    def apply(self, x_BxSxHxC: jax.Array) -> jax.Array:
        """Rotates the two halves of each head (rotate-half) in float32; returns an array of x's dtype."""
        a, b = jnp.split(x_BxSxHxC.astype(jnp.float32), 2, axis=-1)
        cos, sin = self
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BxSxHxC.dtype)


class KVCache(NamedTuple):
    """Keys and values of one layer, those of position t in slot t, after norm and rotary embedding.

    Heads come before positions, so that a head's slots are contiguous, which halves the time on a CPU.
    """

    key_BxHxTxC: jax.Array
    value_BxHxTxC: jax.Array

    def write(self, key_BxSxHxC: jax.Array, value_BxSxHxC: jax.Array, positions_BxS: jax.Array) -> "KVCache":
        """The cache with these keys and values in the slots of their positions."""
        sequence_Bx1 = jnp.arange(positions_BxS.shape[0])[:, None]
        new = (key_BxSxHxC, value_BxSxHxC)
        return KVCache(*(old.at[sequence_Bx1, :, positions_BxS].set(x) for old, x in zip(self, new, strict=True)))

    def attend(self, query_BxSxQxC: jax.Array, positions_BxS: jax.Array) -> jax.Array:
        """Attention of each query over the slots up to its position, an array like the queries."""
        batch, length, _, size = query_BxSxQxC.shape
        query_BxSxHxGxC = query_BxSxQxC.reshape(batch, length, self.key_BxHxTxC.shape[1], -1, size)
        scores = jnp.einsum("BSHGC,BHTC->BHGST", query_BxSxHxGxC, self.key_BxHxTxC, preferred_element_type=jnp.float32)
        visible_BxSxT = jnp.arange(self.key_BxHxTxC.shape[2]) <= positions_BxS[..., None]
        scores = jnp.where(visible_BxSxT[:, None, None], scores * size**-0.5, jnp.finfo(jnp.float32).min)
        weights_BxHxGxSxT = jax.nn.softmax(scores, axis=-1).astype(query_BxSxQxC.dtype)
        return jnp.einsum("BHGST,BHTC->BSHGC", weights_BxHxGxSxT, self.value_BxHxTxC).reshape(query_BxSxQxC.shape)


class Attention(nn.Module):
    """Grouped-query causal attention.

    Without a cache, a token attends to itself and earlier tokens of its document (equal segment ids). With one, a
    sequence is one document: its keys and values go into the slots of their positions, and a token attends to every
    slot up to its own.
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
        rotary: RotaryEmbedding,
        cache: KVCache | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Returns ([batch, length, d_model] in `dtype`, the updated cache).

        `positions_BxS` only says which slots of the cache are written; `rotary` holds the angles of these positions.
        """
        arch = self.architecture
        batch, length, _ = x_BxSxD.shape
        # One axis for all tokens, and one for all heads: a CPU would merge two contracted axes by copying.
        x_NxD = x_BxSxD.astype(self.dtype).reshape(-1, arch.d_model)

        def project(name, heads):
            shape = (arch.d_model, heads, arch.head_dim)
            kernel = parameter(self, name, shape, ("embed", "heads", None)).astype(self.dtype)
            projected = (x_NxD @ kernel.reshape(arch.d_model, -1)).reshape(batch, length, heads, arch.head_dim)
            return sharding.constrain(projected, ("batch", "length", "heads", None), self.rules)

        query, key = project("query", arch.num_heads), project("key", arch.num_kv_heads)
        value = project("value", arch.num_kv_heads)
        # The norm is over all heads together.
        query = RMSNorm(arch.norm_eps, ("heads", None), name="query_norm")(query)
        key = RMSNorm(arch.norm_eps, ("heads", None), name="key_norm")(key)
        query, key = rotary.apply(query), rotary.apply(key)

        if cache is None:
            out_BxSxQxC = attend(self.kernel, query, key, value, segment_ids_BxS, self.rules)
        else:
            cache = cache.write(key, value, positions_BxS)
            out_BxSxQxC = cache.attend(query, positions_BxS)
        out_BxSxQxC = sharding.constrain(out_BxSxQxC, ("batch", "length", "heads", None), self.rules)
        shape = (arch.num_heads, arch.head_dim, arch.d_model)
        kernel = parameter(self, "out", shape, ("heads", None, "embed")).astype(self.dtype)
        out_NxD = out_BxSxQxC.reshape(batch * length, -1) @ kernel.reshape(-1, arch.d_model)
        return out_NxD.reshape(batch, length, -1), cache
