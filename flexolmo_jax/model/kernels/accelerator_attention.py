"""Causal attention within packed documents by library kernels, for GPUs and TPUs.

The arguments are those of `causal_attention`.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.extend.core
import jax.numpy as jnp

from flexolmo_jax.model.kernels.blockwise_attention import LOG_NORMALIZER

LANES = 128  # of a TPU: lengths and block sizes are multiples
SPLASH_BLOCK = 512  # maximum number of queries, and of keys, whose scores are in VMEM at a time
CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"  # name of JAX's primitive
CUDNN_HEAD_DIM = 128  # maximum head size on any GPU that has flash attention


def masked(query, key, value, segment_ids, implementation: Literal["xla", "cudnn"] = "xla") -> jax.Array:
    """`jax.nn.dot_product_attention` with a mask that keeps documents apart."""
    visible_Bx1xSxS = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return jax.nn.dot_product_attention(
        query, key, value, mask=visible_Bx1xSxS, is_causal=True, implementation=implementation
    )


def cudnn(
    query_BxSxQxC: jax.Array,
    key_BxSxHxC: jax.Array,
    value_BxSxHxC: jax.Array,
    segment_ids_BxS: jax.Array,
) -> jax.Array:
    """Flash attention of cuDNN, for GPUs.

    It takes bfloat16 and float16, even lengths, and head sizes 8, 16, ... 128; XLA computes anything else.

    Documents are separated by a bias [length, length] for each sequence, shared by its heads: 32 MiB at 4096 tokens.
    Scores above the diagonal are skipped; scores between documents are computed. cuDNN could take the bounds of
    documents instead, but only through an unpublished interface of JAX, with as many key-value heads as query heads,
    on Hopper and later GPUs, and in memory that grows with the maximum number of documents in a sequence.
    """
    length, head_dim = query_BxSxQxC.shape[1], query_BxSxQxC.shape[-1]
    fits = length % 2 == 0 and head_dim % 8 == 0 and head_dim <= CUDNN_HEAD_DIM
    fits &= query_BxSxQxC.dtype in (jnp.bfloat16, jnp.float16)
    implementation = "cudnn" if fits else "xla"
    return masked(query_BxSxQxC, key_BxSxHxC, value_BxSxHxC, segment_ids_BxS, implementation)


def is_cudnn(primitive: jax.extend.core.Primitive, *_, **__) -> bool:
    """A rematerialization policy that keeps the outputs of cuDNN's forward pass, which have no names."""
    return primitive.name == CUDNN_FORWARD


def splash(
    query_BxSxQxC: jax.Array,
    key_BxSxHxC: jax.Array,
    value_BxSxHxC: jax.Array,
    segment_ids_BxS: jax.Array,
) -> jax.Array:
    """Splash attention, for TPUs: skips scores above the diagonal, and holds the scores of one block at a time.

    It takes lengths that are multiples of 128; XLA computes attention at others.
    """
    attend = masked if query_BxSxQxC.shape[1] % LANES else _splash
    return attend(query_BxSxQxC, key_BxSxHxC, value_BxSxHxC, segment_ids_BxS)


def _splash(query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array) -> jax.Array:
    from jax.experimental.pallas.ops.tpu import splash_attention  # slow to import

    heads_first = (y.swapaxes(1, 2) for y in (query * query.shape[-1] ** -0.5, key, value))
    kernel = _splash_kernel(query.shape[1], query.shape[2])
    return jax.vmap(kernel)(*heads_first, splash_attention.SegmentIds(segment_ids, segment_ids)).swapaxes(1, 2)


def _splash_kernel(length: int, heads: int) -> Callable[..., Any]:
    from jax.experimental.pallas.ops.tpu import splash_attention

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
        causal, block_sizes=sizes, residual_checkpoint_name=LOG_NORMALIZER
    )
