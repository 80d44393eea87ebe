"""Causal attention within packed documents by kernels of libraries, for GPUs and TPUs.

The arguments are those of `causal_attention`.
"""

from collections.abc import Callable

import jax
import jax.extend.core
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention

from flexolmo_jax.model.kernels.blockwise_attention import LOG_NORMALISER

LANES = 128  # of a TPU: lengths and sizes of blocks are multiples
SPLASH_BLOCK = 512  # at most: queries, and keys, whose scores are in VMEM at a time
CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"  # name of JAX's primitive
CUDNN_HEAD_DIM = 128  # at most, on any GPU that has flash attention


def masked(query, key, value, segment_ids, implementation: str = "xla") -> jax.Array:
    """`jax.nn.dot_product_attention` with a mask that keeps documents apart."""
    visible_Bx1xSxS = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    how = {"mask": visible_Bx1xSxS, "is_causal": True, "implementation": implementation}
    return jax.nn.dot_product_attention(query, key, value, **how)


def cudnn(
    query_BxSxNxC: jax.Array,
    key_BxSxHxC: jax.Array,
    value_BxSxHxC: jax.Array,
    segment_ids_BxS: jax.Array,
) -> jax.Array:
    """Flash attention of cuDNN, for GPUs.

    It takes bfloat16 and float16, even lengths, and heads of 8, 16, ... 128 elements; anything else is computed by XLA.

    Documents are kept apart by a bias of [length, length] for each row, shared by its heads: 32 MiB at 4096 tokens.
    What lies above the diagonal is skipped; what lies between documents is computed. cuDNN could be given the
    bounds of documents instead, but through an interface that JAX does not publish, with as many heads of keys as of
    queries, on GPUs from Hopper on, and in memory that grows with the most documents a row may have.
    """
    length, head_dim = query_BxSxNxC.shape[1], query_BxSxNxC.shape[-1]
    fits = length % 2 == 0 and head_dim % 8 == 0 and head_dim <= CUDNN_HEAD_DIM
    fits &= query_BxSxNxC.dtype in (jnp.bfloat16, jnp.float16)
    implementation = "cudnn" if fits else "xla"
    return masked(query_BxSxNxC, key_BxSxHxC, value_BxSxHxC, segment_ids_BxS, implementation)


def is_cudnn(primitive: jax.extend.core.Primitive, *_, **__) -> bool:
    """A policy of rematerialisation that keeps what cuDNN's forward pass returns, which has no name to keep it by."""
    return primitive.name == CUDNN_FORWARD


def splash(
    query_BxSxNxC: jax.Array,
    key_BxSxHxC: jax.Array,
    value_BxSxHxC: jax.Array,
    segment_ids_BxS: jax.Array,
) -> jax.Array:
    """Splash attention, for TPUs: skips what lies above the diagonal and never holds more scores than a block has.

    It takes lengths that are multiples of 128; at others XLA computes attention.
    """
    attend = masked if query_BxSxNxC.shape[1] % LANES else _splash
    return attend(query_BxSxNxC, key_BxSxHxC, value_BxSxHxC, segment_ids_BxS)


def _splash(query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array) -> jax.Array:
    heads_first = (y.swapaxes(1, 2) for y in (query * query.shape[-1] ** -0.5, key, value))
    kernel = _splash_kernel(query.shape[1], query.shape[2])
    return jax.vmap(kernel)(*heads_first, splash_attention.SegmentIds(segment_ids, segment_ids)).swapaxes(1, 2)


def _splash_kernel(length: int, heads: int) -> Callable[..., jax.Array]:
    block = next(size for size in range(min(length, SPLASH_BLOCK), 0, -LANES) if length % size == 0)
    sizes = splash_attention.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    causal = splash_attention.MultiHeadMask([splash_attention.CausalMask((length, length))] * heads)
    return splash_attention.make_splash_mha_single_device(
        causal, block_sizes=sizes, residual_checkpoint_name=LOG_NORMALISER
    )
