"""Causal attention in blocks of queries, for CPUs: skips masked scores, and holds few scores at a time.

The algorithm is FlashAttention-2's (arXiv 2307.08691, section 3) in static blocks: a block of W queries and all keys up
to its end are one matmul. The backward pass recomputes scores from the logarithm of their normalizer. Inside, heads
come before positions, and the queries of the G heads that share a key-value head form one matrix of Y = G * W rows.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

BLOCK_LENGTH = 128
MAX_BLOCKS = 8
# Names of the residuals of the backward pass, for rematerialization.
ATTENTION_OUTPUT, LOG_NORMALIZER = "attention_output", "attention_log_normalizer"


@jax.custom_vjp
def blockwise(query_BxSxQxC, key_BxSxHxC, value_BxSxHxC, segment_ids_BxS):
    """Attention as in `causal_attention`, one sequence at a time; any length will do."""
    return _forward(query_BxSxQxC, key_BxSxHxC, value_BxSxHxC, segment_ids_BxS)[0]


def _forward(*inputs):
    out_BxSxQxC, log_normalizer_BxHxGxSx1 = jax.lax.map(lambda sequence: _attend(*sequence), inputs)
    out_BxSxQxC = checkpoint_name(out_BxSxQxC, ATTENTION_OUTPUT)
    log_normalizer_BxHxGxSx1 = checkpoint_name(log_normalizer_BxHxGxSx1, LOG_NORMALIZER)
    return out_BxSxQxC, (*inputs, out_BxSxQxC, log_normalizer_BxHxGxSx1)


def _backward(residuals, d_out_BxSxQxC):
    return *jax.lax.map(lambda sequence: _attend_backward(*sequence), (*residuals, d_out_BxSxQxC)), None


blockwise.defvjp(_forward, _backward)


def _attend(query_SxQxC, key_SxHxC, value_SxHxC, segment_ids_S):
    """Attention of a sequence, and log normalizers, float32 [kv heads, query heads of each, length, 1]."""
    query_HxGxSxC, key_HxSxC, value_HxSxC = _heads_first(query_SxQxC, key_SxHxC, value_SxHxC)
    out, log_normalizer = [], []
    for block, visible_YxT in _blocks(query_HxGxSxC, segment_ids_S):
        key_HxTxC, value_HxTxC = key_HxSxC[:, : block.stop], value_HxSxC[:, : block.stop]
        scores_HxYxT = _matmul("HYC,HTC->HYT", _block(query_HxGxSxC, block), key_HxTxC)
        scores_HxYxT = jnp.where(visible_YxT, scores_HxYxT, jnp.finfo(jnp.float32).min)
        highest_HxYx1 = jnp.max(scores_HxYxT, axis=-1, keepdims=True)
        weights_HxYxT = jnp.exp(scores_HxYxT - highest_HxYx1)
        normalizer_HxYx1 = jnp.sum(weights_HxYxT, axis=-1, keepdims=True)
        out_HxYxC = _matmul("HYT,HTC->HYC", weights_HxYxT.astype(value_HxTxC.dtype), value_HxTxC)
        out.append(_grouped(out_HxYxC / normalizer_HxYx1, block))
        log_normalizer.append(_grouped(highest_HxYx1 + jnp.log(normalizer_HxYx1), block))
    out_SxQxC = _heads_last(jnp.concatenate(out, axis=2)).astype(query_SxQxC.dtype)
    return out_SxQxC, jnp.concatenate(log_normalizer, axis=2)


def _attend_backward(
    query_SxQxC, key_SxHxC, value_SxHxC, segment_ids_S, out_SxQxC, log_normalizer_HxGxSx1, d_out_SxQxC
):
    """The gradients of queries, keys and values of a sequence."""
    query_HxGxSxC, key_HxSxC, value_HxSxC = _heads_first(query_SxQxC, key_SxHxC, value_SxHxC)
    d_out_HxGxSxC, _, _ = _heads_first(d_out_SxQxC, key_SxHxC, value_SxHxC, scale=1)
    # The softmax's gradient sums weights * d_weights over the keys; this sum over the head size equals it.
    shared_SxQ = jnp.sum(out_SxQxC.astype(jnp.float32) * d_out_SxQxC.astype(jnp.float32), axis=-1)
    shared_HxGxSx1 = shared_SxQ.T.reshape(log_normalizer_HxGxSx1.shape)
    # Scores are [keys, queries]: they are the left operand of two matmuls, neither of which needs a transpose.
    length = key_HxSxC.shape[1]
    d_query, d_key_HxSxC, d_value_HxSxC = [], jnp.float32(0), jnp.float32(0)
    for block, visible_YxT in _blocks(query_HxGxSxC, segment_ids_S):
        key_HxTxC, value_HxTxC = key_HxSxC[:, : block.stop], value_HxSxC[:, : block.stop]
        query_HxYxC, d_out_HxYxC = _block(query_HxGxSxC, block), _block(d_out_HxGxSxC, block)
        log_normalizer_Hx1xY = _block(log_normalizer_HxGxSx1, block).swapaxes(1, 2)
        shared_Hx1xY = _block(shared_HxGxSx1, block).swapaxes(1, 2)
        scores_HxTxY = _matmul("HTC,HYC->HTY", key_HxTxC, query_HxYxC)
        d_weights_HxTxY = _matmul("HTC,HYC->HTY", value_HxTxC, d_out_HxYxC)
        weights_HxTxY = jnp.where(visible_YxT.T, jnp.exp(scores_HxTxY - log_normalizer_Hx1xY), 0)
        d_scores_HxTxY = weights_HxTxY * (d_weights_HxTxY - shared_Hx1xY)
        weights_HxTxY, d_scores_HxTxY = (y.astype(value_HxTxC.dtype) for y in (weights_HxTxY, d_scores_HxTxY))
        d_query.append(_grouped(_matmul("HTC,HTY->HCY", key_HxTxC, d_scores_HxTxY).swapaxes(1, 2), block))
        later = ((0, 0), (0, length - block.stop), (0, 0))
        d_key_HxSxC += jnp.pad(_matmul("HTY,HYC->HTC", d_scores_HxTxY, query_HxYxC), later)
        d_value_HxSxC += jnp.pad(_matmul("HTY,HYC->HTC", weights_HxTxY, d_out_HxYxC), later)
    d_query_SxQxC = query_SxQxC.shape[-1] ** -0.5 * _heads_last(jnp.concatenate(d_query, axis=2))
    d_inputs = (d_query_SxQxC, d_key_HxSxC.swapaxes(0, 1), d_value_HxSxC.swapaxes(0, 1))
    return tuple(y.astype(query_SxQxC.dtype) for y in d_inputs)


def _blocks(query_HxGxSxC, segment_ids_S):
    """Yields (slice of a block's queries, bool [G * queries, keys up to the block's end]: which keys are visible)."""
    group, length = query_HxGxSxC.shape[1:3]
    step = max(BLOCK_LENGTH, -(-length // MAX_BLOCKS))
    for start in range(0, length, step):
        end = min(start + step, length)
        visible_WxT = segment_ids_S[start:end, None] == segment_ids_S[:end]
        visible_WxT &= jnp.arange(start, end)[:, None] >= jnp.arange(end)
        yield slice(start, end), jnp.tile(visible_WxT, (group, 1))


def _heads_first(query_SxQxC, key_SxHxC, value_SxHxC, scale=None):
    """(Scaled queries [kv heads, query heads of each, length, size], keys, values); the default scale is size**-0.5."""
    length, _, size = query_SxQxC.shape
    query_SxHxGxC = query_SxQxC.reshape(length, key_SxHxC.shape[1], -1, size) * (scale or size**-0.5)
    return query_SxHxGxC.transpose(1, 2, 0, 3), key_SxHxC.swapaxes(0, 1), value_SxHxC.swapaxes(0, 1)


def _heads_last(out_HxGxSxC):
    _, _, length, size = out_HxGxSxC.shape
    return out_HxGxSxC.transpose(2, 0, 1, 3).reshape(length, -1, size)


def _block(x_HxGxSxC, block):
    """A block of positions as [kv heads, query heads of each * positions, size]."""
    heads, _, _, size = x_HxGxSxC.shape
    return x_HxGxSxC[:, :, block].reshape(heads, -1, size)


def _grouped(x_HxYxC, block):
    heads, _, size = x_HxYxC.shape
    return x_HxYxC.reshape(heads, -1, block.stop - block.start, size)


def _matmul(axes, a, b):
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)
