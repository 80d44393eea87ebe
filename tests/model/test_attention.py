"""Attention and its rotary embedding against plain numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flexolmo_jax.model.attention import Attention, RotaryEmbedding
from flexolmo_jax.model.kernels import blockwise_attention
from flexolmo_jax.model.kernels.causal_attention import KERNELS
from tests.support.tiny import ARCHITECTURE, COMPILE_FAST, random_batch


def rotate(x_SxHxC, positions_S, theta):
    """Each pair (first half, second half) as a complex number, turned by its angle."""
    half = x_SxHxC.shape[-1] // 2
    turn_SxC = np.exp(1j * np.outer(positions_S, theta ** (-np.arange(half) / half)))
    z_SxHxC = (x_SxHxC[..., :half] + 1j * x_SxHxC[..., half:]) * turn_SxC[:, None]
    return np.concatenate([z_SxHxC.real, z_SxHxC.imag], axis=-1)


def attend(x_SxD, segment_ids_S, positions_S, leaves, arch):
    """One sequence, one head and one query at a time."""
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
    turned = jax.jit(lambda x, positions: RotaryEmbedding.of(positions, 8, 5e5).apply(x))(
        np.float32(x_BxSxHxC), positions_BxS
    )
    np.testing.assert_allclose(turned, expected, atol=1e-3)


@pytest.mark.parametrize("kernel", ["reference", "blockwise"])
@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_attention_is_that_of_plain_loops(monkeypatch, num_kv_heads, kernel):
    """Grouped heads, QK-norm over all heads, several documents and padding in a sequence."""
    monkeypatch.setattr(blockwise_attention, "BLOCK_LENGTH", 4)
    arch = dataclasses.replace(ARCHITECTURE, num_kv_heads=num_kv_heads)
    rng = np.random.default_rng(0)
    batch = random_batch([[5, 4], [3, 2, 2]], 9)
    x_BxSxD = rng.normal(size=(2, 9, arch.d_model))
    module = Attention(arch, jnp.float32, (), kernel)
    rotary = RotaryEmbedding.of(batch["positions"], arch.head_dim, arch.rope_theta)
    arguments = (jnp.float32(x_BxSxD), batch["segment_ids"], batch["positions"], rotary)
    shapes = jax.eval_shape(lambda key: nn.unbox(module.init(key, *arguments)["params"]), jax.random.key(0))
    leaves = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape), shapes)
    apply = jax.jit(module.apply, compiler_options=COMPILE_FAST)
    actual = apply({"params": jax.tree.map(np.float32, leaves)}, *arguments)
    for i in range(2):
        expected = attend(x_BxSxD[i], batch["segment_ids"][i], batch["positions"][i], leaves, arch)
        np.testing.assert_allclose(actual[0][i], expected, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.05)])
@pytest.mark.parametrize(("length", "num_kv_heads"), [(9, 4), (16, 2), (37, 1)])
def test_blocks_have_the_gradient_of_all_scores_at_once(monkeypatch, length, num_kv_heads, dtype, tolerance):
    """Blocks of 4 at least, 8 at most: lengths that divide into them and that do not."""
    monkeypatch.setattr(blockwise_attention, "BLOCK_LENGTH", 4)
    rng = np.random.default_rng(0)
    query, cotangent = (jnp.asarray(rng.normal(size=(2, length, 4, 8)), dtype) for _ in range(2))
    key, value = (jnp.asarray(rng.normal(size=(2, length, num_kv_heads, 8)), dtype) for _ in range(2))
    segment_ids = jnp.cumsum(rng.random((2, length)) < 0.2, axis=1)

    def both(kernel):
        out, vjp = jax.vjp(lambda *inputs: KERNELS[kernel](*inputs, segment_ids), query, key, value)
        return out, *vjp(cotangent)

    actual, expected = (jax.jit(both, static_argnums=0)(kernel) for kernel in ("blockwise", "reference"))
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(np.float32(got), np.float32(want), atol=tolerance, rtol=tolerance)


def test_what_causality_masks_is_hardly_computed():
    """FLOPs of the compiled program: half of all scores, and half a block for each block."""
    query = jax.ShapeDtypeStruct((1, 1024, 2, 16), jnp.float32)
    segment_ids = jax.ShapeDtypeStruct((1, 1024), jnp.int32)

    def flops(kernel):
        compiled = jax.jit(KERNELS[kernel]).lower(query, query, query, segment_ids).compile()
        return compiled.cost_analysis()["flops"]

    assert flops("blockwise") < 0.6 * flops("reference")
