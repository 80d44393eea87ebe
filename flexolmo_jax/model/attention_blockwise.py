"""Causal attention in blocks of queries, for CPUs: what causality masks is skipped, and few scores exist at a time.

The algorithm is FlashAttention-2's (arXiv 2307.08691, section 3), in static blocks: a block of queries meets all keys
up to its end in one matmul. The backward pass computes scores anew from the logarithm of their normaliser.
Inside, heads stand before positions, and the G queries of one kv head are rows of one matmul.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

BLOCK_LENGTH = 128
MAX_BLOCKS = 8
# Names of what the backward pass needs, for rematerialisation: what attention gathers, and its normaliser.
ATTENDED, LOG_NORMALISER = "attended", "attention_log_normaliser"


@jax.custom_vjp
def blockwise(query_BxSxNxC, key_BxSxHxC, value_BxSxHxC, segment_ids_BxS):
    """Attention as `attention_kernels` describes it; the length need not divide into blocks."""
    return _forward(query_BxSxNxC, key_BxSxHxC, value_BxSxHxC, segment_ids_BxS)[0]


def _forward(query_BxSxNxC, key_BxSxHxC, value_BxSxHxC, segment_ids_BxS):
    query_BxHxGxSxC, key_BxHxSxC, value_BxHxSxC = _heads_first(query_BxSxNxC, key_BxSxHxC, value_BxSxHxC)
    out, log_normaliser = [], []
    for rows, visible_Bx1xRxT in _blocks(query_BxHxGxSxC, segment_ids_BxS):
        key_BxHxTxC, value_BxHxTxC = key_BxHxSxC[:, :, : rows.stop], value_BxHxSxC[:, :, : rows.stop]
        scores_BxHxRxT = _matmul("BHRC,BHTC->BHRT", _rows(query_BxHxGxSxC, rows), key_BxHxTxC)
        scores_BxHxRxT = jnp.where(visible_Bx1xRxT, scores_BxHxRxT, jnp.finfo(jnp.float32).min)
        highest_BxHxRx1 = jnp.max(scores_BxHxRxT, axis=-1, keepdims=True)
        weights_BxHxRxT = jnp.exp(scores_BxHxRxT - highest_BxHxRx1)
        normaliser_BxHxRx1 = jnp.sum(weights_BxHxRxT, axis=-1, keepdims=True)
        out_BxHxRxC = _matmul("BHRT,BHTC->BHRC", weights_BxHxRxT.astype(value_BxHxTxC.dtype), value_BxHxTxC)
        out.append(_grouped(out_BxHxRxC / normaliser_BxHxRx1, rows))
        log_normaliser.append(_grouped(highest_BxHxRx1 + jnp.log(normaliser_BxHxRx1), rows))
    out_BxSxNxC = checkpoint_name(_heads_last(jnp.concatenate(out, axis=3)).astype(query_BxSxNxC.dtype), ATTENDED)
    log_normaliser_BxHxGxSx1 = checkpoint_name(jnp.concatenate(log_normaliser, axis=3), LOG_NORMALISER)
    inputs = (query_BxSxNxC, key_BxSxHxC, value_BxSxHxC, segment_ids_BxS)
    return out_BxSxNxC, (*inputs, out_BxSxNxC, log_normaliser_BxHxGxSx1)


def _backward(residuals, d_out_BxSxNxC):
    query_BxSxNxC, key_BxSxHxC, value_BxSxHxC, segment_ids_BxS, out_BxSxNxC, log_normaliser_BxHxGxSx1 = residuals
    query_BxHxGxSxC, key_BxHxSxC, value_BxHxSxC = _heads_first(query_BxSxNxC, key_BxSxHxC, value_BxSxHxC)
    d_out_BxHxGxSxC, _, _ = _heads_first(d_out_BxSxNxC, key_BxSxHxC, value_BxSxHxC, scale=1)
    # Summed over the head's size, it is what the softmax's gradient sums over the keys.
    shared_BxSxN = jnp.sum(out_BxSxNxC.astype(jnp.float32) * d_out_BxSxNxC.astype(jnp.float32), axis=-1)
    shared_BxHxGxSx1 = jnp.moveaxis(shared_BxSxN, 1, 2).reshape(log_normaliser_BxHxGxSx1.shape)
    # Scores stand transposed: they are the left side of two matmuls, those of keys and values, and of none transposed.
    length = key_BxHxSxC.shape[2]
    d_query, d_key_BxHxSxC, d_value_BxHxSxC = [], 0.0, 0.0
    for rows, visible_Bx1xRxT in _blocks(query_BxHxGxSxC, segment_ids_BxS):
        key_BxHxTxC, value_BxHxTxC = key_BxHxSxC[:, :, : rows.stop], value_BxHxSxC[:, :, : rows.stop]
        query_BxHxRxC, d_out_BxHxRxC = _rows(query_BxHxGxSxC, rows), _rows(d_out_BxHxGxSxC, rows)
        log_normaliser_BxHx1xR = _rows(log_normaliser_BxHxGxSx1, rows).swapaxes(2, 3)
        shared_BxHx1xR = _rows(shared_BxHxGxSx1, rows).swapaxes(2, 3)
        scores_BxHxTxR = _matmul("BHTC,BHRC->BHTR", key_BxHxTxC, query_BxHxRxC)
        d_weights_BxHxTxR = _matmul("BHTC,BHRC->BHTR", value_BxHxTxC, d_out_BxHxRxC)
        weights_BxHxTxR = jnp.exp(scores_BxHxTxR - log_normaliser_BxHx1xR)
        weights_BxHxTxR = jnp.where(visible_Bx1xRxT.swapaxes(2, 3), weights_BxHxTxR, 0)
        d_scores_BxHxTxR = weights_BxHxTxR * (d_weights_BxHxTxR - shared_BxHx1xR)
        weights_BxHxTxR, d_scores_BxHxTxR = (y.astype(value_BxHxTxC.dtype) for y in (weights_BxHxTxR, d_scores_BxHxTxR))
        d_query_BxHxCxR = _matmul("BHTC,BHTR->BHCR", key_BxHxTxC, d_scores_BxHxTxR)
        d_query.append(_grouped(d_query_BxHxCxR.swapaxes(2, 3), rows))
        later = ((0, 0), (0, 0), (0, length - rows.stop), (0, 0))
        d_key_BxHxSxC += jnp.pad(_matmul("BHTR,BHRC->BHTC", d_scores_BxHxTxR, query_BxHxRxC), later)
        d_value_BxHxSxC += jnp.pad(_matmul("BHTR,BHRC->BHTC", weights_BxHxTxR, d_out_BxHxRxC), later)
    scale = query_BxSxNxC.shape[-1] ** -0.5
    d_query_BxSxNxC = scale * _heads_last(jnp.concatenate(d_query, axis=3))
    d_inputs = (d_query_BxSxNxC, d_key_BxHxSxC.swapaxes(1, 2), d_value_BxHxSxC.swapaxes(1, 2))
    return *(y.astype(query_BxSxNxC.dtype) for y in d_inputs), None


blockwise.defvjp(_forward, _backward)


def _blocks(query_BxHxGxSxC, segment_ids_BxS):
    """Yields (the queries of a block as a slice, bool [batch, 1, group * queries, keys up to the block's end])."""
    group, length = query_BxHxGxSxC.shape[2:4]
    step = max(BLOCK_LENGTH, -(-length // MAX_BLOCKS))
    for start in range(0, length, step):
        end = min(start + step, length)
        visible_BxQxT = segment_ids_BxS[:, start:end, None] == segment_ids_BxS[:, None, :end]
        visible_BxQxT &= jnp.arange(start, end)[:, None] >= jnp.arange(end)
        yield slice(start, end), jnp.tile(visible_BxQxT, (1, group, 1))[:, None]


def _heads_first(query_BxSxNxC, key_BxSxHxC, value_BxSxHxC, scale=None):
    """Queries times their scale, by default the root of the head's size, as [batch, kv heads, group, length, size]."""
    batch, length, _, size = query_BxSxNxC.shape
    query_BxSxHxGxC = query_BxSxNxC.reshape(batch, length, key_BxSxHxC.shape[2], -1, size) * (scale or size**-0.5)
    return query_BxSxHxGxC.transpose(0, 2, 3, 1, 4), key_BxSxHxC.swapaxes(1, 2), value_BxSxHxC.swapaxes(1, 2)


def _heads_last(out_BxHxGxSxC):
    batch, _, _, length, size = out_BxHxGxSxC.shape
    return out_BxHxGxSxC.transpose(0, 3, 1, 2, 4).reshape(batch, length, -1, size)


def _rows(x_BxHxGxSxC, rows):
    """Some positions of an array, those of a group one after another: [batch, kv heads, group * positions, size]."""
    batch, heads, _, _, size = x_BxHxGxSxC.shape
    return x_BxHxGxSxC[:, :, :, rows].reshape(batch, heads, -1, size)


def _grouped(x_BxHxRxC, rows):
    batch, heads, _, size = x_BxHxRxC.shape
    return x_BxHxRxC.reshape(batch, heads, -1, rows.stop - rows.start, size)


def _matmul(axes, a, b):
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)
