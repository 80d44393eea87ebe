"""Attention and its rotary embedding against plain numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tiny import ARCHITECTURE, COMPILE_FAST, random_batch

from flexolmo_jax.model.attention import Attention, rotary


def rotate(x_SxHxC, positions_S, theta):
    """Each pair (first half, second half) as a complex number, turned by its angle."""
    half = x_SxHxC.shape[-1] // 2
    turn_SxC = np.exp(1j * np.outer(positions_S, theta ** (-np.arange(half) / half)))
    z_SxHxC = (x_SxHxC[..., :half] + 1j * x_SxHxC[..., half:]) * turn_SxC[:, None]
    return np.concatenate([z_SxHxC.real, z_SxHxC.imag], axis=-1)


def attend(x_SxD, segment_ids_S, positions_S, leaves, arch):
    """One row, one head and one query at a time."""
    query, key, value = (np.einsum("SD,DHC->SHC", x_SxD, leaves[name]) for name in ("query", "key", "value"))

    def normed(y_SxHxC, scale_HxC):
        return y_SxHxC / np.sqrt(np.mean(y_SxHxC**2, axis=(1, 2), keepdims=True) + arch.norm_eps) * scale_HxC

    query = rotate(normed(query, leaves["query_norm"]["scale"]), positions_S, arch.rope_theta)
    key = rotate(normed(key, leaves["key_norm"]["scale"]), positions_S, arch.rope_theta)
    out_SxD = np.zeros_like(x_SxD)
    for head in range(arch.num_heads):
        shared = head // (arch.num_heads // arch.num_kv_heads)
        for s in range(len(x_SxD)):
            seen = [t for t in range(s + 1) if segment_ids_S[t] == segment_ids_S[s]]
            scores = np.exp(key[seen, shared] @ query[s, head] / np.sqrt(arch.head_dim))
            out_SxD[s] += scores / scores.sum() @ value[seen, shared] @ leaves["out"][head]
    return out_SxD


def test_rotary_turns_complex_numbers():
    x_BxSxHxC = np.random.default_rng(0).normal(size=(2, 6, 3, 8))
    positions_BxS = np.array([[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 4095]])
    expected = [rotate(x, positions, 5e5) for x, positions in zip(x_BxSxHxC, positions_BxS, strict=True)]
    np.testing.assert_allclose(jax.jit(rotary)(np.float32(x_BxSxHxC), positions_BxS, 5e5), expected, atol=1e-3)


@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_attention_is_that_of_plain_loops(num_kv_heads):
    """Grouped heads, QK-norm over all heads, several documents and padding in a row."""
    arch = dataclasses.replace(ARCHITECTURE, num_kv_heads=num_kv_heads)
    rng = np.random.default_rng(0)
    batch = random_batch([[5, 4], [3, 2, 2]], 9)
    x_BxSxD = rng.normal(size=(2, 9, arch.d_model))
    module = Attention(arch, jnp.float32, ())
    arguments = (jnp.float32(x_BxSxD), batch["segment_ids"], batch["positions"])
    shapes = jax.eval_shape(lambda key: nn.unbox(module.init(key, *arguments)["params"]), jax.random.key(0))
    leaves = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape), shapes)
    apply = jax.jit(module.apply, compiler_options=COMPILE_FAST)
    actual = apply({"params": jax.tree.map(np.float32, leaves)}, *arguments)
    for row in range(2):
        expected = attend(x_BxSxD[row], batch["segment_ids"][row], batch["positions"][row], leaves, arch)
        np.testing.assert_allclose(actual[0][row], expected, atol=1e-4)
